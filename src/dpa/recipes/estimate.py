"""What a run will take before it starts: tokens, hours, memory and disk of every stage.
Run its tests: pytest tests/test_estimate.py

Speeds are those measured in the ledgers of runs that are given (the run's own folder by itself, if it is there). Where
nothing was measured they are arithmetic on the device's matrix rate, measured here in about a second:

    a forward pass costs 2 x parameters FLOP a token, a training step 6 x (8 x with activation checkpointing on a card),
    and DPO 2 x more for the reference, which reads both responses of a pair as the policy does
    share of the matrix rate reached: training 0.4, scoring 0.5, sampling 0.1          (our assumptions)
    an answer has half of rollout.max_new_tokens; a prompt with its direction 150 tokens; four rated rows a prompt
"""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from dpa.core.config import PromptsConfig, RunConfig
from dpa.core.errors import ConfigError, RunFolderError
from dpa.models.policy import default_device
from dpa.recipes.checks import BYTES_PER_CANDIDATE
from dpa.sampling.samplers import PROCESSOR_ROWS
from dpa.storage.stage_records import read_ledger
from dpa.storage.tables import read_record
from dpa.training.learner import Learner
from dpa.training.learners import learner_named, learner_of

TRAINING_SHARE, SCORING_SHARE, SAMPLING_SHARE = 0.4, 0.5, 0.1
PROMPT_TOKENS = 150
ROWS_PER_PROMPT = 4
ADAM_BYTES = 16
"""A parameter in fp32 training: weight, gradient, two moments."""
CHECKPOINT_BYTES = 12


@dataclass(frozen=True)
class StageEstimate:
    """One stage. `rows` candidates, scores or winners; `tokens` generated or trained on; bytes of memory and disk.

    `measured`: where its speed comes from; empty where it is arithmetic.
    """

    name: str
    rows: int
    tokens: int
    seconds: float
    memory: int
    disk: int
    measured: str = ""


@dataclass
class Speeds:
    """What ledgers say: amounts and the seconds they took, by kind of work, and where that was measured."""

    amounts: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    offline_winners: int | None = None
    source: str = ""

    def add(self, kind: str, amount: float, seconds: float, memory: int = 0) -> None:
        """Count one stage's work."""
        if amount > 0 and seconds > 0:
            self.amounts[kind] = self.amounts.get(kind, 0.0) + amount
            self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
        self.memory[kind] = max(self.memory.get(kind, 0), memory)

    def rate(self, kind: str) -> float | None:
        """Per second; None where it was not measured."""
        return self.amounts[kind] / self.seconds[kind] if kind in self.amounts else None

    def mean(self, kind: str, per: str) -> float | None:
        """Amount of one kind for each of another."""
        return self.amounts[kind] / self.amounts[per] if kind in self.amounts and per in self.amounts else None


@dataclass(frozen=True)
class Size:
    """A model: parameters, and bytes of keys and values for each token."""

    parameters: float
    cache_bytes: int


def estimate(config: RunConfig, runs: Sequence[Path] = (), parameters: float | None = None) -> list[StageEstimate]:
    """Every stage of the run in order. `runs`: finished or half-finished run folders whose ledgers are to be used.

    `parameters`: of the policy, where its folder is not on this machine. Raises ConfigError.
    """
    speeds = read_speeds([*runs, Path(config.out)])
    policy = size_of(config.policy, parameters, "policy", "--parameters 7.2e9")
    judge = policy
    backbone = config.reward.folder or (config.reward.train.backbone if config.reward.train else None)
    if backbone is not None and Path(backbone).is_dir():
        judge = size_of(backbone, None, "reward.folder", "")
    elif backbone is None:
        judge = Size(0, 0)  # Python functions
    work = _Work(config, speeds, policy, judge)
    rated = sum(count_rows(ratings.path) or 0 for ratings in config.ratings)
    stages: list[StageEstimate] = []
    if config.reward.train:
        stages.append(work.train_reward(rated))
    if config.ratings:
        winners = speeds.offline_winners or rated // ROWS_PER_PROMPT * config.selection.directions
        stages += work.iteration(0, 0, rated, winners)
    prompts = _prompts(config.prompts, "prompts")
    directions = config.rollout.directions
    kept = directions if config.selection.method == "per_direction" else config.selection.directions
    for t in range(1, config.iterations + 1):
        candidates = prompts * directions * config.rollout.samples
        if learner_of(config, t).reads == "prompts":  # it makes and scores its candidates itself
            stages += work.iteration(t, 0, 0, prompts * directions)
        else:
            stages += work.iteration(t, candidates, candidates, prompts * kept)
    return stages


class _Work:
    """Turns amounts of work into estimates."""

    def __init__(self, config: RunConfig, speeds: Speeds, policy: Size, judge: Size) -> None:
        self.config, self.speeds, self.policy, self.judge = config, speeds, policy, judge
        self._flops: float | None = None
        self.answer = speeds.mean("tokens sampled", "answers") or config.rollout.max_new_tokens / 2
        self.example = speeds.mean("tokens trained", "examples") or PROMPT_TOKENS + self.answer
        self.cuda = torch.cuda.is_available()

    def train_reward(self, rated: int) -> StageEstimate:
        """The reward model's training; ridge only reads the rows once."""
        train = self.config.reward.train
        assert train is not None
        passes = 1.0 if train.method == "ridge" else train.epochs
        tokens = int(rated * self.example * passes)
        per_token = (2 if train.method == "ridge" else 6) * self.judge.parameters
        seconds, measured = self._seconds("reward tokens", tokens, per_token, TRAINING_SHARE)
        per_parameter = ADAM_BYTES if train.method == "full" else 4
        memory = self.speeds.memory.get("reward tokens") or int(per_parameter * self.judge.parameters)
        return StageEstimate("train_reward", rated, tokens, seconds, memory, int(4 * self.judge.parameters), measured)

    def iteration(self, t: int, sampled: int, scored: int, winners: int) -> list[StageEstimate]:
        """The stages of iteration t, its measurement included."""
        stages = [self._rollout(f"iter_{t}/rollout", sampled)] if sampled else []
        stages += [self._score(f"iter_{t}/score", scored)] if scored else []
        stages += [self._finetune(t, winners)]
        evaluate = self.config.evaluate
        grid = len(self.config.space.build().grid(evaluate.directions))
        answers = _prompts(evaluate.prompts, "evaluate.prompts") * grid * evaluate.samples
        return [*stages, self._rollout(f"iter_{t}/evaluate", answers)]

    def _rollout(self, name: str, rows: int) -> StageEstimate:
        config, bytes_each = self.config.rollout, 2 if self.cuda else 4
        tokens = int(rows * self.answer)
        seconds, measured = self._seconds("tokens sampled", tokens, 2 * self.policy.parameters, SAMPLING_SHARE)
        shard = config.prompts_per_shard * config.directions * config.samples
        fits = min(rows, shard if self.cuda else PROCESSOR_ROWS)
        together = fits if config.batch_size == "auto" else config.batch_size
        cache = together * (PROMPT_TOKENS + config.max_new_tokens) * self.policy.cache_bytes * bytes_each
        memory = self.speeds.memory.get("tokens sampled") or int(self.policy.parameters * bytes_each + cache)
        return StageEstimate(name, rows, tokens, seconds, memory, rows * BYTES_PER_CANDIDATE, measured)

    def _score(self, name: str, rows: int) -> StageEstimate:
        per_row = 2 * self.judge.parameters * (PROMPT_TOKENS + self.answer)
        seconds, measured = self._seconds("rows scored", rows, per_row, SCORING_SHARE)
        memory = self.speeds.memory.get("rows scored") or int(self.judge.parameters * (2 if self.cuda else 4))
        return StageEstimate(name, rows, 0, seconds, memory, rows * 100, measured)

    def _finetune(self, t: int, rows: int) -> StageEstimate:
        """What the learner reads: one response a row, both of a pair, or a prompt's own answers, which it also samples
        and scores; and a reference that reads them too, where there is one."""
        learn = learner_of(self.config, t)
        config, kind = getattr(self.config, learn.section), _trained(learn)
        reference = bool(getattr(config, "beta", 0))
        responses = {"winners": 1, "pairs": 2, "prompts": self.config.rollout.samples}[learn.reads]
        tokens = int(rows * responses * self.example * config.epochs)
        per_token = ((8 if self.cuda else 6) + (2 if reference else 0)) * self.policy.parameters
        seconds, measured = self._seconds(kind, tokens, per_token, TRAINING_SHARE)
        if learn.reads == "prompts" and not measured:
            answers = int(rows * responses * config.epochs)
            seconds += self._rollout("", answers).seconds + self._score("", answers).seconds
        elif not measured:
            seconds /= self.config.cluster.processes
        per_parameter = 4 if config.lora else ADAM_BYTES + (4 if reference else 0)
        memory = self.speeds.memory.get(kind) or int(per_parameter * self.policy.parameters)
        checkpoints = 0 if config.lora else 3 * CHECKPOINT_BYTES  # two kept, one being written
        disk = int((4 + checkpoints) * self.policy.parameters)
        return StageEstimate(f"iter_{t}/finetune", rows, tokens, seconds, memory, disk, measured)

    def _seconds(self, kind: str, amount: float, flop_each: float, share: float) -> tuple[float, str]:
        rate = self.speeds.rate(kind)
        if rate is not None:
            return amount / rate, self.speeds.source
        if self._flops is None:
            self._flops = matrix_rate()
        return amount * flop_each / (share * self._flops), ""


def read_speeds(runs: Iterable[Path]) -> Speeds:
    """What the done-records of run folders say; a folder that is not there says nothing."""
    speeds, sources = Speeds(), []
    for run in dict.fromkeys(path.resolve() for path in runs):
        found = False
        for done in sorted(run.glob("iter_*/**/done.json")) + sorted(run.glob("train_reward/done.json")):
            found = True
            try:
                config = read_record(run / "fingerprint.json", ("config",), optional=None)["config"]
                ledger = read_ledger(read_record(done, ("ledger",), optional=None)["ledger"])
            except (KeyError, TypeError, ValueError, AttributeError):
                raise RunFolderError(f"--from: {run} holds a damaged record ({done}); name another run.") from None
            _count(speeds, done.parent.relative_to(run).parts, asdict(ledger), config)
        sources += [run.name] if found else []
    speeds.source = ", ".join(sources)
    return speeds


def _trained(learn: type[Learner[Any]]) -> str:
    """The kind of work that a finetuning is."""
    return "tokens trained" if learn.reads == "winners" else f"tokens trained on {learn.reads}"


def _count(speeds: Speeds, place: tuple[str, ...], ledger: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    seconds, memory = ledger["wall_s"], ledger["peak_memory"]
    if place[-1] == "rollout":
        speeds.add("tokens sampled", ledger["tokens_generated"], seconds, memory)
        speeds.add("answers", ledger["rows"], seconds)
    elif place[-1] == "score":
        speeds.add("rows scored", ledger["candidates_scored"], seconds, memory)
    elif place[-1] == "finetune":
        learn = learner_named("sft" if place[0] == "iter_0" else config["learner"])
        speeds.add(_trained(learn), ledger["training_tokens"], seconds, memory)
        if learn.reads == "winners":
            speeds.add("examples", ledger["rows"] * config[learn.section]["epochs"], seconds)
        if place[0] == "iter_0":
            speeds.offline_winners = ledger["rows"]
    elif place[-1] == "train_reward":
        speeds.add("reward tokens", ledger["training_tokens"], seconds, memory)


def matrix_rate(seconds: float = 0.5) -> float:
    """FLOP/s of square matrix products on the default device: bf16 on a card, fp32 on a CPU."""
    device = default_device()
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    a = torch.randn(size, size, device=device, dtype=dtype)
    a @ a
    wait()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        for _ in range(4):
            a @ a
        wait()
        count += 4
    return 2 * size**3 * count / (time.perf_counter() - begun)


def size_of(folder: str, parameters: float | None, where: str, fix: str) -> Size:
    """Read from the headers of the weights and from config.json. Raises ConfigError."""
    path = Path(folder)
    files = sorted(path.glob("*.safetensors"))
    if not files and parameters is None:
        raise ConfigError(f"{where}: {folder} is not on this machine, so its size is not known; give {fix}.")
    count = parameters or 0.0
    if parameters is None:
        for file in files:
            with safe_open(str(file), framework="pt") as weights:
                count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    about = path / "config.json"
    config = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    heads = config.get("num_attention_heads") or 32
    width = config.get("head_dim") or (config.get("hidden_size") or 4096) // heads
    layers = config.get("num_hidden_layers") or 32
    return Size(count, 2 * layers * (config.get("num_key_value_heads") or heads) * width)


def count_rows(path: str) -> int | None:
    """Rows of a data file, or of all in a folder; None where it is not on this machine."""
    place = Path(path)
    if place.is_dir():
        return sum(count_rows(str(file)) or 0 for file in sorted(place.rglob("*")) if file.is_file())
    if not place.is_file():
        return None
    match place.suffix:
        case ".parquet":
            return pq.read_metadata(place).num_rows
        case ".csv":
            options = pyarrow.csv.ParseOptions(newlines_in_values=True)
            return pyarrow.csv.read_csv(place, parse_options=options).num_rows
        case ".jsonl":
            with place.open("rb") as lines:
                return sum(1 for line in lines if line.strip())
    return 0


def _prompts(config: PromptsConfig, where: str) -> int:
    there = count_rows(config.path)
    counts = [count for count in (there, config.count) if count is not None]
    if not counts:
        raise ConfigError(f"{where}.path: {config.path} is not on this machine; give {where}.count.")
    return min(counts)


def run_needs(stages: Sequence[StageEstimate]) -> tuple[float, int, int]:
    """Of the whole run: seconds, peak memory, disk (a finetuning's checkpoints are deleted when it ends)."""
    finetunings = [stage for stage in stages if stage.name.endswith("finetune")]
    lasting = sum(stage.disk for stage in stages if stage not in finetunings)
    kept = [stage.disk * 4 // (4 + 3 * CHECKPOINT_BYTES) for stage in finetunings]
    largest = max((stage.disk for stage in finetunings), default=0)
    memory = max((stage.memory for stage in stages), default=0)
    return sum(stage.seconds for stage in stages), memory, lasting + sum(kept) + largest
