"""Supervised finetuning on the best-rated responses; no direction is known.

max sum log pi(y* | x), y* = argmax of the center's scalar c . r(x, y) over the rated responses of x.

Published: finetuning on demonstrations. Ours: the demonstrations are each prompt's best response by the reward model
(the cone's center, here helpfulness), which is a stronger baseline than all of them would be; as many passes as the
budget allows.
"""

from dpa.recipes.baselines.lab import Lab, Method, Trained, unstated


def train(lab: Lab) -> list[Trained]:
    """One policy, one point."""
    rows = unstated(lab.best_rated(lab.space.center_K))
    return [lab.as_point("SFT", lab.finetune(0, lab.start_policy, rows, lab.budget))]


METHOD = Method(
    name="sft",
    title="SFT",
    color=("#a3671f", "#e0b070"),
    point=True,
    bar=2.0,
    train=train,
)
