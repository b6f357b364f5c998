"""Attention of one new position over a cache, with grouped queries: keys and values are read where they lie.
Run its tests: pytest tests/test_decoding.py

Where heads share keys and values and a mask is needed, transformers' SDPA (before 5.24, and with several positions
later too) writes a copy of the cache for every head, at every layer of every step. Here the queries of a group stand as
rows of one product over their common keys, and the mask is made once a step. Registered by transformers' own
AttentionInterface and AttentionMaskInterface, so that any model whose attention is "sdpa" takes it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

GROWING, FIXED = "dpa_grouped", "dpa_grouped_fixed"
"""Over a cache that ends at the new position; over buffers of a fixed length, in which only the mask says what is."""


class NotFixedError(Exception):
    """The model's mask depends on where a position stands: its cache must end at the new one."""


@contextmanager
def grouped_attention(model: PreTrainedModel, kind: str = GROWING) -> Iterator[None]:
    """In the block `model` attends by this module where it used SDPA; other kinds of attention stay as they are."""
    config, before = model.config, model.config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = kind
    try:
        yield
    finally:
        if before == "sdpa":
            config._attn_implementation = before


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: queries (B, H, T, D), keys and values (B, groups, S, D) -> (B, T, H, D)."""
    if query.shape[2] != 1 or dropout or any(kwargs.get(name) is not None for name in ("position_bias", "softcap")):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    rows, heads, _, width = query.shape
    groups = key.shape[1]
    query = query.reshape(rows, groups, heads // groups, width)
    if query.device.type == "cpu" and query.dtype == torch.float32:
        # On a processor two batched products are faster than SDPA, whose output also is in another order.
        scores = torch.matmul(query * (width**-0.5 if scaling is None else scaling), key.transpose(2, 3))
        if attention_mask is not None:
            scores += attention_mask
        attended = torch.matmul(scores.softmax(-1), value)
    else:
        attended = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(rows, 1, heads, value.shape[-1]), None


def _mask(fixed: bool, **fields: Any) -> torch.Tensor | None:
    """transformers' mask function: for one new position a row's mask is what it has seen, (B, 1, 1, S), to be added."""
    length = fields["q_length"] if "q_length" in fields else len(fields["cache_position"])  # the latter before 5.4
    window = fields.get("local_size")
    causal = fields["mask_function"] is causal_mask_function or (window is not None and window >= fields["kv_length"])
    if fixed and not (length == 1 and causal):
        raise NotFixedError
    if length != 1:
        return sdpa_mask(**fields)
    seen: torch.Tensor | None
    if causal:
        seen = fields["attention_mask"]
        seen = None if seen is None else seen[:, None, None, : fields["kv_length"]]
    else:
        seen = sdpa_mask(**{**fields, "allow_is_causal_skip": False})
    if seen is None or seen.dtype != torch.bool:
        return seen
    dtype = fields.get("dtype", torch.float32)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


for _name, _fixed in ((GROWING, False), (FIXED, True)):
    AttentionInterface.register(_name, attend)
    AttentionMaskInterface.register(_name, partial(_mask, _fixed))
