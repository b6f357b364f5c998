"""A run without a policy ends with its reward model, and says so where a policy is asked for.
Run: pytest tests/test_reward_run.py
"""

import json
import shutil
import time
from pathlib import Path

import pytest
from fakes import run_config
from tiny_models import save_tiny_model

from dpa.core.config import RewardRunConfig, RunConfig, load_config, load_run
from dpa.core.config_identity import resolved
from dpa.core.errors import ConfigError, RunFolderError, TrainingError
from dpa.core.records import stable_hash
from dpa.recipes.dpa import Loop
from dpa.recipes.rated_rows import RewardRun
from dpa.stages.ratings import read_ratings
from dpa.storage.run_folder import StageFolder
from dpa.storage.tables import write_json
from dpa.training.trainers import StopsAtBadStep

ROWS = [
    {
        "prompt": f"question {n}",
        "response": "word " * (1 + n % 5) + "!!!!" * (n // 5 % 2),
        "length": n % 5,
        "cheer": 4 * (n // 5 % 2),
        "chance": int(stable_hash(n), 16) % 5,
    }
    for n in range(60)
]


@pytest.fixture
def fields(tmp_path: Path) -> dict:
    """The fields of a run over 60 rated rows that ends with its reward model; `chance` cannot be learned."""
    save_tiny_model(tmp_path / "model")
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "out": str(tmp_path / "run"),
        "space": {"objectives": {"length": None, "cheer": None}},
        "ratings": [
            {"path": str(tmp_path / "rated.jsonl"), "scales": {name: [0, 4] for name in ("length", "cheer", "chance")}}
        ],
        "reward": {"train": {"backbone": str(tmp_path / "model"), "method": "ridge", "held_out": 0.3}},
    }


def written(path: Path, fields: dict) -> Path:
    write_json(path, fields)  # JSON is YAML
    return path


def test_a_run_without_a_policy_ends_with_its_reward_model_and_is_resumed(tmp_path: Path, fields: dict) -> None:
    config = load_run(written(tmp_path / "a.yaml", fields))
    assert type(config) is RewardRunConfig
    for _ in range(2):
        with RewardRun(config) as run:
            folder = run.run()
    record = json.loads((folder / "dpa_reward.json").read_text())
    assert record["attributes"] == ["length", "cheer", "chance"] and (folder / "model.safetensors").is_file()


def test_a_kill_before_the_seal_costs_no_step_and_no_second_of_the_ledger(
    fields: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields["reward"]["train"] |= {"method": "full", "epochs": 2}
    config = RewardRunConfig(**fields)
    trained = Path(config.out) / "reward_model"
    check, at = StopsAtBadStep._check_step, []

    def slowly(*given: object) -> object:
        time.sleep(0.3)  # so that it takes longer than all of the second process
        at.append(time.monotonic())
        return check(*given)

    with monkeypatch.context() as killed, RewardRun(config) as run:
        killed.setattr(StageFolder, "finish", lambda *_, **__: 1 / 0)
        killed.setattr(StopsAtBadStep, "_check_step", slowly)
        with pytest.raises(ZeroDivisionError):
            run.run()
    before, steps = (trained / "model.safetensors").read_bytes(), []
    monkeypatch.setattr(StopsAtBadStep, "_check_step", lambda *_: steps.append(1))
    with RewardRun(config) as run:
        run.run()
        ledger = run.folder.stage(None, "train_reward").ledger
    assert not steps and (trained / "model.safetensors").read_bytes() == before
    assert ledger.wall_s > at[-1] - at[0], "what the first process took is counted"
    assert not trained.with_name("reward_model.training").exists()


def test_a_reward_model_that_is_not_as_the_run_sealed_it_is_made_again(tmp_path: Path, fields: dict) -> None:
    config = RewardRunConfig(**fields)
    trained = Path(config.out) / "reward_model"
    with RewardRun(RewardRunConfig(**fields | {"out": str(tmp_path / "other"), "seed": 5})) as run:
        shutil.copytree(run.run(), trained)
    others = (trained / "model.safetensors").read_bytes()
    with RewardRun(config) as run:
        run.run()
    own = (trained / "model.safetensors").read_bytes()
    assert own != others, "one that somebody put there is not the run's"
    (trained / "model.safetensors").write_bytes(b"damaged")
    with RewardRun(config) as run:
        run.run()
        assert run.folder.stage(None, "train_reward").done
    assert (trained / "model.safetensors").read_bytes() == own


def test_a_reward_model_no_better_than_the_mean_ends_the_run_with_a_sentence(fields: dict) -> None:
    fields["space"] = {"objectives": {"length": None, "chance": None}}
    with RewardRun(RewardRunConfig(**fields)) as run, pytest.raises(TrainingError, match="chance: NO BETTER"):
        run.run()


def test_a_verb_that_needs_a_policy_refuses_such_a_configuration(tmp_path: Path, fields: dict) -> None:
    file = written(tmp_path / "a.yaml", fields)
    with pytest.raises(ConfigError, match=r"^policy, prompts, evaluate: .* add all three to train a policy"):
        load_config(file)
    with pytest.raises(ConfigError, match=r"^rollout: belongs to a run that trains a policy"):
        load_run(file, {"rollout.samples": "2"})
    with pytest.raises(ConfigError, match=r"^policy: this field is required"):
        load_run(file, {"prompts.path": "x.jsonl", "evaluate.prompts.path": "y.jsonl"})


def test_a_folder_of_a_reward_run_is_not_taken_by_a_whole_one(tmp_path: Path, fields: dict) -> None:
    with RewardRun(RewardRunConfig(**fields)):
        pass
    whole = run_config(tmp_path / "run", space=fields["space"], ratings=fields["ratings"], reward=fields["reward"])
    with pytest.raises(RunFolderError, match="policy: "):
        Loop(whole)


def test_count_takes_whole_prompts_and_the_same_ones_from_every_copy(tmp_path: Path, fields: dict) -> None:
    config = RewardRunConfig(**fields).ratings[0]
    some = config.model_copy(update={"count": 7})
    kept = read_ratings([some]).table
    assert len(set(kept["prompt_id"].to_pylist())) == kept.num_rows == 7
    (tmp_path / "turned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS + ROWS)))
    again = read_ratings([some.model_copy(update={"path": str(tmp_path / "turned.jsonl")})]).table
    assert set(again["prompt_id"].to_pylist()) == set(kept["prompt_id"].to_pylist()) and again.num_rows == 14


def test_every_field_of_a_reward_run_is_one_of_a_whole_run() -> None:
    assert list(RunConfig.model_fields)[: len(RewardRunConfig.model_fields)] == list(RewardRunConfig.model_fields)
    assert "policy" not in resolved(RewardRunConfig(out="x", space={"objectives": {"a": None}}, reward={"folder": "f"}))
