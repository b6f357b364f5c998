"""A source of scores: what a section of `reward` needs to become a Scorer. A new one is a file and a line: a class like
these, and its name in SCORER_SOURCES (scoring/scorers.py).
Run its tests: pytest tests/test_scorers.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa.core.records import Scorer
from dpa.core.reference import Model
from dpa.core.sections.reward import RewardConfig


@dataclass(frozen=True)
class ScorerSource:
    """`name` is its place in the table, `given` its section of `reward`, or its settings in `reward.sources`.

    `reward`: all of `reward`; `trained`: the model that `reward.train` saved; `code_revision`: what other models may
    run (core/reference.py).
    """

    name: str
    given: Any
    reward: RewardConfig
    trained: Model | None = None
    code_revision: str | None = None

    def check(self) -> None:
        """Find what can be known to be wrong before hours are spent: no weights are read, no server is asked.

        Raises ConfigError, ModelFileError, RunFolderError.
        """

    def attributes(self, rated: Sequence[str]) -> tuple[str, ...] | None:
        """What it will score, `rated` being what the rated data have; None where only the opened scorer knows.

        Raises ConfigError.
        """
        return None

    def open(self) -> Scorer:
        """The scorer. Raises ModelFileError, ConfigError, EngineError."""
        raise NotImplementedError

    def described(self) -> str:
        """Where scores come from, in a few words for the model card."""
        raise NotImplementedError

    def on_every_node(self) -> Any:
        """`given` with its local paths as every node of a cluster sees them."""
        return self.given


def absolute(path: str) -> str:
    """A folder's whole path; a Hub id stays as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
