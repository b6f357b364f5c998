"""What can be known to be wrong with a run before any work starts.
Run its tests: pytest tests/test_loop_options.py
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpa.core.config import RewardRunConfig, RunConfig
from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, DataError
from dpa.core.sections.reward import RewardConfig
from dpa.models.files import GGUF_SUFFIX, REWARD_FILE
from dpa.sampling.engines import engine_named
from dpa.scoring.function_scorer import function_source
from dpa.scoring.scorers import known_attributes
from dpa.storage.rating_forms import declared_scales
from dpa.storage.schemas import SCORES, name_taken, selection_schema
from dpa.training.learners import learner_of

log = logging.getLogger(__name__)

BYTES_PER_CANDIDATE = 4_000
"""Upper estimate of what one candidate and its scores take on disk."""


def first_iteration(config: RunConfig) -> int:
    """0 where rated rows give an offline iteration, else 1."""
    return 0 if config.ratings else 1


def check_run(config: RunConfig) -> None:
    """What the configuration says by itself. Raises ConfigError."""
    space, gold, first = config.space.build(), config.evaluate.gold, first_iteration(config)
    missing = [name for name in space.names if gold and name not in gold]
    unknown = [name for name in gold if name not in space.names]
    if missing or unknown:
        raise ConfigError(
            f"evaluate.gold: its names must be the objectives {', '.join(space.names)}; "
            f"{'missing' if missing else 'unknown'}: {', '.join(missing or unknown)}."
        )
    engine_named(config.rollout.engine.kind)
    for t in (first, first + 1):
        learner = learner_of(config, t)
        learner.check(config)
        pairs = learner.reads == "pairs"
        columns = selection_schema(pairs, held=config.selection.target_share > 0 and not pairs)
        if learner.reads != "prompts" and (taken := name_taken(columns, space.names)):
            raise ConfigError(
                f"space.objectives: `{taken}` is the name of a column of the selection; rename the objective."
            )
    check_rewards(config)
    for said in _unread(config):
        log.warning("%s", said)


def _unread(config: RunConfig) -> list[str]:
    """Fields that were set and are not read here. No error: a comparison sets them for all of its methods."""
    said, selection, online = [], config.selection, config.finetune.online_learning_rate
    if selection.targets and not selection.target_share:
        said.append(
            f"selection.targets: {selection.targets:g} is not read by method {selection.method}, so no target is "
            "trained; take method pooled, or leave it out."
        )
    section = learner_of(config, 1).section
    if online is not None and section != "finetune":
        said.append(
            f"finetune.online_learning_rate: {online:g} is not read by learner {config.learner}; set "
            f"{section}.learning_rate, or leave it out."
        )
    return said


def check_rewards(config: RewardRunConfig) -> None:
    """Every attribute of an objective is rated and trained, or a function's. What a finished model scores is known
    once it is loaded (`check_attributes`). Raises ConfigError."""
    if config.reward.train and not config.ratings:
        raise ConfigError("reward.train: there are no ratings to train on; add a `ratings` section.")
    rated = [name for ratings in config.ratings for name in declared_scales(ratings)]
    known = known_attributes(config.reward, rated)
    if known is not None:
        twice = next((name for place, name in enumerate(known) if name in known[:place]), None)
        if twice is not None:
            raise ConfigError(
                f"reward: {twice!r} is scored by two sources; leave it out of one of them (what is trained is named in "
                "reward.train.attributes)."
            )
        check_attributes(config.space.build(), known)


def check_attributes(space: DirectionSpace, attributes: Sequence[str]) -> None:
    """Every attribute of an objective is scored, and none has the name of a column. Raises ConfigError."""
    if taken := name_taken(SCORES, attributes):
        raise ConfigError(f"reward: an attribute cannot be called {taken!r}, as a column of scores is; rename it.")
    for objective in space.objectives:
        for name in objective.attributes:
            if name not in attributes:
                raise ConfigError(
                    f"space.objectives.{objective.name}: nothing scores {name!r}; {_known('scored', attributes)}."
                )


def check_rated(reward: RewardConfig, summary: Mapping[str, Any]) -> None:
    """What is to be trained has a mark somewhere: a column may be there and be empty. Raises DataError."""
    counts = {name: about["count"] for name, about in summary["attributes"].items()}
    if reward.train is None:
        return
    for name in reward.train.attributes or counts:
        if not counts[name]:
            raise DataError(
                f"ratings: no row has a mark on {name!r}, so nothing can be trained for it; name what is rated in "
                f"reward.train.attributes ({', '.join(other for other in counts if counts[other])})."
            )


def check_iteration(config: RunConfig, t: int, lowest: int | None = None) -> None:
    """There is such an iteration. Raises ConfigError."""
    lowest = first_iteration(config) if lowest is None else lowest
    if not lowest <= t <= config.iterations:
        raise ConfigError(f"--iteration: {t} is outside {lowest}..{config.iterations}; choose one of those.")


def check_candidates(config: RunConfig, t: int) -> None:
    """The iteration has candidates to score. Raises ConfigError."""
    check_iteration(config, t)
    if learner_of(config, t).reads == "prompts":
        raise ConfigError(
            f"learner: {config.learner} scores its own answers while it learns, so iteration {t} has nothing "
            f"to score or select; run `dpa finetune -t {t}`."
        )


def needed_attributes(space: DirectionSpace) -> set[str]:
    """Attributes the objectives are made of."""
    return {name for objective in space.objectives for name in objective.attributes}


def _known(what: str, names: Sequence[str]) -> str:
    return f"{what} are: {', '.join(dict.fromkeys(names))}" if names else f"nothing is {what}"


def inputs_of(config: RewardRunConfig) -> dict[str, Path]:
    """Local files whose content the run depends on, those of scoring functions among them: a policy that is there was
    trained on what they said then."""
    named = {f"ratings.{place}.path": ratings.path for place, ratings in enumerate(config.ratings)}
    functions = {f"reward.functions.{name}": function for name, function in config.reward.functions.items()}
    if config.reward.folder is not None:  # its record has the scores of its own golden example
        named["reward.folder"] = str(Path(config.reward.folder) / REWARD_FILE)
    if isinstance(config, RunConfig):
        named |= {"prompts.path": config.prompts.path, "evaluate.prompts.path": config.evaluate.prompts.path}
        if Path(config.policy).suffix == GGUF_SUFFIX:
            named["policy"] = config.policy
        functions |= {f"evaluate.gold.{name}": function for name, function in config.evaluate.gold.items()}
    files = {field: Path(path) for field, path in named.items()}
    files |= {field: file for field, function in functions.items() if (file := function_source(function)) is not None}
    return {field: file for field, file in files.items() if file.exists()}
