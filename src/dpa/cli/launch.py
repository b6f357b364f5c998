"""`dpa finetune` in one process, or as one rank of `accelerate launch -m dpa finetune CONFIG -t 1`.
Run its tests: pytest tests/test_launch.py
"""

from dpa.core.config import RunConfig
from dpa.recipes.dpa import Loop
from dpa.training.launching import end_with_launcher
from dpa.training.ranks import first_then_rest


def finetune(config: RunConfig, iteration: int) -> None:
    """Finetune the policy of the iteration before; the first rank holds the run folder, the others join it."""
    end_with_launcher()
    with first_then_rest(lambda join: Loop(config, join=join)) as loop:
        loop.finetune(iteration)
