"""What run a folder belongs to: its configuration, and the content of the files it was given.
Run its tests: pytest tests/test_faults_storage.py -k "04 or 45 or earlier"
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dpa.core.config_identity import differences, fingerprint, resolved
from dpa.core.errors import DamageError, RunFolderError
from dpa.storage.tables import CHECKSUM, disk_error, file_digest, is_whole, read_json, write_if_new, write_record

_log = logging.getLogger(__name__)

_WORK = ("done.json", "shard-*.json", "ratings_summary.json")
"""Files that say that something was finished."""


def check_identity(folder: Path, config: BaseModel, inputs: Mapping[str, Path], may_write: bool) -> None:
    """Refuse a folder of another configuration or of other inputs, field by field; make a new one this run's.

    Raises RunFolderError, also where nobody can say any more what the folder belongs to.
    """
    file, copy = folder / "fingerprint.json", folder / "config.yaml"
    now: dict[str, Any] = {
        "fingerprint": fingerprint(config),
        "config": resolved(config),
        "inputs": {field: content_digest(Path(path)) for field, path in sorted(inputs.items())},
    }
    found = _saved(file, copy)
    if found is not None:
        before, whole = found
        changed = differences(_completed(before["config"], config), now["config"]) + [
            f"{field}: the content of {path} has changed"
            for field, path in inputs.items()
            if before["inputs"].get(field, now["inputs"][field]) != now["inputs"][field]
        ]
        if changed:
            damaged = "" if whole else f" {file} itself was changed after it was written; {_remedy(file)}"
            raise RunFolderError(
                f"out: {folder} belongs to a run with another configuration; go back to that one, or choose "
                f"another folder.{damaged} Changed:\n  " + "\n  ".join(changed)
            )
        now["inputs"] = {**before["inputs"], **now["inputs"]}
    if not may_write:
        return  # whoever made the folder ready has written it
    write_if_new(copy, yaml.safe_dump(now["config"], sort_keys=False).encode())
    if found != (now, True) or not file.exists():
        write_record(file, now)  # last: from now on the folder is this run's


def content_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, or of the names and contents of all files in a folder."""
    try:
        if path.is_file():
            return file_digest(path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listing = [f"{file.relative_to(path)} {file_digest(file)}\n" for file in files]
    except OSError as error:
        raise disk_error(error, path, "reading") from None
    if not listing:
        raise RunFolderError(f"{path}: there is no such file; check the path.")
    return hashlib.sha256("".join(listing).encode("utf-8", "surrogateescape")).hexdigest()


def _saved(file: Path, copy: Path) -> tuple[dict[str, Any], bool] | None:
    """What fingerprint.json says, and whether it is as it was written; where it is gone, what config.yaml says; None
    where the folder is nobody's yet."""
    if file.exists():
        saved = _read(file)
        if saved is None:
            raise RunFolderError(f"out: {file} is damaged; {_remedy(file)}")
        return saved
    if not any(found for pattern in _WORK for found in file.parent.rglob(pattern)):
        return None
    try:
        saved = yaml.safe_load(copy.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        saved = None
    if not isinstance(saved, dict):
        raise RunFolderError(
            f"out: {file.parent} holds work, but fingerprint.json is gone and config.yaml with it (or damaged), so "
            f"nobody can say what it belongs to; delete {file.parent}, or choose another folder."
        )
    _log.warning("%s is gone and is made again from config.yaml; whether data files changed is not known.", file)
    return {"config": saved, "inputs": {}}, True


def _read(file: Path) -> tuple[dict[str, Any], bool] | None:
    try:
        saved = read_json(file)
    except DamageError:
        return None
    if not isinstance(saved, dict) or saved.keys() - {CHECKSUM} != {"fingerprint", "config", "inputs"}:
        return None
    if not isinstance(saved["config"], dict) or not isinstance(saved["inputs"], dict):
        return None
    return {name: value for name, value in saved.items() if name != CHECKSUM}, is_whole(saved)


def _remedy(file: Path) -> str:
    return (
        f"if the configuration and the data are those the run began with, delete {file} and run the same command "
        "again, else choose another folder."
    )


def _completed(saved: dict[str, Any], config: BaseModel) -> dict[str, Any]:
    """A saved configuration with the defaults of fields that its version did not know; as it is where it is no longer
    valid."""
    try:
        return resolved(type(config).model_validate(saved))
    except ValidationError:
        return saved
