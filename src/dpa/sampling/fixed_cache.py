"""A cache in buffers of fixed shapes, so that a card replays a step's forward pass as one CUDA graph.
Run its tests: pytest tests/test_decoding.py

A step of a small model is a thousand kernels that each take less time than their launch. With rows in buffers that stay
where they are, the forward pass of so many rows over so many positions is recorded once and replayed; both numbers are
rounded up (`rung`), so that few need recording. Rows are aligned on the left: each writes at its own length, and one
that joins moves nobody. Buffers and graphs outlive the rows.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from dpa.sampling.forward import Forward, Read
from dpa.sampling.grouped_attention import FIXED, grouped_attention
from dpa.sampling.strided_cache import STRIDE, StridedCache, StridedLayer, layers_of, move_rows, width_of

_log = logging.getLogger(__name__)


def rung(count: int) -> int:
    """`count` rounded up to 2**k or 3 * 2**k."""
    power = 1 << max(count - 1, 0).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


def can_be_recorded(model: PreTrainedModel) -> bool:
    """Whether its steps may be CUDA graphs: rotary embeddings that look how long the sequences are wait for the card,
    and a recording that fails leaves torch's allocator unable to empty its cache."""
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [found, *(kind for kind in found.values() if isinstance(kind, Mapping))]  # by kind of layer, for some
    return all(kind.get("rope_type") not in ("dynamic", "longrope") for kind in kinds)


class FixedLayer(DynamicLayer):
    """Keys and values of one layer in buffers that stay: a step writes each row at the place that `place_R` holds.

    `view` sets how many rows and positions the model is shown.
    """

    def __init__(self, like: StridedLayer, rows: int, length: int, place_R: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self._place_R = like.keys.dtype, like.keys.device, place_R
        self.key_buffer, self.value_buffer = (_room(states, rows, length) for states in (like.keys, like.values))
        self.is_initialized = True

    def view(self, rows: int, length: int) -> None:
        """Show the model the first `rows` rows and `length` positions."""
        self.keys, self.values = self.key_buffer[:rows, :, :length], self.value_buffer[:rows, :, :length]

    def grow(self, rows: int, length: int, place_R: torch.Tensor, live: int) -> None:
        """Other buffers, with the first `live` rows of the present ones."""
        self._place_R = place_R
        self.keys = self.values = None  # they view the old ones
        self.key_buffer = _room(self.key_buffer, rows, length, live)
        self.value_buffer = _room(self.value_buffer, rows, length, live)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        place = self._place_R[: len(key_states), None, None, None]
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.scatter_(2, place.expand_as(states), states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """What makes the new position the last of the view: the mask says which of them are seen."""
        assert self.keys is not None
        return self.keys.shape[-2] - 1


class FixedCache:
    """The rows of a decoder (sampling/decoding.py), at the front of R rows of L positions; see StridedCache.

    With `graphs` steps are recorded, else they run one kernel at a time. A model whose mask is more than what a row has
    seen, such as a sliding window shorter than L, raises NotFixedError at a step, which then has changed nothing.
    """

    prefill_tokens = 65_536

    def __init__(self, graphs: bool) -> None:
        self._graphs = graphs
        self.release()

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether it is worth trying."""
        return model.config._attn_implementation == "sdpa" and Forward(model).positioned

    @property
    def held_bytes(self) -> int:
        states = (buffer for layer in self._layers for buffer in (layer.key_buffer, layer.value_buffer))
        return sum(buffer.nbytes for buffer in (*states, self._logits_RV))

    def release(self) -> None:
        """Forget every row, and give the memory of buffers and graphs back."""
        self.begin(0, 0)
        self._rows = self.width = 0
        self._layers: list[FixedLayer] = []
        self._logits_RV = torch.empty(0, 0)
        self._forget_graphs()

    def begin(self, rows: int, length: int) -> None:
        """Forget every row; `rows` of at most `length` positions are to come, as far as is known."""
        self._count, self._coming = 0, (rows, length)

    def enter(self, read: Read, place_B: torch.Tensor, longest: int) -> None:
        width, rows = width_of(read.cache), self._count + len(place_B)
        room = rung(rows) if self._count and rows > self._rows else rows
        self._make_room(max(room, self._coming[0]), max(longest, width, self._coming[1]), read)
        left_B = width - read.length_P[place_B]
        for ours, theirs in zip(self._layers, layers_of(read.cache), strict=True):
            for buffer, states in ((ours.key_buffer, theirs.keys), (ours.value_buffer, theirs.values)):
                buffer[self._count : rows] = 0  # a NaN of who was there would spread
                buffer[self._count : rows, :, :width] = _shifted(states.index_select(0, place_B), left_B)
        self._count = rows

    def step(self, forward: Forward, token_B: torch.Tensor, length_B: torch.Tensor, longest: int) -> torch.Tensor:
        """See StridedCache. The logits stand until the next step. Raises NotFixedError."""
        if longest >= self.width:
            self._make_room(self._count, rung(longest + 1))
        self._token_R[: self._count] = token_B
        self._place_R.zero_()[: self._count] = length_B
        shape = min(rung(self._count), self._rows), min(max(rung(longest + 1), STRIDE), self.width)
        if self._graphs and shape in self._recorded and self._recorded[shape] is None:
            self._recorded[shape] = self._record(forward, *shape)
        graph = self._recorded.setdefault(shape, None)
        if graph is not None:
            graph.replay()
        else:
            self._run(forward, *shape)
        return self._logits_RV[: self._count]

    def keep(self, staying: torch.Tensor, longest: int) -> None:
        for layer in self._layers:
            for buffer in (layer.key_buffer, layer.value_buffer):
                move_rows(buffer[:, :, :longest], staying)
        self._count = len(staying)

    def is_worth_leaving(self, going_on: int, count: int) -> bool:
        return min(rung(going_on), self._rows) < min(rung(count), self._rows)

    def strided(self, length_B: torch.Tensor, longest: int) -> StridedCache:
        """The same rows in a cache for any attention model."""
        cache = Cache(layer_class_to_replicate=StridedLayer)
        for number, layer in enumerate(self._layers):
            keys, values = (
                _shifted(buffer[: self._count, :, :longest], length_B - longest)
                for buffer in (layer.key_buffer, layer.value_buffer)
            )
            cache.update(keys, values, number)
        other = StridedCache()
        every = torch.arange(self._count, device=length_B.device)
        other.enter(Read(cache, self._logits_RV, length_B, padded=True), every, longest)
        return other

    def _make_room(self, rows: int, length: int, read: Read | None = None) -> None:
        """Buffers that hold so much: the present ones where they do. Those who are in stay in, none being longer."""
        if rows <= self._rows and length <= self.width:
            return
        wider, longer = max(rows, self._rows), max(length, self.width)
        if wider * longer <= 2 * rows * length:  # what fits both serves both; much more than is needed would be waste
            rows, length = wider, longer
        length += -length % STRIDE
        self._forget_graphs()
        self._rows = self.width = 0  # should the memory run out
        like = self._logits_RV if read is None else read.logits_PV
        self._logits_RV = like.new_zeros(rows, like.shape[1])
        self._token_R = torch.zeros(rows, dtype=torch.long, device=self._logits_RV.device)
        self._place_R = torch.zeros_like(self._token_R)
        if self._count:
            for layer in self._layers:
                layer.grow(rows, length, self._place_R, self._count)
        else:
            assert read is not None
            self._layers = []  # the memory first
            self._layers = [FixedLayer(layer, rows, length, self._place_R) for layer in layers_of(read.cache)]
        self._rows, self.width = rows, length

    def _forget_graphs(self) -> None:
        self._recorded: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        """By rows and positions; None after the first step of that shape, which ran as it is."""
        self._pool: Any = None

    def _record(self, forward: Forward, rows: int, length: int) -> torch.cuda.CUDAGraph | None:
        """The forward pass as a graph; None, from then on, where the model does what no graph can hold."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # Other threads (a server's scorer) use the card meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._run(forward, rows, length)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            _log.warning("sampler: this model's steps cannot be recorded as CUDA graphs (%s); they run slower.", reason)
            self._graphs = False
            return None
        return graph

    def _run(self, forward: Forward, rows: int, length: int) -> None:
        """The forward pass of the first `rows` rows over `length` positions. Nothing here may wait for the device."""
        for layer in self._layers:
            layer.view(rows, length)
        place_R = self._place_R[:rows]
        seen_RL = torch.arange(length, device=place_R.device) <= place_R[:, None]
        with grouped_attention(forward.model, FIXED):
            cache = Cache(layers=list(self._layers))
            self._logits_RV[:rows] = forward(cache, self._token_R[:rows, None], seen_RL, place_R[:, None])


def _room(like: torch.Tensor, rows: int, length: int, live: int = 0) -> torch.Tensor:
    """A buffer for states (B, heads, T, width), with the first `live` rows of those."""
    buffer = like.new_zeros((rows, like.shape[1], length, like.shape[3]))
    both = min(length, like.shape[2])
    buffer[:live, :, :both] = like[:live, :, :both]
    return buffer


def _shifted(states: torch.Tensor, left_B: torch.Tensor) -> torch.Tensor:
    """Every row moved to the left by so many positions; what comes in at the edge repeats the edge's."""
    positions = states.shape[2]
    place_BT = (torch.arange(positions, device=states.device) + left_B[:, None]).clamp(0, positions - 1)
    return states.gather(2, place_BT[:, None, :, None].expand_as(states))
