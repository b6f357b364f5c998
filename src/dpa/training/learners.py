"""The learners: the name a configuration gives (`learner`) and the class that learns so. A new one is a line here.
Run its tests: pytest tests/test_learners.py
"""

from typing import Any

from dpa.core.config import RunConfig
from dpa.core.lookup import look_up
from dpa.training.dpo import DPO
from dpa.training.grpo import GRPO
from dpa.training.learner import Learner
from dpa.training.sft import SFT

LEARNERS: dict[str, type[Learner[Any]]] = {
    "sft": SFT,
    "dpo": DPO,
    "grpo": GRPO,
}


def learner_of(run: RunConfig, t: int) -> type[Learner[Any]]:
    """What iteration t learns by; t = 0 from winners, whatever the rest: a direction must first be read."""
    return learner_named("sft" if t == 0 else run.learner)


def learner_named(name: str) -> type[Learner[Any]]:
    """The learner of that name. Raises ConfigError, which names the nearest."""
    return look_up(LEARNERS, name, "learner")
