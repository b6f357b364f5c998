"""A model's folder, sealed: what every file of it was when it was finished, so that no other is ever trained on.
Run its tests: pytest tests/test_seals.py
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpa.core.errors import DpaError, RunFolderError
from dpa.storage.tables import disk_error, is_whole, known_digest, read_json

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


def check_in_run(folder: str | Path) -> None:
    """A model that lies in a run folder is as the stage that made it left it, whoever uses it: a flipped bit answers
    plausibly. Raises RunFolderError. A model from elsewhere, or of a run that sealed nothing, is not looked at."""
    place = Path(folder).resolve()
    for file in sorted(place.parent.glob("*/done.json")):
        try:
            record = read_json(file)
        except DpaError:
            continue  # whoever resumes the run makes the stage again
        sealed = record.get("sealed") if isinstance(record, dict) and is_whole(record) else None
        for relative, files in sealed.items() if isinstance(sealed, dict) else ():
            if Path(os.path.normpath(file.parent / relative)) == place and (trouble := broken(place, files)):
                raise RunFolderError(
                    f"model: {trouble}. `dpa run` with the configuration of its run makes it again; a model that was "
                    "changed on purpose is used from a copy outside the run folder."
                )
