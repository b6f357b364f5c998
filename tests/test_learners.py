"""A learner is one file (toy_learner.py) and one line; the loop trains by it, holds its policy to its seal and resumes.

pytest tests/test_learners.py
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_learner import OneByOne
from toy_run import toy_config

from dpa.core.config import RunConfig
from dpa.core.errors import ConfigError
from dpa.recipes.checks import check_run
from dpa.recipes.dpa import Loop
from dpa.storage.run_folder import StageFolder
from dpa.training.learners import LEARNERS


@pytest.fixture
def registered() -> Iterator[None]:
    """The one line."""
    LEARNERS["toy"] = OneByOne
    yield
    del LEARNERS["toy"]


def test_a_learner_that_is_a_file_and_a_line_is_the_loops(registered: None, tmp_path: Path) -> None:
    config = toy_config(tmp_path, tmp_path / "run", learner="toy")
    with Loop(config) as loop:
        loop.run()
    stage = StageFolder(tmp_path / "run/iter_1/finetune", "iter_1/finetune")
    assert stage.done and stage.seals
    assert stage.ledger.extra["steps"] == stage.ledger.rows > 0 and stage.ledger.training_tokens > 0
    provenance = json.loads((tmp_path / "run/iter_1/policy/dpa_config.json").read_text())["provenance"]
    assert provenance["finetune"]["learning_rate"] == 1e-3, "without a section of its own it has sft's"
    written = (tmp_path / "run/iter_1/policy/model.safetensors").stat().st_mtime_ns
    with Loop(config) as loop:
        loop.finetune(1)
    assert (tmp_path / "run/iter_1/policy/model.safetensors").stat().st_mtime_ns == written


def test_an_unknown_learner_is_refused_when_the_run_opens_and_the_nearest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner: 'gpro' is not known; did you mean `grpo`\?"):
        Loop(toy_config(tmp_path, tmp_path / "run", learner="gpro"))


@pytest.mark.parametrize(
    ("learner", "processes", "rows", "said"),
    [
        (
            "sft",
            2,
            3,
            r"finetune\.packed_rows_per_step: 8 is no multiple .*\(6\); take 12, or another --processes, which",
        ),
        ("sft", 3, "auto", r"finetune\.packed_rows_per_step: 8 is no multiple .*\(3\); take 9, or another --processes"),
        ("sft", 1, 3, r"finetune\.packed_rows_per_step: 8 is no multiple .*\(3\); take 9\.$"),
        ("dpo", 3, "auto", r"dpo\.pairs_per_step: 8 is no multiple of pairs_per_device .*\(3\); take 9, or another"),
    ],
)
def test_a_step_that_processes_cannot_share_out_is_refused_when_the_run_opens(
    learner: str, processes: int, rows: int | str, said: str, tmp_path: Path
) -> None:
    """Not hours later, at the first training, when the folder would refuse the mended number."""

    def config(processes: int) -> RunConfig:
        finetune, cluster = {"rows_per_device": rows}, {"processes": processes}
        given = {"finetune": finetune, "dpo": {"pairs_per_step": 8}, "cluster": cluster, "learner": learner}
        return toy_config(tmp_path, tmp_path / "run", **given)

    with pytest.raises(ConfigError, match=said):
        Loop(config(processes))
    if rows == "auto":
        check_run(config(1))
        check_run(config(2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"selection": {"targets": 0.25, "method": "best_mean"}}, "selection.targets: 0.25 is not read"),
        ({"learner": "dpo", "finetune": {"online_learning_rate": 3e-5}}, "set dpo.learning_rate, or leave it out."),
        ({"selection": {"targets": 0.25}, "finetune": {"online_learning_rate": 3e-5}}, None),
    ],
)
def test_a_field_that_is_set_and_not_read_is_said(
    changes: dict, said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No error: a comparison sets them for all of its methods."""
    check_run(toy_config(tmp_path, tmp_path / "run", **changes))
    assert said in caplog.text if said else not caplog.text


def test_online_iterations_train_at_their_own_rate_and_t0_at_its_own(tmp_path: Path) -> None:
    """The log of a step of t = 1 says the rate it took; a constant one is the peak."""
    finetune = {"max_length": 256, "learning_rate": 1e-3, "online_learning_rate": 2e-4, "warmup": 0.0}
    finetune["schedule"] = "constant_with_warmup"
    with Loop(toy_config(tmp_path, tmp_path / "run", finetune=finetune)) as loop:
        assert [loop.training(t).learning_rate for t in (0, 1, 2)] == [1e-3, 2e-4, 2e-4]
        loop.learn(1)
        log = (loop.stage(1, "finetune").path / "log.jsonl").read_text().splitlines()
    rates = {entry["learning_rate"] for entry in map(json.loads, log) if "learning_rate" in entry}
    assert rates == {2e-4}
