"""A learner is one file and one line: a toy that is registered goes through the loop.
pytest tests/test_learners.py
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from toy_run import toy_config
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpa.core.errors import ConfigError
from dpa.models.learners import LEARNERS
from dpa.models.packing import Example
from dpa.models.sft import SFT
from dpa.recipes.dpa import Loop


class Shortest(SFT):
    """Learns from the shortest winners alone: what would be the file of a new learner."""

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        work: Path,
        start: Callable[[], PreTrainedModel] | None = None,
    ) -> Any:
        """Over half of the examples."""
        shortest = sorted(examples, key=lambda example: example.tokens)[: len(examples) // 2]
        return super().trainer(model, tokenizer, shortest, work, start)


@pytest.fixture
def registered() -> Iterator[None]:
    LEARNERS["shortest"] = Shortest  # the line
    yield
    del LEARNERS["shortest"]


def test_a_toy_learner_is_one_file_and_one_line(registered: None, tmp_path: Path) -> None:
    with Loop(toy_config(tmp_path, tmp_path / "run", learner="shortest")) as loop:
        loop.run()
    provenance = json.loads((tmp_path / "run/iter_1/policy/dpa_config.json").read_text())["provenance"]
    assert provenance["finetune"]["learning_rate"] == 1e-3, "without a section of its own it has that of sft"
    assert (tmp_path / "run/report.html").is_file()


def test_an_unknown_learner_is_refused_when_the_run_opens_and_the_nearest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner: 'gpro' is not known; did you mean `grpo`\?"):
        Loop(toy_config(tmp_path, tmp_path / "run", learner="gpro"))
