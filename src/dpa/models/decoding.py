"""Seeded sampling from any Hugging Face causal language model: the token loop under TransformersSampler.
Run its tests: pytest tests/test_samplers.py

What makes it faster than `generate` on many samples per prompt: a prompt is read once whatever the number of its
samples, rows that have ended leave the batch, the cache grows in strides instead of being copied at every step, and
grouped queries read it where it lies (models/grouped_attention.py). models/fixed_decoding.py is the same for a card.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from dpa.core.errors import EngineError, ModelFileError
from dpa.models.drawing import draw, uniforms
from dpa.models.grouped_attention import grouped_attention

STRIDE = 64  # positions by which the cache grows
LOOK_EVERY = 4  # steps between looks at which rows have ended: each look waits for the device
_LEAVE_AT = 0.94  # ended rows leave once at most this share of the batch is alive


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn: softmax temperature, nucleus mass in (0, 1], longest response, tokens that end one."""

    temperature: float
    top_p: float
    max_new_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int


def check_decodable(model: PreTrainedModel) -> None:
    """Refuse models whose memory is not plain attention (recurrent, hybrid): their rows cannot leave a batch.

    Raises ModelFileError.
    """
    layers = DynamicCache(config=model.config).layers
    if model._is_stateful or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise ModelFileError(
            f"model: {type(model).__name__} keeps a state that is not plain attention, which the transformers sampler "
            "cannot batch; take an attention-only model."
        )


class Forward:
    """One forward pass of a causal language model over a cache: the logits of the last position, whatever its version
    of transformers calls the arguments."""

    def __init__(self, model: PreTrainedModel) -> None:
        takes = inspect.signature(model.forward).parameters
        self.model = model
        self.positioned = "position_ids" in takes
        """Whether the model is told the positions; else it counts what it has seen, and must be given the mask."""
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # newer transformers renamed it
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def __call__(
        self, cache: Cache, ids_BT: torch.Tensor, seen_BS: torch.Tensor | None, positions_BT: torch.Tensor
    ) -> torch.Tensor:
        """logits_BV in single precision. `seen_BS` (bool) says which of the S positions are none of padding's; None
        where all are."""
        fields: dict[str, Any] = {self._cache_name: cache, **self._last_only}
        if self.positioned:
            fields["position_ids"] = positions_BT
        elif seen_BS is None:
            raise ValueError("a model that takes no positions needs the mask")
        seen = None if seen_BS is None else seen_BS.long()
        output = self.model(input_ids=ids_BT, attention_mask=seen, use_cache=True, **fields)
        return output.logits[:, -1].float()


def read_prompts(
    forward: Forward, prompts: Sequence[Sequence[int]], pad_id: int, width: int | None = None
) -> tuple[Cache, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Read P prompts, padded on the left so that all end in the same column: cache, logits_PV, lengths_P and seen_PW
    (None where nothing is padded and the model takes positions). `width` defaults to the longest prompt's length.

    Raises EngineError when the model's output is NaN.
    """
    device = forward.model.device
    width = width or max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    seen = torch.arange(width, device=device) >= (width - lengths)[:, None]
    padded = not forward.positioned or min(map(len, prompts)) < width
    cache = Cache(layer_class_to_replicate=StridedLayer)
    logits_PV = forward(cache, ids, seen if padded else None, (seen.cumsum(-1) - 1).clamp(min=0))
    if bool(logits_PV.isnan().any()):
        raise EngineError("sampler: the model's output is NaN; its weights are damaged or its dtype too narrow.")
    return cache, logits_PV, lengths, seen if padded else None


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    prompt_of_B: Sequence[int],
    seeds_B: Sequence[int],
    limits_B: Sequence[int],
    how: Decoding,
) -> list[list[int]]:
    """Sample B responses: row b continues `prompts[prompt_of_B[b]]` by at most `limits_B[b]` tokens.

    Every draw of row b comes from `seeds_B[b]` alone. Up to the rounding of the model's own arithmetic, a response
    does not depend on the other rows. Returns token ids, the end token included where one was drawn. On a card
    `FixedDecoder` does the same faster.

    Raises EngineError when the model's output is NaN.
    """
    device, forward = model.device, Forward(model)
    ends = torch.tensor(how.end_ids, device=device)
    steps = max(limits_B)
    uniforms_BT = torch.from_numpy(np.stack([uniforms(seed, steps) for seed in seeds_B])).to(device)
    row_of_B = torch.tensor(prompt_of_B, device=device)
    limit_B = torch.tensor(limits_B, device=device)
    tokens_BT = torch.full((len(seeds_B), steps), how.pad_id, device=device)

    cache, logits_BV, lengths, seen = read_prompts(forward, prompts, how.pad_id)
    width = max(map(len, prompts))
    cache.batch_select_indices(row_of_B)
    logits_BV, length_B = logits_BV[row_of_B], lengths[row_of_B]
    seen_BT = None if seen is None else torch.cat([seen[row_of_B], seen.new_ones(len(seeds_B), steps)], dim=1)
    alive_B = torch.arange(len(seeds_B), device=device)  # which row of the output each row of the batch is
    ended_B = torch.zeros_like(alive_B, dtype=torch.bool)
    for step in range(steps):
        token_B = draw(logits_BV, uniforms_BT[:, step], how.temperature, how.top_p)
        tokens_BT[alive_B, step] = token_B
        ended_B |= torch.isin(token_B, ends) | (limit_B <= step + 1)
        if step % LOOK_EVERY == LOOK_EVERY - 1:
            count = len(ended_B) - int(ended_B.sum())
            if count == 0:
                break
            if count <= _LEAVE_AT * len(ended_B):
                staying = fill_holes(ended_B, count)
                for layer in cache.layers:
                    assert isinstance(layer, StridedLayer)
                    layer.keep_rows(staying)
                token_B, uniforms_BT = token_B[staying], uniforms_BT[staying]
                seen_BT = None if seen_BT is None else seen_BT[staying]
                length_B, limit_B = length_B[staying], limit_B[staying]
                alive_B, ended_B = alive_B[staying], ended_B[staying]
        if step + 1 < steps:
            seen = None if seen_BT is None else seen_BT[:, : width + step + 1]
            # A row that has ended stays for some steps: its position must not pass the context.
            position_B = length_B + torch.clamp(limit_B - 1, max=step)
            with grouped_attention(model):
                logits_BV = forward(cache, token_B[:, None], seen, position_B[:, None])
    return [until_end(row, limit, how.end_ids) for row, limit in zip(tokens_BT.tolist(), limits_B, strict=True)]


class StridedLayer(DynamicLayer):
    """Keys and values of one layer, kept at the front of buffers that grow by strides: a step writes one position."""

    keys: torch.Tensor
    values: torch.Tensor
    _key_buffer: torch.Tensor
    _value_buffer: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = self._key_buffer = key_states[:, :, :0]
        self.values = self._value_buffer = value_states[:, :, :0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if end > self._key_buffer.shape[-2]:
            self._key_buffer = _grown(self.keys, end + STRIDE)
            self._value_buffer = _grown(self.values, end + STRIDE)
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._set(self._key_buffer.index_select(0, indices), self._value_buffer.index_select(0, indices))

    def keep_rows(self, staying: torch.Tensor) -> None:
        """Keep the rows `staying`, as `fill_holes` orders them: only those that change place are copied."""
        moved = (staying != torch.arange(len(staying), device=staying.device)).nonzero()[:, 0]
        for buffer in (self._key_buffer, self._value_buffer):
            buffer[moved] = buffer.index_select(0, staying[moved])
        self._set(self._key_buffer[: len(staying)], self._value_buffer[: len(staying)])

    def join(self, other: "StridedLayer") -> None:
        """Take the other's rows in after one's own; the shorter side is padded in front, so that both end together."""
        length = max(self.keys.shape[-2], other.keys.shape[-2])
        self.keys, self._key_buffer = _stacked(self.keys, other.keys, length)
        self.values, self._value_buffer = _stacked(self.values, other.values, length)

    def drop_front(self, count: int) -> None:
        """Forget the first `count` positions, which no row has."""
        self._key_buffer, self._value_buffer = self._key_buffer[:, :, count:], self._value_buffer[:, :, count:]
        self.keys, self.values = self.keys[:, :, count:], self.values[:, :, count:]

    def _set(self, key_buffer: torch.Tensor, value_buffer: torch.Tensor) -> None:
        length = self.keys.shape[-2]
        self._key_buffer, self._value_buffer = key_buffer, value_buffer
        self.keys, self.values = key_buffer[:, :, :length], value_buffer[:, :, :length]


def fill_holes(ended_B: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` rows that go on, those beyond `count` in the places of ended ones before it."""
    staying = torch.arange(count, device=ended_B.device)
    staying[ended_B[:count]] = (~ended_B[count:]).nonzero()[:, 0] + count
    return staying


def _grown(states: torch.Tensor, length: int) -> torch.Tensor:
    buffer = states.new_empty((*states.shape[:2], length, states.shape[3]))
    buffer[:, :, : states.shape[2]] = states
    return buffer


def _stacked(above: torch.Tensor, below: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of both, `length` positions and the buffer they stand in. The padding is zero: a NaN would spread."""
    count = len(above)
    buffer = above.new_zeros((count + len(below), above.shape[1], length + STRIDE, above.shape[3]))
    buffer[:count, :, length - above.shape[2] : length] = above
    buffer[count:, :, length - below.shape[2] : length] = below
    return buffer[:, :, :length], buffer


def until_end(tokens: list[int], limit: int, end_ids: tuple[int, ...]) -> list[int]:
    """A row's tokens up to its first end token, or `limit` of them."""
    end = next((place + 1 for place, token in enumerate(tokens[:limit]) if token in end_ids), limit)
    return tokens[:end]
