"""The stages of a run as amounts of work: what each makes, reads and trains on, and what that takes.
Run its tests: pytest tests/test_estimate.py
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from dpa.core.config import RunConfig
from dpa.core.sections.reward import JudgeConfig
from dpa.core.sections.training import TrainingConfig
from dpa.core.target_measures import target_grid
from dpa.models.compiling import TRAINING_STEPS
from dpa.models.shared_prefixes import LEAST_SHARED, WORTH_SHARING
from dpa.recipes.checks import BYTES_PER_CANDIDATE, first_iteration
from dpa.recipes.costs.data_sizes import DIRECTION_TOKENS, PROMPT_TOKENS, RESPONSE_TOKENS, Data
from dpa.recipes.costs.devices import Device
from dpa.recipes.costs.model_sizes import Size
from dpa.recipes.costs.needs import TrainingNeed, rollout_need, shards_of, training_need
from dpa.recipes.costs.speeds import Speeds, kind_of
from dpa.recipes.costs.work import FUNCTION_ROW_S, PROCESSOR_START, Assumptions, Clock, Sampling, Training, passes_of
from dpa.stages.judge import CHARACTERS_PER_TOKEN
from dpa.training.learner import Learner
from dpa.training.learners import learner_of

CHECKPOINT_BYTES = 12
"""A parameter's weight and AdamW's two moments, in fp32."""


def checkpoint_bytes(parameters: float) -> int:
    """Of a training of all weights: two checkpoints that are kept until it ends, and one being written."""
    return int(3 * CHECKPOINT_BYTES * parameters)


@dataclass(frozen=True)
class JudgeCalls:
    """What a stage asks of a judge's servers: requests, tokens they read and write; `longest`: each reply is counted as
    long as it may be."""

    requests: int
    tokens_in: int
    tokens_out: int
    longest: bool


@dataclass(frozen=True)
class StageEstimate:
    """One stage. `rows` candidates, scores or winners; `tokens` generated or trained on; bytes of memory and disk; its
    likely `seconds`, and between which they may lie. None: unknown, and `unknown` says why.

    `measured`: where its speed comes from; empty where it is arithmetic. `misfit`: the device's memory does not hold
    it, and what to change. `judge`: what it asks of servers, whose time is not known. `checkpoints`: bytes of `disk`
    that are deleted when it ends.
    """

    name: str
    rows: int | None
    tokens: int | None
    seconds: float | None
    memory: int
    disk: int
    measured: str = ""
    low: float | None = None
    high: float | None = None
    misfit: str = ""
    unknown: str = ""
    judge: JudgeCalls | None = None
    checkpoints: int = 0


@dataclass(frozen=True)
class Inputs:
    """What a run is made of: its models, its data, and where it runs."""

    policy: Size
    scorer: Size | None
    data: Data
    device: Device
    cards: int


class Stages:
    """Turns amounts of work into estimates, under one set of assumptions."""

    def __init__(self, config: RunConfig, speeds: Speeds, inputs: Inputs, assume: Assumptions) -> None:
        self.config, self.speeds, self.given, self.assume = config, speeds, inputs, assume
        self.clock = Clock(inputs.device, inputs.cards, assume, speeds.card)
        most = config.rollout.max_new_tokens
        answer = (inputs.data.rated.response_tokens if inputs.data.rated else most / 2) * assume.answer
        self.answer = min(speeds.mean("tokens sampled", "answers") or answer, most)
        self.example = speeds.mean("tokens of examples", "examples") or inputs.data.prompt + self.answer
        self.start = assume.start * (1.0 if inputs.device.card else PROCESSOR_START)
        self.shards = shards_of(config.cluster, inputs.cards)

    def all(self) -> list[StageEstimate]:
        """Every stage in order."""
        config, rated = self.config, self.given.data.rated
        stages = [self.train_reward()] if config.reward.train else []
        if config.ratings:
            rows = None if rated is None else rated.rows
            winners = self.speeds.offline_winners
            if winners is None and rated is not None:
                winners = rated.prompts * config.selection.directions
            stages += self.iteration(0, None, rows, winners)
        prompts, directions = self.given.data.prompts, config.rollout.directions
        kept = config.selection.of_iteration(1).winners(directions)
        for t in range(1, config.iterations + 1):
            candidates = None if prompts is None else prompts * directions * config.rollout.samples
            if learner_of(config, t).reads == "prompts":  # it makes and scores its candidates itself
                stages += self.iteration(t, None, None, prompts and prompts * directions)
            else:
                stages += self.iteration(t, candidates, candidates, prompts and math.ceil(prompts * kept))
        return stages

    def train_reward(self) -> StageEstimate:
        """The reward model's training; ridge only reads the rows once."""
        train, size, rated = self.config.reward.train, self.given.scorer, self.given.data.rated
        assert train is not None and size is not None
        ridge = train.method == "ridge"
        example = max(1.0, self._rated_example(train.max_length) - DIRECTION_TOKENS)  # no direction is stated
        longest = min(train.max_length, 4 * example)
        learnt = (1 - train.held_out) * (1.0 if ridge else train.epochs)
        tokens = None if rated is None else int(rated.rows * example * learnt)
        mixed = self.given.device.in_bf16(train.bf16)
        need = training_need(
            size, self.given.device, "reward.train", longest=longest, most=train.batch_size, mixed=mixed,
            lora=train.lora if train.method == "lora" else None, checkpointing=train.gradient_checkpointing,
        )  # fmt: skip
        seconds, measured = self._measured("reward tokens", tokens)
        if tokens is not None and seconds is None and ridge:
            seconds = self.start + self.clock.scoring(size, tokens)
        elif tokens is not None and seconds is None:
            steps = max(1.0, tokens / example / train.batch_size)
            passes = passes_of(train.batch_size * example, need.units * longest)
            work = Training(
                tokens, 0, steps, passes, train.method == "lora", need.recompute,
                self._compiles(train.compile, steps, need.recompute), mixed,
            )  # fmt: skip
            one = replace(self.clock, cards=1)  # it trains in this process alone
            seconds = self.start + one.training(size, work)
        least, misfit = (4 * size.parameters, "") if ridge else (need.memory, need.misfit)
        memory, misfit = self._memory("reward tokens", least, misfit)
        rows = None if rated is None else rated.rows
        checkpoints = checkpoint_bytes(size.parameters) if train.method == "full" else 0
        disk = int(4 * size.parameters) + checkpoints
        why = "" if rated else "rated rows are not here"
        return StageEstimate(
            "train_reward", rows, tokens, seconds, memory, disk, measured,
            misfit=misfit, unknown=why, checkpoints=checkpoints,
        )  # fmt: skip

    def iteration(self, t: int, sampled: int | None, scored: int | None, winners: int | None) -> list[StageEstimate]:
        """The stages of iteration t, its measurement included; `sampled`, `scored` None: unknown, or not there."""
        makes = t > 0 and learner_of(self.config, t).reads != "prompts"
        directions = self.config.rollout.directions
        stages = [self._rollout(f"iter_{t}/rollout", sampled, directions, self.config.rollout.samples)] if makes else []
        rated = self.given.data.rated
        if t == 0:
            each = rated.rows / max(1, rated.prompts) if rated else 1.0
            stages.append(self._score("iter_0/score", scored, each, self._rated_example()))
        elif makes:
            stages.append(self._score(f"iter_{t}/score", scored, directions * self.config.rollout.samples))
        return [*stages, self._finetune(t, winners), self._evaluate(t)]

    def _evaluate(self, t: int) -> StageEstimate:
        evaluate, space, held_out = self.config.evaluate, self.config.direction_space(), self.given.data.held_out
        grid = len(space.grid(evaluate.directions))
        if space.target_template is not None and learner_of(self.config, t).reads == "winners":
            grid += len(target_grid(space))
        rows = None if held_out is None else held_out * grid * evaluate.samples
        rollout = self._rollout(f"iter_{t}/evaluate", rows, grid, evaluate.samples)
        score = self._score("", rows, grid * evaluate.samples)
        if rollout.seconds is None or score.seconds is None:
            return replace(rollout, seconds=None, unknown=rollout.unknown or score.unknown, judge=score.judge)
        seconds = rollout.seconds + score.seconds
        if self.given.scorer is not None and not score.measured:
            seconds -= self.start  # both are one stage
        measured = rollout.measured if score.measured or self.given.scorer is None else ""
        return replace(rollout, seconds=seconds, measured=measured, judge=score.judge)

    def _rollout(self, name: str, rows: int | None, directions: int, samples: int) -> StageEstimate:
        config, given = self.config.rollout, self.given
        shard = config.prompts_per_shard * directions * samples
        ray = config.workers if self.config.cluster.engine == "ray" else 0
        need = rollout_need(
            given.policy, given.device, config, given.data.prompt, min(rows or shard, shard), given.cards, ray
        )
        memory, misfit = self._memory("tokens sampled", need.memory, need.misfit)
        if rows is None:
            return StageEstimate(name, None, None, None, memory, 0, misfit=misfit, unknown="prompts are not here")
        tokens = int(rows * self.answer)
        seconds, measured = self._measured("tokens sampled", tokens)
        if seconds is None:
            batches = -(-rows // shard) * (1 if need.continuous else -(-min(rows, shard) // need.together))
            prompt = (
                given.data.prompt
            )  # engines on a card keep what prompts begin with; in this process it is read anew
            if not given.device.card or config.engine.kind in ("vllm", "http"):
                prompt = self._behind_others(prompt, directions, answer=0)
            copies = need.copies if need.continuous else min(need.copies, max(1, -(-rows // shard)))
            work = Sampling(
                rows, self.answer, config.max_new_tokens, rows / samples, prompt, need.together, batches,
                copies, need.continuous, given.device.in_bf16(config.bf16),
            )  # fmt: skip
            seconds = self.start + self.clock.sampling(given.policy, work)
        return StageEstimate(
            name, rows, tokens, seconds, memory, rows * BYTES_PER_CANDIDATE, measured, misfit=misfit
        )  # fmt: skip

    def _score(self, name: str, rows: int | None, each: float, example: float | None = None) -> StageEstimate:
        """`each` rows answer the same prompt, which a processor reads once (scoring/row_layouts.py)."""
        reward, size, rated = self.config.reward, self.given.scorer, self.given.data.rated
        prompt = self.given.data.prompt if example is None or rated is None else rated.prompt_tokens
        example = example or prompt + self.answer
        read = example if self.given.device.card else max(1.0, example - prompt * (1 - 1 / max(1.0, each)))
        wide = 2 if self.given.device.card else 4
        memory, _ = self._memory("rows scored", size.parameters * wide if size else 0)
        if rows is None:
            why = "rated rows are not here" if name.startswith("iter_0/") else "prompts are not here"
            return StageEstimate(name, None, None, None, memory, 0, unknown=why)
        seconds, measured = self._measured("rows scored", rows)
        unknown = ""
        if seconds is None:
            copies = self.config.cluster.scorers if self.config.cluster.engine == "ray" else 1
            start = self.start if size else 0.0
            seconds = start + (self.clock.scoring(size, rows * read) / copies if size else 0.0)
            seconds += FUNCTION_ROW_S * rows if reward.functions else 0.0
            waited = [f"reward.{name}" for name in ("judge", "http", "sources") if getattr(reward, name)]
            if waited:
                seconds, unknown = None, f"{waited[0]} answers at its own speed"
        return StageEstimate(
            name, rows, 0, seconds, memory, rows * 100, measured, unknown=unknown, judge=self._judge(rows, example)
        )  # fmt: skip

    def _judge(self, rows: int, example: float) -> JudgeCalls | None:
        """What it asks of a judge: conversation, response and rubrics once a row, or again where a reply is unread."""
        judge = self.config.reward.judge
        if judge is None:
            return None
        rubrics = sum(map(len, judge.attributes.values())) + len(judge.template or "") / 2 + 400
        reads = example - DIRECTION_TOKENS + rubrics / CHARACTERS_PER_TOKEN
        given = (judge.arguments.get(name) for name in ("max_completion_tokens", "max_tokens"))
        most = next((length for length in given if isinstance(length, int)), judge.max_tokens)
        longest = most > JudgeConfig.model_fields["max_tokens"].default  # it may reason before it rates
        writes = most if longest else min(most, self.assume.reply * len(judge.attributes))
        return JudgeCalls(round(rows * self.assume.asked), round(rows * reads), round(rows * writes), longest)

    def _finetune(self, t: int, rows: int | None) -> StageEstimate:
        """What the learner reads: one response a row, both of a pair, or a prompt's own answers, which it also samples
        and scores; and a reference that reads them too, where there is one."""
        learn, given = learner_of(self.config, t), self.given
        config, kind = getattr(self.config, learn.section), kind_of(learn)
        name, size = f"iter_{t}/finetune", given.policy
        responses = {"winners": 1, "pairs": 2, "prompts": self.config.rollout.samples}[learn.reads]
        reference, mixed = bool(getattr(config, "beta", 0)), given.device.in_bf16(config.bf16)
        example = self.speeds.mean(kind, f"examples of {learn.reads}") or self.example
        example = self._rated_example(config.max_length) if t == 0 else min(example, config.max_length)
        longest, most = self._pass(learn, config)
        need = training_need(
            size, given.device, learn.section, longest=longest, most=most, mixed=mixed, lora=config.lora,
            optimizer=config.optimizer, checkpointing=self._checkpointing(config),
            references=int(reference and config.lora is None), logits=learn.reads != "winners", shards=self.shards,
            sampled=most * longest * 4 * size.cache_bytes if learn.reads == "prompts" else 0,
        )  # fmt: skip
        scores = self._score("", None, 1.0).memory if learn.reads == "prompts" else 0
        memory, misfit = self._memory(kind, need.memory + scores, need.misfit)
        checkpoints = 0 if config.lora else checkpoint_bytes(size.parameters)
        disk = int(4 * size.parameters) + checkpoints
        if rows is None:
            why = "rated rows are not here" if t == 0 else "prompts are not here"
            return StageEstimate(
                name, None, None, None, memory, disk, misfit=misfit, unknown=why, checkpoints=checkpoints
            )
        earlier = (learner_of(self.config, before) for before in range(first_iteration(self.config), t))
        replayed = config.replay if any(one.reads == learn.reads for one in earlier) else 0
        contrast = 1 + getattr(config, "contrastive_negatives", 0) * bool(getattr(config, "contrastive", 0))
        read = self.speeds.mean(kind, "examples") if learn.reads == "winners" else example
        if read is None:
            kept = self.config.selection.of_iteration(t).winners(self.config.rollout.directions)
            read = self._behind_others(
                example, max(1.0, self.config.selection.directions if t == 0 else kept) * contrast
            )
        tokens = int(rows * (1 + replayed) * responses * read * config.epochs * contrast)
        seconds, measured = self._measured(kind, tokens)
        judge, unknown = None, ""
        if seconds is None:
            seconds = self.start + self._trains(learn, config, tokens, read, longest, need, reference, mixed)
        if learn.reads == "prompts" and not measured:
            answers = int(rows * responses * config.epochs)
            score = self._score("", answers, 1.0)
            judge, unknown = score.judge, score.unknown
            made = self._samples_while_learning(answers, config)
            seconds = None if score.seconds is None else seconds + made + score.seconds
        return StageEstimate(
            name, rows, tokens, seconds, memory, disk, measured,
            misfit=misfit, unknown=unknown, judge=judge, checkpoints=checkpoints,
        )  # fmt: skip

    def _trains(
        self,
        learn: type[Learner[Any]],
        config: TrainingConfig,
        tokens: int,
        example: float,
        longest: float,
        need: TrainingNeed,
        reference: bool,
        mixed: bool,
    ) -> float:
        """Seconds of a finetuning that was not measured, without what it samples and scores."""
        step, recompute = self._step_tokens(learn, config, example), need.recompute
        steps = max(1.0, tokens / step)
        work = Training(
            tokens,
            min(1.0, self.answer / example),
            steps,
            passes_of(step / self.given.cards, need.units * longest),
            config.lora is not None,
            recompute,
            self.given.cards == 1 and self._compiles(getattr(config, "compile", False), steps, recompute),
            mixed,
            tokens if reference else 0,
        )
        return self.clock.training(self.given.policy, work)

    def _samples_while_learning(self, answers: int, config: Any) -> float:
        """Seconds of a learner's own sampling: a step's answers at a time, by the weights it trains."""
        rollout = self.config.rollout
        together = min(answers, config.prompts_per_step * rollout.samples)
        work = Sampling(
            answers, self.answer, rollout.max_new_tokens, answers / rollout.samples, self.given.data.prompt, together,
            -(-answers // together), mixed=self.given.device.card, exact=config.lora is None,
        )  # fmt: skip
        return self.clock.sampling(self.given.policy, work)

    def _pass(self, learn: type[Learner[Any]], config: Any) -> tuple[float, float]:
        """Tokens of the longest unit of a pass (a packed row, a pair, an answer), and the units of a step."""
        longest = min(config.max_length, 2 * self.given.data.prompt + self.config.rollout.max_new_tokens)
        if learn.reads == "winners":
            return config.max_length, config.packed_rows_per_step
        if learn.reads == "pairs":
            return 2 * longest, config.pairs_per_step
        return longest, config.prompts_per_step * self.config.rollout.samples

    def _step_tokens(self, learn: type[Learner[Any]], config: Any, example: float) -> float:
        longest, units = self._pass(learn, config)
        return units * (longest if learn.reads == "winners" else example * (2 if learn.reads == "pairs" else 1))

    def _checkpointing(self, config: TrainingConfig) -> bool | None:
        """A launched training on cards computes activations twice unless it is told not to."""
        if config.gradient_checkpointing is None and self.given.cards > 1 and self.given.device.card:
            return True
        return config.gradient_checkpointing

    def _compiles(self, asked: bool | str, steps: float, recompute: bool) -> bool:
        worth = steps >= TRAINING_STEPS and self.given.device.card
        return not recompute and (worth if asked == "auto" else bool(asked))

    def _behind_others(self, example: float, together: float, answer: float | None = None) -> float:
        """Tokens read of a row, where `together` rows state their direction behind a question that is read once: one
        that is long enough (models/shared_prefixes.py)."""
        own = min(example, DIRECTION_TOKENS + (self.answer if answer is None else answer))
        shared = example - own
        if self.config.space.placement == "system" or shared < max(LEAST_SHARED, (1 - WORTH_SHARING) * example):
            return example
        return own + shared / together

    def _rated_example(self, longest: float | None = None) -> float:
        """Tokens of a rated row: measured by a run, or those of the rated data."""
        rated = self.given.data.rated
        tokens = rated.prompt_tokens + rated.response_tokens if rated else PROMPT_TOKENS + RESPONSE_TOKENS
        if self.speeds.mean("tokens of examples", "examples"):
            tokens = self.example
        return min(tokens, longest or tokens)

    def _memory(self, kind: str, least: float, misfit: str = "") -> tuple[int, str]:
        """Bytes of one device, and what to change where it lacks them. What a ledger measured is the machine's memory,
        which says nothing of a card's; where the run fitted, it fits."""
        measured = 0 if self.given.device.card else self.speeds.memory.get(kind, 0)
        return (measured, "") if measured else (int(least), misfit)

    def _measured(self, kind: str, amount: int | None) -> tuple[float | None, str]:
        """Seconds by a ledger's speed, and whose it is; None where there is none."""
        rate = self.speeds.rate(kind)
        if rate is None or amount is None:
            return None, ""
        return amount / rate * self.assume.measured, self.speeds.source
