"""What `--reward` gives, to choose among answers: a reward model's folder, or a run and with it all that it scores by.
Run its tests: pytest tests/test_given_reward.py

    given = GivenReward("runs/my/reward_model")    # or a Hub id
    given = GivenReward("runs/my")                 # or its YAML: the model it trained, its functions, servers, judge
    given.check(space)
    scorer = given.open()
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dpa.core.config import RUN_FILE, RewardRunConfig, run_named
from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, DirectionError, ModelFileError
from dpa.core.records import Scorer
from dpa.core.reference import ModelReference
from dpa.core.sections.reward import RewardConfig
from dpa.models.files import REWARD_FILE, resolve_model
from dpa.scoring.function_scorer import function_file
from dpa.scoring.reward_model import read_spec
from dpa.scoring.scorers import build_scorer, known_attributes
from dpa.storage.seals import check_in_run

TRAINED = "reward_model"
"""What a run folder calls the reward model it trained."""
_OUR_CODE = "dpa."


@dataclass(frozen=True)
class GivenReward:
    """`text`: as the user wrote it; `code_revision`: what a reward model may run (core/reference.py), whatever a run's
    configuration says."""

    text: str
    code_revision: str | None = None

    def check(self, space: DirectionSpace) -> None:
        """Refuse, before anything is loaded, what is damaged or does not score what the objectives are made of.

        Raises ConfigError, ModelFileError, RunFolderError.
        """
        if (folder := self._config.folder) is not None:
            try:
                check_in_run(resolve_model(ModelReference(folder, self.code_revision)).path)
                if self._config.preset is None and Path(folder).is_dir():
                    read_spec(Path(folder))
            except ModelFileError as error:
                raise ModelFileError(f"--reward: {error}") from None
        if self._trained is not None:
            check_in_run(self._trained)
        names = known_attributes(self._config, self._rated)
        try:
            space.combine(np.empty((0, len(names or ()))), names or ())
        except DirectionError as error:
            if names is not None:
                raise ConfigError(
                    f"--reward: {self.text} does not score all that the objectives are made of ({error}); give the run "
                    "folder or the configuration of a run that does: its functions are then called too."
                ) from None

    def open(self) -> Scorer:
        """The scorer. Raises ConfigError, ModelFileError, EngineError."""
        trained = None if self._trained is None else ModelReference(str(self._trained), self.code_revision)
        return build_scorer(self._config, trained, self.code_revision)

    @property
    def strangers(self) -> list[str]:
        """Fields by which code that is not ours is run, or others are asked: only where somebody says so."""
        config = self._config
        functions = [
            name
            for name, function in config.functions.items()
            if function_file(function) is not None or not function.startswith(_OUR_CODE)
        ]
        asked = [name for name in ("http", "judge") if getattr(config, name) is not None]
        return [f"functions.{name}" for name in functions] + asked + [f"sources.{name}" for name in config.sources]

    @cached_property
    def _run(self) -> RewardRunConfig | None:
        """The configuration of the run that was given; None for a reward model."""
        return run_named(self.text)

    @property
    def _config(self) -> RewardConfig:
        if self._run is None:
            return RewardConfig(folder=self.text)  # type: ignore[call-arg]
        return self._run.reward.within(Path(self._run.out))

    @property
    def _trained(self) -> Path | None:
        """The reward model that the run trained: beside its configuration, wherever that is now, or in its `out`."""
        if self._run is None or self._config.train is None:
            return None
        places = [Path(self.text), Path(self.text).parent, Path(self._run.out)]
        found = next((place / TRAINED for place in places if (place / TRAINED / REWARD_FILE).is_file()), None)
        if found is None:
            raise ConfigError(
                f"--reward: {self.text} has not trained its reward model yet; run `dpa train-reward` with it first."
            )
        return found

    @property
    def _rated(self) -> tuple[str, ...]:
        return () if self._trained is None else read_spec(self._trained).attributes


def reward_of_run(run: Path) -> str:
    """What the answers of a run's policy are chosen by where nobody says so: all that the run scores by if that is code
    of ours, else the reward model it trained. Raises ConfigError."""
    strangers: list[str] = []
    if (run / RUN_FILE).is_file():
        strangers = GivenReward(str(run)).strangers
        if not strangers:
            return str(run)
    if (run / TRAINED).is_dir():
        return str(run / TRAINED)
    if strangers:
        raise ConfigError(
            f"--reward: {run} scores by reward.{strangers[0]}, which is not called unasked; give --reward {run}."
        )
    raise ConfigError(f"--reward: {run} holds no reward model and is no run that scores; give the folder of either.")
