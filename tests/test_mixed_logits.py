"""Multi-objective decoding equals mixing the log-probabilities by hand, whatever the batch, and one policy is itself.

pytest tests/test_mixed_logits.py
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import SPACE, save_tiny_model, tiny_model, tiny_tokenizer

from dpa.core.errors import ModelFileError
from dpa.core.records import SampleRequest
from dpa.sampling.decoding import Decoding, decode
from dpa.sampling.drawing import draw, uniforms
from dpa.sampling.mixed_logits import MixedDecoder, MixedLogitsSampler
from dpa.sampling.samplers import SamplerSpec

PROMPTS = [[2, 40, 41, 42, 4], [2, 50, 4], [2, 60, 61, 62, 63, 64, 65, 4]]
SHARES = (0.6, 0.4)
MODELS = [tiny_model(seed=1), tiny_model("gpt2", seed=2)]
QUESTIONS = [[{"role": "user", "content": text}] for text in ("Why?", "Who is it?")]


@torch.inference_mode()
def by_hand(prompt: list[int], seed: int, how: Decoding) -> list[int]:
    """The whole text through both models at every token, no cache."""
    ids, numbers = list(prompt), torch.from_numpy(uniforms(seed, how.max_new_tokens))
    for number in numbers:
        steps = [model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for model in MODELS]
        mixed = sum(share * own for share, own in zip(SHARES, steps, strict=True))
        ids.append(int(draw(mixed[None], number[None], how.temperature, how.top_p)))
        if ids[-1] in how.end_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [1e-6, 0.9], ids=["greedy", "sampled"])
def test_rows_say_what_mixing_by_hand_says(temperature: float) -> None:
    how = Decoding(temperature, 1.0, 16, tuple(range(100, 130)))
    decoder = MixedDecoder(MODELS)
    decoder.mix(SHARES)
    prompt_of_B, seeds_B = [0, 1, 2, 1, 0], [11, 12, 13, 14, 15]
    rows = decode(decoder, PROMPTS, prompt_of_B, seeds_B, [16] * 5, how)
    expected = [by_hand(PROMPTS[p], seed, how) for p, seed in zip(prompt_of_B, seeds_B, strict=True)]
    assert rows == expected
    assert len({len(row) for row in rows}) > 1 or temperature < 0.1, "some row ends, and leaves, before another"


def test_the_distribution_of_a_token_is_the_normalised_weighted_product() -> None:
    decoder = MixedDecoder(MODELS)
    decoder.mix(SHARES)
    with torch.inference_mode():
        logits_BV = decoder.enter(decoder.read(PROMPTS), [0, 1, 2])
        for row, prompt in zip(logits_BV, PROMPTS, strict=True):
            each = [model(torch.tensor([prompt])).logits[0, -1].softmax(-1) for model in MODELS]
            product = each[0] ** SHARES[0] * each[1] ** SHARES[1]
            torch.testing.assert_close(row.softmax(-1), product / product.sum(), rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match=r"add up to 1\.1"):
        decoder.mix((0.6, 0.5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two policies of one vocabulary."""
    folder = tmp_path_factory.mktemp("mixed")
    for seed in (0, 5):
        save_tiny_model(folder / f"{seed}")
        tiny_model(seed=seed).save_pretrained(folder / f"{seed}")
    return [str(folder / "0"), str(folder / "5")]


def test_a_share_of_one_is_that_policy_exactly_and_each_direction_has_its_own_mixture(folders: list[str]) -> None:
    spec = SamplerSpec(folders[0], SPACE, max_new_tokens=20)
    mixed = MixedLogitsSampler(folders, lambda v: (0.5, 0.5) if v is None else (1 - v[1], v[1]), spec)
    seeds = (1, 2, 3)
    directions = [(1.0, 0.0), (0.0, 1.0), (0.4, 0.6)]
    asked = [SampleRequest(question, v, seeds) for question in QUESTIONS for v in directions]
    answers = mixed.sample(asked)
    for folder, place in zip(folders, (0, 1), strict=True):
        alone = replace(spec, policy=folder).build()
        plain = alone.sample([SampleRequest(question, None, seeds) for question in QUESTIONS])
        assert [answers[place], answers[place + 3]] == plain
    assert len({answers[place][0].text for place in range(3)}) == 3
    told = MixedLogitsSampler(folders, lambda v: (1.0, 0.0), spec, states_direction=True)
    assert told.sample(asked[:1]) == spec.build().sample(asked[:1])
    with pytest.raises(ValueError, match="no target"):
        mixed.sample([replace(asked[0], held=(None, 40))])


def test_policies_of_unlike_vocabularies_are_refused_in_one_sentence(folders: list[str], tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(tmp_path)
    tiny_model(vocab_size=262).save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match=r"mixing: .* has another vocabulary than .*; mix policies of one"):
        MixedLogitsSampler([folders[0], str(tmp_path)], lambda v: SHARES, SamplerSpec(folders[0], SPACE, 8))
