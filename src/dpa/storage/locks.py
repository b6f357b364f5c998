"""Who may write in a run folder: one process alone, or the workers of a sharded stage together.
Run its tests: pytest tests/test_shares.py tests/test_faults_storage.py -k "share or 19"

One file, `lock`, under flock; the kernel frees it when a process ends, however it ends.

    alone        the exclusive lock for the life of the process
    share i/N    exclusive while the folder is made ready (configuration, prompts), then shared with the other shares of
                 N; `lock-i-of-N` keeps a second process off the same share. The last one at work gets the exclusive
                 lock back, so that exactly one process marks the stage done.
    joined       none: a further rank of a launch whose first rank holds it
"""

import fcntl
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from dpa.core.errors import ConfigError, RunFolderError

_POLL_S = 0.05
_NAMELESS_S = 2.0
"""How long a holder may take from locking to writing its name."""


@dataclass(frozen=True)
class Share:
    """The shards of worker `index` (1 to `count`) of a stage: every `count`-th one."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Read `3/16`. Raises ConfigError."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        index, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= index <= count:
            raise ConfigError(f"--shard: {text!r} is not i/N with i from 1 to N; a Slurm array of 16 is --array=1-16.")
        return cls(index, count)

    def has(self, number: int) -> bool:
        """Whether shard `number` is this worker's."""
        return number % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class RunLock:
    """The lock of one run folder, taken when it is made. Raises RunFolderError, which names the holder."""

    def __init__(self, file: Path, share: Share | None = None, join: bool = False) -> None:
        self.share = share
        """Whose shards this process makes; None: all."""
        self.shared = join
        """Whether others may be writing in the folder now: nothing of theirs is touched."""
        self._file = file
        self._descriptors: list[int] = []
        if join:
            return
        try:
            self._lock = self._open(file)
            if share is None:
                if not _flock(self._lock, fcntl.LOCK_EX):
                    raise self._in_use()
                self._sign(_name())
            else:
                own = self._open(file.with_name(f"lock-{share.index}-of-{share.count}"))
                if not _flock(own, fcntl.LOCK_EX):
                    raise RunFolderError(
                        f"--shard: share {share} is being made by {_signed(own) or 'another process'}; wait for it."
                    )
                _write(own, _name())
                self._enter(share)
        except BaseException:
            self.close()
            raise

    def let_others_in(self) -> None:
        """A share's worker has made the folder ready: from now on the others work too."""
        if self.share is None or self.shared:
            return
        if _flock(self._lock, fcntl.LOCK_SH):
            self.shared = True
        else:  # another share took it in between, to make ready what is ready
            self._enter(self.share)
            self.let_others_in()

    def become_alone(self) -> bool:
        """Take the whole folder if nobody else works in it. When not, this process has no lock left and must end: of
        several that end together, the last gets it."""
        if self.share is not None:
            if self.shared:  # on NFS a lock that cannot be raised is kept, and several shares would keep each other out
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            if not _flock(self._lock, fcntl.LOCK_EX):
                return False
            self._sign(f"{_name()}, for shares of {self.share.count}")
            self.share, self.shared = None, False
        return True

    def close(self) -> None:
        """Release it."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _enter(self, share: Share) -> None:
        """The exclusive lock where nobody holds it, else the shared one beside shares of the same count."""
        nameless = time.monotonic() + _NAMELESS_S
        while True:
            if _flock(self._lock, fcntl.LOCK_EX):
                self._sign(f"{_name()}, for shares of {share.count}")
                self.shared = False
                return
            if _flock(self._lock, fcntl.LOCK_SH):
                if not _signed(self._lock).endswith(f" shares of {share.count}"):
                    raise self._in_use()
                self.shared = True
                return
            if "for shares of" in _signed(self._lock):
                nameless = time.monotonic() + _NAMELESS_S
            elif time.monotonic() > nameless:
                raise self._in_use()
            time.sleep(_POLL_S)

    def _in_use(self) -> RunFolderError:
        return RunFolderError(
            f"out: {self._file.parent} is in use by {_signed(self._lock) or 'another process'}; wait for it to end, "
            "or choose another folder."
        )

    def _sign(self, text: str) -> None:
        _write(self._lock, text)

    def _open(self, file: Path) -> int:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        self._descriptors.append(descriptor)
        return descriptor


def _flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _name() -> str:
    return f"process {os.getpid()} on host {socket.gethostname()}"


def _signed(descriptor: int) -> str:
    return os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip()


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{text}\n".encode(), 0)
