"""Seeded sampling from any Hugging Face causal language model: prompts are read, a token of every row is written at a
step, rows leave. `decode` here and ContinuousBatch (sampling/batching.py) both drive a `Decoder`.
Run its tests: pytest tests/test_decoding.py

What makes it faster than `generate` on many samples per prompt: a prompt is read once whatever the number of its
samples, and on a processor so is what several prompts begin with (packed_prompts.py), rows that have ended leave the
batch, the cache is not copied at every step (strided_cache.py; on a card fixed_cache.py), and grouped queries read it
where it lies (grouped_attention.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from dpa.core.errors import EngineError
from dpa.core.records import places_of
from dpa.models.shared_prefixes import WORTH_SHARING, Family, families, tokens_read
from dpa.sampling.drawing import draw, uniforms
from dpa.sampling.fixed_cache import FixedCache, can_be_recorded
from dpa.sampling.forward import Forward, Read, check_decodable
from dpa.sampling.grouped_attention import NotFixedError
from dpa.sampling.packed_prompts import can_be_packed, read_packed
from dpa.sampling.strided_cache import StridedCache, StridedLayer, fill_holes

LOOK_EVERY = 4  # steps between looks at which rows have ended: each look waits for the device
_PADDING = 0  # it is masked, so any token will do, and the tokenizer's own may lie beyond the embedding


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn: softmax temperature, nucleus mass in (0, 1], longest response, tokens that end one."""

    temperature: float
    top_p: float
    max_new_tokens: int
    end_ids: tuple[int, ...]


class Decoder:
    """A model and the rows in its hands. Not for several threads.

    `cache` is `fixed` where the model lies on a CUDA card and its attention can be fixed, else `strided`; a fixed one
    gives way to a strided one at the first step it cannot take. Up to the rounding of the model's own arithmetic a
    row's logits depend neither on the other rows nor on the cache. After an error in `enter`, `step` or `keep` the
    cache may be half changed: `begin` again, or `release` it. Raises ModelFileError for a model whose memory is not
    plain attention.
    """

    def __init__(self, model: PreTrainedModel, cache: Literal["strided", "fixed"] | None = None) -> None:
        check_decodable(model)
        on_card = model.device.type == "cuda"
        fixed = on_card and FixedCache.fits(model) if cache is None else cache == "fixed"
        self.model, self._forward = model, Forward(model)
        self._packs = can_be_packed(self._forward)
        self._cache: StridedCache | FixedCache = (
            FixedCache(graphs=on_card and can_be_recorded(model)) if fixed else StridedCache()
        )
        self.begin()

    @property
    def held_bytes(self) -> int:
        """Of the cache that is kept for the next rows."""
        return self._cache.held_bytes

    @property
    def width(self) -> int:
        """Positions that the cache now has."""
        return self._cache.width

    def begin(self, rows: int = 0, length: int = 0) -> None:
        """Forget every row; `rows` of at most `length` positions are to come, as far as is known."""
        self._cache.begin(rows, length)
        self._length_B = torch.empty(0, dtype=torch.long, device=self.model.device)
        self._longest = 0

    def release(self) -> None:
        """The same, and give the memory back."""
        self.begin()
        self._cache.release()

    def parts(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Places of the prompts in the parts that are best read together. They come in the order given, but where they
        share enough, those that begin alike stand beside the first of them."""
        budget, found = self._cache.prefill_tokens, self._families(prompts, sum(map(len, prompts)))
        if found is None:
            at_once = max(1, budget // max(map(len, prompts), default=1))
            places = list(range(len(prompts)))
            return [places[start : start + at_once] for start in range(0, len(prompts), at_once)]
        parts: list[list[int]] = []
        tokens = 0
        for family in found:
            own = tokens_read(prompts, [family])
            if not parts or tokens + own > budget:
                parts.append([])
                tokens = 0
            parts[-1] += family.places
            tokens += own
        return parts

    def read(self, prompts: Sequence[Sequence[int]]) -> Read:
        """Read P prompts. Raises EngineError when the model's output is NaN."""
        found = self._families(prompts, len(prompts) * max(map(len, prompts)))
        read = self._read_padded(prompts) if found is None else read_packed(self._forward, prompts, found)
        if bool(read.logits_PV.isnan().any()):
            raise EngineError("decoding: the model's output is NaN; its weights are damaged or its dtype too narrow.")
        return read._replace(logits_PV=read.logits_PV.float())

    def _families(self, prompts: Sequence[Sequence[int]], otherwise: int) -> list[Family] | None:
        """Who is read behind whom; None where that is not possible, or not worth it beside `otherwise` tokens."""
        if not self._packs or len(prompts) < 2:
            return None
        found = families(prompts, self._cache.prefill_tokens)
        return found if tokens_read(prompts, found) <= WORTH_SHARING * otherwise else None

    def _read_padded(self, prompts: Sequence[Sequence[int]]) -> Read:
        device, width = self.model.device, max(map(len, prompts))
        ids = [[_PADDING] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        length_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
        seen = torch.arange(width, device=device) >= (width - length_P)[:, None]
        padded = not self._forward.positioned or min(map(len, prompts)) < width
        cache = Cache(layer_class_to_replicate=StridedLayer)
        mask = seen if padded else None
        logits_PV = self._forward(cache, torch.tensor(ids, device=device), mask, seen.cumsum(-1) - 1)
        return Read(cache, logits_PV, length_P, padded)

    def enter(self, read: Read, prompt_of_B: Sequence[int]) -> torch.Tensor:
        """Let rows in, behind those that are: row b continues the prompt `prompt_of_B[b]` of those read. logits_BV."""
        place_B = torch.tensor(prompt_of_B, device=self.model.device)
        length_B = read.length_P[place_B]
        longest = max(self._longest, int(length_B.max()))
        self._cache.enter(read, place_B, longest)
        self._length_B, self._longest = torch.cat([self._length_B, length_B]), longest
        return read.logits_PV[place_B]

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        """Write the next token of every row: logits_BV of the one after it, which stand until the next step."""
        inputs = self._forward, token_B, self._length_B, self._longest
        try:
            logits_BV = self._cache.step(*inputs)
        except NotFixedError:
            assert isinstance(self._cache, FixedCache)
            self._cache = self._cache.strided(self._length_B, self._longest)
            logits_BV = self._cache.step(*inputs)
        self._length_B = self._length_B + 1
        self._longest += 1
        return logits_BV

    def is_worth_leaving(self, going_on: int) -> bool:
        """Whether steps are faster once only `going_on` rows are left."""
        return self._cache.is_worth_leaving(going_on, len(self._length_B))

    def keep(self, staying: torch.Tensor) -> None:
        """Keep the rows `staying`, as `fill_holes` orders them."""
        if not len(staying):
            self.begin()
            return
        self._length_B = self._length_B[staying]
        self._longest = int(self._length_B.max())
        self._cache.keep(staying, self._longest)


@torch.inference_mode()
def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    prompt_of_B: Sequence[int],
    seeds_B: Sequence[int],
    limits_B: Sequence[int],
    how: Decoding,
) -> list[list[int]]:
    """Sample B responses: row b continues `prompts[prompt_of_B[b]]` by at most `limits_B[b]` tokens.

    Every draw of row b comes from `seeds_B[b]` alone. Returns token ids, the end token included where one was drawn.
    Whoever was in the decoder's hands is forgotten. Raises EngineError when the model's output is NaN.
    """
    device, steps = decoder.model.device, max(limits_B)
    decoder.begin(len(seeds_B), max(map(len, prompts)) + steps)
    rows_P = places_of(prompt_of_B)
    order, entered = [], []
    for part in decoder.parts(prompts):  # rows stand in the order in which their prompts are read
        rows = [(b, place) for place, prompt in enumerate(part) for b in rows_P.get(prompt, ())]
        order += [b for b, _ in rows]
        entered.append(decoder.enter(decoder.read([prompts[prompt] for prompt in part]), [place for _, place in rows]))
    logits_BV = entered[0] if len(entered) == 1 else torch.cat(entered)
    del entered

    ends = torch.tensor(how.end_ids, device=device)
    uniforms_BT = torch.from_numpy(np.stack([uniforms(seeds_B[b], steps) for b in order])).to(device)
    limit_B = torch.tensor([limits_B[b] for b in order], device=device)
    tokens_BT = torch.zeros((len(seeds_B), steps), dtype=torch.long, device=device)
    alive_B = torch.tensor(order, device=device)  # which row of the output each row of the batch is
    ended_B = torch.zeros_like(alive_B, dtype=torch.bool)
    for step in range(steps):
        token_B = draw(logits_BV, uniforms_BT[:, step], how.temperature, how.top_p)
        tokens_BT[alive_B, step] = token_B
        ended_B |= torch.isin(token_B, ends) | (limit_B <= step + 1)
        if step % LOOK_EVERY == LOOK_EVERY - 1:
            count = len(ended_B) - int(ended_B.sum())
            if count == 0:
                break
            if decoder.is_worth_leaving(count):
                staying = fill_holes(ended_B, count)
                decoder.keep(staying)
                token_B, uniforms_BT, limit_B = token_B[staying], uniforms_BT[staying], limit_B[staying]
                alive_B, ended_B = alive_B[staying], ended_B[staying]
        if step + 1 < steps:
            logits_BV = decoder.step(token_B)
    decoder.begin()
    return [until_end(row, limit, how.end_ids) for row, limit in zip(tokens_BT.tolist(), limits_B, strict=True)]


def until_end(tokens: list[int], limit: int, end_ids: tuple[int, ...]) -> list[int]:
    """A row's tokens up to its first end token, or `limit` of them."""
    end = next((place + 1 for place, token in enumerate(tokens[:limit]) if token in end_ids), limit)
    return tokens[:end]
