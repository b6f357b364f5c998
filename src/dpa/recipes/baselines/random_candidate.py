"""The control at equal budget: the pooled loop, but for each direction a random candidate of the pool is kept.

Finetuning on a random sample sometimes matches best-of-n, so that what a loop gains must be measured beside it. The
configuration sets `selection.method: random`. It starts from the policy of t = 0, which was selected, not drawn.

Published: nothing; a control of ours.
"""

from dpa.recipes.baselines.lab import Method
from dpa.recipes.baselines.loops import last_of_loop

METHOD = Method(
    name="random_candidate",
    title="random candidate",
    color=("#8a8378", "#a9a297"),
    kind="variant",
    train=last_of_loop,
)
