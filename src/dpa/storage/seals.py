"""A model's folder, sealed: what every file of it was when it was finished, so that no other is ever trained on.
Run its tests: pytest tests/test_seals.py
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpa.core.errors import RunFolderError
from dpa.storage.tables import disk_error, known_digest

Seal = dict[str, dict[str, Any]]
"""File name within the folder -> its `sha256` (hex) and size in `bytes`."""


def seal(folder: Path) -> Seal:
    """The seal of every file that lies in a folder now. Raises RunFolderError when there is none."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise RunFolderError(f"{folder}: there is nothing to seal; run what makes it again.")
    return {
        str(file.relative_to(folder)): {"sha256": known_digest(file), "bytes": file.stat().st_size} for file in files
    }


def broken(folder: Path, sealed: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is wrong with the first file that is not as it was sealed; None when all are. Files that came later, such as
    a model card, are not looked at. A file is read once in a process, as long as its size, time and inode stay."""
    for name, was in sealed.items():
        file = folder / name
        try:
            size = file.stat().st_size
            if size != was["bytes"]:
                return f"{file} is damaged: {size} bytes, but {was['bytes']} when it was finished"
            if known_digest(file) != was["sha256"]:
                return f"{file} is damaged: its checksum is not the one it had when it was finished"
        except (FileNotFoundError, NotADirectoryError):
            return f"{file} is gone"
        except OSError as error:
            raise disk_error(error, file, "reading") from None
    return None
