"""Replies that were paid for, kept by their key as JSON lines, so that nobody pays twice.
Run its tests: pytest tests/test_judge.py
"""

import json
import logging
from pathlib import Path

from dpa.core.records import stable_hash
from dpa.storage.tables import disk_error

_log = logging.getLogger(__name__)


class Replies:
    """Key -> reply, and key -> reason where a server refused to answer.

    What the file says is not trusted: a line that is cut off, no object, or not as its `check` says is left out, with
    one sentence for all of them. Lines are added whole, so several processes may keep replies in one file.
    """

    def __init__(self, file: Path) -> None:
        """Read what is there. Raises RunFolderError, StorageError."""
        self.file = file
        self.replies: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self._torn = False
        """Whether the file ends in the middle of a line."""
        self._read()

    def keep(self, key: str, model: str, reply: str | None = None, refused: str | None = None) -> None:
        """Add what was answered, or why nothing was. Raises RunFolderError, StorageError."""
        kind, text = ("refused", refused or "") if reply is None else ("reply", reply)
        (self.refused if reply is None else self.replies)[key] = text
        row = {"key": key, "model": model, kind: text, "check": stable_hash(key, kind, text)}
        line = b"\n" * self._torn + json.dumps(row).encode() + b"\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab", buffering=0) as file:
                file.write(line)
        except OSError as error:
            raise disk_error(error, self.file, "keeping a reply") from None
        self._torn = False

    def _read(self) -> None:
        try:
            data = self.file.read_bytes() if self.file.exists() else b""
        except OSError as error:
            raise disk_error(error, self.file, "reading") from None
        lines = [line for line in data.split(b"\n") if line.strip()]
        self._torn = bool(data) and not data.endswith(b"\n")
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
