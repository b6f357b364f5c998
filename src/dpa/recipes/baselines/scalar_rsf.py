"""Scalar rejection-sampling finetuning with one fixed direction, never stated: RAFT (2304.06767), Llama 2 (2307.09288).

For t = 1..T: sample N responses to each prompt, keep argmax c . r(x, y) with c the cone's center, finetune on it from
the current policy. t = 0 is the same over the rated responses.

Published: best-of-n, keep 1, finetune from the current model. Ours: t = 0 offline, as DPA has it; three in ten tokens
of the budget for t = 0, the rest in equal parts; the numbers of prompts and samples.
"""

from functools import partial

from dpa.recipes.baselines.asking import without_direction
from dpa.recipes.baselines.lab import Lab, Method, Trained, unstated

OFFLINE = 0.3
"""Share of the budget for t = 0."""


def train(lab: Lab) -> list[Trained]:
    """The last policy, one point."""
    center_K, T = lab.space.center_K, lab.config.iterations
    policy = lab.finetune(0, lab.start_policy, unstated(lab.best_rated(center_K)), OFFLINE * lab.budget)
    for t in range(1, T + 1):
        goal = (1 - OFFLINE) * lab.budget * (T - t) / T  # what must be left after this iteration
        lab.rollout(t, partial(lab.sampler, policy, translate=without_direction), center_K[None])
        policy = lab.finetune(t, policy, unstated(lab.best_sampled(center_K, t)), lab.left - goal, online=True)
    return [lab.as_point(f"t = {T}", policy)]


METHOD = Method(
    name="scalar_rsf",
    title="scalar RSF",
    color=("#3d3a36", "#d9d4cb"),
    point=True,
    bar=2.0,
    train=train,
)
