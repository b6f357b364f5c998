"""Files that are whole or not there: bytes, JSON, parquet tables and model folders.
Run its tests: pytest tests/test_tables.py
"""

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpa.core.errors import DamageError, DpaError, RunFolderError, StorageError

TEMPORARY = ".tmp"
"""Suffix of what is being written; `.NAME.tmp` stands in the folder of NAME, so a rename never crosses file systems."""

CHECKSUM = "checksum"
"""Field of a record that tells damage: 32 hex digits of the SHA-256 of its other fields."""

_USER_FIXES = {
    errno.EACCES: "make the folder writable or choose another one",
    errno.EPERM: "make the folder writable or choose another one",
    errno.EROFS: "choose a folder that is not read-only",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EEXIST: "a file stands at this path; remove it or choose another path",
    errno.EISDIR: "a folder stands at this path; remove it or choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its links lead round in a circle; choose another path",
}
_DISK_FIXES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EFBIG: "raise the file-size limit (ulimit -f) and run the same command again",
}


@dataclass(frozen=True)
class FileRecord:
    """What a finished table file must look like: rows, SHA-256 of its bytes (hex), size in bytes."""

    rows: int
    sha256: str
    bytes: int


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or none: temporary name, fsync, rename, fsync of the folder.

    Raises StorageError (disk full, file too large, I/O error) or RunFolderError (not writable, no such folder), with
    the path and the number of bytes; the file that stood there before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)
    except OSError as error:
        raise disk_error(error, path, f"writing {len(data)} bytes") from None


def write_if_new(path: Path, data: bytes) -> None:
    """The same, unless the file holds these bytes already."""
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)


def json_bytes(value: Any) -> bytes:
    """A value as readable JSON. NaN and infinity are refused: JSON has none, use null."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # a lone surrogate becomes JSON's own escape


def write_json(path: Path, value: Any) -> None:
    """Write a value as `json_bytes`, as `write_bytes` does."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Read a JSON file; DamageError names one that is damaged, StorageError one that cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise disk_error(error, path, "reading") from None
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{path} is not readable JSON ({error}); delete it and run the same command again.") from None


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write what later work relies on: JSON with a checksum that `read_record` holds it to."""
    write_json(path, {**record, CHECKSUM: _record_digest(record)})


def read_record(path: Path, fields: Collection[str], optional: Collection[str] | None = ()) -> dict[str, Any]:
    """Read a record that has these fields, the checksum left out. One of an earlier version has no checksum: of it no
    other fields are accepted than `optional` ones (None: any). Raises as `read_json` does."""
    found = read_json(path)
    trouble = ""
    if not isinstance(found, dict):
        trouble = f"it holds {type(found).__name__}, not an object"
    elif missing := [name for name in fields if name not in found]:
        trouble = f"{missing[0]!r} is missing"
    elif not is_whole(found):
        trouble = "its checksum is another"
    elif (
        CHECKSUM not in found
        and optional is not None
        and (odd := [name for name in found if name not in {*fields, *optional}])
    ):
        trouble = f"{odd[0]!r} is no field of it"
    if trouble:
        raise DamageError(f"{path} is damaged ({trouble}); delete it and run the same command again.")
    return {name: value for name, value in found.items() if name != CHECKSUM}


def is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a record is what its checksum says, where it has one."""
    rest = {name: value for name, value in record.items() if name != CHECKSUM}
    try:
        return CHECKSUM not in record or record[CHECKSUM] == _record_digest(rest)
    except (ValueError, RecursionError):  # no number that we write: Infinity, NaN; or nested too deep
        return False


def write_table(path: Path, table: pa.Table) -> FileRecord:
    """Write a parquet table, as `write_bytes` does, and return the record that `read_table` checks it against."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    data = buffer.getvalue()
    write_bytes(path, data)
    return FileRecord(table.num_rows, hashlib.sha256(data).hexdigest(), len(data))


def read_table(path: Path, record: FileRecord | None = None) -> pa.Table:
    """Read a parquet table; with a record, every byte is verified (without, parquet's own page checksums are).

    Raises DamageError, which names the file, when it is not what the record says; StorageError or RunFolderError when
    it cannot be read or is not there.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise disk_error(error, path, "reading") from None
    if record is not None:
        _compare(path, record, len(data), hashlib.sha256(data).hexdigest())
    try:
        return pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DamageError(f"{path} is damaged ({error}); delete it and run the same command again.") from None


def verify(path: Path, record: FileRecord) -> None:
    """Check a file against its record without parsing it; raises as `read_table` does."""
    try:
        _compare(path, record, Path(path).stat().st_size, file_digest(path))
    except OSError as error:
        raise disk_error(error, path, "reading") from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_digest(path: Path) -> str:
    """The same, remembered within this process until the file's size, time or inode changes."""
    about = Path(path).stat()
    return _remembered_digest(str(path), about.st_size, about.st_mtime_ns, about.st_ino)


@lru_cache(maxsize=4096)
def _remembered_digest(path: str, size: int, modified_ns: int, inode: int) -> str:
    return file_digest(Path(path))


@contextmanager
def save_folder_atomically(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well it is synced and renamed to `path`.

    What stood at `path` is replaced as a whole. When the block raises, nothing at `path` changes.
    Raises StorageError or RunFolderError as `write_bytes` does, also for an OSError of the block.
    """
    path = Path(path)
    if not path.name or path.name == "..":  # `.` and `/` cannot be replaced
        raise RunFolderError(f"{path}: this folder cannot be written as a whole; name a new one in it.")
    path = path.resolve()  # where a link leads, to another disk perhaps
    temporary, old = (path.with_name(f".{path.name}{suffix}") for suffix in (TEMPORARY, ".old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():  # a crash between the two renames below
            old.rename(path)
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir()
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                _sync(file)
            _sync(temporary)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        where = f" (file {error.filename})" if error.filename else ""
        raise disk_error(error, path, f"writing the folder{where}") from None


def disk_error(error: OSError, path: Path, doing: str) -> DpaError:
    """The error to raise for an OSError: the user's to mend (RunFolderError) or the disk's (StorageError)."""
    code = error.errno or 0
    if code == errno.ENOENT and doing == "reading":
        return RunFolderError(f"{path}: there is no such file; check the path, or run what makes it again.")
    if code in (errno.EACCES, errno.EPERM) and doing == "reading":
        return RunFolderError(f"{path}: reading failed ({error.strerror}); make it readable for this user.")
    fix = _USER_FIXES.get(code) or _DISK_FIXES.get(code) or "check the disk and run the same command again"
    kind = RunFolderError if code in _USER_FIXES else StorageError
    return kind(f"{path}: {doing} failed ({error.strerror or error}); {fix}.")


def _record_digest(record: Mapping[str, Any]) -> str:
    """Of the values, not of how they are laid out."""
    plain = json.loads(json.dumps(record, allow_nan=False))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]


def _sync(path: Path) -> None:
    """Make a file's bytes, or a folder's renames, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _compare(path: Path, record: FileRecord, size: int, sha256: str) -> None:
    if size != record.bytes:
        raise DamageError(f"{path} is damaged: {size} bytes, but its record says {record.bytes}.")
    if sha256 != record.sha256:
        raise DamageError(f"{path} is damaged: its checksum is {sha256[:12]}..., not {record.sha256[:12]}...")
