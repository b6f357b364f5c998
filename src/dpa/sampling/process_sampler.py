"""Samplers in processes of their own, so that several use several cores or cards.
Run its tests: pytest tests/test_samplers.py
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from dpa.core.closing import Closing
from dpa.core.errors import DpaError, EngineError
from dpa.core.records import Sample, Sampler, SampleRequest
from dpa.sampling.samplers import SamplerSpec


class ProcessSampler(Closing):
    """What a spec builds (a TransformersSampler), in a process of its own.

    A process that dies is started again after `backoff_s`, twice as long each time, and asked the same; when it dies
    after `max_restarts` of them EngineError is raised. `close` (or leaving the `with` block) ends the process, and so
    does the end of this one, kill -9 included.
    """

    def __init__(self, spec: SamplerSpec, max_restarts: int = 3, backoff_s: float = 1.0) -> None:
        self._spec, self._max_restarts, self._backoff_s = spec, max_restarts, backoff_s
        self.revision = spec.revision
        self._process: Any = None
        self._connection: Connection | None = None
        self._closed = False
        self._start()  # it loads the policy while others start

    @property
    def pid(self) -> int | None:
        """Process id of the worker."""
        return self._process.pid if self._process is not None else None

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """As TransformersSampler.sample. Raises EngineError."""
        for death in range(self._max_restarts + 1):
            try:
                if self._connection is None:
                    self._start()
                assert self._connection is not None
                self._connection.send(list(requests))
                answer = self._connection.recv()
            except (EOFError, OSError):  # the pipe broke: the process died
                code = None
                if self._process is not None:  # else it could not even be started
                    self._process.join()
                    code = self._process.exitcode
                self._end()
                if self._closed:
                    break
                if death < self._max_restarts:
                    time.sleep(self._backoff_s * 2**death)
                continue
            if isinstance(answer, Exception):
                raise answer
            return answer
        if self._closed:
            raise EngineError("sampler: it was closed.")
        raise EngineError(
            f"sampler: the worker process for {self._spec.policy} died {self._max_restarts + 1} times in a row "
            f"(exit code {code}); look for memory or driver trouble, or lower rollout.batch_size."
        )

    def close(self) -> None:
        """End the process for good."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._connection = self._process = None

    def _start(self) -> None:
        self._process, self._connection = start_worker(_serve, self._spec)


def _serve(connection: Connection, spec: SamplerSpec) -> None:
    """What the worker process does until its parent hangs up."""
    leave_signals_to_parent()
    sampler: Sampler | None = None
    while True:
        try:
            requests = connection.recv()
        except EOFError:
            return
        try:
            sampler = sampler or spec.build()
            connection.send(sampler.sample(requests))
        except DpaError as error:
            connection.send(error)
        except torch.AcceleratorError:
            raise  # the card's state is lost: the parent starts another process
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            connection.send(RuntimeError(f"{type(error).__name__}: {error}"))  # any class may not survive the pipe


def start_worker(serve: Callable[..., None], *given: Any, daemon: bool = True) -> tuple[Any, Connection]:
    """A process that runs `serve(connection, *given)`, and our end of the connection. A `daemon` ends with this process
    by itself and may start none of its own; any other must be ended.

    It is forked from one process that has imported the module of `serve`, so that all pay its imports once. Where there
    is a card, whose state no fork survives, and where forks are not safe, each imports for itself.
    """
    context: Any = multiprocessing.get_context("spawn")
    if sys.platform == "linux" and not torch.cuda.is_available():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([serve.__module__])  # of no effect once the process has started
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *given), daemon=daemon)
    process.start()
    theirs.close()
    return process, ours


def leave_signals_to_parent() -> None:
    """In a worker: Ctrl-C is for the parent, and when that ends, even by kill -9 in the middle of a batch, so do we."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
