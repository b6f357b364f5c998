"""MOD, multi-objective decoding: the specialists' probabilities mixed at every token (arXiv 2406.18853).

log pi(y_t | x, y_<t) = sum_i lambda_i(v) log pi_i(y_t | x, y_<t) + constant: what maximises sum_i lambda_i r_i under a
reverse KL divergence, where each pi_i does for its r_i. It costs a pass through each asked specialist for a token.

Published: the rule, no training beyond the specialists. Ours: specialists and lambda(v) are those of rewarded soups
(soups.py: the cone is signed), and are taken from there where that method is compared with the same settings.
"""

from dpa.recipes.baselines.lab import Lab, Method, Trained
from dpa.recipes.baselines.soups import mixture, specialists
from dpa.sampling.mixed_logits import MixedLogitsSampler


def train(lab: Lab) -> list[Trained]:
    """The specialists, mixed while they answer."""
    folders = specialists(lab.ground)
    spec = lab.spec(folders[0], measuring=True)

    def shares(direction: tuple[float, ...] | None) -> list[float]:
        assert direction is not None
        return mixture(direction, lab.space)

    return [Trained("MOD", lambda: MixedLogitsSampler(folders, shares, spec))]


METHOD = Method(
    name="mod",
    title="MOD",
    color=("#00796b", "#5fd4c4"),
    bar=0.0,
    stands_on="soups",
    train=train,
)
