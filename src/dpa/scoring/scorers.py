"""Where scores come from: the table of sources, and the one scorer that those of a configuration make together.
Run its tests: pytest tests/test_scorers.py
"""

from collections.abc import Sequence

import numpy as np

from dpa.core.errors import ConfigError
from dpa.core.lookup import look_up
from dpa.core.records import Messages, Scored, Scorer, add_costs, score_in_full, stable_hash
from dpa.core.reference import Model
from dpa.core.sections.reward import RewardConfig
from dpa.scoring.function_scorer import FunctionSource
from dpa.scoring.http_scorer import HttpSource
from dpa.scoring.judge_scorer import JudgeSource
from dpa.scoring.reward_scorer import FolderSource, TrainedSource
from dpa.scoring.scorer_source import ScorerSource

SCORER_SOURCES: dict[str, type[ScorerSource]] = {
    "train": TrainedSource,
    "folder": FolderSource,
    "http": HttpSource,
    "judge": JudgeSource,
    "functions": FunctionSource,
}
"""Name -> source, in the order their attributes stand in. A name that is a field of `reward` reads that section; any
other is given its settings in `reward.sources`."""


class MixScorer:
    """Several scorers side by side: their attributes in order. Raises ConfigError when two rate the same attribute."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        names = [name for scorer in scorers for name in scorer.attributes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"reward: attribute {twice[0]!r} comes from two scorers; rename or drop one of them.")
        self.attributes = tuple(names)
        self.revision = stable_hash(*(scorer.revision for scorer in scorers))
        self._scorers = tuple(scorers)

    def score(self, prompts: Sequence[Messages], responses: Sequence[str]) -> np.ndarray:
        """Return scores_NM: the columns of each scorer after the other's."""
        return self.score_in_full(prompts, responses).scores_NM

    def score_in_full(self, prompts: Sequence[Messages], responses: Sequence[str]) -> Scored:
        """The same, with the reasons and costs of all."""
        given = [score_in_full(scorer, prompts, responses) for scorer in self._scorers]
        reasons = {row: reason for one in reversed(given) for row, reason in one.reasons.items()}
        costs: dict[str, float] = {}
        for one in given:
            add_costs(costs, one.costs)
        return Scored(np.concatenate([one.scores_NM for one in given], axis=1), reasons, costs)


def scorer_sources(
    config: RewardConfig, trained: Model | None = None, code_revision: str | None = None
) -> list[ScorerSource]:
    """The sources a configuration names, in the table's order. Raises ConfigError for an unknown one."""
    for name in config.sources:
        look_up(SCORER_SOURCES, name, "reward.sources")
        if name in RewardConfig.model_fields:
            raise ConfigError(f"reward.sources: {name!r} has a section of its own; write reward.{name}.")
    own = {name: getattr(config, name) for name in SCORER_SOURCES if name in RewardConfig.model_fields}
    given = {name: section for name, section in own.items() if section} | config.sources
    return [
        source(name, given[name], config, trained, code_revision)
        for name, source in SCORER_SOURCES.items()
        if name in given
    ]


def build_scorer(config: RewardConfig, trained: Model | None = None, code_revision: str | None = None) -> Scorer:
    """The scorer a configuration describes; `trained` is the model that `reward.train` saved, `code_revision` what the
    other models it names may run (core/reference.py)."""
    scorers = [source.open() for source in scorer_sources(config, trained, code_revision)]
    return scorers[0] if len(scorers) == 1 else MixScorer(scorers)


def check_scorers(config: RewardConfig, code_revision: str | None = None) -> None:
    """What can be known of them before hours are spent. Raises ConfigError, ModelFileError, RunFolderError."""
    for source in scorer_sources(config, None, code_revision):
        source.check()


def known_attributes(config: RewardConfig, rated: Sequence[str]) -> tuple[str, ...] | None:
    """Every attribute that will be scored, `rated` being what the rated data have; None where only an opened scorer
    knows. Raises ConfigError."""
    found = [source.attributes(rated) for source in scorer_sources(config)]
    return None if None in found else tuple(name for names in found for name in names or ())


def scored_by(config: RewardConfig) -> str:
    """A sentence on where scores come from, every source named."""
    return f"Scores came from {' and '.join(source.described() for source in scorer_sources(config))}."


def on_every_node(config: RewardConfig) -> RewardConfig:
    """The configuration with local paths as every node of a cluster sees them; Hub ids and modules stay."""
    moved = {source.name: source.on_every_node() for source in scorer_sources(config)}
    own = {name: given for name, given in moved.items() if name in RewardConfig.model_fields}
    others = {name: given for name, given in moved.items() if name not in own}
    return config.model_copy(update={**own, "sources": others})
