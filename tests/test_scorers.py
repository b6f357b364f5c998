"""Scorers: batches do not change scores, memory running out does not either, and a changed model is refused.
pytest tests/test_scorers.py
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeSampler, all_rows, prompts_of, space_of
from tiny_models import save_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dpa.core.errors import ConfigError, EngineError, ModelFileError
from dpa.core.records import Messages, Scorer
from dpa.core.sections.reward import RewardConfig, RewardTrainConfig
from dpa.core.sections.rollout import RolloutConfig
from dpa.scoring.function_scorer import FunctionScorer
from dpa.scoring.reward_model import PUBLISHED_CONVERSATION, RELEASED_SPEC, conversation_text, encode, forward
from dpa.scoring.reward_scorer import RewardModelScorer
from dpa.scoring.scorer_source import ScorerSource
from dpa.scoring.scorers import (
    SCORER_SOURCES,
    MixScorer,
    build_scorer,
    check_scorers,
    known_attributes,
    on_every_node,
    scored_by,
)
from dpa.stages.rollout import rollout
from dpa.stages.score import score
from dpa.storage.run_folder import StageFolder
from dpa.training.reward_rows import RatedExample
from dpa.training.reward_training import train_reward_model

ASKED: Messages = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model folder: ridge on a tiny random Llama."""
    folder = tmp_path_factory.mktemp("scorers")
    random = np.random.default_rng(0)
    rows = []
    for number in range(40):
        words = int(random.integers(1, 20))
        asked: Messages = [{"role": "user", "content": f"q{number // 2}"}]
        rows.append(RatedExample(f"p{number // 2}", asked, "ab " * words, (4.0 * words, 90.0 - 4 * words)))
    config = RewardTrainConfig(backbone=str(save_tiny_model(folder / "backbone")), method="ridge", max_length=128)
    scales = {"long": (0.0, 4.0), "short": (0.0, 4.0)}
    train_reward_model(rows, tuple(scales), scales, config, folder / "reward")
    return folder / "reward"


@pytest.fixture
def reward(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "reward"
    copy.mkdir()
    for file in trained.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def change_json(file: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


# The reward model


def test_scores_do_not_depend_on_the_batch(trained: Path) -> None:
    responses = ["ab " * words for words in (1, 30, 7, 2, 19, 3)]
    prompts = [ASKED] * len(responses)
    together = RewardModelScorer(trained).score(prompts, responses)
    small = RewardModelScorer(trained, token_budget=128).score(prompts, responses)
    scorer = RewardModelScorer(trained)
    alone = np.concatenate([scorer.score([ASKED], [response]) for response in responses])
    assert together.shape == (6, 2)
    assert np.allclose(together, alone, atol=1e-3)
    assert np.allclose(small, alone, atol=1e-3)
    assert np.ptp(together[:, 0]) > 1


def test_scores_are_those_of_plain_transformers(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    chat = [*ASKED, {"role": "assistant", "content": "Because."}]
    inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        expected = model(**inputs).logits.numpy()
    assert np.allclose(RewardModelScorer(trained).score([ASKED], ["Because."]), expected, atol=1e-3)


def test_a_row_that_cannot_be_scored_is_nan(trained: Path) -> None:
    scores = RewardModelScorer(trained).score([ASKED] * 3, ["fine", "x" * 1000, "fine too"])
    assert np.isnan(scores[1]).all()
    assert np.isfinite(scores[[0, 2]]).all()


def test_nothing_to_score(trained: Path) -> None:
    assert RewardModelScorer(trained).score([], []).shape == (0, 2)


def test_revision_names_the_weights(reward: Path, trained: Path) -> None:
    assert RewardModelScorer(reward).revision == RewardModelScorer(trained).revision
    change_json(reward / "dpa_reward.json", lambda data: data["scales"].update(long=[0, 9]))
    assert RewardModelScorer(reward).revision != RewardModelScorer(trained).revision


def edit_weights(reward: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(reward)
    with torch.no_grad():
        model.score.weight.mul_(1.1)
    model.save_pretrained(reward)


def edit_chat_template(reward: Path) -> None:
    file = reward / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|end|>", "<|end|><|end|>"))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (edit_weights, "scores its golden example"),
    "chat template": (edit_chat_template, "other tokens"),
    "plain template": (
        lambda reward: change_json(reward / "dpa_reward.json", lambda d: d.update(template="{prompt} {response}")),
        "other tokens",
    ),
    "pad is EOS": (
        lambda reward: change_json(reward / "tokenizer_config.json", lambda d: d.update(pad_token="<|end|>")),
        "pads with its EOS",
    ),
    "EOS is pad": (
        lambda reward: change_json(reward / "tokenizer_config.json", lambda d: d.update(eos_token="<|pad|>")),
        "pads with its EOS",
    ),
    "pad of the model": (
        lambda reward: change_json(reward / "config.json", lambda d: d.update(pad_token_id=1)),
        "pad_token_id",
    ),
    "pad of both": (
        lambda reward: [
            change_json(reward / "config.json", lambda d: d.update(pad_token_id=2)),
            change_json(reward / "tokenizer_config.json", lambda d: d.update(pad_token="<|no such token|>")),
        ],
        "pad_token_id",
    ),
    "attributes": (
        lambda reward: change_json(reward / "dpa_reward.json", lambda d: d["attributes"].pop()),
        "2 outputs for 1 attributes",
    ),
    "golden scores": (
        lambda reward: change_json(reward / "dpa_reward.json", lambda d: d["golden"].update(scores=[1.0, 2.0])),
        "scores its golden example",
    ),
    "no chat template": (lambda reward: (reward / "chat_template.jinja").unlink(), "lost its chat template"),
    "no tokenizer": (
        lambda reward: [(reward / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "does not load as a classifier",
    ),
    "no record": (lambda reward: (reward / "dpa_reward.json").unlink(), "has no dpa_reward.json"),
    "torn record": (lambda reward: (reward / "dpa_reward.json").write_text('{"attributes": ["a"]'), "is damaged"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_model_fails_its_self_test(reward: Path, what: str) -> None:
    change, message = CHANGES[what]
    change(reward)
    with pytest.raises(ModelFileError, match=message) as caught:
        RewardModelScorer(reward)
    assert "\n" not in str(caught.value)


class SmallMemory(torch.nn.Module):
    """A model that runs out of memory above so many tokens; its score is the mean of the row's token ids."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(1))
        self.tokens = tokens
        self.failures = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        if input_ids.numel() > self.tokens:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more.")
        total = (input_ids * attention_mask).sum(1) / attention_mask.sum(1)
        return SimpleNamespace(logits=total[:, None].float())


def test_fault_16_out_of_memory_means_smaller_batches_and_the_same_scores() -> None:
    random = np.random.default_rng(0)
    ids_N = [random.integers(1, 100, random.integers(1, 20)).tolist() for _ in range(50)]
    small = SmallMemory(tokens=64)
    assert np.array_equal(forward(small, ids_N, 0), forward(SmallMemory(10**6), ids_N, 0))
    assert 0 < small.failures < 10, "a batch that failed teaches the later ones"


def test_fault_16_one_row_that_does_not_fit_is_a_clear_error() -> None:
    with pytest.raises(EngineError, match="one row of 20 tokens"):
        forward(SmallMemory(tokens=10), [[1] * 20], 0)


def test_other_errors_of_a_model_are_not_swallowed() -> None:
    with pytest.raises(TypeError):
        forward(torch.nn.Linear(1, 1), [[1]], 0)


# Templates


def test_published_template_letter_for_letter(trained: Path) -> None:
    golden = RELEASED_SPEC.golden
    tokenizer = AutoTokenizer.from_pretrained(trained)
    (ids,) = encode(tokenizer, PUBLISHED_CONVERSATION, 4096, [golden.messages], [golden.response])
    assert ids is not None
    assert tokenizer.decode(ids) == (
        "[INST] You must read the following conversation carefully and rate the assistant's response from score 0-100 "
        "in these aspects: helpfulness, correctness, coherence, honesty, complexity, verbosity\n\nUser: What are some "
        'synonyms for the word "beautiful"?\n\nAssistant: Nicely, Beautifully, Handsome, Stunning, Wonderful, '
        "Gorgeous, Pretty, Stunning, Elegant [/INST]"
    )
    assert len(RELEASED_SPEC.attributes) == len(golden.scores) == 10


def test_text_with_braces_is_not_a_placeholder(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    asked: Messages = [{"role": "user", "content": "{response} {0}"}]
    (ids,) = encode(tokenizer, "P {prompt} R {response}", 100, [asked], ["{prompt}"])
    assert ids is not None
    assert tokenizer.decode(ids) == "P {response} {0} R {prompt}"


def test_several_turns_go_on_as_the_template_would() -> None:
    messages: Messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    assert conversation_text(messages) == "S\n\nA\n\nAssistant: B\n\nUser: C"
    assert conversation_text(messages[1:2]) == "A"


def test_a_chat_template_that_refuses_a_row_leaves_it_unscored(reward: Path) -> None:
    template = reward / "chat_template.jinja"
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template.write_text(refuse + template.read_text())
    asked: Messages = [{"role": "system", "content": "S"}, *ASKED]
    scores = RewardModelScorer(reward).score([asked, ASKED], ["fine", "fine"])
    assert np.isnan(scores[0]).all()
    assert np.isfinite(scores[1]).all()


# Functions and mixes


def count_words(messages: Messages, response: str) -> float:
    return float(len(response.split()))


def test_functions_by_callable_module_and_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def shout(messages, response):\n    return 100.0 * response.isupper()\n")
    scorer = FunctionScorer(
        {"words": count_words, "shout": f"{tmp_path / 'mine.py'}:shout", "true": "dpa.world.true_reward:verbosity"}
    )
    assert scorer.attributes == ("words", "shout", "true")
    assert scorer.score([ASKED] * 2, ["A B", "a"]).tolist() == [[2, 100, 2.5], [1, 0, 1.25]]
    assert scorer.score([], []).shape == (0, 3)


def test_revision_and_function_follow_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # a cache would take the second for the first
    revisions = []
    for body in ("1.0", "2.0", "1.0"):
        (tmp_path / "mine.py").write_text(f"def f(messages, response):\n    return {body}\n")
        scorer = FunctionScorer({"f": f"{tmp_path / 'mine.py'}:f"})
        assert scorer.score([ASKED], ["x"]).item() == float(body)
        revisions.append(scorer.revision)
    assert revisions[0] == revisions[2] != revisions[1]
    assert not (tmp_path / "__pycache__").exists()


def test_a_function_that_fails_makes_its_row_nan(caplog: pytest.LogCaptureFixture) -> None:
    def picky(messages: Messages, response: str) -> float:
        return {"inf": float("inf"), "none": None}.get(response) if response in ("inf", "none") else 1 / len(response)  # type: ignore[return-value]

    scorer = FunctionScorer({"picky": picky, "words": count_words})
    scores = scorer.score([ASKED] * 4, ["ok", "", "inf", "none"])
    assert scores[0].tolist() == [0.5, 1]
    assert np.isnan(scores[1:]).all()
    assert len(caplog.records) == 1, "said once"


def test_a_function_that_fails_is_said_with_its_own_line_and_without_the_response(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def reads(messages: Messages, response: str) -> float:
        return float(json.loads(response))

    line = reads.__code__.co_firstlineno + 1
    cases = {
        f"JSONDecodeError at {__file__}:{line})": reads,
        "(TypeError: it does not take (messages, response), or returned no number)": lambda messages: 1.0,
        "(ValueError: it does not take (messages, response), or returned no number)": lambda messages, response: (
            response
        ),
    }
    for said, function in cases.items():
        caplog.clear()
        assert np.isnan(FunctionScorer({"f": function}).score([ASKED], ["my words"])).all()  # type: ignore[dict-item]
        assert said in caplog.text and "my words" not in caplog.text


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("words", "is not `module:name`"),
        ("no.such.module:f", "cannot be imported"),
        ("no_such_file.py:f", "cannot be imported"),
        ("dpa.world.true_reward:f", "has no function 'f'"),
        ("dpa.world.true_reward:BASE", "has no function 'BASE'"),
    ],
)
def test_function_mistakes_are_one_sentence(function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FunctionScorer({"words": function})


def test_mix_puts_attributes_side_by_side(trained: Path) -> None:
    model, words = RewardModelScorer(trained), FunctionScorer({"words": count_words})
    mix: Scorer = MixScorer([model, words])
    assert mix.attributes == ("long", "short", "words")
    scores = mix.score([ASKED], ["one two"])
    assert scores.tolist() == [[*model.score([ASKED], ["one two"])[0], 2.0]]
    assert mix.revision not in (model.revision, words.revision)
    with pytest.raises(ConfigError, match="'words' comes from two scorers"):
        MixScorer([words, words])


def test_build_scorer(trained: Path) -> None:
    functions = {"words": "dpa.world.true_reward:verbosity"}
    train = {"backbone": "somewhere"}
    assert isinstance(build_scorer(RewardConfig(functions=functions)), FunctionScorer)
    assert isinstance(build_scorer(RewardConfig(folder=str(trained))), RewardModelScorer)
    both = build_scorer(RewardConfig.model_validate({"train": train, "functions": functions}), trained)
    assert both.attributes == ("long", "short", "words")


# A source of one's own


class LetterSource(ScorerSource):
    """All that a new source is, beside its line in the table."""

    def attributes(self, rated: Sequence[str]) -> tuple[str, ...]:
        return (self.given["letter"],)

    def open(self) -> Scorer:
        letter = self.given["letter"]
        return FunctionScorer({letter: lambda messages, response: 10.0 * response.count(letter)})

    def described(self) -> str:
        return f"counting {self.given['letter']}"


@pytest.fixture
def letters() -> Iterator[RewardConfig]:
    SCORER_SOURCES["letters"] = LetterSource
    functions, sources = {"words": "dpa.world.true_reward:verbosity"}, {"letters": {"letter": "e"}}
    yield RewardConfig.model_validate({"functions": functions, "sources": sources})
    del SCORER_SOURCES["letters"]


def test_a_new_source_is_a_class_and_a_line(letters: RewardConfig, tmp_path: Path) -> None:
    candidates, scores = StageFolder(tmp_path / "rollout"), StageFolder(tmp_path / "score")
    prompts = prompts_of(3)
    rollout(candidates, prompts, space_of(), [FakeSampler()], RolloutConfig(directions=2, samples=1), seed=0)
    check_scorers(letters)
    ledger = score(scores, candidates, prompts, build_scorer(letters))
    asked = [row["response"] for row in all_rows(candidates)]
    assert [row["e"] for row in all_rows(scores)] == [10.0 * response.count("e") for response in asked]
    assert ledger.candidates_scored == 6
    assert known_attributes(letters, ()) == ("words", "e")
    assert scored_by(letters) == "Scores came from Python functions for words and counting e."
    assert on_every_node(letters) == letters


def test_an_unknown_source_is_named_with_the_nearest(letters: RewardConfig) -> None:
    for name, said in (("leters", "'leters' is not known; did you mean `letters`"), ("http", "write reward.http")):
        with pytest.raises(ConfigError, match=f"reward.sources: .*{said}"):
            known_attributes(RewardConfig(sources={name: {}}), ())


def test_what_is_scored_is_known_ahead_unless_a_finished_model_scores() -> None:
    train = {"backbone": "b", "attributes": ["a"]}
    judge = {"attributes": {"c": "0 to 100"}, "model": "m"}
    functions = {"words": "dpa.world.true_reward:verbosity"}
    config = RewardConfig.model_validate({"train": train, "judge": judge, "functions": functions})
    assert known_attributes(config, ["a", "b"]) == ("a", "c", "words")
    with pytest.raises(ConfigError, match=r"reward\.train\.attributes: nobody rates 'a'; rated are: b\."):
        known_attributes(config, ["b"])
    assert known_attributes(config.model_copy(update={"folder": "finished"}), ["a"]) is None
