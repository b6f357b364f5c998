"""A run of the loop: opened, what is made once, and what an iteration stands on.
Run its tests: pytest tests/test_loop.py
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import pyarrow as pa

from dpa.core.config import RunConfig
from dpa.core.directions import DirectionSpace
from dpa.core.errors import RunFolderError
from dpa.core.reference import ModelReference
from dpa.models.policy import check_policy
from dpa.recipes.checks import check_run, first_iteration, inputs_of
from dpa.recipes.rated_rows import RatedRows
from dpa.recipes.results import evaluation_of
from dpa.recipes.run import Run, reports_progress
from dpa.scoring.function_scorer import FunctionScorer
from dpa.scoring.scorers import check_scorers
from dpa.storage.locks import Share
from dpa.storage.run_folder import RunFolder, StageFolder
from dpa.storage.stopping import end_on_signal
from dpa.training.learner import Learner
from dpa.training.learners import learner_of
from dpa.training.ranks import ranks


class LoopRun(Run):
    """A run folder of the loop, open. Raises UserError subclasses for what the user can mend."""

    def __init__(self, config: RunConfig, share: Share | None = None, join: bool = False) -> None:
        """Open the run folder. `share`: only this share of the shards of `rollout` and `score` is made, beside other
        processes. `join`: a rank of a launched training whose first rank has opened the folder."""
        check_run(config)
        folder = RunFolder(config.out)
        folder.open(config, inputs_of(config), share, join)
        super().__init__(config, folder)
        self._rated = RatedRows(config, folder, self.console)
        if share is not None or ranks() > 1:  # before others come in: what all of them read
            _ = self.start_policy
        if share is not None:
            if config.ratings:
                self.read_ratings()
            _ = self.training_prompts
            folder.let_others_in()

    def __enter__(self) -> Self:
        if ranks() == 1:  # the ranks of a launch stop together (training/trainers.py)
            self._open.enter_context(end_on_signal(self.config.name))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    # --- what is made once -------------------------------------------------------------------------------------------

    @reports_progress
    def read_ratings(self, show: bool = False) -> pa.Table:
        """All rated data as one table; `show` prints its summary."""
        return self._rated.read(self.held_out, show)

    @reports_progress
    def train_reward(self, show: bool = False) -> Mapping[str, Any]:
        """Train the reward model and return its record; `show` prints its held-out quality."""
        train = self.config.reward.train
        shared = train is not None and train.backbone == self.config.policy  # perhaps a file to be dequantised
        return self._rated.train(self.held_out, show, self.start_policy if shared else None)

    # --- an iteration ------------------------------------------------------------------------------------------------

    @property
    def first(self) -> int:
        """0 where rated rows give an offline iteration, else 1."""
        return first_iteration(self.config)

    def policy(self, t: int) -> ModelReference:
        """The policy of iteration t; before the first one, the start policy."""
        if t < self.first:
            return self.config.reference(self.start_policy)
        if not self.stage(t, "finetune").done:
            raise RunFolderError(
                f"iteration {t}: its policy is not finetuned yet, or is damaged; run `dpa finetune -t {t}` first."
            )
        return self.config.reference(self.policy_folder(t))

    def learner(self, t: int) -> type[Learner[Any]]:
        """What iteration t learns by."""
        return learner_of(self.config, t)

    def training(self, t: int) -> Any:
        """The section of the configuration by which iteration t learns."""
        return getattr(self.config, self.learner(t).section).of_iteration(t)

    def drawn_from(self, t: int) -> DirectionSpace:
        """The space that the directions of iteration t are drawn from: before `selection.ends_until`, its ends."""
        return replace(self.space, training_ends=1.0) if t < self.config.selection.ends_until else self.space

    def learned_from(self, t: int) -> StageFolder:
        """The stage whose rows the learner of iteration t reads."""
        return self.stage(t, "rollout" if self.learner(t).reads == "prompts" else "select")

    def look_ahead(self) -> None:
        """What later stages read is there, before earlier ones spend hours."""
        self._engine.check(self.config.rollout)
        if not self.stage(self.first, "finetune").done:
            check_policy(self.policy(self.first - 1), self.space)
        if evaluation_of(self, self.config.iterations) is not None:
            return
        check_scorers(self.config.reward, self.config.remote_code_revision)
        FunctionScorer(self.config.evaluate.gold, "evaluate.gold")
        _ = self.held_out
        if self.config.iterations > 0:
            _ = self.training_prompts
