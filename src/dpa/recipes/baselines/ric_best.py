"""Rewards-in-Context at its best: asked for the label whose answers are best under the direction, by the reward model.

l(v) = argmax_l v . mean_x r(x, y_l(x)) over labels l on a lattice, the means over training prompts: an answer y_l(x) to
each under each label, sampled and scored once, and charged. The policy is that of ric.py (arXiv 2402.10207), taken
from there where that method is compared with the same settings.

Published: the policy. Ours: how it is asked, so that what it is compared by is no rule of ours (labels.target_rule).
"""

from dpa.recipes.baselines.lab import Lab, Method, Trained
from dpa.recipes.baselines.labels import asking_best
from dpa.recipes.baselines.ric import ROUNDS, labelled_policy


def train(lab: Lab) -> list[Trained]:
    """The same policy, asked by what its labels were seen to give."""
    labelled = labelled_policy(lab.ground)
    return [lab.trained("RiC, best labels", labelled.policy, asking_best(lab, ROUNDS + 1, labelled))]


METHOD = Method(
    name="ric_best",
    title="Rewards-in-Context, best labels",
    color=("#8e2c8a", "#e58be0"),
    bar=0.0,
    stands_on="ric",
    train=train,
)
