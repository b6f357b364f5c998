"""What every run needs: its folder, configuration, prompts, samplers, scorers and measuring.
Run its tests: pytest tests/test_loop.py

The loop of the method (dpa.py) and the methods it is compared with (baselines/lab.py) are both built on it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from rich.console import Console

from dpa.core.config import RunConfig
from dpa.core.errors import RunFolderError
from dpa.core.records import Ledger, Prompt, Sampler, Scorer
from dpa.core.reference import ModelReference
from dpa.core.sections.reward import RewardConfig
from dpa.core.sections.rollout import PromptsConfig, RolloutConfig
from dpa.core.target_measures import target_grid
from dpa.core.targets import Held
from dpa.models.files import GGUF_SUFFIX, REWARD_FILE
from dpa.models.gguf import dequantise
from dpa.models.memory import free_memory
from dpa.recipes.checks import check_attributes, needed_attributes
from dpa.sampling.engines import build_samplers, engine_of
from dpa.sampling.ray_samplers import ray_samplers
from dpa.scoring.function_scorer import FunctionScorer
from dpa.scoring.ray_scorers import ray_scorers
from dpa.scoring.scorers import build_scorer
from dpa.stages.evaluate import evaluate, evaluate_targets
from dpa.stages.prompts import (
    draw_prompts,
    measured_prompts,
    prompts_from_table,
    prompts_table,
    read_prompts,
    without_held_out,
)
from dpa.stages.rollout import rollout
from dpa.stages.score import score
from dpa.stages.train_reward import require_better_than_mean
from dpa.storage.progress import AtWork
from dpa.storage.run_folder import RunFolder, StageFolder
from dpa.storage.tables import read_json
from dpa.training.ranks import is_first

Result = TypeVar("Result")


def reports_progress(stage: Callable[..., Result]) -> Callable[..., Result]:
    """A stage that says now and then that it is at work, where there is no terminal."""

    @wraps(stage)
    def work(run: "Run", *arguments: Any, **options: Any) -> Result:
        place = f"iter_{arguments[0]}/" if arguments and isinstance(arguments[0], int) else ""
        with AtWork(f"{place}{stage.__name__}") if is_first() else nullcontext():
            return stage(run, *arguments, **options)

    return work


class Run:
    """A run folder and what the stages over it stand on.

    `made`: the folder of what is made once, prompts and the reward model; the run's own unless several runs share it.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, made: RunFolder | None = None) -> None:
        self.config = config
        self.space = config.direction_space()
        self.console = Console()
        self._folder, self._made = folder, made or folder
        self._engine = engine_of(config.rollout)  # starts when it is first asked
        self._open = ExitStack()
        self._open.callback(folder.close)
        self._open.callback(self._engine.close)

    # --- where things are --------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.path

    def stage(self, t: int | None, name: str) -> StageFolder:
        """The folder of a stage of iteration t, or of one outside the iterations."""
        return self._folder.stage(t, name)

    def policy_folder(self, t: int) -> Path:
        """Where the policy of iteration t is saved."""
        return self.path / f"iter_{t}" / "policy"

    @property
    def reward_folder(self) -> Path:
        """Where the trained reward model is saved."""
        return self._made.path / "reward_model"

    @cached_property
    def start_policy(self) -> str:
        """The configured policy; of a GGUF file, the folder that was made of it, once."""
        file = Path(self.config.policy)
        if file.suffix != GGUF_SUFFIX:
            return self.config.policy
        stage = self._made.stage(None, "start_policy")
        folder = stage.path / "policy"
        if not stage.done:
            self._make_start_policy(file, folder, stage)
        return str(folder)

    def _make_start_policy(self, file: Path, folder: Path, stage: StageFolder) -> None:
        """Dequantise the GGUF file."""
        self.console.print(dequantise(file, folder), markup=False)
        stage.finish(sealed=[folder])

    # --- prompts -----------------------------------------------------------------------------------------------------

    def prompts(self, t: int) -> list[Prompt]:
        """The prompts of iteration t: drawn without repeats until all are used, then again in another order."""
        return draw_prompts(self.training_prompts, t, self.config.prompts.count, self.config.seed)

    @cached_property
    def training_prompts(self) -> list[Prompt]:
        """Those that every iteration draws from; none that policies are measured on."""
        prompts = self._read_prompts("prompts", self.config.prompts)
        kept = without_held_out(prompts, self.held_out)
        if len(kept) < len(prompts):
            self.console.print(
                f"prompts: {len(prompts) - len(kept):,} of {len(prompts):,} are prompts of evaluate.prompts; they are "
                "left out, so that what is measured on was never trained on.",
                style="yellow",
            )
        return kept

    @cached_property
    def held_out(self) -> list[Prompt]:
        """The prompts policies are measured on."""
        config = self.config.evaluate.prompts
        return self._read_prompts("eval_prompts", config)[: config.count]  # an older version kept all, and took these

    def _read_prompts(self, name: str, config: PromptsConfig) -> list[Prompt]:
        """Prompts of the file as the run folder keeps them, of those to measure on the ones that are drawn; rejects go
        beside them, with their reasons."""
        stage = self._made.stage(None, name)
        if stage.done:
            return prompts_from_table(stage.table(0))
        field, limit = {"eval_prompts": "evaluate.prompts"}.get(name, name), self.config.rollout.max_reject_rate
        prompts, rejects = read_prompts(config.path, config.column, limit, config.split, field)
        if name == "eval_prompts":
            prompts = measured_prompts(prompts, config.count)
        stage.write_shard(0, prompts_table(prompts), Ledger(rows=len(prompts), rejects=len(rejects)), rejects)
        stage.finish()
        return prompts

    # --- samplers and scorers ----------------------------------------------------------------------------------------

    @contextmanager
    def samplers(self, policy: ModelReference, config: RolloutConfig) -> Iterator[list[Sampler]]:
        """The samplers of a policy: on the cluster where its engine can be spread, else as that opens them."""
        cluster = self.config.cluster
        spec = self._engine.spec(policy, self.space, config) if cluster.engine == "ray" else None
        if spec is not None:
            with ray_samplers(spec, config.workers, cluster) as samplers:
                yield samplers
            return
        self.make_room()
        with build_samplers(policy, config, self.space, self._engine) as samplers:
            yield samplers

    @cached_property
    def scorer(self) -> Scorer:
        """What gives scores: the reward model trained here, and whatever else is configured."""
        free_memory()  # of a policy that nobody holds any more, and its caches
        scorer = build_scorer(*self._scorer_parts())
        check_attributes(self.space, scorer.attributes)
        return scorer

    @contextmanager
    def scorers(self) -> Iterator[list[Scorer]]:
        """The same here, or several on the cluster."""
        if self.config.cluster.engine == "local":
            yield [self.scorer]
            return
        with ray_scorers(*self._scorer_parts(), self.config.cluster) as scorers:
            check_attributes(self.space, scorers[0].attributes)
            yield scorers

    def make_room(self) -> None:
        """The scorer leaves a card that is to be sampled on. On a processor it stays: to load it again costs more."""
        if self._engine.wants_card(self.config.rollout):
            self.let_scorer_go()

    def let_scorer_go(self) -> None:
        """Its memory is needed now; it is loaded again when it is."""
        self.__dict__.pop("scorer", None)
        free_memory()

    def _scorer_parts(self) -> tuple[RewardConfig, ModelReference | None, str | None]:
        train = self.config.reward.train
        if train and not self._made.stage(None, "train_reward").done:
            raise RunFolderError("reward model: it is not trained yet, or is damaged; run `dpa train-reward` first.")
        if train and not train.allow_worse_than_mean:
            require_better_than_mean(read_json(self.reward_folder / REWARD_FILE), needed_attributes(self.space))
        trained = self.config.reference(self.reward_folder) if train else None
        return self.config.reward.within(self._made.path), trained, self.config.remote_code_revision

    # --- measuring ---------------------------------------------------------------------------------------------------

    def measure(
        self,
        stage: Callable[[str], StageFolder],
        samplers: Callable[[RolloutConfig], AbstractContextManager[list[Sampler]]],
        targets: bool = False,
    ) -> dict[str, Any]:
        """Ask a policy the held-out prompts under every direction of the grid; the same code for every method.

        `stage`: the folders of `rollout`, `score` and `gold` of this measurement; `samplers` open the policy. One that
        knows `targets` is asked a grid of them too, in folders below `targets`.
        """
        settings, grid = self.config.evaluate, target_grid(self.space) if targets else []
        kinds: dict[str, tuple[np.ndarray, list[Held] | None]] = {"": (self.space.grid(settings.directions), None)}
        if grid:
            weights_DK, held_DK = zip(*((target.weights, target.held) for target in grid), strict=True)
            kinds["targets/"] = np.array(weights_DK), list(held_DK)
        changes = {"samples": settings.samples, "temperature": settings.temperature, "top_p": 1.0}
        how = self.config.rollout.model_copy(update=changes)
        if not all(stage(f"{kind}rollout").done for kind in kinds):
            self.make_room()  # not every method opens those of `samplers`
            with samplers(how) as opened:
                for kind, asked in kinds.items():
                    place = stage(f"{kind}rollout")
                    rollout(place, self.held_out, self.space, opened, how, self.config.seed, *asked)
            del opened  # or they would be held, with their caches, while the scorer is loaded
        with self.scorers() as scorers:
            for kind in kinds:
                score(stage(f"{kind}score"), stage(f"{kind}rollout"), self.held_out, scorers)
        if settings.gold:
            gold = FunctionScorer(settings.gold, "evaluate.gold")
            for kind in kinds:
                score(stage(f"{kind}gold"), stage(f"{kind}rollout"), self.held_out, gold)

        def found(kind: str) -> tuple[Any, ...]:
            scores = self.measured(lambda name: stage(f"{kind}{name}"))
            return stage(f"{kind}rollout").whole_table(), scores, self.space, settings, self.config.seed

        return evaluate(*found("")) | ({"targets": evaluate_targets(*found("targets/"))} if grid else {})

    def measured(self, stage: Callable[[str], StageFolder]) -> dict[str, pa.Table]:
        """Scores of a finished measurement, by name of the reward."""
        scores = {"model": stage("score").whole_table()}
        if self.config.evaluate.gold:
            scores["gold"] = stage("gold").whole_table()
        return scores
