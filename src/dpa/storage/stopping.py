"""SIGTERM and SIGINT: the first asks long work to stop at the next safe point, the second ends the process at once.
Run its tests: pytest tests/test_faults_rollout.py -k 07
"""

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TypeVar

from dpa.core.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)

GRACE_S = 8.0
"""Seconds that work in hand has to finish after a signal; then it is dropped, and done by the resumed run."""

POLL_S = 0.1
"""Seconds within which a signal is noticed."""

Worker = TypeVar("Worker")
Result = TypeVar("Result")


class StopOnSignal:
    """While the block runs, `requested` says whether someone asked to stop; the work looks at it where it can.

    with StopOnSignal() as stop:
        for number, rows in stop.work_through(range(10), samplers, sample_shard):
            write(number, rows)
        if stop.requested:
            raise stop.interrupted("iter_1/rollout", done=3, total=10, unit="shards")

    Outside the main thread signals cannot be caught, and `requested` stays False.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.signal_name = ""
        self._grace_s = grace_s
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal arrived."""
        return bool(self.signal_name)

    def interrupted(self, stage: str, done: int, total: int, unit: str) -> Interrupted:
        """The error to raise: what is finished, and how to go on."""
        return Interrupted(
            f"{stage}: stopped by {self.signal_name} with {done} of {total} {unit} finished; "
            "run the same command to go on from there."
        )

    def work_through(
        self, numbers: Sequence[int], workers: Sequence[Worker], work: Callable[[Worker, int], Result]
    ) -> Iterator[tuple[int, Result]]:
        """Yield (number, work(worker, number)) as each is finished, one thread per worker.

        The caller keeps the results, so that only one thread touches the disk. After a signal no number is begun, and
        what is in hand has `grace_s` seconds to finish. Threads are daemons: work that never returns keeps no process
        alive. What `work` raises is raised here.
        """
        waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        results: queue.SimpleQueue[tuple[int, Result] | BaseException | None] = queue.SimpleQueue()
        for item in (*numbers, *(None for _ in workers)):
            waiting.put(item)
        closed = threading.Event()

        def run(worker: Worker) -> None:
            try:
                while (number := waiting.get()) is not None and not (closed.is_set() or self.requested):
                    results.put((number, work(worker, number)))
                results.put(None)
            except BaseException as error:  # raised again in the caller's thread
                results.put(error)

        working = len(workers)
        for worker in workers:
            threading.Thread(target=run, args=(worker,), daemon=True).start()
        deadline = float("inf")
        try:
            while working and time.monotonic() < deadline:
                if self.requested and deadline == float("inf"):
                    deadline = time.monotonic() + self._grace_s
                try:
                    result = results.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if result is None:
                    working -= 1
                elif isinstance(result, BaseException):
                    raise result
                else:
                    yield result
        finally:
            closed.set()

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signal_name = signal.Signals(number).name
        print(f"dpa: {self.signal_name}: finishing the work in hand; once more stops at once.", file=sys.stderr)
