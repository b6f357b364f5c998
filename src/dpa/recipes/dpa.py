"""The recipe of the method: t = 0 offline from rated rows, then T rounds of rollout, score, select, finetune, evaluate.

    with Loop(load_config("recipes/demo.yaml")) as loop:
        loop.run()

Every step returns at once when its done-record stands, so the same call resumes a run wherever it stopped.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from rich.console import Console

from dpa.core.config import PromptsConfig, RewardConfig, RolloutConfig, RunConfig, resolved
from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, DataError, RunFolderError, StorageError
from dpa.core.records import Ledger, Prompt, Sampler, Scorer
from dpa.core.reference import ModelReference
from dpa.models.files import EVALUATION_FILE, GGUF_SUFFIX
from dpa.models.function_scorer import FunctionScorer
from dpa.models.gguf import dequantise
from dpa.models.launching import free_memory, launch, launches
from dpa.models.learner import Learner
from dpa.models.learners import learner_of
from dpa.models.policy import check_policy
from dpa.models.ranks import is_first, ranks
from dpa.models.ray_workers import ray_samplers, ray_scorers
from dpa.models.reward_model import RECORD
from dpa.models.samplers import build_samplers, engine_kind, sampler_spec
from dpa.models.scorers import build_scorer, check_scorers, known_attributes, scored_by
from dpa.models.vllm_sampler import VllmEngine
from dpa.pages.card import write_card
from dpa.pages.report import write_report
from dpa.stages.evaluate import EVALUATION, evaluate, side_by_side
from dpa.stages.finetune import finetune_policy, listening_curve
from dpa.stages.prompts import draw_prompts, prompts_from_table, prompts_table, read_prompts
from dpa.stages.ratings import leave_out, load_ratings, print_summary, read_ratings, save_ratings
from dpa.stages.rollout import ask, rollout
from dpa.stages.score import score, score_rows
from dpa.stages.select import select_rated, select_winners
from dpa.stages.train_reward import print_quality, require_better_than_mean, train_reward
from dpa.storage.locks import Share
from dpa.storage.memory import peak_memory
from dpa.storage.progress import AtWork
from dpa.storage.rating_forms import declared_scales
from dpa.storage.run_folder import RunFolder, StageFolder
from dpa.storage.stopping import end_on_signal
from dpa.storage.tables import json_bytes, read_json, read_record, write_bytes, write_record
from dpa.version import __version__

log = logging.getLogger(__name__)

EXAMPLES = 3
"""Held-out questions that travel with a policy, for people to try."""
BYTES_PER_CANDIDATE = 4_000
"""Upper estimate of what one candidate and its scores take on disk."""


Result = TypeVar("Result")


def _shown(stage: Callable[..., Result]) -> Callable[..., Result]:
    """A stage that says now and then that it is at work, where there is no terminal."""

    @wraps(stage)
    def work(loop: "Loop", *arguments: Any, **options: Any) -> Result:
        place = f"iter_{arguments[0]}/" if arguments and isinstance(arguments[0], int) else ""
        with AtWork(f"{place}{stage.__name__}") if is_first() else nullcontext():
            return stage(loop, *arguments, **options)

    return work


class Loop:
    """One run folder and the stages of the method over it. Raises UserError subclasses for what the user can mend."""

    def __init__(
        self, config: RunConfig, ignore_free_space: bool = False, share: Share | None = None, join: bool = False
    ) -> None:
        """Open the run folder. `share`: only this share of the shards of `rollout` and `score` is made, beside other
        processes. `join`: a rank of a launched training whose first rank has opened the folder."""
        self.config = config
        self.space = config.space.build()
        self.console = Console()
        self._ratings: tuple[pa.Table, dict[str, Any]] | None = None
        self._vllm = VllmEngine()  # starts when vLLM is first asked
        self._check()
        self._folder = RunFolder(config.out).open(
            config, _inputs(config), _needed_bytes(config), ignore_free_space, share, join
        )
        self._open = ExitStack()
        self._open.callback(self._folder.close)
        self._open.callback(self._vllm.close)
        if share is not None:
            self._make_ready()

    def _make_ready(self) -> None:
        """Before other shares come in: what all of them read."""
        if self.config.ratings:
            self.read_ratings()
        assert self._training_prompts is not None
        self._folder.let_others_in()

    def __enter__(self) -> "Loop":
        if ranks() == 1:  # the ranks of a launch stop together (models/training.py)
            self._open.enter_context(end_on_signal(self.config.name))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    # --- the figure of the method ------------------------------------------------------------------------------

    def run(self) -> Path:
        """The whole loop; returns the path of the report."""
        http = self.config.rollout.engine.http
        if self.config.rollout.engine.kind == "http" and http.servers and http.model is not None:
            raise ConfigError(
                f"rollout.engine.http.model: {http.model!r} is one name at servers that stay the same, while every "
                "iteration has another policy; give `command`, or run the stages one by one."
            )
        if not self._folder.stage(self.first, "finetune").done:
            check_policy(self.policy(self.first - 1), self.space)
        self._check_ahead()
        if self.config.ratings:
            self.read_ratings()
        if self.config.reward.train:
            self.train_reward()
        for t in range(self.first, self.config.iterations + 1):
            self.learn(t)
            self.evaluate(t)
            self.report()
        return self.report()

    def learn(self, t: int) -> None:
        """Iteration t up to its policy. A learner of prompts samples and scores while it learns."""
        if t > 0:
            self.rollout(t)
        if self.learner(t).reads != "prompts":
            self.score(t)
            self.select(t)
        self.finetune(t)

    @property
    def first(self) -> int:
        """0 where rated rows give an offline iteration, else 1."""
        return 0 if self.config.ratings else 1

    # --- once --------------------------------------------------------------------------------------------------

    @_shown
    def read_ratings(self, show: bool = False) -> pa.Table:
        """All rated data as one table; `show` prints its summary."""
        if not self.config.ratings:
            raise ConfigError("ratings: none are configured; add a `ratings` section.")
        if self._ratings is None:
            self._ratings = load_ratings(self.path)
        if self._ratings is None:
            everything = read_ratings(self.config.ratings)
            ratings = leave_out(everything, self.held_out)
            if left_out := everything.table.num_rows - ratings.table.num_rows:
                self.console.print(f"ratings: {left_out} rows of prompts that are measured on are left out of training")
            self._ratings = ratings.table, save_ratings(ratings, self.path)
            show = True
        table, summary = self._ratings
        if show:
            print_summary(summary, self.console)
        self._check_rated(summary)
        return table

    def _check_rated(self, summary: Mapping[str, Any]) -> None:
        """What is to be trained has a mark somewhere: a column may be there and be empty."""
        reward, counts = self.config.reward, {name: about["count"] for name, about in summary["attributes"].items()}
        if reward.train is None:
            return
        for name in reward.train.attributes or counts:
            if not counts[name]:
                raise DataError(
                    f"ratings: no row has a mark on {name!r}, so nothing can be trained for it; name what is rated in "
                    f"reward.train.attributes ({', '.join(other for other in counts if counts[other])})."
                )

    @_shown
    def train_reward(self, show: bool = False) -> Mapping[str, Any]:
        """Train the reward model and return its record; `show` prints its held-out quality."""
        train = self.config.reward.train
        if train is None:
            raise ConfigError("reward.train: not configured; add the section, or use `reward.folder` as it is.")
        stage = self._folder.stage(None, "train_reward")
        if not stage.done:  # a model that nobody sealed, or that has changed since
            (self.reward_folder / RECORD).unlink(missing_ok=True)
        begun = time.monotonic()
        table = self.read_ratings()
        scales = {name: tuple(about["scale"]) for name, about in self._ratings_summary()["attributes"].items()}
        facts = train_reward(
            table, scales, train, self.reward_folder, self.config.seed, self.config.remote_code_revision
        )
        if not stage.done:
            done = facts["training"]
            tokens = int(done["train_tokens"] * done["epochs"])
            wall_s = time.monotonic() - begun
            stage.finish(
                Ledger(
                    training_tokens=tokens,
                    rows=done["train_rows"],
                    rejects=done["rejected_rows"],
                    wall_s=wall_s,
                    peak_memory=peak_memory(),
                ),
                sealed=[self.reward_folder],
            )
            show = True
        if show:
            print_quality(facts, self.console)
        return facts

    # --- every iteration ---------------------------------------------------------------------------------------

    @_shown
    def rollout(self, t: int) -> Ledger:
        """Ask this iteration's prompts under directions drawn from the space, of the policy of t - 1.

        Where the learner samples for itself, only draw the directions.
        """
        self._check_iteration(t, lowest=1)
        stage, drawn_from = self._folder.stage(t, "rollout"), self.drawn_from(t)
        if self.learner(t).reads == "prompts":
            return ask(stage, self.prompts(t), drawn_from, self.config.rollout, self.config.seed)
        return self._sample(stage, t - 1, self.prompts(t), self.config.rollout, drawn_from)

    @_shown
    def score(self, t: int) -> Ledger:
        """Give every candidate of the iteration its vector; at t = 0 the rated responses are the candidates."""
        self._check_iteration(t)
        self._check_candidates(t)
        stage = self._folder.stage(t, "score")
        with self._scorers() as scorers:
            if t == 0:
                return score_rows(stage, self.read_ratings(), scorers)
            return score(stage, self._folder.stage(t, "rollout"), self.prompts(t), scorers)

    @_shown
    def select(self, t: int) -> Ledger:
        """Keep the winner of each direction, with a loser beside it where the learner reads pairs."""
        self._check_iteration(t)
        self._check_candidates(t)
        stage, scores = self._folder.stage(t, "select"), self._folder.stage(t, "score")
        config, seed, space = self.config.selection, self.config.seed, self.drawn_from(t)
        if t == 0:
            return select_rated(stage, self.read_ratings(), scores, space, config, seed)
        candidates, pairs = self._folder.stage(t, "rollout"), self.learner(t).reads == "pairs"
        return select_winners(stage, candidates, scores, self.prompts(t), space, config, seed, pairs)

    @_shown
    def finetune(self, t: int) -> Ledger:
        """Finetune from the policy of t - 1 on the rows that this iteration's learner reads."""
        self._check_iteration(t)
        stage, learn = self._folder.stage(t, "finetune"), self.learner(t)
        scorer = self.scorer if learn.reads == "prompts" else None
        if scorer is None:
            self._let_scorer_go()
        if scorer is None and launches(self.config.cluster) and not stage.done:
            with self._folder.lent():  # the first rank takes the lock
                launch(["finetune", str(self.path / "config.yaml"), "-t", str(t)], self.config.cluster, stage.name)
            return self._folder.stage(t, "finetune").ledger
        config = getattr(self.config, learn.section)
        same = [before for before in range(self.first, t) if self.learner(before).reads == learn.reads]
        ledger = finetune_policy(
            stage,
            self._learned_from(t),
            self.policy(t - 1),
            learn(config, self.space, self.config.seed + t, self.config.rollout, scorer),
            self.policy_folder(t),
            [self._learned_from(before) for before in same] if config.replay else [],
        )
        if is_first():
            self._write_card(t)
        return ledger

    @_shown
    def evaluate(self, t: int) -> Mapping[str, Any]:
        """Measure the policy of t on the held-out prompts over the grid; says loudly when it does not listen."""
        self._check_iteration(t)
        settings = self.config.evaluate
        record = self._evaluation_file(t)
        answers, scored = (self._folder.stage(t, f"evaluate/{name}") for name in ("rollout", "score"))
        prompts = self.held_out
        known = self._evaluation(t)
        stages = [answers, scored, *([self._folder.stage(t, "evaluate/gold")] if settings.gold else [])]
        if known is not None and all(stage.done for stage in stages):
            self._publish(t, known)
            return known
        how = self.config.rollout.model_copy(
            update={"samples": settings.samples, "temperature": settings.temperature, "top_p": 1.0}
        )
        self._sample(answers, t, prompts, how, self.space, measuring=True)
        with self._scorers() as scorers:
            score(scored, answers, prompts, scorers)
        if settings.gold:
            score(
                self._folder.stage(t, "evaluate/gold"), answers, prompts, FunctionScorer(settings.gold, "evaluate.gold")
            )
        found = evaluate(answers.whole_table(), self._evaluation_scores(t), self.space, settings, self.config.seed)
        write_record(record, found)
        self._publish(t, found)
        self._write_card(t, found)
        self.console.print(
            f"t = {t}: {found['listens']['sentence']}", style=None if found["listens"]["verdict"] else "bold red"
        )
        return found

    def report(self) -> Path:
        """Write results.json, table.csv, samples.jsonl and report.html from the iterations measured so far."""
        evaluations = {t: self._evaluation(t) for t in range(self.first, self.config.iterations + 1)}
        measured = [t for t, found in evaluations.items() if found is not None]
        results = {
            "name": self.config.name,
            "seed": self.config.seed,
            "version": __version__,
            "space": self.space.to_dict(),
            "config": resolved(self.config),
            "policies": [
                {
                    "name": f"t = {t}",
                    "evaluation": evaluations[t],
                    "ledger": self._ledgers(t),
                    "listening": listening_curve(self._folder.stage(t, "finetune")),
                }
                for t in measured
            ],
            "samples": self._samples(measured[-1]) if measured else None,
            "ledger": self._once_ledger(),
            "reward_model": self._of_reward_model("quality"),
            "reward_precision": self._of_reward_model("precision"),
        }
        return write_report(self.path, results)

    # --- what the stages stand on ------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.path

    @property
    def reward_folder(self) -> Path:
        """Where the trained reward model is saved."""
        return self.path / "reward_model"

    def policy_folder(self, t: int) -> Path:
        """Where the policy of iteration t is saved."""
        return self.path / f"iter_{t}" / "policy"

    def policy(self, t: int) -> ModelReference:
        """The policy of iteration t; before the first one, the start policy."""
        if t < self.first:
            return self.config.reference(self.start_policy)
        if not self._folder.stage(t, "finetune").done:
            raise RunFolderError(
                f"iteration {t}: its policy is not finetuned yet, or is damaged; run `dpa finetune -t {t}` first."
            )
        return self.config.reference(self.policy_folder(t))

    def learner(self, t: int) -> type[Learner[Any]]:
        """What iteration t learns by."""
        return learner_of(self.config, t)

    def _learned_from(self, t: int) -> StageFolder:
        """The stage whose rows the learner of iteration t reads."""
        return self._folder.stage(t, "rollout" if self.learner(t).reads == "prompts" else "select")

    def drawn_from(self, t: int) -> DirectionSpace:
        """The space that the directions of iteration t are drawn from: before `selection.ends_until`, its ends."""
        return replace(self.space, training_ends=1.0) if t < self.config.selection.ends_until else self.space

    @cached_property
    def start_policy(self) -> str:
        """The configured policy; a GGUF file is dequantised into the run folder first, once."""
        file = Path(self.config.policy)
        if file.suffix != GGUF_SUFFIX:
            return self.config.policy
        stage = self._folder.stage(None, "start_policy")
        folder = stage.path / "policy"
        if not stage.done:
            self.console.print(dequantise(file, folder))
            stage.finish(sealed=[folder])
        return str(folder)

    @cached_property
    def scorer(self) -> Scorer:
        """The reward model of this run."""
        scorer = build_scorer(*self._scorer_parts())
        self._check_attributes(scorer.attributes)
        return scorer

    def _let_scorer_go(self) -> None:
        """Its memory is needed now; it is loaded again when it is."""
        self.__dict__.pop("scorer", None)
        free_memory()

    def _scorer_parts(self) -> tuple[RewardConfig, ModelReference | None, str | None]:
        train = self.config.reward.train
        if train and not self._folder.stage(None, "train_reward").done:
            raise RunFolderError("reward model: it is not trained yet, or is damaged; run `dpa train-reward` first.")
        if train and not train.allow_worse_than_mean:
            require_better_than_mean(read_json(self.reward_folder / RECORD), self._needed_attributes())
        trained = self.config.reference(self.reward_folder) if train else None
        return self.config.reward.within(self.path), trained, self.config.remote_code_revision

    def prompts(self, t: int) -> list[Prompt]:
        """The prompts of iteration t: drawn without repeats until all are used, then again in another order."""
        return draw_prompts(self._training_prompts, t, self.config.prompts.count, self.config.seed)

    @cached_property
    def held_out(self) -> list[Prompt]:
        """The prompts policies are measured on."""
        return self._read_prompts("eval_prompts", self.config.evaluate.prompts)[: self.config.evaluate.prompts.count]

    @cached_property
    def _training_prompts(self) -> list[Prompt]:
        return self._read_prompts("prompts", self.config.prompts)

    def _read_prompts(self, name: str, config: PromptsConfig) -> list[Prompt]:
        """Prompts of the file as the run folder keeps them; rejects go beside them, with their reasons."""
        stage = self._folder.stage(None, name)
        if stage.done:
            return prompts_from_table(stage.table(0))
        prompts, rejects = read_prompts(config.path, config.column, self.config.rollout.max_reject_rate, config.split)
        stage.write_shard(0, prompts_table(prompts), Ledger(rows=len(prompts), rejects=len(rejects)), rejects)
        stage.finish()
        return prompts

    def _sample(
        self,
        stage: StageFolder,
        t: int,
        prompts: list[Prompt],
        config: RolloutConfig,
        space: DirectionSpace,
        measuring: bool = False,
    ) -> Ledger:
        if stage.done:
            return stage.ledger
        grid = self.space.grid(self.config.evaluate.directions) if measuring else None
        with self._samplers(t, config) as samplers:
            return rollout(stage, prompts, space, samplers, config, self.config.seed, grid)

    @contextmanager
    def _samplers(self, t: int, config: RolloutConfig) -> Iterator[list[Sampler]]:
        """The samplers of the policy of t: here, on the cluster, or what `rollout.engine` names."""
        what = (self.policy(t), config, self.space)
        if self.config.cluster.engine == "local" or config.engine.kind in ("http", "vllm"):
            if engine_kind(config) == "vllm":
                self._let_scorer_go()  # vLLM asks for most of a card
            with build_samplers(*what, vllm=self._vllm) as samplers:
                yield samplers
        else:
            with ray_samplers(sampler_spec(*what), config.workers, self.config.cluster) as samplers:
                yield samplers

    @contextmanager
    def _scorers(self) -> Iterator[list[Scorer]]:
        """The scorers of this run: here, or on the cluster."""
        if self.config.cluster.engine == "local":
            yield [self.scorer]
            return
        with ray_scorers(*self._scorer_parts(), self.config.cluster) as scorers:
            self._check_attributes(scorers[0].attributes)
            yield scorers

    # --- records and checks ------------------------------------------------------------------------------------

    def _evaluation_file(self, t: int) -> Path:
        return self.path / f"iter_{t}" / "evaluate" / "evaluation.json"

    def _evaluation(self, t: int) -> dict[str, Any] | None:
        """What was measured of the policy of t; None where nothing was, or its record is damaged."""
        file = self._evaluation_file(t)
        if not file.exists():
            return None
        try:
            return read_record(file, EVALUATION, optional=None)
        except StorageError as error:
            log.warning("%s; t = %d does not count as measured.", str(error).split("; ")[0], t)
            return None

    def _publish(self, t: int, found: Mapping[str, Any]) -> None:
        """The front travels with the model, and with it a few questions to try it on."""
        examples = [prompt.messages[-1]["content"] for prompt in self.held_out[:EXAMPLES]]
        file, data = self.policy_folder(t) / EVALUATION_FILE, json_bytes({**found, "examples": examples})
        if not file.is_file() or file.read_bytes() != data:
            write_bytes(file, data)

    def _of_reward_model(self, name: str) -> Any:
        """A field of the record of the reward model trained here, such as its held-out quality; None where none is."""
        if self.config.reward.train is None or not self._folder.stage(None, "train_reward").done:
            return None
        return read_json(self.reward_folder / RECORD).get(name)

    def _evaluation_scores(self, t: int) -> dict[str, pa.Table]:
        scores = {"model": self._folder.stage(t, "evaluate/score").whole_table()}
        if self.config.evaluate.gold:
            scores["gold"] = self._folder.stage(t, "evaluate/gold").whole_table()
        return scores

    def _samples(self, t: int) -> dict[str, Any]:
        prompts = {prompt.prompt_id: prompt.messages for prompt in self.held_out}
        answers = self._folder.stage(t, "evaluate/rollout").whole_table()
        questions = side_by_side(answers, self._evaluation_scores(t), prompts, self.space, self.config.evaluate)
        return {"policy": f"t = {t}", "questions": questions}

    def _ratings_summary(self) -> dict[str, Any]:
        assert self._ratings is not None
        return self._ratings[1]

    def _write_card(self, t: int, evaluation: Mapping[str, Any] | None = None) -> None:
        """README.md beside the policy of iteration t."""
        evaluation = evaluation or self._evaluation(t)
        config = self.config
        write_card(
            self.policy_folder(t),
            f"{config.name}, t = {t}",
            self.space,
            config.policy,
            [*(ratings.path for ratings in config.ratings), config.prompts.path],
            scored_by(config.reward),
            evaluation,
            self._ledgers(t),
        )

    def _ledgers(self, t: int) -> dict[str, Any]:
        names = ["rollout", "score", "select", "finetune", "evaluate/rollout", "evaluate/score", "evaluate/gold"]
        stages = {name: self._folder.stage(t, name) for name in names if (self.path / f"iter_{t}" / name).is_dir()}
        return {name: asdict(stage.ledger) for name, stage in stages.items() if stage.done}

    def _once_ledger(self) -> dict[str, Any]:
        stage = self._folder.stage(None, "train_reward")
        return {"train_reward": asdict(stage.ledger)} if stage.done else {}

    def _check(self) -> None:
        """What can be known to be wrong before any work starts."""
        evaluate_gold = self.config.evaluate.gold
        missing = [name for name in self.space.names if evaluate_gold and name not in evaluate_gold]
        unknown = [name for name in evaluate_gold if name not in self.space.names]
        if missing or unknown:
            raise ConfigError(
                f"evaluate.gold: its names must be the objectives {', '.join(self.space.names)}; "
                f"{'missing' if missing else 'unknown'}: {', '.join(missing or unknown)}."
            )
        for t in (self.first, self.first + 1):
            self.learner(t).check(self.config)
        if self.config.reward.train and not self.config.ratings:
            raise ConfigError("reward.train: there are no ratings to train on; add a `ratings` section.")
        self._check_scored()

    def _check_ahead(self) -> None:
        """What later stages read is there, before earlier ones spend hours."""
        if self._evaluation(self.config.iterations) is not None:
            return
        check_scorers(self.config.reward, self.config.remote_code_revision)
        FunctionScorer(self.config.evaluate.gold, "evaluate.gold")
        assert self.held_out
        if self.config.iterations > 0:
            assert self._training_prompts

    def _check_scored(self) -> None:
        """Every attribute of an objective is rated and trained, or a function's. What a finished model scores is known
        once it is loaded (`_check_attributes`)."""
        rated = [name for ratings in self.config.ratings for name in declared_scales(ratings)]
        known = known_attributes(self.config.reward, rated)
        if known is not None:
            self._check_attributes(known)

    def _needed_attributes(self) -> set[str]:
        """Attributes the objectives are made of."""
        return {name for objective in self.space.objectives for name in objective.attributes}

    def _check_attributes(self, attributes: tuple[str, ...]) -> None:
        for objective in self.space.objectives:
            for name in objective.attributes:
                if name not in attributes:
                    raise ConfigError(
                        f"space.objectives.{objective.name}: nothing scores {name!r}; {_known('scored', attributes)}."
                    )

    def _check_candidates(self, t: int) -> None:
        if self.learner(t).reads == "prompts":
            raise ConfigError(
                f"learner: {self.config.learner} scores its own answers while it learns, so iteration {t} has nothing "
                f"to score or select; run `dpa finetune -t {t}`."
            )

    def _check_iteration(self, t: int, lowest: int | None = None) -> None:
        lowest = self.first if lowest is None else lowest
        if not lowest <= t <= self.config.iterations:
            raise ConfigError(f"--iteration: {t} is outside {lowest}..{self.config.iterations}; choose one of those.")


def _known(what: str, names: Sequence[str]) -> str:
    return f"{what} are: {', '.join(dict.fromkeys(names))}" if names else f"nothing is {what}"


def _inputs(config: RunConfig) -> dict[str, Path]:
    """Local files whose content the run depends on."""
    named = {"prompts.path": config.prompts.path, "evaluate.prompts.path": config.evaluate.prompts.path}
    if Path(config.policy).suffix == GGUF_SUFFIX:
        named["policy"] = config.policy
    named |= {f"ratings.{place}.path": ratings.path for place, ratings in enumerate(config.ratings)}
    return {field: Path(path) for field, path in named.items() if Path(path).exists()}


def _needed_bytes(config: RunConfig) -> int:
    """A rough upper estimate of what the run writes: candidates, and one policy an iteration."""
    prompts = config.prompts.count or 0
    candidates = prompts * config.rollout.directions * config.rollout.samples * max(config.iterations, 1)
    policy = Path(config.policy)
    weights = sum(file.stat().st_size for file in policy.glob("*.safetensors")) if policy.is_dir() else 0
    # A policy is saved each iteration; a checkpoint being written holds the weights and two optimizer moments.
    return candidates * BYTES_PER_CANDIDATE + weights * (config.iterations + 1 + 6)
