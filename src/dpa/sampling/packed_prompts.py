"""Prompts read behind each other in one row without padding, what several begin with once: on a processor.
Run its tests: pytest tests/test_packed_prompts.py

Nine directions behind a question of 275 tokens, 25 tokens each, are 2,700 tokens in a padded batch and 500 like this.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers.cache_utils import Cache

from dpa.models.attention import SEGMENTS, best_way, packed_attention
from dpa.models.shared_prefixes import Family, pack_families
from dpa.sampling.forward import Forward, Read
from dpa.sampling.strided_cache import StridedLayer, layers_of


def can_be_packed(forward: Forward) -> bool:
    """Whether the model reads such rows here."""
    on_processor = forward.model.device.type == "cpu"  # asked first: a card would try its kernels
    return on_processor and forward.takes_rows and best_way(forward.model) == SEGMENTS


def read_packed(forward: Forward, prompts: Sequence[Sequence[int]], found: Sequence[Family]) -> Read:
    """Read P prompts, each in one of the families, in one pass. What comes out is as of a batch padded on the left."""
    inputs, places_P = pack_families(prompts, found)
    length_P, width = torch.tensor(list(map(len, prompts))), max(map(len, prompts))
    index_PW = np.zeros((len(prompts), width), np.int64)  # padding is masked: any token of the row will do
    for row_W, places in zip(index_PW, places_P, strict=True):
        row_W[width - len(places) :] = places
    ends_P = torch.tensor([places[-1] for places in places_P])
    packed = Cache(layer_class_to_replicate=StridedLayer)
    with packed_attention(forward.model):
        logits_PV = forward.over_row(packed, inputs, ends_P)
    return Read(_gathered(packed, torch.from_numpy(index_PW)), logits_PV, length_P, min(map(len, prompts)) < width)


def _gathered(packed: Cache, index_PW: torch.Tensor) -> Cache:
    """A cache of P rows, of the positions `index_PW` of the one row of `packed`, which is used up."""
    cache, layers = Cache(layer_class_to_replicate=StridedLayer), layers_of(packed)
    packed.layers.clear()
    for number in range(len(layers)):
        layer = layers.pop(0)  # its memory is free once it is copied
        keys, values = (states[0][:, index_PW].transpose(0, 1) for states in (layer.keys, layer.values))
        cache.update(keys, values, number)
    return cache
