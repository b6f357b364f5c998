"""SIGTERM and SIGINT: the first asks long work to stop at the next safe point, the second ends the process at once.
Run its tests: pytest tests/test_stopping.py tests/test_faults_rollout.py -k "07 or signal or thread"

StopOnSignal is for work that can look; `end_on_signal` is around all of it, so that no work begins after a signal.
"""

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from dpa.core.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)

GRACE_S = 8.0
"""Seconds that work in hand has to finish after a signal; then it is dropped, and done by the resumed run."""

POLL_S = 0.1
"""Seconds within which a signal is noticed."""

JOIN_S = 1.0
"""Seconds that threads have to end once nobody waits for their work any more."""

Worker = TypeVar("Worker")
Result = TypeVar("Result")


_ending = 0
"""Blocks of `end_on_signal` that are open."""

_working: list[threading.Thread] = []
"""Threads that were left while they worked."""


@contextmanager
def end_on_signal(label: str) -> Iterator[None]:
    """While the block runs, a signal ends it with Interrupted: at once where the main thread stands, and after work
    under StopOnSignal when that has come to its safe point, whether or not it had more to do.

    Outside the main thread signals cannot be caught, and nothing changes.
    """
    global _ending
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    name = ""

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal name
        name = signal.Signals(number).name
        for again in previous:
            signal.signal(again, signal.SIG_DFL)  # once more stops at once
        raise KeyboardInterrupt(name)  # no Exception: libraries catch those and go on

    previous = {number: signal.signal(number, end) for number in SIGNALS if not _is_for_parent(number)}
    _ending += 1
    try:
        yield
    except KeyboardInterrupt as stopped:
        reason = name or (str(stopped) or "SIGINT")
        raise Interrupted(f"{label}: stopped by {reason}; run the same command to go on from there.") from None
    finally:
        _ending -= 1
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_process(code: int | str | None) -> None:
    """Exit. Where a thread still works, without Python's own end: it takes the lock of the interpreter away from such a
    thread within C++ that cannot bear it ("terminate called without an active exception", exit code 134)."""
    if any(thread.is_alive() for thread in _working):
        if isinstance(code, str):
            print(code, file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


def end_process_by_error() -> None:
    """The same for an error that nobody expected, whose traceback is shown."""
    if not any(thread.is_alive() for thread in _working):
        raise
    traceback.print_exc()
    end_process(1)


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
        alive (`end_process`). What `work` raises is raised here.
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
        threads = [threading.Thread(target=run, args=(worker,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
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
            until = time.monotonic() + JOIN_S
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))
            _working[:] = [thread for thread in (*_working, *threads) if thread.is_alive()]

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if not _is_for_parent(number):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.requested and error[0] is None and _ending and self._previous:
            raise KeyboardInterrupt(self.signal_name)  # what was in hand is finished; nothing else begins

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signal_name = signal.Signals(number).name
        print(f"dpa: {self.signal_name}: finishing the work in hand; once more stops at once.", file=sys.stderr)


def _is_for_parent(number: signal.Signals) -> bool:
    """Whether this is a worker that leaves the signal to its parent: Ctrl-C reaches both, and two would be one each."""
    return multiprocessing.parent_process() is not None and signal.getsignal(number) is signal.SIG_IGN
