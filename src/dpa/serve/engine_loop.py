"""The thread that owns the model: it lets answers in, writes a token of each, and hands text over as it comes.
Run its tests: pytest tests/test_engine.py
"""

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpa.models.batching import ContinuousBatch, Row
from dpa.models.policy import end_token_ids
from dpa.serve.text_stream import TextStream

PREFILL_TOKENS = 8192
"""Prompt tokens, padding included, that are read between two steps: those who are being answered wait for it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Some text of an answer; the last one says why the answer ended."""

    text: str
    finish_reason: str | None = None


@dataclass(eq=False)
class Job:
    """One answer that is asked for: `deliver` is called in the event loop's thread with each piece of it.

    With `streaming` a piece comes with every token that completes one, else the whole answer comes at once.
    """

    row: Row
    stops: Sequence[str]
    streaming: bool
    deliver: Callable[[Piece], None]
    cancelled: bool = False


class EngineLoop:
    """Runs until the process ends; a failure of the model ends the process, and whoever supervises it starts another.

    `max_rows` answers are written at once; the others wait in the order they came.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_rows: int) -> None:
        ends = end_token_ids(model, tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._batch = ContinuousBatch(model, ends, pad)
        self._tokenizer, self._max_rows = tokenizer, max_rows
        self._waiting: deque[Job] = deque()
        self._running: dict[int, tuple[Job, TextStream | None]] = {}
        self._wake = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def load(self) -> tuple[int, int]:
        """Answers that are being written, and answers that wait."""
        return len(self._running), len(self._waiting)

    def start(self) -> None:
        """Begin; to be called in the event loop that the pieces are delivered in."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Ask for answers; those of one call are let in together where there is room."""
        with self._wake:
            self._waiting.extend(jobs)
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forget answers; those that are being written stop before their next token."""
        for job in jobs:
            job.cancelled = True

    def _run(self) -> None:
        try:
            while True:
                self._once()
        except BaseException as error:
            _log.critical("engine: %s", _where(error))
            os._exit(70)

    def _once(self) -> None:
        with self._wake:
            while not self._waiting and not self._running:
                self._wake.wait()
            entering = self._next()
        leaving = [job.row for job, _ in self._running.values() if job.cancelled]
        if leaving:
            self._forget(leaving, "cancelled")
        if entering:
            self._batch.join([job.row for job in entering])
            for job in entering:
                wants_text = job.streaming or job.stops
                self._running[id(job.row)] = job, TextStream(self._decode, job.stops) if wants_text else None
        pieces: list[tuple[Job, Piece]] = []
        stopped: list[Row] = []
        for row in self._batch.step():
            job, stream = self._running[id(row)]
            text = "" if stream is None else stream.push(row.tokens[-1])
            reason = "stop" if stream is not None and stream.stopped else row.finish_reason
            if reason is None:
                if job.streaming and text:
                    pieces.append((job, Piece(text)))
                continue
            if row.finish_reason is None:  # at a stop string: the batch does not know of it
                stopped.append(row)
            else:
                del self._running[id(row)]
            if stream is None:
                text = self._decode(row.tokens)
            else:
                text += stream.finish()
                text = text if job.streaming else stream.text
            pieces.append((job, Piece(text, reason)))
        if stopped:
            self._forget(stopped, "stop")
        if pieces:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(_deliver, pieces)

    def _next(self) -> list[Job]:
        """Who enters now: first come, as many as there is room for, and as much text as may be read at once."""
        entering: list[Job] = []
        longest = 0
        while self._waiting and len(self._running) + len(entering) < self._max_rows:
            if self._waiting[0].cancelled:
                self._waiting.popleft()
                continue
            longest = max(longest, len(self._waiting[0].row.prompt))
            if entering and longest * (len(entering) + 1) > PREFILL_TOKENS:
                break
            entering.append(self._waiting.popleft())
        return entering

    def _forget(self, rows: Sequence[Row], reason: str) -> None:
        self._batch.leave(rows, reason)
        for row in rows:
            del self._running[id(row)]

    def _decode(self, ids: Sequence[int]) -> str:
        text: Any = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _deliver(pieces: Sequence[tuple[Job, Piece]]) -> None:
    for job, piece in pieces:
        if not job.cancelled:
            job.deliver(piece)


def _where(error: BaseException) -> str:
    """The kind of an error and the place it was raised: its words might hold a user's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
    return f"{type(error).__name__}{place}"
