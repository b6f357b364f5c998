"""A learner is one file (toy_learner.py) and one line; the loop trains by it, holds its policy to its seal and resumes.

pytest tests/test_learners.py
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_learner import OneByOne
from toy_run import toy_config

from dpa.core.errors import ConfigError
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
