"""What a stage writes beside its tables: the record of a shard, of the finished stage, and the rows it rejected.
Run its tests: pytest tests/test_run_folder.py tests/test_faults_run_folder.py
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa.core.errors import DamageError, RunFolderError
from dpa.core.records import Ledger
from dpa.storage.seals import Seal
from dpa.storage.tables import FileRecord, read_record, write_bytes


@dataclass(frozen=True)
class Reject:
    """A row that could not be used, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """What stands beside a finished shard. `made_from` names its inputs: a shard of other inputs is made again."""

    file: FileRecord
    ledger: Ledger
    rejects: tuple[Reject, ...]
    made_from: str

    @classmethod
    def read(cls, file: Path) -> "ShardRecord | None":
        """The record as it was written; None where it is damaged."""
        try:
            data = read_record(file, ("file", "ledger", "rejects", "made_from"))
            rejects = tuple(Reject(**reject) for reject in data["rejects"])
            return cls(FileRecord(**data["file"]), read_ledger(data["ledger"]), rejects, data["made_from"])
        except (DamageError, TypeError, ValueError, AttributeError):
            return None


@dataclass(frozen=True)
class DoneRecord:
    """What `done.json` says: the checksum of each shard, what the stage cost, and the folders it sealed (their place
    as seen from the stage's)."""

    shards: list[str]
    ledger: Ledger
    sealed: dict[str, Seal]

    @classmethod
    def read(cls, file: Path, stage: str) -> "DoneRecord":
        """The record of a stage. Raises RunFolderError when it is not finished, DamageError when it is damaged."""
        if not file.exists():
            raise RunFolderError(f"{stage}: this stage is not finished in {file.parent}; run it first.")
        data = read_record(file, ("shards", "ledger"), optional=("sealed",))
        try:
            sealed = {str(place): dict(files) for place, files in data.get("sealed", {}).items()}
            return cls(list(data["shards"]), read_ledger(data["ledger"]), sealed)
        except (TypeError, ValueError, AttributeError) as error:
            raise DamageError(f"{file} is damaged ({error}); delete it and run the same command again.") from None


def read_ledger(data: Mapping[str, Any]) -> Ledger:
    """A ledger as it was written. Raises TypeError or ValueError for what is none."""
    known = {name: value for name, value in data.items() if name != "prompt_tokens"}  # older runs have it, always 0
    ledger = Ledger(**known)
    for value in (*known.values(), *ledger.extra.values()):
        if value is not ledger.extra and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{value!r} is no amount")
    return ledger


def write_rejects(file: Path, stage: str, rejects: Sequence[Reject]) -> None:
    """Write one JSON object a line: id, stage, reason."""
    lines = [
        json.dumps({"id": reject.id, "stage": stage, "reason": reject.reason}, ensure_ascii=False) + "\n"
        for reject in rejects
    ]
    write_bytes(file, "".join(lines).encode("utf-8", "backslashreplace"))


def count_reasons(rejects: Sequence[Reject], most: int = 5) -> str:
    """The commonest reasons with their counts, as text: `3 x prompt is empty, 1 x id 'a' is a duplicate`."""
    counts = Counter(reject.reason for reject in rejects).most_common()
    text = ", ".join(f"{count} x {reason}" for reason, count in counts[:most])
    more = len(counts) - most
    return f"{text}, and {more} other reason{'s' if more > 1 else ''}" if more > 0 else text
