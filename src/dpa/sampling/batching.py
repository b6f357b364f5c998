"""Continuous batching: rows join and leave between two steps, so that a server answers many at once.
Run its tests: pytest tests/test_engine.py

Same decoder and same draws as `decode` in sampling/decoding.py: a row's numbers come from its seed alone, so an answer
does not depend, up to the rounding of the model's own arithmetic, on who else is in the batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from dpa.core.records import places_of
from dpa.sampling.decoding import Decoder
from dpa.sampling.drawing import draw, uniforms
from dpa.sampling.strided_cache import fill_holes

TINY = 1e-6
"""A temperature below it is none, a mass below it is the likeliest token's: in single precision both would vanish."""


@dataclass(eq=False)
class Row:
    """One answer that is being written. `temperature` 0 takes the likeliest token; `limit` counts new tokens.

    A row may leave the batch and join again: it goes on after the tokens it has.
    """

    prompt: Sequence[int]
    seed: int
    limit: int
    temperature: float
    top_p: float
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    """None while it goes on; "stop" at an end token, "length" at the limit, whatever `leave` says otherwise."""
    _uniforms: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def length(self) -> int:
        """Tokens that are read when it joins."""
        return len(self.prompt) + len(self.tokens)

    def uniform(self) -> float:
        """The number that draws the next token."""
        if len(self._uniforms) <= len(self.tokens):  # they begin the same whatever their count
            self._uniforms = uniforms(self.seed, min(self.limit, 2 * len(self.tokens) + 64))
        return float(self._uniforms[len(self.tokens)])


class ContinuousBatch:
    """The rows in a decoder's hands, each at its own length.

    `join` reads prompts; `step` writes one more token of every row; `leave` takes rows out. Not for several threads.
    Whatever they raise, no token is lost and the batch can be used: a `join` that failed let nobody in, a `step` that
    failed wrote nothing, and where the cache may be half changed no row is left in `rows`; each may join again.
    """

    def __init__(self, decoder: Decoder, end_ids: tuple[int, ...]) -> None:
        self.rows: list[Row] = []
        self._decoder, self._end_ids, self._device = decoder, frozenset(end_ids), decoder.model.device
        self._logits_BV = torch.empty(0, device=self._device)
        decoder.begin()

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> None:
        """Read the rows' prompts (equal ones once, and on a processor what several begin with) and let the rows in.
        Raises EngineError when the output is NaN."""
        texts = [(*row.prompt, *row.tokens) for row in rows]
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        read = self._decoder.read(list(distinct))
        with self._emptied_on_error():
            logits_BV = self._decoder.enter(read, [distinct[text] for text in texts])
            self._logits_BV = torch.cat([self._logits_BV, logits_BV]) if self.rows else logits_BV
        self.rows += rows

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Draw one token for every row and take out those that end with it. Returns the rows that drew one."""
        if not self.rows:
            return []
        before = [(row, len(row.tokens)) for row in self.rows]
        try:
            with self._emptied_on_error():
                return self._step()
        except Exception:
            for row, count in before:
                del row.tokens[count:]
                row.finish_reason = None
            raise

    def _step(self) -> list[Row]:
        drew, token_B = list(self.rows), self._draw()
        for row, token in zip(drew, token_B.tolist(), strict=True):
            row.tokens.append(token)
            if token in self._end_ids:
                row.finish_reason = "stop"
            elif len(row.tokens) >= row.limit:
                row.finish_reason = "length"
        staying = self._keep([row.finish_reason is None for row in drew])
        if self.rows:
            self._logits_BV = self._decoder.step(token_B if staying is None else token_B[staying])
        return drew

    def leave(self, rows: Sequence[Row], reason: str | None) -> None:
        """Take rows out, whatever they were about to say. Without a reason they may join again."""
        gone = set(map(id, rows))
        for row in rows:
            row.finish_reason = row.finish_reason or reason
        with torch.inference_mode(), self._emptied_on_error():
            staying = self._keep([id(row) not in gone for row in self.rows])
            if staying is not None:
                self._logits_BV = self._logits_BV[staying]

    @contextmanager
    def _emptied_on_error(self) -> Iterator[None]:
        """What is half done to the cache cannot be used: every row leaves, and may join again."""
        try:
            yield
        except BaseException:
            self.rows = []
            self._decoder.release()
            raise

    def _draw(self) -> torch.Tensor:
        """token_B. Rows are drawn in groups of like treatment: sorting or not must not depend on the neighbours."""
        token_B = torch.empty(len(self.rows), dtype=torch.long, device=self._device)
        kinds = ("greedy" if row.temperature < TINY else "nucleus" if row.top_p < 1 else "plain" for row in self.rows)
        for kind, places in places_of(kinds).items():
            where = torch.tensor(places, device=self._device)
            logits_BV = self._logits_BV[where]
            if kind == "greedy":
                token_B[where] = logits_BV.argmax(-1)
                continue
            rows = [self.rows[place] for place in places]
            uniform_B = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=self._device)
            heat_B1 = torch.tensor([[row.temperature] for row in rows], device=self._device)
            mass_B1 = torch.tensor([[max(row.top_p, TINY)] for row in rows], device=self._device)
            token_B[where] = draw(logits_BV, uniform_B, heat_B1, mass_B1 if kind == "nucleus" else 1.0)
        return token_B

    def _keep(self, stays: Sequence[bool]) -> torch.Tensor | None:
        """Keep some rows; returns their old places in their new order, None where all stay."""
        count = sum(stays)
        if count == len(stays):
            return None
        staying = fill_holes(~torch.tensor(stays, device=self._device), count)
        self.rows = [self.rows[place] for place in staying.tolist()]
        self._decoder.keep(staying)
        return staying
