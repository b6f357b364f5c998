"""The control at equal budget: the pooled loop, but for each direction a random candidate of the pool is kept.

Finetuning on a random sample sometimes matches best-of-n, so that what a loop gains must be measured beside it. The
configuration sets `selection.method: random`. It starts from the policy of t = 0, which was selected, not drawn.

Published: nothing; a control of ours.
"""

from dpa.recipes.baselines.lab import Lab, Trained
from dpa.recipes.baselines.loops import run_loop


def train(lab: Lab) -> list[Trained]:
    """The last policy."""
    return run_loop(lab)[-1:]
