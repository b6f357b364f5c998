"""Best of n answers of the start policy under the asked direction: no training, n times the tokens of an answer.

y = argmax over n samples of v . r(x, y). The scorer is the run's own. Where that is the true reward, as in a recipe
whose scores are functions, it knows at answering time what no user could know: an upper bound then, not a peer.

Published: best-of-n (WebGPT 2112.09332). Ours: n.
"""

from dpa.recipes.baselines.asking import TranslatingSampler, without_direction
from dpa.recipes.baselines.lab import Lab, Method, Trained
from dpa.sampling.best_of import BestOfSampler

CANDIDATES = 4


def train(lab: Lab) -> list[Trained]:
    """The start policy with the scorer over it."""

    def build() -> BestOfSampler:
        told_nothing = TranslatingSampler(lab.start_sampler(), without_direction)
        return BestOfSampler(told_nothing, lab.scorer, lab.space, CANDIDATES)

    return [Trained(f"best of {CANDIDATES}", build)]


METHOD = Method(
    name="best_of_start",
    title="start policy, best of n",
    color=("#8c4a6b", "#e6a3c4"),
    bar=0.0,
    spends_less=True,
    by_default=False,
    train=train,
)
