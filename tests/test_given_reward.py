"""What `--reward` gives: a reward model, or a run and all that it scores by; code of others only where it is named.
pytest tests/test_given_reward.py
"""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from damage import damage
from serving import ServeProcess
from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from toy_run import toy_config

from dpa.cli.talk import answer
from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, ModelFileError
from dpa.core.objective import Objective
from dpa.core.reference import ModelReference
from dpa.core.sections.reward import RewardTrainConfig
from dpa.models.policy import save_policy
from dpa.recipes.dpa import Loop
from dpa.scoring.given_reward import GivenReward, reward_of_run
from dpa.scoring.reward_scorer import RewardModelScorer
from dpa.scoring.wordiness import wordiness
from dpa.training.reward_rows import RatedExample
from dpa.training.reward_training import train_reward_model

SPACE = DirectionSpace((Objective("helpfulness", {"good": 1.0}), Objective("verbosity", {"words": 1.0})), max_angle=60)
ASKED: Any = [{"role": "user", "content": "Why?"}]
OURS = "dpa.scoring.wordiness:wordiness"
COUNTING = """
from pathlib import Path
Path(__file__).with_name("called").touch()

def words(messages, response):
    return float(len(response.split()))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of one attribute, `good`."""
    folder = tmp_path_factory.mktemp("trained")
    draws = np.random.default_rng(0).integers(1, 20, 40)
    rows = [RatedExample(f"p{n}", ASKED, "ab " * int(words), (90.0 - 4 * words,)) for n, words in enumerate(draws)]
    config = RewardTrainConfig(backbone=str(save_tiny_model(folder / "backbone")), method="ridge", max_length=256)
    train_reward_model(rows, ("good",), {"good": (0.0, 4.0)}, config, folder / "reward_model")
    return folder / "reward_model"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run as `dpa init` makes one where all marks agree: the second objective is counted by a function."""
    run = tmp_path / "run"
    shutil.copytree(trained, run / "reward_model")
    save_policy(tiny_model(), tiny_tokenizer(), run / "iter_1" / "policy", SPACE, {})
    return scored_by(run, {"words": OURS})


def scored_by(run: Path, functions: dict[str, str], out: str | None = None) -> Path:
    objectives = {objective.name: objective.attributes for objective in SPACE.objectives}
    config = {
        "out": out or str(run),
        "space": {"objectives": objectives},
        "ratings": [{"path": "rated.jsonl"}],
        "reward": {"train": {"backbone": "b", "attributes": ["good"]}, "functions": functions},
        "policy": "p",
        "prompts": {"path": "p"},
        "evaluate": {"prompts": {"path": "p"}},
    }
    (run / "config.yaml").write_text(json.dumps(config))
    return run


def best_of(run: Path, count: int = 4, **more: Any) -> list[str]:
    policy = ModelReference(str(run / "iter_1" / "policy"))
    return list(answer(policy, ["Why?"], "helpfulness*0.6 + verbosity*0.8", 1, 1.0, 8, 0, True, best_of=count, **more))


def test_a_policy_is_asked_for_the_best_by_all_that_its_run_scores_by(run: Path) -> None:
    scorer = GivenReward(str(run)).open()
    assert scorer.attributes == ("good", "words")
    scores_NM = scorer.score([ASKED] * 2, ["ab ab", "ab"])
    assert scores_NM[:, :1] == pytest.approx(
        RewardModelScorer(str(run / "reward_model")).score([ASKED] * 2, ["ab ab", "ab"])
    )
    assert scores_NM[:, 1].tolist() == [wordiness(ASKED, "ab ab"), wordiness(ASKED, "ab")]
    assert best_of(run) == best_of(run, reward=str(run)) == best_of(run, reward=str(run / "config.yaml"))


def test_what_does_not_score_every_objective_is_refused_with_what_does(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"--reward: .*reward_model does not score all .*'words'.*give the run"):
        best_of(run, reward=str(run / "reward_model"))


@pytest.mark.parametrize(("way", "said"), [("deleted", "has no dpa_reward.json"), ("truncated", "is damaged")])
def test_a_reward_model_without_its_record_is_refused_by_what_scores_and_by_nothing_else(
    run: Path, tmp_path: Path, way: str, said: str
) -> None:
    damage(run / "reward_model" / "dpa_reward.json", way)
    with pytest.raises(ModelFileError, match=rf"--reward: reward model: .*{said}"):
        best_of(run, reward=str(run / "reward_model"))
    objectives = {objective.name: objective.attributes for objective in SPACE.objectives}
    reward = {"folder": str(run / "reward_model"), "functions": {"words": OURS}}
    config = toy_config(tmp_path / "in", tmp_path / "out", space={"objectives": objectives}, reward=reward)
    with Loop(config) as loop:
        loop.report()  # of what is measured, say
        with pytest.raises(ModelFileError, match=said):
            loop.run()


def test_code_that_is_not_ours_is_called_only_where_the_run_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(COUNTING)
    scored_by(run, {"words": f"{tmp_path / 'mine.py'}:words"})
    assert reward_of_run(run) == str(run / "reward_model")
    with pytest.raises(ConfigError, match="does not score all that the objectives are made of"):
        best_of(run)
    (tmp_path / "dpa.mine.py").write_text(COUNTING)
    assert GivenReward(str(scored_by(run, {"words": "dpa.mine.py:words"}))).strangers == ["functions.words"]
    scored_by(run, {"words": f"{tmp_path / 'mine.py'}:words"})
    (run / "reward_model").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"scores by reward\.functions\.words, which is not called unasked"):
        best_of(run)
    (tmp_path / "elsewhere").rename(run / "reward_model")
    assert not (tmp_path / "called").exists()
    assert best_of(run, reward=str(run))
    assert (tmp_path / "called").exists()


def test_the_reward_model_is_found_beside_its_configuration_or_in_its_out(run: Path, tmp_path: Path) -> None:
    scored_by(run, {"words": OURS}, out="moved/away")
    assert GivenReward(str(run / "config.yaml")).open().attributes == ("good", "words")
    mine = tmp_path / "mine.yaml"
    mine.write_text((scored_by(run, {"words": OURS}) / "config.yaml").read_text())
    assert GivenReward(str(mine)).open().attributes == ("good", "words")
    shutil.rmtree(run / "reward_model")
    with pytest.raises(ConfigError, match="has not trained its reward model yet; run `dpa train-reward`"):
        GivenReward(str(mine)).check(SPACE)


def test_a_policy_of_no_run_needs_to_be_told(run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run / "iter_1" / "policy", tmp_path / "alone" / "iter_1" / "policy"))
    with pytest.raises(ConfigError, match=r"--reward: .*alone holds no reward model and is no run that scores; give"):
        best_of(alone.parents[1])


def test_a_server_chooses_by_all_that_a_run_scores_by(run: Path, tmp_path: Path) -> None:
    server = ServeProcess(run / "iter_1" / "policy", "--reward", run, "--threads", 1, log=tmp_path / "log")
    body = {
        "model": "run-1",
        "messages": ASKED,
        "max_tokens": 8,
        "seed": 0,
        "dpa": "helpfulness*0.8 + verbosity*0.6",
        "dpa_options": {"best_of": 3},
    }
    try:
        answered = httpx.post(server.wait().url + "/v1/chat/completions", json=body, timeout=60).json()
    finally:
        server.stop(signal.SIGKILL)
    assert "dpa" in answered, answered
    assert len(answered["dpa"]["candidates"]) == 3 and set(answered["dpa"]["scores"]) == {"helpfulness", "verbosity"}
