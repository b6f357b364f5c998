"""Samplers in processes of their own, so that several use several cores or cards.
Run its tests: pytest tests/test_samplers.py
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any

import torch

from dpa.core.errors import DpaError, EngineError
from dpa.core.records import Sample, Sampler, SampleRequest
from dpa.sampling.samplers import SamplerSpec


class ProcessSampler:
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
                self._process.join()
                code = self._process.exitcode
                self.close()
                if death < self._max_restarts:
                    time.sleep(self._backoff_s * 2**death)
                continue
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise EngineError(
            f"sampler: the worker process for {self._spec.policy} died {self._max_restarts + 1} times in a row "
            f"(exit code {code}); look for memory or driver trouble, or lower rollout.batch_size."
        )

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._connection = self._process = None

    def __enter__(self) -> "ProcessSampler":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        context = process_context(__name__)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._spec, theirs), daemon=True)
        self._process.start()
        theirs.close()


def _serve(spec: SamplerSpec, connection: Connection) -> None:
    """What the worker process does until its parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    threading.Thread(target=die_with_parent, daemon=True).start()
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


def process_context(module: str) -> SpawnContext | ForkServerContext:
    """How workers start: forked from one process that has imported their `module`, so that all pay its imports once.
    Where there is a card, whose state no fork survives, and where forks are not safe, each imports for itself."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])  # of no effect once the process has started
    return context


def die_with_parent() -> None:
    """Leave at once when the parent ends, even by kill -9 in the middle of a batch."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
