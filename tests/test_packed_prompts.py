"""Prompts that begin alike are read once, and say what they say in a padded batch.
Run: pytest tests/test_packed_prompts.py
"""

import numpy as np
import pytest
import torch
from tiny_models import SPACE, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from dpa.core.errors import EngineError
from dpa.core.records import SampleRequest
from dpa.sampling.batching import ContinuousBatch, Row
from dpa.sampling.decoding import Decoder, Decoding, decode
from dpa.sampling.samplers import TransformersSampler
from dpa.sampling.strided_cache import layers_of

HOW = Decoding(1.0, 1.0, 30, end_ids=(1, *range(60, 80)))
MODELS = [
    ("llama", {}),
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}),
    ("mistral", {"sliding_window": 12}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gpt2", {}),
]
PACKED = [kind for kind in MODELS if kind[0] != "gpt2"]  # which has dropout, and keeps the padded batch


def under_endings(questions: int = 3, endings: int = 5, length: int = 40, header: int = 4) -> list[list[int]]:
    """Questions of about `length` tokens behind a header, each under endings of 2 to 6 tokens, in no order."""
    rng = np.random.default_rng(7)
    first = rng.integers(81, 250, header).tolist()
    asked = [first + rng.integers(81, 250, length - header + 3 * number).tolist() for number in range(questions)]
    prompts = [
        [*question, 5 + ending, *rng.integers(81, 250, rng.integers(1, 6)).tolist()]
        for question in asked
        for ending in range(endings)
    ]
    return [prompts[place] for place in rng.permutation(len(prompts))]


def padded(decoder: Decoder) -> Decoder:
    """The same, and it reads padded batches."""
    decoder._packs = False
    return decoder


class Reads:
    """The shapes of what a model was given."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.shapes: list[tuple[int, ...]] = []
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, inputs: self.shapes.append(tuple(inputs[0].shape))
        )


@pytest.mark.parametrize(("architecture", "changes"), PACKED)
def test_what_is_read_packed_is_what_is_read_padded(architecture: str, changes: dict) -> None:
    """Logits, and keys and values wherever there is a token; columns of padding are finite."""
    model, prompts = tiny_model(architecture, **changes), [*under_endings(), [90], [91] * 30]
    before, width = model.config._attn_implementation, max(map(len, prompts))
    reads = Reads(model)
    with torch.inference_mode():
        ours, expected = Decoder(model).read(prompts), padded(Decoder(model)).read(prompts)
    assert [shape[0] for shape in reads.shapes] == [1, len(prompts)]
    assert model.config._attn_implementation == before
    torch.testing.assert_close(ours.logits_PV, expected.logits_PV, rtol=1e-4, atol=1e-4)
    assert ours.length_P.equal(expected.length_P) and ours.padded == expected.padded
    seen = torch.arange(width) >= (width - ours.length_P)[:, None]
    for one, other in zip(layers_of(ours.cache), layers_of(expected.cache), strict=True):
        for mine, right in ((one.keys, other.keys), (one.values, other.values)):
            mine, right = mine.transpose(1, 2), right.transpose(1, 2)
            assert mine.isfinite().all()
            torch.testing.assert_close(mine[seen], right[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["strided", "fixed"])
@pytest.mark.parametrize(("architecture", "changes"), MODELS)
def test_rows_behind_packed_prompts_say_what_they_say_behind_padded_ones(
    architecture: str, changes: dict, cache: str
) -> None:
    """Several samples of each prompt, rows that leave; also where few prompts are read at once."""
    model, prompts = tiny_model(architecture, **changes), under_endings()
    rng = np.random.default_rng(0)
    places = rng.permutation([*range(len(prompts))] * 3).tolist()
    asked = prompts, places, list(range(len(places))), rng.integers(3, 31, len(places)).tolist(), HOW
    expected = decode(padded(Decoder(model, cache)), *asked)
    assert len(set(map(len, expected))) > 5, "rows end at many lengths"
    decoder = Decoder(model, cache)
    assert decode(decoder, *asked) == expected
    for tokens in (60, 130):
        decoder._cache.prefill_tokens = tokens
        assert decode(decoder, *asked) == expected


def test_a_question_under_several_endings_is_read_once() -> None:
    model, prompts = tiny_model(), under_endings(questions=1, endings=9)
    reads, shared = Reads(model), 40
    with torch.inference_mode():
        Decoder(model).read(prompts)
        ContinuousBatch(Decoder(model), (1,)).join([Row(tuple(ids), 0, 5, 1.0, 1.0) for ids in prompts])
    assert reads.shapes == [(1, shared + sum(len(ids) - shared for ids in prompts))] * 2


def test_prompts_that_share_little_are_read_as_before() -> None:
    model, rng = tiny_model(), np.random.default_rng(0)
    reads, decoder = Reads(model), Decoder(model)
    prompts = [[5, 6, *rng.integers(81, 250, length).tolist()] for length in (20, 18, 17, 17)]
    with torch.inference_mode():
        decoder.read(prompts)
    assert reads.shapes == [(4, 22)]
    decoder._cache.prefill_tokens = 50
    assert decoder.parts(prompts) == [[0, 1], [2, 3]]


def test_a_long_prompt_among_short_ones_pads_none_of_them() -> None:
    """However a part was cut: its memory is that of its tokens."""
    model = tiny_model()
    reads = Reads(model)
    with torch.inference_mode():
        Decoder(model).read([[90 + place] * 4 for place in range(20)] + [[81] * 200])
    assert reads.shapes == [(1, 280)]


def test_parts_keep_families_together_within_the_budget() -> None:
    decoder, prompts = Decoder(tiny_model()), under_endings(questions=4, endings=4)
    decoder._cache.prefill_tokens = 150
    parts = decoder.parts(prompts)
    assert sorted(place for part in parts for place in part) == list(range(len(prompts)))
    questions = [{tuple(prompts[place][4:30]) for place in part} for part in parts]
    assert sum(map(len, questions)) == 4 and len(parts) > 1
    assert parts[0][0] == 0


def test_a_sampler_reads_each_text_once_whatever_the_order_and_the_batches_and_says_the_same() -> None:
    texts = ["A long text about the " + thing * 12 for thing in ("sea. ", "old house. ", "fox and the crow. ")]
    requests = [
        SampleRequest([{"role": "user", "content": text + ending}], None, (1, 2))
        for ending in ("Why?", "Who?", "When was that, and where?", "How so?")
        for text in texts
    ]
    model = tiny_model()
    sampler = TransformersSampler(model, tiny_tokenizer(), SPACE, max_new_tokens=10, batch_size=8)
    alone = [sampler.sample([request])[0] for request in requests]
    reads = Reads(model)
    assert sampler.sample(requests) == alone
    read = [tokens for rows, tokens in reads.shapes if rows == 1 and tokens > 1]
    assert len(read) == 3, "a batch for each text, of four requests of two samples"
    assert sum(read) < 0.5 * sum(len(sampler.prompting.encode(r.messages, None, None)) for r in requests)


def test_damaged_weights_are_an_engine_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(EngineError, match="NaN"), torch.inference_mode():
        Decoder(model).read(under_endings())
