"""A cache for any attention model: it ends at the newest position, its rows are aligned on the right, and it grows in
strides instead of being copied at every step.
Run its tests: pytest tests/test_decoding.py
"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer

from dpa.sampling.forward import Forward, Read
from dpa.sampling.grouped_attention import grouped_attention

STRIDE = 64  # positions by which the cache grows
_LEAVE_AT = 0.94  # ended rows leave once at most this share of the batch is alive


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
        for buffer in (self._key_buffer, self._value_buffer):
            move_rows(buffer, staying)
        self._set(self._key_buffer[: len(staying)], self._value_buffer[: len(staying)])

    def join(self, others: Sequence["StridedLayer"]) -> None:
        """Take the others' rows in after one's own, and leave them none; shorter ones are padded in front, so that all
        end together."""
        layers = [self, *others]
        length = max(layer.keys.shape[-2] for layer in layers)
        self.keys, self._key_buffer = _stacked([layer.keys for layer in layers], length)
        self.values, self._value_buffer = _stacked([layer.values for layer in layers], length)
        for other in others:
            other.keys = other.values = other._key_buffer = other._value_buffer = torch.empty(0)

    def drop_front(self, count: int) -> None:
        """Forget the first `count` positions, which no row has."""
        self._key_buffer, self._value_buffer = self._key_buffer[:, :, count:], self._value_buffer[:, :, count:]
        self.keys, self.values = self.keys[:, :, count:], self.values[:, :, count:]

    def _set(self, key_buffer: torch.Tensor, value_buffer: torch.Tensor) -> None:
        length = self.keys.shape[-2]
        self._key_buffer, self._value_buffer = key_buffer, value_buffer
        self.keys, self.values = key_buffer[:, :, :length], value_buffer[:, :, :length]


def layers_of(cache: Cache) -> list[StridedLayer]:
    """The layers of a cache that is strided."""
    layers = [layer for layer in cache.layers if isinstance(layer, StridedLayer)]
    assert len(layers) == len(cache.layers)
    return layers


def width_of(cache: Cache) -> int:
    """Positions of a cache that is strided, padding included."""
    return layers_of(cache)[0].keys.shape[-2]


class StridedCache:
    """The rows of a decoder (sampling/decoding.py), all of one width; FixedCache has the same methods."""

    prefill_tokens = 8192
    """Prompt tokens, padding included and shared ones counted once, that are read at once."""
    held_bytes = 0
    """Of what is kept for the next rows when all have left."""

    def __init__(self) -> None:
        self.release()

    def release(self) -> None:
        """Forget every row, and give the memory back."""
        self._cache: Cache | None = None
        self._entered: list[Cache] = []
        self._padded = False

    def begin(self, rows: int, length: int) -> None:
        """Forget every row."""
        self.release()

    def enter(self, read: Read, place_B: torch.Tensor, longest: int) -> None:
        """Let rows in: row b continues the prompt `place_B[b]` of what was read. None, old or new, is longer than
        `longest`."""
        read.cache.batch_select_indices(place_B)
        if self._cache is None:
            self._cache, self._padded = read.cache, read.padded
            return
        self._padded |= read.padded or width_of(self._cache) != width_of(read.cache)
        self._entered.append(read.cache)

    def _settle(self) -> Cache:
        """Those that entered stand with the others; they are moved once, however many reads they came in."""
        assert self._cache is not None
        if self._entered:
            for ours, *theirs in zip(layers_of(self._cache), *map(layers_of, self._entered), strict=True):
                ours.join(theirs)
            self._entered = []
        return self._cache

    def step(self, forward: Forward, token_B: torch.Tensor, length_B: torch.Tensor, longest: int) -> torch.Tensor:
        """Write a token of every row, whose lengths before it are `length_B`: logits_BV."""
        cache = self._settle()
        width = width_of(cache) + 1
        seen_BS = None
        if self._padded:
            seen_BS = torch.arange(width, device=token_B.device) >= (width - 1 - length_B)[:, None]
        with grouped_attention(forward.model):
            return forward(cache, token_B[:, None], seen_BS, length_B[:, None]).float()

    def keep(self, staying: torch.Tensor, longest: int) -> None:
        """Keep the rows `staying`, as `fill_holes` orders them; none of them is longer than `longest`."""
        cache = self._settle()
        slack = width_of(cache) - longest
        for layer in layers_of(cache):
            layer.keep_rows(staying)
            if slack >= STRIDE:
                layer.drop_front(slack)

    def is_worth_leaving(self, going_on: int, count: int) -> bool:
        """Whether steps are faster once only `going_on` of `count` rows are left."""
        return going_on <= _LEAVE_AT * count

    @property
    def width(self) -> int:
        """Positions, padding included."""
        return width_of(self._settle())


def fill_holes(ended_B: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` rows that go on, those beyond `count` in the places of ended ones before it."""
    staying = torch.arange(count, device=ended_B.device)
    staying[ended_B[:count]] = (~ended_B[count:]).nonzero()[:, 0] + count
    return staying


def move_rows(states: torch.Tensor, staying: torch.Tensor) -> None:
    """Bring the rows `staying`, as `fill_holes` orders them, to the front; those that have their place stay there."""
    moved = (staying != torch.arange(len(staying), device=staying.device)).nonzero()[:, 0]
    states.index_copy_(0, moved, states.index_select(0, staying[moved]))


def _grown(states: torch.Tensor, length: int) -> torch.Tensor:
    buffer = states.new_empty((*states.shape[:2], length, states.shape[3]))
    buffer[:, :, : states.shape[2]] = states
    return buffer


def _stacked(parts: Sequence[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of all, `length` positions and the buffer they stand in. The padding is zero: a NaN would spread."""
    _, heads, _, width = parts[0].shape
    buffer = parts[0].new_zeros((sum(map(len, parts)), heads, length + STRIDE, width))
    for rows, part in zip(buffer.split([len(part) for part in parts]), parts, strict=True):
        rows[:, :, length - part.shape[2] : length] = part
    return buffer[:, :, :length], buffer
