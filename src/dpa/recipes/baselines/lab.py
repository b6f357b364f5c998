"""Where every method works: a Run for one method and one seed, with a budget, over a folder of its own.
Run its tests: pytest tests/test_baselines.py

What the methods of one seed share was made once by an ordinary Loop of no iterations (`shared`): the rated table, the
reward model and its scores of the rated responses, the selection and the policy of t = 0. It is only read here.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dpa.core.comparison import Entry
from dpa.core.config import RunConfig
from dpa.core.directions import DirectionSpace
from dpa.core.errors import DamageError, DataError, TrainingError
from dpa.core.records import Ledger, Prompt, Sampler, messages_text, stable_hash
from dpa.core.reference import ModelReference
from dpa.core.sections.reward import RewardConfig
from dpa.core.sections.rollout import PromptsConfig
from dpa.core.sections.selection import SelectionConfig
from dpa.models.policy import count_tokens, shares_beginnings
from dpa.recipes.baselines.asking import TranslatingSampler, without_direction
from dpa.recipes.run import Run
from dpa.sampling.samplers import SamplerSpec, sampler_spec
from dpa.stages.finetune import finetune_policy
from dpa.stages.prompts import draw_prompts, prompts_from_table
from dpa.stages.ratings import load_ratings
from dpa.stages.rollout import ask, rollout
from dpa.stages.score import score
from dpa.stages.select import select_rated, select_winners
from dpa.storage.run_folder import RunFolder, StageFolder
from dpa.storage.schemas import completeness
from dpa.storage.stage_records import DoneRecord
from dpa.training.grpo import GRPO
from dpa.training.learner import Learner
from dpa.training.learners import learner_named

NARROWEST = 1e-6
"""Half-angle in degrees of a cone that holds one direction."""

MEASURING = "measure"
"""Folder of what is asked only to measure; it is charged to nobody."""


class Trained(NamedTuple):
    """A policy to be measured: its name in the report, how to open a Sampler that takes directions, and whether that
    takes targets too."""

    name: str
    open: Callable[[], Sampler]
    targets: bool = False


@dataclass(frozen=True, kw_only=True)
class Method(Entry):
    """A method as its file states it: what a report must know of it, and how it trains. Line it up in methods.py.

    `stands_on` names the method whose training it begins with, and whose `changes` it has where it has none of its own.
    Where that one is compared with the same settings, its job is waited for and its policies are read (`Lab.ground`);
    what they cost is charged to both.
    """

    train: Callable[["Lab"], list[Trained]]
    stands_on: str | None = None


class Lab(Run):
    """One (method, seed). `budget`: tokens generated and trained on that it may spend, what it takes over included.

    `ground` is the lab of the method it stands on, that one's work being done; its own where there is none.
    """

    def __init__(self, config: RunConfig, shared: Path, folder: Path, budget: int, ground: "Lab | None" = None) -> None:
        super().__init__(config, RunFolder(folder), made=RunFolder(shared))
        self.shared, self.folder, self.budget = shared, folder, budget
        self.ground = ground or self

    # --- what the methods of a seed share ----------------------------------------------------------------------------

    def _make_start_policy(self, file: Path, folder: Path, stage: StageFolder) -> None:
        self._check_shared(None, "start_policy")  # the shared job's to make

    @cached_property
    def reward(self) -> RewardConfig:
        """The configuration of scores, the trained reward model being a folder by now."""
        own = self.config.reward.within(self.shared)
        if own.train is None:
            return own
        self._check_shared(None, "train_reward")
        return own.model_copy(update={"train": None, "folder": str(self.reward_folder)})

    def _scorer_parts(self) -> tuple[RewardConfig, ModelReference | None, str | None]:
        return self.reward, None, self.config.remote_code_revision

    @cached_property
    def ratings(self) -> pa.Table:
        """The rated responses, columns of ratings.parquet."""
        loaded = load_ratings(self.shared)
        if loaded is None:
            raise DamageError(f"{self.shared}: its rated data are damaged.")
        return loaded[0]

    @cached_property
    def rated(self) -> pa.Table:
        """The same, with the columns `candidate_id` and `complete` that sampled candidates have."""
        return as_candidates(self.ratings)

    @cached_property
    def row_tokens(self) -> float:
        """Tokens of a rated row on average, its prompt included and no direction stated."""
        rows = unstated(self.rated)
        return count_tokens(self.config.reference(self.start_policy), rows, self.space) / len(rows)

    def rated_scores(self) -> np.ndarray:
        """scores_RK of the rated responses by the reward model, in the ratings' order; NaN where there is none."""
        return self.objectives(self.shared_stage(0, "score"))

    def _read_prompts(self, name: str, config: PromptsConfig) -> list[Prompt]:
        return prompts_from_table(self.shared_stage(None, name).table(0))

    def take_over_t0(self) -> str:
        """The policy of t = 0, which listens to directions already; what it cost is charged to this method."""
        self._check_shared(0, "finetune")
        ledger = self.shared_stage(0, "finetune").ledger
        stage = self.stage(0, "taken_over")
        if not stage.done:
            stage.finish(replace(ledger, extra={}))
        return str(self.shared / "iter_0" / "policy")

    # --- the stages, in a folder of this method's own ----------------------------------------------------------------

    def sampler(
        self, policy: str | Path, measuring: bool = False, translate: Callable[..., Any] | None = None
    ) -> Sampler:
        """A policy that answers in this process, each request rewritten by `translate` where one is given."""
        opened = self.spec(policy, measuring).build()
        return opened if translate is None else TranslatingSampler(opened, translate)

    def start_sampler(self) -> Sampler:
        """The start policy as it came, to be measured; it knows no direction, so requests must carry none."""
        return self.sampler(self.start_policy, measuring=True)

    def spec(self, policy: str | Path, measuring: bool = False) -> SamplerSpec:
        """How a policy is sampled: as rollout says, or as evaluation does."""
        changes = {"temperature": self.config.evaluate.temperature, "top_p": 1.0} if measuring else {}
        return sampler_spec(self.config.reference(policy), self.config.rollout.model_copy(update=changes), self.space)

    def rollout(
        self,
        t: int,
        build: Callable[[], Sampler],
        directions_DK: np.ndarray | None = None,
        count: int | None = None,
        **changes: Any,
    ) -> None:
        """Sample the prompts of iteration t, the first `count` of them where one is given, as `config.rollout` and
        `changes` of it say; score every candidate. The sampler is built where there is something to sample, and gone
        before the scorer comes."""
        candidates, scores = self.stage(t, "rollout"), self.stage(t, "score")
        if candidates.done and scores.done and self.stage(t, "finetune").done:
            return  # until then another scorer's scores take their place, as in the loop
        prompts = self.prompts(t)[:count]
        if not candidates.done:
            self.make_room()
            how = self.config.rollout.model_copy(update=changes)
            rollout(candidates, prompts, self.space, [build()], how, self.config.seed, directions_DK)
        score(scores, candidates, prompts, self.scorer)

    def candidates(self, t: int) -> tuple[pa.Table, np.ndarray]:
        """The candidates of iteration t with `messages` (JSON text) and `complete` (stages/select.py), scores_RK."""
        table = self.stage(t, "rollout").whole_table()
        texts = {prompt.prompt_id: messages_text(prompt.messages) for prompt in self.prompts(t)}
        messages = pa.array([texts[prompt_id] for prompt_id in table["prompt_id"].to_pylist()], pa.string())
        table = table.append_column("messages", messages).append_column("complete", pa.array(completeness(table)))
        return table, self.objectives(self.stage(t, "score"))

    def best_rated(self, direction_K: np.ndarray, t: int = 0) -> pa.Table:
        """For each rated prompt its best response under one direction, in the columns of a select shard."""
        stage, one = self.stage(t, "select"), SelectionConfig(directions=1)  # type: ignore[call-arg]
        scores, space = self.shared_stage(0, "score"), self.only(direction_K)
        select_rated(stage, self.ratings, scores, space, one, self.config.seed)
        return stage.whole_table()

    def best_sampled(self, direction_K: np.ndarray, t: int) -> pa.Table:
        """For each prompt of iteration t its best candidate under one direction, in the columns of a select shard."""
        stage = self.stage(t, "select")
        how = SelectionConfig(directions=1)  # type: ignore[call-arg]
        folders = self.stage(t, "rollout"), self.stage(t, "score")
        select_winners(stage, *folders, self.prompts(t), self.only(direction_K), how, self.config.seed)
        return stage.whole_table()

    def finetune(self, t: int, policy: str | Path, rows: pa.Table, tokens: float, online: bool = False) -> Path:
        """Finetune `policy` on rows until about `tokens` are trained on: in passes over them, whole or not.

        Rows have the columns of a select shard; a null direction means that none is stated. `online`: the policy made
        them, so `finetune.online_learning_rate` holds, as in the loop's own iterations.
        """
        rate = self.config.finetune.of_iteration(int(online)).learning_rate
        return self._train(t, policy, rows, [rows], learner_named("sft"), tokens, learning_rate=rate)

    def prefer(self, t: int, policy: str | Path, pairs: pa.Table, tokens: float, **changes: Any) -> Path:
        """The same by DPO on pairs (columns `chosen` and `rejected` instead of `response`), `config.dpo` and `changes`
        of it saying how. Raises DataError where there are none."""
        if not len(pairs):
            raise DataError(
                f"iter_{t}: no prompt of the rated data has two responses of which one is better, so there is no pair "
                "to learn from; rate several responses to a prompt, or leave this method out."
            )
        sides = [pairs.append_column("response", pairs[side]) for side in ("chosen", "rejected")]
        return self._train(t, policy, pairs, sides, learner_named("dpo"), tokens, **changes)

    def practise(self, t: int, policy: str | Path, count: int, learn: type[GRPO], **fields: Any) -> tuple[Path, Ledger]:
        """Let a learner that samples for itself, with these `fields`, learn from `count` prompts under directions drawn
        for them, `config.grpo` saying how: one direction for each, once, after those of the iterations before. Returns
        the policy and what it cost."""
        asked, rollout = self.stage(t, "rollout"), self.config.rollout.model_copy(update={"directions": 1})
        if not asked.done:
            before = sum(self.stage(earlier, "rollout").ledger.rows for earlier in range(1, t))
            prompts = draw_prompts(self.training_prompts, t, count, self.config.seed, before)
            ask(asked, prompts, self.space, rollout, self.config.seed)
        how = rollout, None if self.stage(t, "finetune").done else self.scorer
        config = getattr(self.config, learn.section).model_copy(update={"epochs": 1})
        rows = self._kept(t, asked.whole_table())
        out = self._learn(t, policy, rows, learn(config, self.space, self.config.seed + t, *how, **fields))
        return out, self.stage(t, "finetune").ledger

    def _train(
        self,
        t: int,
        policy: str | Path,
        rows: pa.Table,
        read: list[pa.Table],
        learn: type[Learner[Any]],
        tokens: float,
        **changes: Any,
    ) -> Path:
        """`read`: what one pass over the rows reads."""
        kept = self._kept(t, rows)
        if self.stage(t, "finetune").done:  # a job that goes on has spent what it did before
            return self.policy_folder(t)
        if tokens <= 0:
            raise TrainingError(
                f"iter_{t}: nothing of the budget of {self.budget:,} tokens is left to train on; raise `budget`, or "
                "lower this method's prompts or samples in `changes`."
            )
        config = getattr(self.config, learn.section)
        start = self.config.reference(policy)
        packs = learn.reads == "winners" and shares_beginnings(start, config.bf16)
        packed = config.max_length if packs else None
        longest = config.max_length
        epochs = tokens / max(1, sum(count_tokens(start, one, self.space, packed, longest) for one in read))
        # Several methods state no direction, or not as ours.
        unmeasured = {"listening_rows": 0, "min_listening": None}
        config = config.model_copy(update={"epochs": epochs, **unmeasured, **changes})
        return self._learn(t, policy, kept, learn(config, self.space, self.config.seed + t))

    def _kept(self, t: int, rows: pa.Table) -> StageFolder:
        """The rows that iteration t learns from, as a stage."""
        stage = self.stage(t, "rows")
        made_from = stable_hash(*(part for name in rows.column_names for part in (name, *rows[name].to_pylist())))
        if stage.shard_digest(0, made_from) is None:
            stage.write_shard(0, rows, Ledger(rows=len(rows)), made_from=made_from)
        if not stage.done:
            stage.finish(shards=1)
        return stage

    def _learn(self, t: int, policy: str | Path, rows: StageFolder, learner: Learner[Any]) -> Path:
        out = self.policy_folder(t)
        finetuned = self.stage(t, "finetune")
        if learner.scorer is None and not finetuned.done:
            self.let_scorer_go()
        finetune_policy(finetuned, rows, self.config.reference(policy), learner, out)
        return out

    # --- small things ------------------------------------------------------------------------------------------------

    def only(self, direction_K: np.ndarray) -> DirectionSpace:
        """The space whose cone holds one direction, for selecting and sampling under it alone."""
        center = tuple(map(float, direction_K))
        training: dict[str, Any] = {"training_angle": None, "training_ends": 0.0, "training_arcs": 0.0}
        return replace(self.space, center=center, max_angle=NARROWEST, presets={}, **training)

    def objectives(self, score_stage: StageFolder) -> np.ndarray:
        """scores_RK of a finished score stage; NaN where a row is not valid."""
        return self.space.combine(*score_stage.scores())

    @property
    def left(self) -> int:
        """Tokens of the budget that are left for the first training that is not done. One that turned out damaged is
        given again what it was given, whatever was trained after it."""
        cost = Ledger() if self.ground is self else self.ground.cost
        for t in count():
            stages = [self.stage(t, file.parent.name) for file in sorted(self.path.glob(f"iter_{t}/*/done.json"))]
            done = {stage.path.name: stage.ledger for stage in stages if stage.done}
            for ledger in done.values():
                cost.add(ledger)
            if "finetune" not in done:
                break
        return self.budget - cost.tokens_generated - cost.training_tokens

    @property
    def cost(self) -> Ledger:
        """What it has spent, and what it stands on."""
        total = spent(self.folder)
        if self.ground is not self:
            total.add(self.ground.cost)
        return total

    def measuring(self, policy: str) -> Callable[[str], StageFolder]:
        """The folders of what a policy of that name is asked to be measured."""
        slug = "".join(letter if letter.isalnum() else "_" for letter in policy.lower())
        return lambda name: self.stage(None, f"{MEASURING}/{slug}/{name}")

    def trained(
        self, name: str, policy: str | Path, translate: Callable[..., Any] | None = None, targets: bool = False
    ) -> Trained:
        """A policy that is measured by itself, each request rewritten by `translate` where one is given."""
        return Trained(name, lambda: self.sampler(policy, measuring=True, translate=translate), targets)

    def as_point(self, name: str, policy: Path) -> Trained:
        """A policy that is told no direction."""
        return self.trained(name, policy, without_direction)

    def _check_shared(self, t: int | None, name: str) -> None:
        """Raises DamageError where a model that the methods share is not what it was."""
        if not self.shared_stage(t, name).done:
            raise DamageError(f"{self.shared}: the model of {name} is damaged.")

    def shared_stage(self, t: int | None, name: str) -> StageFolder:
        """The folder of a stage that the methods share, to be read."""
        return self._made.stage(t, name)


def as_candidates(ratings: pa.Table) -> pa.Table:
    """Rated rows with the columns `candidate_id` and `complete` that sampled candidates have."""
    own = ratings.append_column("candidate_id", ratings["row_id"])
    return own.append_column("complete", pa.array(completeness(own)))


def unstated(rows: pa.Table) -> pa.Table:
    """Rows without their direction, if they have one: for a policy that is told none."""
    nothing = pa.nulls(len(rows), pa.list_(pa.float64()))
    if "direction" not in rows.column_names:
        return rows.append_column("direction", nothing)
    return rows.set_column(rows.column_names.index("direction"), "direction", nothing)


def spent(folder: Path) -> Ledger:
    """What every finished stage below a folder cost, those for measuring left out. A damaged record counts for nothing:
    a job that goes on has made again what it came by."""
    total = Ledger()
    for file in sorted(folder.rglob("done.json")):
        if MEASURING not in file.relative_to(folder).parts:
            with suppress(DamageError):
                total.add(replace(DoneRecord.read(file, file.parent.name).ledger, extra={}))
    return total
