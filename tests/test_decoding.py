"""The token loop over its two caches and the attention under it: equal results, and a cache that moves once.
pytest tests/test_decoding.py
"""

import weakref
from contextlib import nullcontext
from typing import Literal

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from dpa.sampling.decoding import Decoder, Decoding, decode
from dpa.sampling.fixed_cache import FixedCache, can_be_recorded, rung
from dpa.sampling.forward import Forward
from dpa.sampling.grouped_attention import grouped_attention
from dpa.sampling.strided_cache import StridedCache, fill_holes

HOW = Decoding(1.0, 1.0, 40, end_ids=(1, *range(60, 80)))


def rows_of(prompts: int, samples: int) -> tuple[list[list[int]], list[int], list[int], list[int]]:
    """Prompts of 5 to 30 tokens, and of every row its prompt, seed and limit."""
    rng = np.random.default_rng(3)
    texts = [rng.integers(81, 250, rng.integers(5, 31)).tolist() for _ in range(prompts)]
    places = [place for place in range(prompts) for _ in range(samples)]
    return texts, places, list(range(100, 100 + len(places))), rng.integers(3, 41, len(places)).tolist()


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "longrope"])
def test_steps_that_wait_for_the_card_are_not_recorded(kind: str) -> None:
    more = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "original_max_position_embeddings": 64}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **(more if kind == "longrope" else {})}
    assert can_be_recorded(tiny_model(rope_parameters=rope)) == (kind in ("default", "linear"))
    assert can_be_recorded(tiny_model("gpt2"))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_a_fixed_cache_says_what_a_strided_one_says(architecture: str) -> None:
    """Rows that leave, buckets, lengths and limits: the same rows, also by a decoder that has decoded before."""
    model = tiny_model(architecture, context=80)
    assert FixedCache.fits(model)
    fixed, strided = Decoder(model, "fixed"), Decoder(model, "strided")
    for prompts, samples in ((6, 4), (5, 3), (9, 5)):
        asked = rows_of(prompts, samples)
        expected = decode(strided, *asked, HOW)
        assert len(set(map(len, expected))) > 5, "rows end at many lengths"
        assert decode(fixed, *asked, HOW) == expected
    assert isinstance(fixed._cache, FixedCache) and fixed.held_bytes > 0
    buffer = weakref.ref(fixed._cache._layers[0].key_buffer)
    fixed.release()
    assert fixed.held_bytes == 0 and buffer() is None


@pytest.mark.parametrize("cache", ["strided", "fixed"])
def test_a_row_depends_neither_on_the_others_nor_on_their_order(cache: str) -> None:
    decoder = Decoder(tiny_model(), cache)
    texts, places, seeds, limits = rows_of(6, 4)
    together = decode(decoder, texts, places, seeds, limits, HOW)
    for row in (0, 7, 23):
        alone = decode(decoder, [texts[places[row]]], [0], [seeds[row]], [limits[row]], HOW)
        assert alone == [together[row]]
    mixed = np.random.default_rng(0).permutation(len(places))
    asked = ([some[row] for row in mixed] for some in (places, seeds, limits))
    assert decode(decoder, texts, *asked, HOW) == [together[row] for row in mixed]


@pytest.mark.parametrize("cache", ["fixed", "strided"])
def test_prompts_that_are_read_some_at_a_time_continue_as_if_read_together(cache: Literal["fixed", "strided"]) -> None:
    decoder, asked = Decoder(tiny_model(), cache), rows_of(7, 3)
    expected = decode(decoder, *asked, HOW)
    for tokens in (1, 70):  # one prompt at a time, a few
        decoder._cache.prefill_tokens = tokens
        assert decode(decoder, *asked, HOW) == expected


def test_a_sliding_window_shorter_than_the_rows_makes_a_fixed_cache_strided_and_a_longer_one_does_not() -> None:
    asked = rows_of(4, 3)
    for window, kind in ((50, StridedCache), (200, FixedCache)):
        model = tiny_model("mistral", sliding_window=window)
        decoder = Decoder(model, "fixed")
        assert decode(decoder, *asked, HOW) == decode(Decoder(model), *asked, HOW)
        assert type(decoder._cache) is kind


def test_rungs_are_few_and_never_too_small() -> None:
    assert [rung(count) for count in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 25, 96, 97, 1024, 1025)] == [
        1, 2, 3, 4, 6, 6, 8, 12, 12, 16, 32, 96, 128, 1024, 1536
    ]  # fmt: skip
    assert all(count <= rung(count) < 1.5 * count + 1 for count in range(1, 3000))


class BytesCopied(TorchDispatchMode):
    """Counts the bytes that operators write which only move numbers."""

    MOVES = (
        "copy_",
        "scatter_",
        "clone",
        "_to_copy",
        "cat",
        "index_select",
        "index_copy_",
        "repeat",
        "repeat_interleave",
    )

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.MOVES:
            moved = args[1] if function.overloadpacket.__name__ == "copy_" else result
            moved = args[3] if function.overloadpacket.__name__ in ("index_copy_", "scatter_") else moved
            self.bytes += moved.numel() * moved.element_size()
        return result


@pytest.mark.parametrize("kind", ["strided", "fixed"])
@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (8, 1), (4, 4)])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "equal"])
def test_one_step_moves_the_cache_once(kind: str, heads: int, groups: int, padded: bool) -> None:
    """Over 300 positions a step copies less than three times what it adds, the model's rotations left out."""
    torch.manual_seed(0)
    fields = {"hidden_size": heads * 16, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 261}
    model = LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=heads, num_key_value_heads=groups)).eval()
    assert model.config._attn_implementation == "sdpa"
    decoder = Decoder(model, kind)
    with torch.inference_mode():
        decoder.begin(2, 310)
        read = decoder.read([[5] * 300, [6] * (250 if padded else 300)])
        assert read.padded == padded
        decoder.enter(read, [0, 1])
        new = sum(layer.keys[:, :, :1].nbytes + layer.values[:, :, :1].nbytes for layer in read.cache.layers)
        logits = 2 * 261 * 4 if kind == "fixed" else 0
        with BytesCopied() as counted:
            decoder.step(torch.tensor([7, 8]))
        assert model.config._attn_implementation == "sdpa"
    rotations = 3 * 2 * (heads + groups) * 16 * 4  # rotate_half's `cat` of queries and keys
    assert counted.bytes - rotations - logits < 3 * new


def test_grouped_attention_is_the_models_own_attention() -> None:
    """With and without padding, in single precision and in bf16 (which takes SDPA): the logits of the plain model."""
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.15)):
        model = tiny_model().to(dtype)
        forward, decoder = Forward(model), Decoder(model)
        for prompts in ([[90] * 20, [91] * 12], [[90] * 20, [91] * 20]):
            found = []
            for grouped in (False, True):
                with torch.inference_mode():
                    read = decoder.read(prompts)
                    seen = torch.arange(21) >= (20 - read.length_P)[:, None] if read.padded else None
                    token, positions = torch.tensor([[7], [8]]), read.length_P[:, None]
                    with grouped_attention(model) if grouped else nullcontext():
                        found.append(forward(read.cache, token, seen, positions))
            assert torch.allclose(found[0], found[1], atol=close)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_both_caches_give_the_same_logits_while_rows_join_and_leave(architecture: str) -> None:
    """The same tokens written into both, short and long prompts in any order; a window of 100 ends the fixed one."""
    model = tiny_model(architecture, **({"sliding_window": 100} if architecture == "mistral" else {}))
    chance, pair = np.random.default_rng(1), (Decoder(model, "strided"), Decoder(model, "fixed"))
    count, grown = 0, set()
    with torch.inference_mode():
        for _ in range(50):
            prompts = [chance.integers(5, 250, chance.integers(1, 120)).tolist() for _ in range(chance.integers(0, 3))]
            if prompts and count < 10:
                for decoder in pair:
                    decoder.enter(decoder.read(prompts), range(len(prompts)))
                count += len(prompts)
            if not count:
                continue
            tokens = torch.from_numpy(chance.integers(5, 250, count))
            strided, fixed = (decoder.step(tokens) for decoder in pair)
            assert torch.allclose(strided, fixed, atol=1e-4)
            grown.add(pair[1].width)
            ended = torch.from_numpy(chance.random(count) < 0.1)
            if ended.any():
                count -= int(ended.sum())
                for decoder in pair:
                    decoder.keep(fill_holes(ended, count))
    assert len(grown) > 2
    assert isinstance(pair[1]._cache, StridedCache if architecture == "mistral" else FixedCache)
