"""The token loop's two forms and the attention under them: equal results, and a cache that moves once.
pytest tests/test_decoding.py
"""

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from dpa.models.decoding import Decoding, Forward, decode, read_prompts
from dpa.models.fixed_decoding import FixedDecoder, NotFixedError, rung
from dpa.models.grouped_attention import grouped_attention

HOW = Decoding(1.0, 1.0, 40, end_ids=(1, *range(60, 80)), pad_id=0)


def rows_of(prompts: int, samples: int) -> tuple[list[list[int]], list[int], list[int], list[int]]:
    """Prompts of 5 to 30 tokens, and of every row its prompt, seed and limit."""
    rng = np.random.default_rng(3)
    texts = [rng.integers(81, 250, rng.integers(5, 31)).tolist() for _ in range(prompts)]
    places = [place for place in range(prompts) for _ in range(samples)]
    return texts, places, list(range(100, 100 + len(places))), rng.integers(3, 41, len(places)).tolist()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_fixed_buffers_say_what_growing_ones_say(architecture: str) -> None:
    """Rows that leave, buckets, lengths and limits: the same rows, also by a decoder that has decoded before."""
    model = tiny_model(architecture, context=80)
    assert FixedDecoder.fits(model)
    decoder = FixedDecoder(model, HOW, graphs=False)
    for prompts, samples in ((6, 4), (5, 3), (9, 5)):
        asked = rows_of(prompts, samples)
        expected = decode(model, *asked, HOW)
        assert len(set(map(len, expected))) > 5, "rows end at many lengths"
        assert decoder.decode(*asked) == expected


def test_a_row_of_fixed_buffers_does_not_depend_on_the_others() -> None:
    model = tiny_model()
    texts, places, seeds, limits = rows_of(6, 4)
    together = FixedDecoder(model, HOW, graphs=False).decode(texts, places, seeds, limits)
    for row in (0, 7, 23):
        alone = FixedDecoder(model, HOW, graphs=False)
        assert alone.decode([texts[places[row]]], [0], [seeds[row]], [limits[row]]) == [together[row]]


def test_a_sliding_window_shorter_than_the_rows_cannot_be_fixed_and_a_longer_one_can() -> None:
    asked = rows_of(4, 3)
    with pytest.raises(NotFixedError):
        FixedDecoder(tiny_model("mistral", sliding_window=16), HOW, graphs=False).decode(*asked)
    wide = tiny_model("mistral", sliding_window=200)
    assert FixedDecoder(wide, HOW, graphs=False).decode(*asked) == decode(wide, *asked, HOW)


def test_rungs_are_few_and_never_too_small() -> None:
    assert [rung(count) for count in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 25, 96, 97, 1024, 1025)] == [
        1, 2, 3, 4, 6, 6, 8, 12, 12, 16, 32, 96, 128, 1024, 1536
    ]  # fmt: skip
    assert all(count <= rung(count) < 1.5 * count + 1 for count in range(1, 3000))


class BytesCopied(TorchDispatchMode):
    """Counts the bytes that operators write which only move numbers."""

    MOVES = ("copy_", "clone", "_to_copy", "cat", "index_select", "index_copy_", "repeat", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.MOVES:
            moved = args[1] if function.overloadpacket.__name__ == "copy_" else result
            moved = args[3] if function.overloadpacket.__name__ == "index_copy_" else moved
            self.bytes += moved.numel() * moved.element_size()
        return result


@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (8, 1), (4, 4)])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "equal"])
def test_one_step_moves_the_cache_once(heads: int, groups: int, padded: bool) -> None:
    """Over 300 positions a step copies less than three times what it adds, the model's rotations left out."""
    torch.manual_seed(0)
    fields = {"hidden_size": heads * 16, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 261}
    model = LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=heads, num_key_value_heads=groups)).eval()
    assert model.config._attn_implementation == "sdpa"
    prompts = [[5] * 300, [6] * (250 if padded else 300)]
    with torch.inference_mode():
        forward = Forward(model)
        cache, _, lengths, seen = read_prompts(forward, prompts, pad_id=0)
        assert (seen is None) == (not padded)
        seen = None if seen is None else torch.cat([seen, seen.new_ones(2, 1)], 1)
        new = sum(layer.keys[:, :, :1].nbytes + layer.values[:, :, :1].nbytes for layer in cache.layers)
        with grouped_attention(model), BytesCopied() as counted:
            forward(cache, torch.tensor([[7], [8]]), seen, lengths[:, None])
        assert model.config._attn_implementation == "sdpa"
    rotations = 3 * 2 * (heads + groups) * 16 * 4  # rotate_half's `cat` of queries and keys
    assert counted.bytes - rotations < 3 * new


def test_grouped_attention_is_the_models_own_attention() -> None:
    """With and without padding, in single precision and in bf16 (which takes SDPA): the logits of the plain model."""
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.15)):
        model = tiny_model().to(dtype)
        for prompts in ([[90] * 20, [91] * 12], [[90] * 20, [91] * 20]):
            with torch.inference_mode():
                forward = Forward(model)
                found = []
                for grouped in (False, True):
                    cache, _, lengths, seen = read_prompts(forward, prompts, pad_id=0)
                    seen = None if seen is None else torch.cat([seen, seen.new_ones(2, 1)], 1)
                    token, positions = torch.tensor([[7], [8]]), lengths[:, None]
                    if grouped:
                        with grouped_attention(model):
                            found.append(forward(cache, token, seen, positions))
                    else:
                        found.append(forward(cache, token, seen, positions))
            assert torch.allclose(found[0], found[1], atol=close)
