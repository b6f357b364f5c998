"""Measured speeds: what the ledgers of runs say, and what bench/card.py found on a card.
Run its tests: pytest tests/test_estimate.py
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpa.core.errors import RunFolderError
from dpa.storage.stage_records import read_ledger
from dpa.storage.tables import read_record
from dpa.training.learner import UNSHARED, Learner
from dpa.training.learners import learner_named


@dataclass(frozen=True)
class CardFigures:
    """What bench/card.py measured: products' FLOP/s, copies' bytes/s, and shares of them reached by a kind of work
    (`training`, `scoring`, `sampling`) on its small model and on one of 7B; a part that was not run is lacking."""

    folder: str
    rates: Mapping[str, float]
    shares: Mapping[tuple[str, bool], float]


@dataclass
class Speeds:
    """What ledgers say: amounts and the seconds they took, by kind of work, and where that was measured.
    Of this very run alone: `memory`, which its processes took of the machine, and `offline_winners`, what it trained on
    at t = 0."""

    amounts: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    offline_winners: int | None = None
    source: str = ""
    card: CardFigures | None = None

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


def read_speeds(folders: Iterable[Path], own: Path | None = None) -> Speeds:
    """What the done-records of run folders say, and the result files of bench/card.py; a folder that is not there says
    nothing. `own`: which of them is this run's, whose amounts are this run's too. Raises RunFolderError for a damaged
    one."""
    speeds, sources = Speeds(), []
    for run in dict.fromkeys(path.resolve() for path in folders):
        found, itself = False, own is not None and run == own.resolve()
        if (run / "rates.json").is_file():
            speeds.card = _card(run)
        for done in sorted(run.glob("iter_*/**/done.json")) + sorted(run.glob("train_reward/done.json")):
            found = True
            try:
                config = read_record(run / "fingerprint.json", ("config",), optional=None)["config"]
                ledger = read_ledger(read_record(done, ("ledger",), optional=None)["ledger"])
                _count(speeds, done.parent.relative_to(run).parts, asdict(ledger), config, itself)
            except (KeyError, TypeError, ValueError, AttributeError):
                raise RunFolderError(f"--from: {run} holds a damaged record ({done}); name another run.") from None
        sources += [run.name] if found else []
    speeds.source = ", ".join(sources)
    return speeds


def kind_of(learn: type[Learner[Any]]) -> str:
    """The kind of work that a finetuning is."""
    return "tokens trained" if learn.reads == "winners" else f"tokens trained on {learn.reads}"


def _count(
    speeds: Speeds, place: tuple[str, ...], ledger: Mapping[str, Any], config: Mapping[str, Any], own: bool
) -> None:
    seconds, memory = ledger["wall_s"], ledger["peak_memory"] if own else 0
    if place[-1] == "rollout":
        speeds.add("tokens sampled", ledger["tokens_generated"], seconds, memory)
        speeds.add("answers", ledger["rows"], seconds)
    elif place[-1] == "score":
        speeds.add("rows scored", ledger["candidates_scored"], seconds, memory)
    elif place[-1] == "finetune":
        learn = learner_named("sft" if place[0] == "iter_0" else config["learner"])
        speeds.add(kind_of(learn), ledger["training_tokens"], seconds, memory)
        responses = {"winners": 1, "pairs": 2, "prompts": config["rollout"]["samples"]}[learn.reads]
        section = config[learn.section]
        negatives = section.get("contrastive_negatives", 0) if section.get("contrastive") else 0
        examples = ledger["rows"] * responses * section["epochs"] * (1 + negatives)  # their tokens are trained on too
        unshared = ledger["extra"].get(UNSHARED, ledger["training_tokens"])
        if learn.reads == "winners":
            speeds.add("tokens of examples", unshared, seconds)
        speeds.add("examples" if learn.reads == "winners" else f"examples of {learn.reads}", examples, seconds)
        if place[0] == "iter_0" and own:
            speeds.offline_winners = ledger["rows"] or None  # none where the policy was trained elsewhere
    elif place[-1] == "train_reward":
        speeds.add("reward tokens", ledger["training_tokens"], seconds, memory)


_CARD_ROWS = {
    ("finetune", "finetuning"): ("training", False),
    ("scoring", "scoring"): ("scoring", False),
    ("decoding", "decoding, 1024 rows"): ("sampling", False),
    ("seven_b", "7B shape, finetuning"): ("training", True),
    ("seven_b", "7B shape, scoring"): ("scoring", True),
}
"""(Phase, row) of bench/card.py -> kind of work, and whether the model was the one of 7B."""


def _card(folder: Path) -> CardFigures:
    """The figures that were measured to their end."""
    rates: dict[str, float] = {}
    shares: dict[tuple[str, bool], float] = {}
    for phase in ("rates", *dict.fromkeys(phase for phase, _ in _CARD_ROWS)):
        file = folder / f"{phase}.json"
        if not file.is_file():
            continue
        try:
            for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
                if phase == "rates":
                    rates[str(row["what"])] = float(row["figure"])
                elif (phase, row["what"]) in _CARD_ROWS and "share" in row:
                    shares[_CARD_ROWS[phase, row["what"]]] = float(row["share"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise RunFolderError(f"--from: {file} is no result of bench/card.py; name another folder.") from None
    usable = {name: rate for name, rate in rates.items() if 0 < rate < math.inf}
    return CardFigures(folder.name, usable, {key: share for key, share in shares.items() if 0 < share < 1})
