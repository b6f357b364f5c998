"""A run on disk: one lock, one configuration, and stages made of checked shards. The same command resumes it.
Run its tests: pytest tests/test_run_folder.py
"""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from dpa.core.closing import Closing
from dpa.core.errors import DamageError, DpaError, RunFolderError
from dpa.core.records import Ledger
from dpa.storage.identity import check_identity
from dpa.storage.locks import RunLock, Share
from dpa.storage.schemas import score_matrix
from dpa.storage.seals import Seal, broken, seal
from dpa.storage.stage_records import DoneRecord, Reject, ShardRecord, write_rejects
from dpa.storage.tables import TEMPORARY, disk_error, read_table, verify, write_record, write_table

_log = logging.getLogger(__name__)


class RunFolder(Closing):
    """The folder of one run. Stages meet here, not in code.

    with RunFolder("runs/demo").open(config, inputs={"prompts.path": Path("prompts.jsonl")}) as run:
        stage = run.stage(1, "rollout")
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: RunLock | None = None

    def open(
        self,
        config: BaseModel,
        inputs: Mapping[str, Path] | None = None,
        share: Share | None = None,
        join: bool = False,
    ) -> "RunFolder":
        """Lock the folder, and check that it belongs to this configuration and these inputs.

        `share`: this process makes one share of a stage, beside others (storage/locks.py); it calls `let_others_in`
        once what they all need is there. `join`: another rank of the same launch holds the lock; nothing is written.

        `inputs`: field -> local file or folder whose content the run depends on (prompts, ratings); its SHA-256 is
        part of the run's identity.

        Raises RunFolderError: locked by another process (which it names), another configuration or input (each
        difference on its line), not writable.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path / "lock", share, join)
        except OSError as error:
            raise disk_error(error, self.path, "opening the run folder") from None
        try:
            check_identity(self.path, config, inputs or {}, may_write=not self._lock.shared)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Release the lock (the kernel does it too when the process ends, however it ends)."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def check_room(self, needed: int) -> None:
        """Raises RunFolderError where the disk has fewer bytes free than what is still to be done needs."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise RunFolderError(
                f"out: {self.path} has {_gigabytes(free)} free and the run needs about {_gigabytes(needed)}; free some "
                "space, choose another folder, or pass --ignore-free-space."
            )

    def let_others_in(self) -> None:
        """The folder is ready for the other shares."""
        assert self._lock is not None
        self._lock.let_others_in()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While the block runs, the lock is free for the process that this one starts; then it is taken back."""
        self.close()
        yield
        self._lock = RunLock(self.path / "lock")

    def stage(self, iteration: int | None, name: str) -> "StageFolder":
        """The folder of a stage: `iter_<iteration>/<name>`, or `<name>` for a stage outside the iterations."""
        place = name if iteration is None else f"iter_{iteration}/{name}"
        return StageFolder(self.path / place, place, self._lock)


class StageFolder:
    """One stage's shards, records, rejects and ledger.

    A shard is a parquet file plus a record (`shard-00000.json`: rows, sha256, bytes, ledger, rejects) written after
    it; a file without its record does not count. The stage is done when `done.json` lists its shards and every one of
    them is whole. A damaged shard is set aside as `*.damaged` and reported as missing, so that it is made again. A
    model that the stage made is sealed (storage/seals.py): one that has changed since opens the stage again.

    `name` (`iter_1/rollout`) identifies the stage in messages and in random seeds, wherever the run folder lies.
    `lock` is the run folder's: where it is shared, only this process's shards are made, set aside or swept.
    """

    def __init__(self, path: Path, name: str | None = None, lock: RunLock | None = None) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self._lock = lock
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if lock is None or not lock.shared:
                self._sweep()
        except OSError as error:
            raise disk_error(error, self.path, "opening the stage folder") from None

    # --- writing -----------------------------------------------------------------------------------------------

    def write_shard(
        self, number: int, table: pa.Table, ledger: Ledger, rejects: Sequence[Reject] = (), made_from: str = ""
    ) -> None:
        """Write a shard, then its record. Replaces a shard of the same number; the stage is open again."""
        (self.path / "done.json").unlink(missing_ok=True)
        self._record_file(number).unlink(missing_ok=True)
        file = write_table(self._data_file(number), table)
        record = ShardRecord(file, ledger, tuple(rejects), made_from)
        write_record(self._record_file(number), asdict(record))

    def write_rejects(self, rejects: Sequence[Reject]) -> None:
        """Write `rejects.jsonl` (id, stage, reason); `finish` does it for rejects that came with shards."""
        write_rejects(self.path / "rejects.jsonl", self.name, rejects)

    def finish(self, ledger: Ledger | None = None, shards: int | None = None, sealed: Sequence[Path] = ()) -> None:
        """Mark the stage done: its ledger is the shards' ledgers added up, plus `ledger`.

        `shards`: how many there must be (numbers 0 to shards - 1); default: those that are recorded. `sealed`: folders
        of models that the stage made; it is done as long as every file in them stays as it is now.
        """
        count = len(list(self.path.glob("shard-*.json"))) if shards is None else shards
        records = [self._record(number) for number in range(count)]
        total = Ledger()
        for record in records:
            if record is None:
                raise ValueError(f"{self.name}: finish() before all {shards} shards are written")
            total.add(record.ledger)
        total.add(ledger or Ledger())
        rejects = [reject for record in records if record for reject in record.rejects]
        if rejects:
            self.write_rejects(rejects)
        elif records:  # those of an earlier attempt
            (self.path / "rejects.jsonl").unlink(missing_ok=True)
        done: dict[str, Any] = {"shards": [record.file.sha256 for record in records if record], "ledger": asdict(total)}
        if sealed:
            done["sealed"] = {os.path.relpath(folder, self.path): seal(folder) for folder in sealed}
            self._compare_seals(done["sealed"])
        write_record(self.path / "done.json", done)

    # --- sharing -----------------------------------------------------------------------------------------------

    @property
    def share(self) -> Share | None:
        """Whose shards this process makes; None: all of them."""
        return None if self._lock is None else self._lock.share

    def mine(self, number: int) -> bool:
        """Whether this process makes shard `number`."""
        return self.share is None or self.share.has(number)

    def missing(self, made_from: Sequence[str]) -> list[int]:
        """Numbers of the shards this process has to make: not there, not whole, or made from other inputs."""
        return [
            number
            for number, inputs in enumerate(made_from)
            if self.mine(number) and self.shard_digest(number, inputs) is None
        ]

    def may_finish(self, made_from: Sequence[str]) -> bool:
        """Whether this process, its own shards being made, is to `finish`: a share's worker when it is the last at
        work and every shard is there."""
        if self._lock is None or self.share is None:
            return True
        return self._lock.become_alone() and not self.missing(made_from)

    # --- reading -----------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether `done.json` stands, and every shard and every sealed file is as it says (all bytes are checked)."""
        if not (self.path / "done.json").exists():
            return False
        try:
            record = self._done()
        except DamageError as error:
            _log.warning("%s: its done-record does not count: %s", self.name, str(error).split("; ")[0])
            return False
        whole = [self.shard_digest(number) for number in range(len(record.shards))]
        if whole != record.shards:
            return False
        for place, sealed in record.sealed.items():
            trouble = broken(Path(os.path.normpath(self.path / place)), sealed)
            if trouble is not None:
                _log.warning("%s: %s; it is never used, and has to be made again.", self.name, trouble)
                return False
        return True

    @property
    def seals(self) -> bool:
        """Whether the finished stage sealed what it made; an earlier version did not."""
        return bool(self._done().sealed)

    @property
    def shards(self) -> int:
        """How many shards the finished stage has."""
        return len(self._done().shards)

    @property
    def ledger(self) -> Ledger:
        """What the finished stage cost."""
        return self._done().ledger

    def shard_digest(self, number: int, made_from: str | None = None) -> str | None:
        """SHA-256 of a shard that is recorded, whole and made from these inputs (None: any); else None.

        A damaged shard is set aside.
        """
        record = self._record(number)
        if record is None or (made_from is not None and record.made_from != made_from):
            return None
        with self._set_aside_if_damaged(number):
            verify(self._data_file(number), record.file)
            return record.file.sha256
        return None

    def shard(self, number: int) -> pa.Table | None:
        """A shard's table, every byte verified; None when there is none. A damaged shard is set aside."""
        record = self._record(number)
        with self._set_aside_if_damaged(number):
            return None if record is None else read_table(self._data_file(number), record.file)
        return None

    def ledger_of(self, numbers: Iterable[int]) -> Ledger:
        """What these recorded shards cost together."""
        total = Ledger()
        for number in numbers:
            total.add(self._must(number).ledger)
        return total

    def shard_rejects(self, number: int) -> tuple[Reject, ...]:
        """The rejects of a recorded shard."""
        return self._must(number).rejects

    def table(self, number: int) -> pa.Table:
        """A shard's table, every byte verified; DamageError when it is damaged or not there."""
        table = self.shard(number)
        if table is None:
            place, _, verb = self.name.partition("/")
            maker = f"`dpa {verb.split('/')[0]} -t {place.removeprefix('iter_')}`" if verb else "the same command"
            raise DamageError(f"{self._data_file(number)} is damaged or missing; run {maker} again.")
        return table

    def tables(self) -> Iterator[pa.Table]:
        """The finished stage's shards in order, verified.

        Raises RunFolderError when the stage is not finished, DamageError when a shard turns out damaged.
        """
        for number in range(self.shards):
            yield self.table(number)

    def whole_table(self) -> pa.Table:
        """All rows of the finished stage; raises as `tables` does."""
        return pa.concat_tables(self.tables())

    def scores(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """Of a finished score stage: scores_NM, NaN where a row is not valid, and the names of the M attributes."""
        return score_matrix(self.whole_table())

    # --- inside ------------------------------------------------------------------------------------------------

    def _data_file(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.parquet"

    def _record_file(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.json"

    def _must(self, number: int) -> ShardRecord:
        record = self._record(number)
        if record is None:
            raise ValueError(f"{self.name}: shard {number} is not recorded")
        return record

    def _record(self, number: int) -> ShardRecord | None:
        file = self._record_file(number)
        if not file.exists():
            return None
        record = ShardRecord.read(file)
        if record is None:
            _log.warning("%s is damaged: its shard does not count and will be made again.", file)
        return record

    def _done(self) -> DoneRecord:
        return DoneRecord.read(self.path / "done.json", self.name)

    def _compare_seals(self, now: Mapping[str, Seal]) -> None:
        """Say so when what is made again is not what it was: rows that came from the first one stand."""
        try:
            before = self._done().sealed
        except DpaError:
            return
        changed = [place for place in now if place in before and now[place] != before[place]]
        if changed:
            _log.warning(
                "%s: %s was made again and is not, bit for bit, what it was (another device, thread count or version); "
                "what was sampled or scored with the first one stands.",
                self.name,
                ", ".join(changed),
            )

    @contextmanager
    def _set_aside_if_damaged(self, number: int) -> Iterator[None]:
        try:
            yield
        except RunFolderError:  # the file is gone
            return
        except DamageError as error:
            if not self.mine(number) or (self._lock is not None and self._lock.shared and self.share is None):
                return  # its own worker or the first rank does it, or is writing it again at this moment
            file = self._data_file(number)
            file.replace(file.with_name(f"{file.name}.damaged"))
            self._record_file(number).unlink()
            _log.warning("%s Set aside as %s.damaged; it will be made again.", error, file.name)

    def _sweep(self) -> None:
        """Remove what an interrupted write left behind: temporary files, and data whose record never came."""
        unrecorded = [file for file in self.path.glob("shard-*.parquet") if not file.with_suffix(".json").exists()]
        temporary = [file for file in self.path.glob(f".*{TEMPORARY}") if not file.is_dir()]
        leftovers = [*temporary, *unrecorded]
        for file in leftovers:
            file.unlink()
        if leftovers:
            _log.warning("%s: removed %d unfinished file(s) of an interrupted run.", self.name, len(leftovers))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
