"""Multi-objective online DPO: pairs under the sampled direction instead of winners (arXiv 2503.00295).

For a direction v and a prompt's candidates, chosen = argmax v . r and rejected = argmin v . r; the loss is DPO's,
-log sigmoid(beta (log pi(c)/ref(c) - log pi(r)/ref(r))), with v in the prompt; the reference is the policy of the
iteration before. It is the ordinary loop with `learner: dpo`.

Published: preference-conditioned online DPO on pairs made under sampled weights. Ours: the pool, the signed directions,
beta and the learning rate, and half as many pairs as the pooled loop trains rows, since a pair is two responses.
"""

from dpa.recipes.baselines.lab import Lab, Trained
from dpa.recipes.baselines.loops import run_loop


def train(lab: Lab) -> list[Trained]:
    """The last policy."""
    return run_loop(lab)[-1:]
