"""What every phase of bench/card.py is given: its inputs, its result file, and a clock.

A phase writes a row of figures, and a line of its log, as soon as it has them: one that breaks or is ended keeps
what it had. Trainings are measured by time, not to their end (`steps_of`).
"""

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

OBJECTIVES = ("quality", "verbosity")
ATTRIBUTE = "quality"
"""The column of --ratings that is learnt."""

STEPS_S, WARM_STEPS = 8.0, 4
"""Seconds that a training's steps are measured for, and the steps before, which are not."""


class Absent(Exception):
    """Something a phase needs is not on this machine, such as vLLM: reported, not a failure."""


@dataclass(frozen=True)
class Inputs:
    """The command line of bench/card.py, which every result file repeats."""

    policy: str
    ratings: str
    prompts: str
    tiny: bool = False


@dataclass
class Card:
    """One phase at work. `out` is the folder of the whole bench."""

    phase: str
    inputs: Inputs
    out: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    _prompts: list[Any] = field(default_factory=list)
    _begun: float = field(default_factory=time.monotonic)

    @property
    def tiny(self) -> bool:
        """Whether sizes are those of a test on a CPU."""
        return self.inputs.tiny

    @property
    def folder(self) -> Path:
        """Where this phase may write what it likes."""
        return self.out / f"{self.phase}.files"

    @property
    def file(self) -> Path:
        """The result file."""
        return self.out / f"{self.phase}.json"

    def row(
        self, what: str, figure: float, unit: str, peer: float | None = None, peer_name: str = "", **more: Any
    ) -> None:
        """Keep one line of the table, instead of an earlier one of the same name, such as one whose peer was still to
        come. `more`: `share` of the card's `of` (matrix or copy rate), and facts."""
        row = {"what": what, "figure": figure, "unit": unit, "peer": peer, "peer_name": peer_name, **more}
        names = [one["what"] for one in self.rows]
        if what in names:
            self.rows[names.index(what)] = row
        else:
            self.rows.append(row)
        beside = "" if peer is None else f"; {peer_name} {peer:,.4g}"
        self.say(f"{what}: {figure:,.4g} {unit}{beside}")
        self.write("running")

    def say(self, text: str) -> None:
        """A line of the phase's log."""
        print(f"[{time.monotonic() - self._begun:6.1f} s] {text}", flush=True)

    def write(self, status: str, reason: str = "", seconds: float | None = None) -> None:
        """The result file as it stands: status is running, done, absent or failed."""
        found = {"phase": self.phase, "status": status, "reason": reason, "seconds": seconds}
        found |= {"inputs": asdict(self.inputs), "rows": self.rows}
        waiting = self.file.with_suffix(".writing")
        waiting.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        waiting.replace(self.file)

    def rates(self) -> dict[str, float]:
        """The card's matrix FLOP/s and copied bytes/s, where the phase `rates` has measured them."""
        file = self.out / "rates.json"
        found = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
        return {row["what"]: row["figure"] for row in found}

    def share(self, amount_per_s: float, of: str) -> dict[str, Any]:
        """The fields of a row that reaches `amount_per_s` of the rate named `of`."""
        rate = self.rates().get(of)
        return {"share": amount_per_s / rate, "of": of} if rate else {}

    def rated(self, count: int) -> list[Any]:
        """`count` rated rows of --ratings as RatedExample, the same at every call, of all prompts alike."""
        import numpy as np

        from dpa.core.sections.ratings import RatingsConfig
        from dpa.stages.ratings import read_ratings
        from dpa.training.reward_rows import RatedExample

        scales = {ATTRIBUTE: (0.0, 100.0)}
        table = read_ratings([RatingsConfig(path=self.inputs.ratings, scales=scales)]).table
        chosen = np.random.default_rng(0).permutation(table.num_rows)[:count]
        rows = table.take(chosen).to_pylist()
        return [
            RatedExample(row["prompt_id"], json.loads(row["messages"]), row["response"], (row[ATTRIBUTE],))
            for row in rows
        ]

    def asked(self, count: int) -> list[Any]:
        """`count` prompts of --prompts, from the front again where there are fewer."""
        from dpa.stages.prompts import read_prompts

        self._prompts = self._prompts or read_prompts(self.inputs.prompts)[0]
        return [self._prompts[place % len(self._prompts)] for place in range(count)]

    def space(self) -> Any:
        """The two objectives of recipes/smollm2-135m.yaml."""
        from dpa.core.directions import DirectionSpace
        from dpa.core.objective import Objective

        return DirectionSpace(tuple(Objective(name, {name: 1.0}) for name in OBJECTIVES))

    def steerable(self) -> Path:
        """The policy as a folder whose template reads a preference; made once for all phases."""
        folder = self.out / "steerable"
        if not (folder / "dpa_config.json").is_file():
            from dpa.models.policy import load_policy, save_policy

            save_policy(*load_policy(self.inputs.policy, device="cpu"), folder, self.space(), {})
        return folder

    def reward_model(self) -> Path:
        """A reward model to score with: a linear head on the policy's own features, made once for all phases."""
        folder = self.out / "ridge_reward"
        if not (folder / "dpa_reward.json").is_file():
            from dpa.core.sections.reward import RewardTrainConfig
            from dpa.training.reward_training import train_reward_model

            config = RewardTrainConfig(backbone=self.inputs.policy, method="ridge", max_length=1024)
            rows = self.rated(40 if self.tiny else 400)
            train_reward_model(rows, (ATTRIBUTE,), {ATTRIBUTE: (0.0, 100.0)}, config, folder)
        return folder

    def reward_spec(self) -> Any:
        """What that model says of itself, but for the order of its scores in bf16: ten pairs of rows and a head made in
        seconds must not decide which precision is measured."""
        from dpa.scoring.reward_model import read_spec

        spec = read_spec(self.reward_model())
        return replace(spec, precision=spec.precision and replace(spec.precision, kendall=None))


def need_vllm() -> None:
    """Raise Absent where vLLM, or a card for it, is not there."""
    if importlib.util.find_spec("vllm") is None:
        raise Absent("vLLM is not installed")
    import torch

    if not torch.cuda.is_available():
        raise Absent("vLLM is installed, but there is no card")


@dataclass(frozen=True)
class Timed:
    """What a piece of work took, and the most memory it held."""

    seconds: float
    peak_bytes: int
    result: Any


def timed(work: Callable[[], Any]) -> Timed:
    """Run it with a clean card before it and a finished card behind it."""
    import torch

    from dpa.models.memory import free_memory
    from dpa.storage.memory import peak_memory

    cuda = torch.cuda.is_available()
    free_memory()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begun = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    return Timed(seconds, torch.cuda.max_memory_allocated() if cuda else peak_memory(), result)


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of a training: how many, the tokens in them (padding not), their seconds, the peak of memory."""

    count: int
    tokens: int
    seconds: float
    peak_bytes: int

    @property
    def speed(self) -> float:
        """Tokens/s."""
        return self.tokens / self.seconds


def steps_of(trainer: Any, seconds: float = STEPS_S, warm: int = WARM_STEPS) -> Steps:
    """Train for `seconds` behind `warm` steps that are not counted, or to the end; a training of no more steps than
    those counts whole. A batch tells its tokens by its `rows`, as ours do, or by its attention mask."""
    import torch
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()
    times: list[float] = []
    tokens: list[Any] = [0]

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Watch(TrainerCallback):
        """Notes when each step ends, and stops. The card is waited for where the measured steps begin and end only."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(now())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(now() if len(times) == warm else time.perf_counter())
            tokens.append(0)
            over = len(times) > warm + 1 and times[-1] - times[warm] >= seconds
            if over or state.global_step >= state.max_steps:
                times[-1] = now()
                control.should_training_stop = True
                control.should_save = False  # of its last step a Trainer keeps a checkpoint, here 80 GB of one

    take = trainer.training_step

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tokens[-1] = tokens[-1] + tokens_in(inputs)
        return take(model, inputs, *args, **kwargs)

    trainer.training_step = counted
    trainer.add_callback(Watch)
    peak = timed(trainer.train).peak_bytes
    first = warm if len(times) > warm + 1 else 0
    count = len(times) - 1 - first
    return Steps(count, int(sum(tokens[first : first + count])), times[-1] - times[first], peak)


def tokens_in(inputs: Any) -> Any:
    """Tokens of a batch that are not padding: a number, or a tensor that the card need not be waited for."""
    if "rows" in inputs:
        return sum(len(row["input_ids"]) if isinstance(row, dict) else len(row.ids_T) for row in inputs["rows"].rows)
    return inputs["attention_mask"].sum()


def on_device() -> tuple[str, Any]:
    """The device, and the dtype work without training is done in there."""
    import torch

    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def parameters_of(model: Any) -> int:
    """Weights that multiply: those of tied embeddings count once, as the head."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiplied(model: Any) -> int:
    """Parameters that a token is multiplied by: all but the table of embeddings, of which it takes a row."""
    return parameters_of(model) - model.get_input_embeddings().weight.numel()
