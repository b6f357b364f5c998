"""Continuous batching: rows join and leave between two steps, so that a server answers many at once.
Run its tests: pytest tests/test_engine.py

Same draws as models/decoding.py: a row's numbers come from its seed alone, so an answer does not depend, up to the
rounding of the model's own arithmetic, on who else is in the batch.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from dpa.core.errors import EngineError
from dpa.models.decoding import STRIDE, StridedLayer, check_decodable, fill_holes
from dpa.models.drawing import draw, uniforms

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
            self._uniforms = uniforms(self.seed, min(self.limit, 2 * len(self.tokens) + STRIDE))
        return float(self._uniforms[len(self.tokens)])


class ContinuousBatch:
    """The rows in the model's hands, each at its own length, and the cache they share, aligned on the right.

    `join` reads prompts; `step` writes one more token of every row; `leave` takes rows out. Not for several threads.
    Whatever they raise, no token is lost and the batch can be used: a `join` that failed let nobody in, a `step` that
    failed wrote nothing, and where the cache may be half changed no row is left in `rows`; each may join again. Raises
    ModelFileError for a model whose memory is not plain attention.
    """

    def __init__(self, model: PreTrainedModel, end_ids: tuple[int, ...], pad_id: int) -> None:
        check_decodable(model)
        self.rows: list[Row] = []
        self._model, self._end_ids, self._pad_id = model, frozenset(end_ids), pad_id
        self._device = model.device
        takes = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # newer transformers renamed it
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._positioned = "position_ids" in takes
        self._cache: Cache | None = None
        self._logits_BV = torch.empty(0, device=self._device)
        self._length_B = torch.empty(0, dtype=torch.long, device=self._device)

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> None:
        """Read the rows' prompts (equal ones once) and let the rows in. Raises EngineError when the output is NaN."""
        texts = [(*row.prompt, *row.tokens) for row in rows]
        prompts = list(dict.fromkeys(texts))
        distinct = {prompt: place for place, prompt in enumerate(prompts)}
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad_id] * (width - len(ids)) + list(ids) for ids in prompts], device=self._device)
        lengths = torch.tensor([len(ids) for ids in prompts], device=self._device)
        seen = torch.arange(width, device=self._device) >= (width - lengths)[:, None]
        cache = Cache(layer_class_to_replicate=StridedLayer)
        logits_BV = self._forward(cache, ids, seen.long(), (seen.cumsum(-1) - 1).clamp(min=0))
        if bool(logits_BV.isnan().any()):
            raise EngineError("engine: the model's output is NaN; its weights are damaged or its dtype too narrow.")
        place_B = torch.tensor([distinct[text] for text in texts], device=self._device)
        cache.batch_select_indices(place_B)
        logits_BV, lengths = logits_BV[place_B], lengths[place_B]
        with self._emptied_on_error():
            if self._cache is None:
                self._cache, self._logits_BV, self._length_B = cache, logits_BV, lengths
            else:
                for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
                    assert isinstance(ours, StridedLayer) and isinstance(theirs, StridedLayer)
                    ours.join(theirs)
                self._logits_BV = torch.cat([self._logits_BV, logits_BV])
                self._length_B = torch.cat([self._length_B, lengths])
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
        if staying is not None:
            token_B = token_B[staying]
        if self.rows:
            assert self._cache is not None
            width = self._width() + 1
            seen = torch.arange(width, device=self._device) >= (width - 1 - self._length_B)[:, None]
            self._logits_BV = self._forward(self._cache, token_B[:, None], seen.long(), self._length_B[:, None])
            self._length_B = self._length_B + 1
        return drew

    def leave(self, rows: Sequence[Row], reason: str | None) -> None:
        """Take rows out, whatever they were about to say. Without a reason they may join again."""
        gone = set(map(id, rows))
        for row in rows:
            row.finish_reason = row.finish_reason or reason
        with torch.inference_mode(), self._emptied_on_error():
            self._keep([id(row) not in gone for row in self.rows])

    @contextmanager
    def _emptied_on_error(self) -> Iterator[None]:
        """What is half done to the cache cannot be used: every row leaves, and may join again."""
        try:
            yield
        except BaseException:
            self.rows, self._cache = [], None
            raise

    def _draw(self) -> torch.Tensor:
        """token_B. Rows are drawn in groups of like treatment: sorting or not must not depend on the neighbours."""
        token_B = torch.empty(len(self.rows), dtype=torch.long, device=self._device)
        groups: dict[str, list[int]] = {}
        for place, row in enumerate(self.rows):
            kind = "greedy" if row.temperature < TINY else "nucleus" if row.top_p < 1 else "plain"
            groups.setdefault(kind, []).append(place)
        for kind, places in groups.items():
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
        self._logits_BV, self._length_B = self._logits_BV[staying], self._length_B[staying]
        if not self.rows:
            self._cache = None
            return staying
        assert self._cache is not None
        slack = self._width() - int(self._length_B.max())
        for layer in self._cache.layers:
            assert isinstance(layer, StridedLayer)
            layer.keep_rows(staying)
            if slack >= STRIDE:
                layer.drop_front(slack)
        return staying

    def _width(self) -> int:
        assert self._cache is not None
        layer = self._cache.layers[0]
        assert isinstance(layer, StridedLayer)
        return layer.keys.shape[-2]

    def _forward(self, cache: Cache, ids: torch.Tensor, seen: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        where = {"position_ids": positions} if self._positioned else {}
        remembered = {self._cache_name: cache}
        output = self._model(
            input_ids=ids, attention_mask=seen, use_cache=True, **remembered, **where, **self._last_only
        )
        return output.logits[:, -1].float()
