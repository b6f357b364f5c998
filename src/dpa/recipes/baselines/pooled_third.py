"""DPA with pooled selection and a third of the samples: each pool serves more directions, so that more is trained on.

The configuration sets its numbers. It is to come to the literal loop's last hypervolume with a third of the tokens that
that one generates, and may spend less than the budget for it.

Published: nothing; the whole row is ours.
"""

from dpa.recipes.baselines.lab import Method
from dpa.recipes.baselines.loops import last_of_loop

METHOD = Method(
    name="pooled_third",
    title="DPA, pooled, a third of the samples",
    color=("#5b86d6", "#9fb8ff"),
    kind="variant",
    saves_on="per_direction",
    spends_less=True,
    train=last_of_loop,
)
