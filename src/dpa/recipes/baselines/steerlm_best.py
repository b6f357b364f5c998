"""SteerLM at its best: asked for the label whose answers are best under the direction, by the reward model.

l(v) = argmax_l v . mean_x r(x, y_l(x)) over labels l on a lattice, the means over training prompts: an answer y_l(x) to
each under each label, sampled and scored once, and charged. The policy is that of steerlm.py (arXiv 2310.05344), taken
from there where that method is compared with the same settings.

Published: the policy. Ours: how it is asked, so that what it is compared by is no rule of ours (labels.target_rule).
"""

from dpa.recipes.baselines.lab import Lab, Method, Trained
from dpa.recipes.baselines.labels import asking_best
from dpa.recipes.baselines.steerlm import BOOTSTRAP, labelled_policy


def train(lab: Lab) -> list[Trained]:
    """The same policy, asked by what its labels were seen to give."""
    labelled = labelled_policy(lab.ground)
    return [lab.trained("SteerLM, best labels", labelled.policy, asking_best(lab, BOOTSTRAP + 1, labelled))]


METHOD = Method(
    name="steerlm_best",
    title="SteerLM, best labels",
    color=("#7d5a00", "#d9bb6b"),
    bar=0.0,
    stands_on="steerlm",
    train=train,
)
