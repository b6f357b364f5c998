"""Scores over HTTP: those of the model in process, servers that would score plausibly and wrongly, rows that fail.
pytest tests/test_http_scorer.py

The server is a fake around the real model: the shapes of vLLM's /classify and text-embeddings-inference's /predict.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import FakeServer, Reply
from tiny_models import save_tiny_model

from dpa.core.errors import ConfigError, EngineError
from dpa.core.records import Messages
from dpa.core.sections.reward import HttpRewardConfig, RewardConfig, RewardTrainConfig
from dpa.scoring.reward_model import forward
from dpa.scoring.reward_scorer import RewardModelScorer
from dpa.scoring.scorers import build_scorer
from dpa.training.reward_rows import RatedExample
from dpa.training.reward_training import train_reward_model

ASKED: Messages = [{"role": "user", "content": "Why?"}]
RESPONSES = ["", "one", "ab ab ab", "a longer answer than that", "x" * 500, "the last"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModelScorer:
    """A reward model: ridge on a tiny random Llama."""
    folder = tmp_path_factory.mktemp("http_scorer")
    random = np.random.default_rng(0)
    rows = []
    for number in range(40):
        words = int(random.integers(1, 20))
        asked: Messages = [{"role": "user", "content": f"q{number // 2}"}]
        rows.append(RatedExample(f"p{number // 2}", asked, "ab " * words, (4.0 * words, 90.0 - 4 * words)))
    config = RewardTrainConfig(backbone=str(save_tiny_model(folder / "backbone")), method="ridge", max_length=128)
    scales = {"long": (0.0, 4.0), "short": (0.0, 4.0)}
    train_reward_model(rows, tuple(scales), scales, config, folder / "reward")
    return RewardModelScorer(folder / "reward")


@pytest.fixture
def serve(model: RewardModelScorer, tmp_path: Path) -> Iterator[Callable[..., FakeServer]]:
    """Servers of the model; `change` goes over the scores of each request before they are sent."""
    started: list[FakeServer] = []

    def start(change: Callable[[np.ndarray], Any] = lambda scores: scores, drop: bool = False) -> FakeServer:
        def answer(body: dict) -> Reply:
            if "input" in body:
                if any(len(ids) > 60 for ids in body["input"]):
                    return 400, {"error": {"message": "too long for me"}}, {}
                scores = change(forward(model.model, body["input"], model.tokenizer.pad_token_id))
                rows = [
                    {"index": row, "label": "long", "probs": list(map(float, values)), "num_classes": len(values)}
                    for row, values in enumerate(scores)
                ]
                return 200, {"data": rows[:-1] if drop else rows[::-1]}, {}
            ids = model.tokenizer([text for (text,) in body["inputs"]])["input_ids"]
            scores = change(forward(model.model, ids, model.tokenizer.pad_token_id))
            names = model.attributes
            rows = [[{"score": float(s), "label": n} for s, n in zip(values, names, strict=True)] for values in scores]
            return 200, [sorted(row, key=lambda item: -item["score"]) for row in rows], {}

        started.append(FakeServer(answer))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def config_of(of: RewardModelScorer, *servers: FakeServer, **fields: Any) -> RewardConfig:
    folder = of.model.name_or_path
    http = HttpRewardConfig(servers=[server.address for server in servers], folder=folder, **{"batch": 2, **fields})
    return RewardConfig(http=http)


@pytest.mark.parametrize("api", ["classify", "predict"])
def test_scores_are_those_of_the_model_in_process(model: RewardModelScorer, serve: Callable, api: str) -> None:
    scorer = build_scorer(config_of(model, serve(), serve(), api=api))
    assert (scorer.attributes, scorer.revision) == (model.attributes, model.revision)
    prompts, responses = [ASKED] * 5, RESPONSES[:4] + RESPONSES[5:]
    assert np.allclose(scorer.score(prompts, responses), model.score(prompts, responses), atol=1e-3)
    assert scorer.score([], []).shape == (0, 2)


def test_what_is_sent_to_vllm(model: RewardModelScorer, serve: Callable) -> None:
    server = serve()
    scorer = build_scorer(config_of(model, server, model="reward"))
    server.asked.clear()
    scorer.score([ASKED] * 5, ["a"] * 5)
    assert sorted(len(body["input"]) for body in server.bodies()) == [1, 2, 2]
    assert {path for _, path, _ in server.asked} == {"/classify"}
    body = server.bodies()[0]
    assert (set(body), body["model"], body["use_activation"]) == ({"model", "input", "use_activation"}, "reward", False)


def test_a_row_that_cannot_be_scored_is_nan_and_its_neighbours_are_not(
    model: RewardModelScorer, serve: Callable
) -> None:
    """One row is too long for the model, one for the server, which refuses its whole request; one comes back as NaN."""
    scorer = build_scorer(config_of(model, serve()))
    found = scorer.score([ASKED] * 5, ["one", "x" * 500, "y" * 70, "two", "three"])
    assert np.isnan(found).all(axis=1).tolist() == [False, True, True, False, False]
    assert np.allclose(found[[0, 3, 4]], model.score([ASKED] * 3, ["one", "two", "three"]), atol=1e-3)
    third_is_nan = serve(lambda scores: np.where(np.arange(len(scores))[:, None] == 2, np.nan, scores))
    scorer = build_scorer(config_of(model, third_is_nan, batch=3))
    assert np.isnan(scorer.score([ASKED] * 3, ["one", "two", "three"])).all(axis=1).tolist() == [False, False, True]


def test_fault_10_rows_that_break_the_server_are_nan_though_nothing_else_is_asked(
    model: RewardModelScorer, serve: Callable
) -> None:
    server = serve()
    right = server.answer
    server.answer = lambda body: (500, {}, {}) if any(len(ids) > 60 for ids in body["input"]) else right(body)
    scorer = build_scorer(config_of(model, server, batch=1, attempts=3))
    assert np.isnan(scorer.score([ASKED] * 2, ["y" * 70, "y" * 80])).all()
    assert not np.isnan(scorer.score([ASKED], ["one"])).any()
    server.answer = lambda body: (500, {}, {})
    with pytest.raises(EngineError, match="no server answers"):
        scorer.score([ASKED], ["two"])


@pytest.mark.parametrize(
    ("change", "drop", "message"),
    [
        (lambda scores: scores[:, ::-1], False, "scores its golden example"),
        (
            lambda scores: np.exp(scores - 100) / np.exp(scores - 100).sum(1, keepdims=True),
            False,
            "a softmax or sigmoid",
        ),
        (lambda scores: scores[:, :1], False, "does not answer with 2 numbers"),
        (lambda scores: scores, True, "does not answer with 2 numbers"),
        (lambda scores: scores * np.nan, False, "nan on"),
    ],
    ids=["order", "softmax", "width", "rows", "nan"],
)
def test_fault_31_a_server_that_scores_plausibly_and_wrongly_is_refused(
    model: RewardModelScorer, serve: Callable, change: Callable, drop: bool, message: str
) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        build_scorer(config_of(model, serve(), serve(change, drop)))
    assert "\n" not in str(caught.value)


def test_fault_13_fewer_rows_than_asked_are_detected(model: RewardModelScorer, serve: Callable) -> None:
    server = serve()
    scorer = build_scorer(config_of(model, server))
    right = server.answer

    def short(body: dict) -> Reply:
        status, payload, headers = right(body)
        return status, {"data": payload["data"][:1]}, headers

    server.answer = short
    with pytest.raises(EngineError, match="for each of 2 rows"):
        scorer.score([ASKED] * 2, ["one", "two"])


def test_settings_are_checked(model: RewardModelScorer, serve: Callable) -> None:
    with pytest.raises(ValueError, match="is no address; write for example"):
        HttpRewardConfig(servers=["gpu:8000"], folder="x")
    with pytest.raises(ConfigError, match=r"reward\.http\.api_key_env: 'DPA_NO_SUCH_KEY' is not set"):
        build_scorer(config_of(model, serve(), api_key_env="DPA_NO_SUCH_KEY"))
