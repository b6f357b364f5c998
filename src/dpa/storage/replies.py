"""Replies that were paid for, kept by their key as JSON lines, so that nobody pays twice.
Run its tests: pytest tests/test_judge.py
"""

import contextlib
import fcntl
import json
import logging
from pathlib import Path
from typing import IO

from dpa.core.records import stable_hash
from dpa.storage.tables import disk_error

_log = logging.getLogger(__name__)


class Replies:
    """Key -> reply, and key -> reason where a server refused to answer.

    What the file says is not trusted: a line that is cut off, no object, or not as its `check` says is left out, with
    one sentence for all of them. Lines are added whole and under flock (on NFS only a lock makes the end of a file the
    same for all), so several processes may keep replies in one file; `catch_up` reads what others added.
    """

    def __init__(self, file: Path) -> None:
        """Read what is there. Raises RunFolderError, StorageError."""
        self.file = file
        self.replies: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self._read_until = 0
        self.catch_up()

    def keep(self, key: str, model: str, reply: str | None = None, refused: str | None = None) -> None:
        """Add what was answered, or why nothing was. Raises RunFolderError, StorageError."""
        kind, text = ("refused", refused or "") if reply is None else ("reply", reply)
        (self.refused if reply is None else self.replies)[key] = text
        row = {"key": key, "model": model, kind: text, "check": stable_hash(key, kind, text)}
        line = json.dumps(row).encode() + b"\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a+b", buffering=0) as file:
                _lock(file, fcntl.LOCK_EX)
                if size := file.seek(0, 2):
                    file.seek(size - 1)
                    line = line if file.read(1) == b"\n" else b"\n" + line  # a writer was ended in its line
                while line:
                    line = line[file.write(line) :]
        except OSError as error:
            raise disk_error(error, self.file, "keeping a reply") from None

    def catch_up(self) -> None:
        """Read what the file gained since it was last read. Raises RunFolderError, StorageError."""
        try:
            if not self.file.exists():
                return
            with self.file.open("rb") as file:
                _lock(file, fcntl.LOCK_SH)
                if file.seek(0, 2) < self._read_until:  # another file in its place
                    self._read_until = 0
                file.seek(self._read_until)
                data = file.read()
        except OSError as error:
            raise disk_error(error, self.file, "reading") from None
        self._read_until += len(data)
        lines = [line for line in data.split(b"\n") if line.strip()]
        whole = sum(self._take(line) for line in lines)
        if whole < len(lines):
            _log.warning(
                "%s: %d of %d lines are damaged and left out; what they answered is asked again.",
                *(self.file, len(lines) - whole, len(lines)),
            )

    def _take(self, line: bytes) -> bool:
        try:
            row = json.loads(line)
            key, kind = row["key"], "reply" if "reply" in row else "refused"
            text = row[kind]
            whole = isinstance(key, str) and isinstance(text, str)
            # Written before there were checks: taken as it is.
            whole = whole and row.get("check", "") in ("", stable_hash(key, kind, text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        if whole:
            (self.replies if kind == "reply" else self.refused)[key] = text
        return whole


def _lock(file: IO[bytes], kind: int) -> None:
    """Until the file is closed; some file systems have no locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, kind)
