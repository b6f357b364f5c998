"""DPA at its best: asked for the direction whose answers are best under the wished one, by the reward model.

u(v) = argmax_u v . mean_x r(x, y_u(x)) over directions u that the policy was trained on, the means over training
prompts: an answer y_u(x) to each under each, sampled and scored once, and charged. The policy is that of pooled.py,
taken from there where that method is compared with the same settings.

Published: the policy (arXiv 2402.18571). Ours: how it is asked, as `steerlm_best` and `ric_best` are: what a policy
makes of a direction need not be the best it can do under it.
"""

from dataclasses import replace
from functools import partial

import numpy as np

from dpa.core.records import SampleRequest
from dpa.recipes.baselines.lab import Lab, Method, Trained
from dpa.recipes.baselines.loops import loop_policies
from dpa.recipes.baselines.trying import TRIED, answers_to_try, best_tried


def train(lab: Lab) -> list[Trained]:
    """The same policy, asked by what its directions were seen to give."""
    policy = loop_policies(lab.ground)[-1]
    grid_DK, rng = lab.space.grid(lab.config.evaluate.directions), np.random.default_rng(lab.config.seed)
    more = max(0, min(TRIED, answers_to_try(lab)) - len(grid_DK))
    asked_LK = np.concatenate([grid_DK, lab.space.sample(more, rng)])
    best = best_tried(lab, lab.config.iterations + 1, partial(lab.sampler, policy, measuring=True), asked_LK)

    def translate(request: SampleRequest) -> SampleRequest:
        assert request.direction is not None
        return replace(request, direction=best(request.direction))

    return [lab.trained("DPA, best directions", policy, translate)]


METHOD = Method(
    name="pooled_best",
    title="DPA, pooled, best directions",
    color=("#0b7a75", "#63d2c6"),
    kind="variant",
    stands_on="pooled",
    train=train,
)
