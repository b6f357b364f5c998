"""Jobs in processes, side by side: each writes its own log, and one that fails stops no other.
Run its tests: pytest tests/test_compare.py
"""

import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console

from dpa.core.errors import DpaError, Interrupted
from dpa.sampling.process_sampler import leave_signals_to_parent, start_worker
from dpa.storage.stopping import StopOnSignal, end_on_signal

_POLL_S = 0.2


class Job(Protocol):
    """Work for a process of its own, where it is sent pickled."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def folder(self) -> Path:
        """Where it works; its log.txt lies there."""

    @property
    def ready(self) -> bool:
        """Whether what it needs is made."""

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""

    def run(self) -> None:
        """Do what is not done yet. Raises DpaError."""


def do_jobs(jobs: Sequence[Job], workers: int, console: Console) -> list[str]:
    """Run the jobs in `workers` processes, of one thread each where there are several; a method waits for what its seed
    shares. Returns what failed, in words.

    A job that fails, or whose process dies, does not stop the others. Raises Interrupted after a signal, once the work
    in hand has come to a safe point.
    """
    waiting = [job for job in jobs if not job.done]
    total, failed, begun = len(jobs), [], time.monotonic()
    finished_here = 0
    if waiting:
        console.print(f"compare: {total - len(waiting)} of {total} jobs are done, {len(waiting)} to do", style="bold")
    with StopOnSignal() as stop, _workers(workers, len(waiting)) as crew:
        while waiting or any(worker.job for worker in crew):
            for worker in crew:
                if worker.job is None and not stop.requested:
                    job = next((job for job in waiting if job.ready), None)
                    if job:
                        waiting.remove(job)
                        worker.give(job)
            busy = [worker for worker in crew if worker.job]
            if stop.requested:
                for worker in busy:
                    worker.stop()
                if not busy:
                    break
            if not busy:
                failed += [f"{job.name}: it waits for what failed" for job in waiting]
                break
            for worker in busy:
                if worker.connection not in wait([each.connection for each in busy], _POLL_S):
                    continue
                job, seconds, trouble = worker.take()
                if trouble and not stop.requested:
                    failed.append(f"{job.name}: {trouble}")
                    console.print(f"compare: {job.name} FAILED after {seconds:.0f} s: {trouble}", markup=False)
                elif not trouble:
                    finished_here += 1
                    left = len(waiting) + sum(1 for each in crew if each.job)
                    minutes = (time.monotonic() - begun) / finished_here * left / 60
                    console.print(
                        f"compare: {total - left - len(failed)} of {total} done: {job.name} in {seconds:.0f} s; "
                        f"about {minutes:.0f} min left",
                        markup=False,
                    )
        if stop.requested:
            raise stop.interrupted("compare", sum(job.done for job in jobs), total, "jobs")
    return failed


class _Worker:
    """A process that runs one job after another; its output goes to each job's log.txt."""

    def __init__(self, threads: int) -> None:
        self.job: Job | None = None
        self._threads = threads
        self._start()

    def give(self, job: Job) -> None:
        """Begin a job."""
        self.job, self._begun, self._asked_to_stop = job, time.monotonic(), False
        try:
            self.connection.send(job)
        except OSError:  # it died while it had nothing to do
            self._process.join()
            self._start()
            self.connection.send(job)

    def take(self) -> tuple[Job, float, str]:
        """The job that has ended, its seconds, and what went wrong, or nothing."""
        job, self.job = self.job, None
        assert job is not None
        try:
            trouble = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            trouble = f"its process died (exit code {self._process.exitcode}); see {job.folder / 'log.txt'}"
            self._start()
        return job, time.monotonic() - self._begun, trouble

    def stop(self) -> None:
        """Ask the job in hand to stop at the next safe point."""
        if not self._asked_to_stop and self._process.pid:
            self._process.terminate()
            self._asked_to_stop = True

    def close(self) -> None:
        """End the process."""
        self.connection.close()  # an idle worker ends by itself
        self._process.join(timeout=0.0 if self.job else 5.0)
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        self._process, self.connection = start_worker(_serve, self._threads, daemon=False)


@contextmanager
def _workers(workers: int, jobs: int) -> Iterator[list[_Worker]]:
    """Worker processes, no more than there are jobs. Small jobs side by side, of one thread each, are faster than one
    after the other on all cores; a single worker has them all, for models of which only one fits in memory."""
    threads = 1 if workers > 1 else torch.get_num_threads()
    crew: list[_Worker] = []
    try:
        crew += [_Worker(threads) for _ in range(min(workers, max(1, jobs)))]
        yield crew
    finally:
        for worker in crew:
            worker.close()


def _serve(connection: Connection, threads: int) -> None:
    """What a worker does until its parent hangs up."""
    leave_signals_to_parent()
    torch.set_num_threads(threads)
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        gc.collect()
        gc.freeze()  # what the jobs before imported stays: a Trainer collects twice, a fifth of a short job's time
        with _output_to(job.folder / "log.txt"):
            try:
                with end_on_signal(job.name):
                    job.run()
                trouble = ""
            except Interrupted as error:
                trouble = str(error)
            except DpaError as error:
                trouble = str(error)
                with suppress(OSError):  # the disk may be full
                    print(f"dpa: {error}", file=sys.stderr)
            except Exception as error:  # a defect of ours: the log has it whole, the other jobs go on
                with suppress(OSError):
                    traceback.print_exc()
                trouble = f"{type(error).__name__}: {error}; see {job.folder / 'log.txt'}"
        connection.send(trouble)


@contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Everything this process prints, libraries included, is added to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # on a full disk the log ends early, but what went wrong is still told
                stream.flush()
        for descriptor, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)
        os.close(target)
