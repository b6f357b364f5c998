"""Attention over packed rows: several sequences behind each other in one row, none of which sees another.
Run its tests: pytest tests/test_attention.py

    inputs = pack_inputs([[5, 6, 7], [8, 9]])            # one row of five tokens, and where each sequence begins
    with packed_attention(model):
        hidden = model.model(**inputs).last_hidden_state

A mask over the whole row costs its length squared: 8,192 tokens in 40 sequences cost forty times what the sequences do.
The ways that do not, best first:

    varlen             torch.nn.attention.varlen (torch >= 2.11) on CUDA, in half precision
    flash_attention_*  of transformers, where the package is installed
    segments           one call of scaled_dot_product_attention a sequence: the CPU's, and the one others are tested by

A card that has none of them keeps the mask. transformers finds our two by the names they are registered under here.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate, chain, product
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.9
    varlen_attn = None

VARLEN, SEGMENTS, FLASH = "dpa_varlen", "dpa_segments", "flash_attention_2"

_HALF = (torch.bfloat16, torch.float16)
_log = logging.getLogger(__name__)


def pack_inputs(ids_N: Sequence[Sequence[int]], before_N: Sequence[int] | None = None) -> dict[str, Any]:
    """What a model is given for these sequences in one row of T tokens: `input_ids` and `position_ids` (1, T), which
    start again with each sequence, `cu_seq_lens_q` and `cu_seq_lens_k` (N + 1), `max_length_q` and `max_length_k`.

    `before_N` (where `may_go_on`): for each sequence the place of an earlier one that it goes on from, and sees, or -1;
    that one goes on from none. Several may go on from the same.
    """
    lengths_N = [len(ids) for ids in ids_N]
    ids_T = np.fromiter(chain.from_iterable(ids_N), np.int64, sum(lengths_N))  # ten times as fast as from a list
    return {
        "input_ids": torch.from_numpy(ids_T)[None],
        **pack_lengths(lengths_N, before_N),
    }


def pack_lengths(lengths_N: Sequence[int], before_N: Sequence[int] | None = None) -> dict[str, Any]:
    """All of `pack_inputs` but the ids."""
    bounds = torch.tensor([0, *accumulate(lengths_N)], dtype=torch.int32)
    begun_N = [0 if place < 0 else lengths_N[place] for place in before_N or [-1] * len(lengths_N)]
    starts_T = torch.repeat_interleave(bounds[:-1].long() - torch.tensor(begun_N), torch.tensor(lengths_N))
    longest = max(lengths_N)
    inputs = {
        "position_ids": (torch.arange(int(bounds[-1])) - starts_T)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if before_N is None:
        return inputs
    seen_N = [begun + length for begun, length in zip(begun_N, lengths_N, strict=True)]
    place_T = torch.arange(int(bounds[-1]))
    own = place_T.split(lengths_N)
    pairs = zip(before_N, own, strict=True)
    return inputs | {
        "goes_on_from": torch.tensor(before_N),
        "key_places": torch.cat(
            [part for place, mine in pairs for part in ([] if place < 0 else [own[place]]) + [mine]]
        ),
        "cu_seq_lens_k": torch.tensor([0, *accumulate(seen_N)], dtype=torch.int32),
        "max_length_k": max(seen_N),
    }


def to_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The inputs with their tensors on the device; a card takes them while it computes."""
    card = device.type == "cuda"
    return {
        name: (value.pin_memory() if card else value).to(device, non_blocking=card)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }


@contextmanager
def packed_attention(model: Any, dtype: torch.dtype | None = None) -> Iterator[bool]:
    """While the block runs, `model` (a transformers model, on its device) attends within the sequences of packed rows.

    Gives False where it keeps its own attention and a mask. `dtype`: what products are computed in, where that is not
    the weights' own.
    """
    before, way = model.config._attn_implementation, best_way(model, dtype)
    if way is not None:
        model.set_attn_implementation(way)
    try:
        yield way is not None
    finally:
        if way is not None:
            model.set_attn_implementation(before)


@contextmanager
def padded_attention(model: Any) -> Iterator[None]:
    """Within a block of `packed_attention`: while this one runs, the model takes padded batches."""
    way = model.config._attn_implementation
    packed = way in (VARLEN, SEGMENTS, FLASH)
    if packed:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if packed:
            model.set_attn_implementation(way)


def best_way(model: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> str | None:
    """Name of the attention that serves packed rows of `model` best on the device, its own by default; None: a mask."""
    config = model.config.get_text_config()
    if not _plain(model, config):
        return None
    weight = next(model.parameters())
    device, dtype = device or weight.device, dtype or weight.dtype
    if device.type == "cpu":
        return SEGMENTS
    if device.type != "cuda" or dtype not in _HALF:
        return None
    if getattr(config, "v_head_dim", None) not in (None, getattr(config, "qk_head_dim", None)):
        return None  # values of another width than keys, which these kernels do not take
    if _varlen_works(device, *_heads(config), dtype):
        return VARLEN
    return FLASH if is_flash_attn_2_available() else None


def may_go_on(model: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> bool:
    """Whether a sequence of a packed row of `model` may go on from an earlier one (`pack_inputs`) on the device."""
    weight, way = next(model.parameters()), best_way(model, dtype, device)
    if way == VARLEN:
        heads = _heads(model.config.get_text_config())
        return _varlen_works(device or weight.device, *heads, dtype or weight.dtype, goes_on=True)
    return way == SEGMENTS


def _heads(config: Any) -> tuple[int, int, int]:
    """Heads of queries, of keys, and their width."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width


def _plain(model: Any, config: Any) -> bool:
    """Whether the model's attention is softmax over keys, full or of a sliding window, behind transformers' interface,
    without dropout, which the kernels lack."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    takes_another = getattr(type(model), "_can_set_attn_implementation", lambda: True)
    dropout = getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None)
    return bool(
        getattr(model, "_supports_attention_backend", False)
        and takes_another()
        and kinds <= {"full_attention", "sliding_attention"}
        and not getattr(config, "is_encoder_decoder", False)
        and not getattr(config, "attn_logit_softcapping", None)
        and not any(name.endswith(".sinks") for name, _ in model.named_parameters())  # a softmax over more than keys
        and config.model_type != "doge"  # its layers make masks of their own
        and not dropout
    )


def varlen_attention(kernel: Callable[..., torch.Tensor], takes_groups: bool) -> Callable[..., Any]:
    """An attention function of transformers over `kernel`, which has the signature of torch's varlen_attn.

    It takes query (1, H, T, C), key and value (1, G, T, C) and gives (1, T, H, C). A kernel that does not take fewer
    heads of keys is given them repeated.
    """

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int = 0,
        max_length_k: int = 0,
        key_places: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if cu_seq_lens_q is None:
            return _segments(module, query, key, value, attention_mask, scaling, sliding_window)
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
        query, key, value = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
        if key_places is not None:
            # What a sequence goes on from stands before it, as often as it is gone on from; in fp32, in which the
            # gradients of all who do are added up.
            key, value = (part.float().index_select(0, key_places).to(dtype) for part in (key, value))
        options: dict[str, Any] = {}
        if key.shape[1] != query.shape[1]:
            if takes_groups:
                options["enable_gqa"] = True
            else:
                key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        window = (-1, -1)
        if getattr(module, "is_causal", True):
            window = (-1 if sliding_window is None else sliding_window - 1, 0)
        given = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        out = kernel(query, key, value, *given, scale=scaling, window_size=window, **options)
        return out[None], None

    return attend


def gives_right_values(
    attend: Callable[..., Any],
    device: torch.device,
    heads: int,
    key_heads: int,
    width: int,
    dtype: torch.dtype,
    goes_on: bool = False,
) -> bool:
    """Whether an attention function gives the values and gradients of `segments`, also where a sequence `goes_on` from
    another; says why where it does not."""
    lengths, before = [5, 1, 20], None
    windows: list[int | None] = [None]
    if goes_on:
        lengths, before, windows = [5, 1, 20, *[2] * 64], [-1, *[0] * 66], [None, 4]
    given_heads = (heads, key_heads, key_heads)
    row = to_device(pack_lengths(lengths, before), device)
    del row["position_ids"]
    results = []
    try:
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            parts = [torch.randn(1, count, sum(lengths), width, device=device, dtype=dtype) for count in given_heads]
            for window, way in product(windows, (attend, _segments)):
                query, key, value = given = [part.clone().requires_grad_() for part in parts]
                out, _ = way(torch.nn.Module(), query, key, value, None, sliding_window=window, **row)
                (out.float() * torch.arange(width, device=device)).sum().backward()
                results.append([out.detach(), *(part.grad for part in given)])
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
    else:
        pairs = chain(*(zip(*both, strict=True) for both in zip(results[::2], results[1::2], strict=True)))
        worst = max(float((ours.float() - right.float()).norm() / right.float().norm()) for ours, right in pairs)
        if worst < 0.05:
            return True
        reason = f"it differs by {worst:.0%}"
    what = "that goes on from what is shared" if goes_on else "of varying length"
    _log.warning("training: attention %s does not work here (%s); another way is taken.", what, reason)
    return False


@lru_cache
def _varlen_works(
    device: torch.device, heads: int, key_heads: int, width: int, dtype: torch.dtype, goes_on: bool = False
) -> bool:
    """Whether torch's own works for these heads on this device; tried once."""
    if varlen_attn is None:
        _log.warning("training: torch %s has no attention of varying length; 2.11 has it.", torch.__version__)
        return False
    attend = varlen_attention(varlen_attn, _TAKES_GROUPS)
    return gives_right_values(attend, device, heads, key_heads, width, dtype, goes_on)


def _segments(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    goes_on_from: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As `varlen_attention`, a call for each sequence, which may go on from an earlier one (`pack_inputs`).

    On a CPU in fp32 always: its half-precision kernels take seven times as long (2,092 against 290 ms for SmolLM2's
    heads over 2,048 tokens, forward and backward).
    """
    # Without bounds each row of the batch is one sequence, not padded: callbacks ask the model while it trains.
    lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    causal, before, kind = getattr(module, "is_causal", True), value.dtype, query.device.type
    with torch.autocast(kind, enabled=False):
        dtype = torch.float32 if kind == "cpu" else before
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        queries, keys, values = (part.split(lengths, dim=2) for part in (query, key, value))
        earlier_N = [-1] * len(lengths) if goes_on_from is None else goes_on_from.tolist()
        parts = []
        for q, k, v, earlier in zip(queries, keys, values, earlier_N, strict=True):
            if earlier >= 0:
                k, v = torch.cat([keys[earlier], k], dim=2), torch.cat([values[earlier], v], dim=2)
            mask, seen = None, k.shape[2] - q.shape[2]
            within = sliding_window is None or k.shape[2] <= sliding_window
            if causal and (seen or not within):
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(seen)
                mask = mask if within else mask.triu(seen + 1 - sliding_window)
            parts.append(
                functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scaling, enable_gqa=True
                )
            )
        out = torch.cat(parts, dim=2).transpose(1, 2).contiguous()
    return out.to(before), None


_TAKES_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters

if varlen_attn is not None:
    AttentionInterface.register(VARLEN, varlen_attention(varlen_attn, _TAKES_GROUPS))
# Compiled, its loop would be compiled again for every list of lengths.
AttentionInterface.register(SEGMENTS, torch.compiler.disable(_segments))
