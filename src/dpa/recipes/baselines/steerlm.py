"""SteerLM: attribute-conditioned supervised finetuning, asked for target values (arXiv 2310.05344, NeMo-Aligner).

max sum log pi(y | a(r(x, y)), x): the reward model labels every rated response with whole numbers 0 to 9 for each
objective, `helpfulness:9,verbosity:3,warmth:0`, good and bad responses alike are trained on under their labels, and a
user asks for the values they want. Bootstrapping: the policy answers new prompts under the labels users will ask for,
the reward model labels those answers, and it is trained on them.

Published: the four steps, the 0-9 scale, labels as text in the system prompt. Ours: objectives are labelled rather than
raw attributes; the label asked for a direction is labels.target_rule; two thirds of the budget for the rated rows;
prompts and samples of one bootstrap round.
"""

from functools import partial

import numpy as np

from dpa.core.directions import DirectionSpace
from dpa.recipes.baselines.lab import Lab, Method, Trained
from dpa.recipes.baselines.labels import Labelled, asking, labelled

OFFLINE = 0.67
"""Share of the budget for the rated rows."""
STEPS = 9
"""The highest label."""
BOOTSTRAP = 1
"""The iteration that bootstraps."""


def train(lab: Lab) -> list[Trained]:
    """The policy after bootstrapping, asked by the rule."""
    policy, write, scores_RK = labelled_policy(lab)
    return [lab.trained("SteerLM", policy, asking(lab.space, scores_RK, write))]


def labelled_policy(lab: Lab) -> Labelled:
    """The policy after bootstrapping, which is the last iteration, BOOTSTRAP."""
    write = partial(write_label, lab.space)
    rated, scores_RK = lab.rated, lab.rated_scores()
    ask = asking(lab.space, scores_RK, write)
    policy = lab.finetune(
        0, lab.start_policy, labelled(rated, scores_RK, write, lab.space.placement), OFFLINE * lab.budget
    )
    lab.rollout(BOOTSTRAP, partial(lab.sampler, policy, translate=ask))
    own, own_RK = lab.candidates(BOOTSTRAP)
    policy = lab.finetune(BOOTSTRAP, policy, labelled(own, own_RK, write, lab.space.placement), lab.left, online=True)
    return Labelled(policy, write, scores_RK)


def write_label(space: DirectionSpace, scores_K: np.ndarray) -> str:
    """`helpfulness:9,verbosity:3,warmth:0`: scores as whole numbers 0 to 9 over what their objectives can reach."""
    low_K, high_K = np.array([space.ranges[name] for name in space.names]).T
    values_K = np.clip(np.round((scores_K - low_K) / (high_K - low_K) * STEPS), 0, STEPS).astype(int)
    return ",".join(f"{name}:{value}" for name, value in zip(space.names, values_K, strict=True))


METHOD = Method(
    name="steerlm",
    title="SteerLM",
    color=("#d17a00", "#f0a93a"),
    bar=2.0,
    train=train,
)
