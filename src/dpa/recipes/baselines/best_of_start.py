"""Best of n answers of the start policy under the asked direction: no training, n times the tokens of an answer.

y = argmax over n samples of v . r(x, y). The scorer is the run's own. Where that is the true reward, as in a recipe
whose scores are functions, it knows at answering time what no user could know: an upper bound then, not a peer.

Nobody tells the policy the direction, so the same n answers to a prompt serve them all; each direction's answer counts
the tokens of all n, which is what it would cost a user.

Published: best-of-n (WebGPT 2112.09332). Ours: n.
"""

from dpa.recipes.baselines.asking import OncePerPromptSampler
from dpa.recipes.baselines.lab import Lab, Method, Trained
from dpa.sampling.best_of import BestOfSampler

CANDIDATES = 4


def train(lab: Lab) -> list[Trained]:
    """The start policy with the scorer over it."""

    def build() -> BestOfSampler:
        return BestOfSampler(OncePerPromptSampler(lab.start_sampler()), lab.scorer, lab.space, CANDIDATES)

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
