"""DPA read literally: the best of the samples made under a direction is kept for that direction.

winner(v) = argmax over the n samples made under v of v . r(x, y_n), one for each direction asked (arXiv 2402.18571,
step 3). The configuration sets `selection.method: per_direction` and numbers that come to the same budget.

Published: the step, one direction for a prompt. Ours: the numbers, which the paper does not give. In the demo three
directions of three samples did better than one of nine over more prompts (docs/findings.md).
"""

from dpa.recipes.baselines.lab import Method
from dpa.recipes.baselines.loops import last_of_loop

METHOD = Method(
    name="per_direction",
    title="DPA, literal",
    color=("#0f8a7d", "#5fe0cf"),
    kind="variant",
    train=last_of_loop,
)
