"""What every phase of bench/card.py is given: its inputs, its result file, and a clock.

A phase writes rows of figures as it finds them, so that a phase that breaks halfway keeps what it had.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OBJECTIVES = ("quality", "verbosity")
ATTRIBUTE = "quality"
"""The column of --ratings that is learnt."""


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
        """Keep one line of the table. `more`: `share` of the card's `of` (matrix or copy rate), and facts."""
        self.rows.append({"what": what, "figure": figure, "unit": unit, "peer": peer, "peer_name": peer_name, **more})
        self.write("running")

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

        from dpa.core.config import RatingsConfig
        from dpa.models.reward_training import RatedExample
        from dpa.stages.ratings import read_ratings

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
        from dpa.core.directions import DirectionSpace, Objective

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
            from dpa.core.config import RewardTrainConfig
            from dpa.models.reward_training import train_reward_model

            config = RewardTrainConfig(backbone=self.inputs.policy, method="ridge", ridge_penalty=1.0, max_length=1024)
            rows = self.rated(40 if self.tiny else 400)
            train_reward_model(rows, (ATTRIBUTE,), {ATTRIBUTE: (0.0, 100.0)}, config, folder)
        return folder


@dataclass(frozen=True)
class Timed:
    """What a piece of work took, and the most memory it held."""

    seconds: float
    peak_bytes: int
    result: Any


def timed(work: Callable[[], Any]) -> Timed:
    """Run it with a clean card before it and a finished card behind it."""
    import torch

    from dpa.storage.memory import peak_memory

    cuda = torch.cuda.is_available()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begun = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    return Timed(seconds, torch.cuda.max_memory_allocated() if cuda else peak_memory(), result)


def on_device() -> tuple[str, Any]:
    """The device, and the dtype work without training is done in there."""
    import torch

    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def parameters_of(model: Any) -> int:
    """Weights that multiply: those of tied embeddings count once, as the head."""
    return sum(parameter.numel() for parameter in model.parameters())
