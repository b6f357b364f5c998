"""The token loop in buffers of fixed shapes, so that a card replays a whole step as one CUDA graph.
Run its tests: pytest tests/test_decoding.py

A step of a small model is a thousand kernels that each take less time than their launch. With rows and cache in buffers
that stay where they are, a step of so many rows over so many positions is recorded once and replayed; both numbers are
rounded up (`rung`), so that few steps need recording. The graphs and buffers outlive a call: keep the decoder.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from dpa.models.decoding import LOOK_EVERY, STRIDE, Decoding, Forward, StridedLayer, fill_holes, read_prompts, until_end
from dpa.models.drawing import draw, uniforms
from dpa.models.grouped_attention import FIXED, NotFixedError, grouped_attention

PREFILL_TOKENS = 65_536  # prompt tokens, padding included, that are read at once

_log = logging.getLogger(__name__)


def rung(count: int) -> int:
    """`count` rounded up to 2**k or 3 * 2**k."""
    power = 1 << max(count - 1, 0).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


class FixedLayer(DynamicLayer):
    """Keys and values of one layer in buffers that never move: a step writes the column that `column` holds.

    `view` sets how many rows and positions the model is shown.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, column: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.key_buffer, self.value_buffer, self._column = keys, values, column
        self.is_initialized = True

    def view(self, rows: int, length: int) -> None:
        """Show the model the first `rows` rows and `length` positions."""
        self.keys, self.values = self.key_buffer[:rows, :, :length], self.value_buffer[:rows, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        return keys.index_copy_(2, self._column, key_states), values.index_copy_(2, self._column, value_states)

    def get_seq_length(self) -> int:
        """What makes the new position the last of the view: the mask says which of them are seen."""
        assert self.keys is not None
        return self.keys.shape[-2] - 1


@dataclass
class _Buffers:
    """What a step reads and writes, for R rows of L positions and T new tokens. One more line takes the lost rows."""

    cache: Cache
    column: torch.Tensor  # (1,) where the new position is written
    step: torch.Tensor  # (1,) new tokens drawn so far, less one
    token_R: torch.Tensor
    length_R: torch.Tensor  # of the prompt
    limit_R: torch.Tensor
    alive_R: torch.Tensor  # which row of the output each row is; R where it is none
    ended_R: torch.Tensor
    seen_RL: torch.Tensor
    uniform_RT: torch.Tensor
    tokens_RT: torch.Tensor  # (R + 1, T)
    graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = field(default_factory=dict)
    """By rows and positions; None after the first step of that shape, which ran as it is."""

    @property
    def layers(self) -> list[FixedLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, FixedLayer)]


class FixedDecoder:
    """What `decode` does, for one model and one way to draw, on a card as CUDA graphs.

    `graphs` (default: where the model is on a CUDA card) records steps; without it they run one kernel at a time.
    `fits` says whether the model's attention can be fixed at all: SDPA, positions given, no sliding window shorter
    than a response. A model that turns out not to be raises NotFixedError at its first step.
    """

    def __init__(self, model: PreTrainedModel, how: Decoding, graphs: bool | None = None) -> None:
        self._forward, self._how = Forward(model), how
        self._graphs = model.device.type == "cuda" if graphs is None else graphs
        self._ends = torch.tensor(how.end_ids, device=model.device)
        self._buffers: _Buffers | None = None
        self._pool: Any = None

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether it is worth trying."""
        return model.config._attn_implementation == "sdpa" and Forward(model).positioned

    @property
    def held_bytes(self) -> int:
        """Of the cache that is kept for the next call."""
        if self._buffers is None:
            return 0
        return sum(layer.key_buffer.nbytes + layer.value_buffer.nbytes for layer in self._buffers.layers)

    def release(self) -> None:
        """Give the memory of buffers and graphs back."""
        self._buffers = self._pool = None

    @torch.inference_mode()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_of_B: Sequence[int],
        seeds_B: Sequence[int],
        limits_B: Sequence[int],
    ) -> list[list[int]]:
        """See `dpa.models.decoding.decode`. Raises EngineError, NotFixedError."""
        width, steps, count = max(map(len, prompts)), max(limits_B), len(seeds_B)
        buffers, logits_BV = self._read(prompts, prompt_of_B, count, width, steps)
        device, rows = logits_BV.device, len(buffers.token_R)
        buffers.limit_R.fill_(1)[:count] = torch.tensor(limits_B, device=device)
        buffers.alive_R.fill_(rows)[:count] = torch.arange(count, device=device)
        buffers.ended_R.fill_(True)[:count] = False
        buffers.uniform_RT[:count, :steps] = torch.from_numpy(np.stack([uniforms(seed, steps) for seed in seeds_B])).to(
            device
        )
        buffers.column.fill_(width - 1)
        buffers.step.fill_(-1)
        buffers.tokens_RT.fill_(self._how.pad_id)
        self._draw(buffers, logits_BV, count)
        del logits_BV
        for step in range(1, steps):
            if step % LOOK_EVERY == 0:
                going = count - int(buffers.ended_R[:count].sum())
                if going == 0:
                    break
                if min(rung(going), rows) < min(rung(count), rows):
                    _keep(buffers, fill_holes(buffers.ended_R[:count], going), width + step)
                    count = going
            length = min(rung(width + step), buffers.seen_RL.shape[1])
            self._advance(buffers, min(rung(count), rows), max(length, min(STRIDE, buffers.seen_RL.shape[1])))
        tokens = buffers.tokens_RT[: len(seeds_B)].tolist()
        return [until_end(row, limit, self._how.end_ids) for row, limit in zip(tokens, limits_B, strict=True)]

    # --- before the first token ----------------------------------------------------------------------------------

    def _read(
        self, prompts: Sequence[Sequence[int]], prompt_of_B: Sequence[int], count: int, width: int, steps: int
    ) -> tuple[_Buffers, torch.Tensor]:
        """Read the prompts some at a time, each once, into the rows that continue them: buffers, logits_BV."""
        buffers: _Buffers | None = None
        logits_BV: torch.Tensor | None = None
        prompt_B = torch.tensor(prompt_of_B)
        at_once = max(1, PREFILL_TOKENS // width)
        for start in range(0, len(prompts), at_once):
            cache, logits_PV, lengths_P, seen_PW = read_prompts(
                self._forward, prompts[start : start + at_once], self._how.pad_id, width
            )
            if buffers is None:
                buffers = self._sized(cache, count, width + steps, steps)
                logits_BV = logits_PV.new_empty(count, logits_PV.shape[1])
                buffers.seen_RL.zero_()
                buffers.seen_RL[:, width - 1] = True
            assert logits_BV is not None
            rows = ((prompt_B >= start) & (prompt_B < start + at_once)).nonzero()[:, 0]
            place = (prompt_B[rows] - start).to(logits_PV.device)
            rows = rows.to(logits_PV.device)
            for ours, theirs in zip(buffers.layers, cache.layers, strict=True):
                assert isinstance(theirs, StridedLayer)
                ours.key_buffer[:, :, :width].index_copy_(0, rows, theirs.keys.index_select(0, place))
                ours.value_buffer[:, :, :width].index_copy_(0, rows, theirs.values.index_select(0, place))
            logits_BV[rows], buffers.length_R[rows] = logits_PV[place], lengths_P[place]
            buffers.seen_RL[rows, :width] = True if seen_PW is None else seen_PW[place]
        assert buffers is not None and logits_BV is not None
        return buffers, logits_BV

    def _sized(self, cache: Cache, rows: int, length: int, steps: int) -> _Buffers:
        """Buffers that hold so much: the present ones where they do, else new ones, like the `cache` just read."""
        old = self._buffers
        if old is not None:
            if rows <= len(old.token_R) and length <= old.seen_RL.shape[1] and steps <= old.uniform_RT.shape[1]:
                return old
            rows, length = max(rows, len(old.token_R)), max(length, old.seen_RL.shape[1])
            steps = max(steps, old.uniform_RT.shape[1])
        old = None
        self.release()
        device = self._forward.model.device
        length += -length % STRIDE
        column = torch.zeros(1, dtype=torch.long, device=device)
        layers: list[Any] = []
        for layer in cache.layers:
            assert isinstance(layer, StridedLayer)
            keys, values = (
                states.new_zeros((rows, states.shape[1], length, states.shape[3]))
                for states in (layer.keys, layer.values)
            )
            layers.append(FixedLayer(keys, values, column))
        whole = partial(torch.zeros, dtype=torch.long, device=device)
        self._buffers = _Buffers(
            cache=Cache(layers=layers),
            column=column,
            step=whole(1),
            token_R=whole(rows),
            length_R=whole(rows),
            limit_R=whole(rows),
            alive_R=whole(rows),
            ended_R=torch.ones(rows, dtype=torch.bool, device=device),
            seen_RL=torch.zeros(rows, length, dtype=torch.bool, device=device),
            uniform_RT=torch.zeros(rows, steps, dtype=torch.float64, device=device),
            tokens_RT=whole(rows + 1, steps),
        )
        return self._buffers

    # --- a step --------------------------------------------------------------------------------------------------

    def _advance(self, buffers: _Buffers, rows: int, length: int) -> None:
        """One step of the first `rows` rows over `length` positions: its first time as it is, then as a graph."""
        shape = rows, length
        for layer in buffers.layers:
            layer.view(rows, length)
        if self._graphs and shape in buffers.graphs and buffers.graphs[shape] is None:
            buffers.graphs[shape] = self._record(buffers, rows, length)
        graph = buffers.graphs.setdefault(shape, None)
        if graph is not None:
            graph.replay()
        else:
            self._step(buffers, rows, length)

    def _record(self, buffers: _Buffers, rows: int, length: int) -> torch.cuda.CUDAGraph | None:
        """The step as a graph; None, from then on, where the model does what no graph can hold."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._step(buffers, rows, length)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            _log.warning("sampler: this model's steps cannot be recorded as CUDA graphs (%s); they run slower.", reason)
            self._graphs = False
            return None
        return graph

    def _step(self, buffers: _Buffers, rows: int, length: int) -> None:
        """Write the last token's position and draw the next one. Nothing here may wait for the device."""
        buffers.column += 1
        buffers.seen_RL[:rows].index_fill_(1, buffers.column, True)
        # A row that has ended stays for some steps: its position must not pass the context.
        position_R = buffers.length_R[:rows] + torch.minimum(buffers.step, buffers.limit_R[:rows] - 1)
        with grouped_attention(self._forward.model, FIXED):
            logits_RV = self._forward(
                buffers.cache, buffers.token_R[:rows, None], buffers.seen_RL[:rows, :length], position_R[:, None]
            )
        self._draw(buffers, logits_RV, rows)

    def _draw(self, buffers: _Buffers, logits_RV: torch.Tensor, rows: int) -> None:
        buffers.step += 1
        uniform_R = buffers.uniform_RT[:rows].index_select(1, buffers.step)[:, 0]
        token_R = draw(logits_RV, uniform_R, self._how.temperature, self._how.top_p)
        buffers.token_R[:rows] = token_R
        buffers.tokens_RT.index_put_((buffers.alive_R[:rows], buffers.step.expand(rows)), token_R)
        over_R = (token_R[:, None] == self._ends).any(1) | (buffers.limit_R[:rows] <= buffers.step + 1)
        buffers.ended_R[:rows] |= over_R


def _keep(buffers: _Buffers, staying: torch.Tensor, length: int) -> None:
    """Move the rows `staying` to the front, as `fill_holes` orders them; the others are lost."""
    count = len(staying)
    moved = (staying != torch.arange(count, device=staying.device)).nonzero()[:, 0]
    source = staying[moved]
    for layer in buffers.layers:
        for buffer in (layer.key_buffer, layer.value_buffer):
            buffer[:, :, :length].index_copy_(0, moved, buffer[:, :, :length].index_select(0, source))
    for rows in (
        buffers.token_R,
        buffers.length_R,
        buffers.limit_R,
        buffers.alive_R,
        buffers.ended_R,
        buffers.seen_RL,
        buffers.uniform_RT,
    ):
        rows[moved] = rows[source]
    buffers.alive_R[count:] = len(buffers.token_R)
    buffers.ended_R[count:] = True


__all__ = ["FixedDecoder", "FixedLayer", "NotFixedError", "rung"]
