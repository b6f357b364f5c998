"""What a run makes of its rated rows: one table, and the reward model. A run without a policy is no more than this.
Run its tests: pytest tests/test_reward_run.py tests/test_loop.py
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from rich.console import Console

from dpa.core.config import RewardRunConfig
from dpa.core.errors import ConfigError
from dpa.core.records import Ledger, Prompt
from dpa.models.files import REWARD_FILE
from dpa.recipes.checks import check_rated, check_rewards, inputs_of, needed_attributes
from dpa.recipes.room import needed_bytes
from dpa.stages.ratings import leave_out, load_ratings, print_summary, read_ratings, save_ratings
from dpa.stages.train_reward import print_quality, require_better_than_mean, train_reward
from dpa.storage.memory import peak_memory
from dpa.storage.progress import AtWork
from dpa.storage.run_folder import RunFolder
from dpa.storage.stopping import end_on_signal
from dpa.training.reward_training import remove_checkpoints
from dpa.training.trainers import CountSeconds


class RatedRows:
    """The rated rows of a run and the reward model trained on them, in the run's folder, which is open."""

    def __init__(self, config: RewardRunConfig, folder: RunFolder, console: Console) -> None:
        self.config, self.folder, self.console = config, folder, console
        self._found: tuple[pa.Table, dict[str, Any]] | None = None

    def read(self, held_out: Sequence[Prompt], show: bool = False) -> pa.Table:
        """All rated data as one table, without the rows of these prompts; `show` prints its summary."""
        table, summary = self._read(held_out, show)
        check_rated(self.config.reward, summary)
        return table

    def train(self, held_out: Sequence[Prompt], show: bool = False, backbone: str | None = None) -> Mapping[str, Any]:
        """Train the reward model and return its record; `show` prints its held-out quality. `backbone`: default, the
        configured one."""
        train = self.config.reward.train
        if train is None:
            raise ConfigError("reward.train: not configured; add the section, or use `reward.folder` as it is.")
        train = train.model_copy(update={"backbone": backbone or train.backbone})
        stage, model = self.folder.stage(None, "train_reward"), self.folder.path / "reward_model"
        if not stage.done:  # nobody knows whose it is, or it has changed: made again, from its last checkpoint if any
            (model / REWARD_FILE).unlink(missing_ok=True)
        begun, seconds = time.monotonic(), CountSeconds()
        table, summary = self._read(held_out)
        check_rated(self.config.reward, summary)
        scales = {name: tuple(about["scale"]) for name, about in summary["attributes"].items()}
        facts = train_reward(table, scales, train, model, self.config.seed, self.config.remote_code_revision, seconds)
        if not stage.done:
            done = facts["training"]
            ledger = Ledger(
                training_tokens=int(done["train_tokens"] * done["epochs"]),
                rows=done["train_rows"],
                rejects=done["rejected_rows"],
                wall_s=seconds.earlier + time.monotonic() - begun,
                peak_memory=peak_memory(),
            )
            stage.finish(ledger, sealed=[model])
            show = True
        remove_checkpoints(model, train)
        if show:
            print_quality(facts, self.console)
        return facts

    def _read(self, held_out: Sequence[Prompt], show: bool = False) -> tuple[pa.Table, dict[str, Any]]:
        if not self.config.ratings:
            raise ConfigError("ratings: none are configured; add a `ratings` section.")
        found = self._found or load_ratings(self.folder.path)
        if found is None:
            everything = read_ratings(self.config.ratings)
            ratings = leave_out(everything, held_out) if held_out else everything
            if left_out := everything.table.num_rows - ratings.table.num_rows:
                self.console.print(f"ratings: {left_out} rows of prompts that are measured on are left out of training")
            found, show = (ratings.table, save_ratings(ratings, self.folder.path)), True
        self._found = found
        if show:
            print_summary(found[1], self.console)
        return found


class RewardRun:
    """A run folder whose run ends with its reward model, open. Raises UserError subclasses for what can be mended."""

    def __init__(self, config: RewardRunConfig) -> None:
        check_rewards(config)
        self.config, self.folder = config, RunFolder(config.out)
        self._open = ExitStack()
        self._open.callback(self.folder.close)
        self.folder.open(config, inputs_of(config))
        self._rated = RatedRows(config, self.folder, Console())

    def __enter__(self) -> Self:
        self._open.enter_context(end_on_signal(self.config.name))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def run(self, ignore_free_space: bool = False) -> Path:
        """Read the rated rows and train the reward model; returns its folder. The same call resumes. Refused where the
        disk looks too full for what is left."""
        if not ignore_free_space:
            self.folder.check_room(needed_bytes(self.config))
        facts, train = self.train_reward(show=True), self.config.reward.train
        if train is not None and not train.allow_worse_than_mean:
            require_better_than_mean(facts, needed_attributes(self.config.space.build()))
        return self.folder.path / "reward_model"

    def read_ratings(self, show: bool = False) -> pa.Table:
        """All rated data as one table; `show` prints its summary."""
        with AtWork("read_ratings"):
            return self._rated.read((), show)

    def train_reward(self, show: bool = False) -> Mapping[str, Any]:
        """Train the reward model and return its record; `show` prints its held-out quality."""
        with AtWork("train_reward"):
            return self._rated.train((), show)
