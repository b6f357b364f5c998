"""The thread that owns the model: it lets answers in, writes a token of each, and hands text over as it comes.
Run its tests: pytest tests/test_engine.py
"""

import asyncio
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpa.core.errors import DpaError
from dpa.models.policy import end_token_ids, is_out_of_memory
from dpa.sampling.batching import ContinuousBatch, Row
from dpa.sampling.decoding import Decoder
from dpa.serve.logs import places
from dpa.serve.text_stream import TextStream, decoded

PREFILL_TOKENS = 8192
"""Prompt tokens, padding included, that are read between two steps: those who are being answered wait for it."""

TURN = 256
"""Tokens an answer may write while others wait to begin; then it gives way to one, and goes on when its turn comes."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Some text of an answer; the last one says why the answer ended, or what `failed`."""

    text: str
    finish_reason: str | None = None
    failed: str | None = None


@dataclass(eq=False)
class Answer:
    """One answer that is asked for: `deliver` is called in the event loop's thread with each piece of it.

    With `streaming` a piece comes with every token that completes one, else the whole answer comes at once. Answers of
    one `request` share its turns.
    """

    row: Row
    stops: Sequence[str]
    streaming: bool
    deliver: Callable[[Piece], None]
    request: Hashable
    cancelled: bool = False
    number: int = 0
    """Its place in the order of coming."""
    joined_at: int = 0
    """Tokens it had when it was let in."""
    text: TextStream | None = None


class EngineLoop:
    """Runs until the process ends. An error in one answer's work ends that answer; only when the device itself no
    longer computes the process ends, and whoever supervises it starts another.

    `max_rows` answers are written at once. Of the requests that wait the one with the fewest answers in hand is next,
    of several the one that was served, or came, longest ago. Where a request has none in hand, one with several gives
    one back for it; where all have one, the longest that has written TURN tokens does. What it wrote is kept and read
    again.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_rows: int) -> None:
        self._batch = ContinuousBatch(Decoder(model), end_token_ids(model, tokenizer))
        self._device = model.device
        self._tokenizer, self._max_rows = tokenizer, max_rows
        self._room = max_rows  # less for a while where the memory was full
        self._steps_since_full = 0
        self._served: dict[Hashable, int] = {}
        """When a request that still waits was last served, counted in answers let in."""
        self._waiting: dict[Hashable, deque[Answer]] = {}
        self._running: dict[int, Answer] = {}
        self._count = 0
        self.rounds = 0
        """How often the model's thread went round: who still waits sees by it that others are served."""
        self._wake = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def load(self) -> tuple[int, int]:
        """Answers that are being written, and answers that wait."""
        with self._wake:
            return len(self._running), sum(map(len, self._waiting.values()))

    def start(self) -> None:
        """Begin; to be called in the event loop that the pieces are delivered in."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, answers: Sequence[Answer]) -> None:
        """Ask for answers; those of one call are let in together where there is room."""
        with self._wake:
            for answer in answers:
                answer.number = self._count = self._count + 1
                self._waiting.setdefault(answer.request, deque()).append(answer)
            self._wake.notify()

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Forget answers; those that are being written stop before their next token."""
        with self._wake:
            for answer in answers:
                answer.cancelled = True
                queue = self._waiting.get(answer.request)
                if queue is not None and answer in queue:
                    queue.remove(answer)
                    if not queue:
                        del self._waiting[answer.request]
                        self._served.pop(answer.request, None)

    def _run(self) -> None:
        try:
            while True:
                self._once()
        except BaseException as error:
            _log.critical("engine: %s", places(error))
            os._exit(70)

    def _once(self) -> None:
        with self._wake:
            while not self._waiting and not self._running:
                self._wake.wait()
            yielding = self._yielding()
            self._set_aside(yielding)
            entering = self._next()
        leaving = [answer.row for answer in self._running.values() if answer.cancelled]
        for row in leaving:
            del self._running[id(row)]
        try:
            self._batch.leave([*leaving, *(answer.row for answer in yielding)], None)
        except Exception as error:
            self._survive(error)
        self._enter(entering)
        try:
            drew = self._batch.step()
        except Exception as error:
            self._survive(error)
            drew = self._step_apart(error)
        self._steps_since_full += 1
        if self._steps_since_full % TURN == 0:
            self._room = min(2 * self._room, self._max_rows)
        self._hand_over(drew)
        inside = set(map(id, self._batch.rows))
        lost = [answer for key, answer in self._running.items() if key not in inside]
        if lost:  # by an error: they go on where they were
            with self._wake:
                self._set_aside(lost)
        self.rounds += 1

    # --- whose turn it is --------------------------------------------------------------------------------------

    def _next(self) -> list[Answer]:
        """Who enters now: as many as there is room for, and as much text as may be read at once."""
        in_hand = Counter(answer.request for answer in self._running.values())
        entering: list[Answer] = []
        longest = 0
        while self._waiting and len(self._running) + len(entering) < self._room:
            request = min(self._waiting, key=lambda one: (in_hand[one], self._place(one)))
            longest = max(longest, self._waiting[request][0].row.length)
            if entering and longest * (len(entering) + 1) > PREFILL_TOKENS:
                break
            entering.append(self._waiting[request].popleft())
            in_hand[request] += 1
            self._served[request] = self._count = self._count + 1
            if not self._waiting[request]:
                del self._waiting[request], self._served[request]
        return entering

    def _place(self, request: Hashable) -> int:
        """Its place in the queue: when it was served last, or came; newcomers for ever never go before it."""
        return self._served.get(request, self._waiting[request][0].number)

    def _yielding(self) -> list[Answer]:
        """The answer that gives its place to a request that has none, if one should."""
        in_hand = Counter(answer.request for answer in self._running.values())
        if len(self._running) < self._room or all(in_hand[request] for request in self._waiting):
            return []
        request, most = in_hand.most_common(1)[0]
        if most > 1:  # its shortest: the least has to be read again
            own = (answer for answer in self._running.values() if answer.request == request)
            return [min(own, key=lambda answer: answer.row.length)]
        longest = max(self._running.values(), key=lambda answer: len(answer.row.tokens) - answer.joined_at)
        if len(longest.row.tokens) - longest.joined_at < TURN:
            return []
        longest.number = self._count = self._count + 1
        return [longest]

    def _set_aside(self, answers: Sequence[Answer]) -> None:
        """Back to the waiting, before those of the same request that have not begun."""
        for answer in sorted(answers, key=lambda answer: answer.number, reverse=True):
            del self._running[id(answer.row)]
            if not answer.cancelled:
                self._waiting.setdefault(answer.request, deque()).appendleft(answer)

    # --- one step ----------------------------------------------------------------------------------------------

    def _enter(self, answers: Sequence[Answer]) -> None:
        """Let answers in; where that fails for several each is tried alone."""
        if not answers:
            return
        before = len(self._batch.rows)  # a batch that failed may have let them go
        try:
            self._batch.join([answer.row for answer in answers])
        except Exception as error:
            self._survive(error)
            if len(answers) > 1:
                for answer in answers:
                    self._enter([answer])
            elif is_out_of_memory(error) and before:
                self._make_room(before)
                with self._wake:
                    self._waiting.setdefault(answers[0].request, deque()).appendleft(answers[0])
            else:
                self._deliver([(answers[0], self._failure(answers[0], error))])
            return
        for answer in answers:
            answer.joined_at = len(answer.row.tokens)
            if answer.text is None and (answer.streaming or answer.stops):
                answer.text = TextStream(self._tokenizer, answer.stops)
            self._running[id(answer.row)] = answer

    def _step_apart(self, error: Exception) -> list[Row]:
        """After a step that failed for all: each answer takes it alone, so that only those at fault end."""
        if is_out_of_memory(error) and len(self._running) > 1:
            self._make_room(len(self._running) // 2)
            return []
        drew: list[Row] = []
        for answer in list(self._running.values()):
            try:
                self._batch.join([answer.row])
                drew += self._batch.step()
                self._batch.leave([answer.row], None)
            except Exception as own:
                self._survive(own)
                del self._running[id(answer.row)]
                self._deliver([(answer, self._failure(answer, own))])
        return drew

    def _hand_over(self, drew: Sequence[Row]) -> None:
        """What the step's tokens say, to those who wait for it."""
        pieces: list[tuple[Answer, Piece]] = []
        stopped: list[Row] = []
        for row in drew:
            answer = self._running.get(id(row))
            if answer is None:
                continue
            try:
                piece = self._piece(answer)
            except Exception as error:  # of the tokenizer
                piece = self._failure(answer, error)
            if piece.finish_reason is not None:
                del self._running[id(row)]
                if row.finish_reason is None:  # at a stop string: the batch does not know of it
                    stopped.append(row)
            if piece.text or piece.finish_reason:
                pieces.append((answer, piece))
        try:
            self._batch.leave(stopped, "stop")
        except Exception as error:
            self._survive(error)
        self._deliver(pieces)

    def _piece(self, answer: Answer) -> Piece:
        """What an answer's newest token adds."""
        row, stream = answer.row, answer.text
        text = "" if stream is None else stream.push(row.tokens[-1])
        reason = "stop" if stream is not None and stream.stopped else row.finish_reason
        if reason is None:
            return Piece(text if answer.streaming else "")
        if stream is None:
            return Piece(decoded(self._tokenizer, row.tokens), reason)
        text += stream.finish()
        return Piece(text if answer.streaming else stream.text, reason)

    # --- what goes wrong ---------------------------------------------------------------------------------------

    def _survive(self, error: Exception) -> None:
        """Go on after an error, unless the device is broken: then nothing can be computed any more."""
        try:
            torch.ones(2, device=self._device).sum().item()
        except Exception:
            raise error from None

    def _make_room(self, count: int) -> None:
        """The memory is full: write fewer answers at once, and try more again after TURN steps."""
        self._room, self._steps_since_full = max(1, count), 0
        _log.warning("engine: the memory is full; it writes %d answers at once for now", self._room)

    def _failure(self, answer: Answer, error: Exception) -> Piece:
        """The end of one answer by an error of ours."""
        _log.error("engine: one answer failed, the others go on: %s", places(error))
        ours = f"engine: it failed at this answer ({type(error).__name__}); its log says where."
        reason = str(error) if isinstance(error, DpaError) else ours
        if is_out_of_memory(error):
            reason = f"engine: an answer to {answer.row.length} tokens does not fit the memory; shorten the prompt."
        return Piece("", "error", reason)

    def _deliver(self, pieces: Sequence[tuple[Answer, Piece]]) -> None:
        if pieces:
            assert self._loop is not None
            with suppress(RuntimeError):  # the loop has ended: nobody waits any more
                self._loop.call_soon_threadsafe(_deliver, pieces)


def _deliver(pieces: Sequence[tuple[Answer, Piece]]) -> None:
    for answer, piece in pieces:
        if not answer.cancelled:
            answer.deliver(piece)
