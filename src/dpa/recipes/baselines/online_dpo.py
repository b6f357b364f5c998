"""Multi-objective online DPO: pairs under the sampled direction instead of winners (arXiv 2503.00295).

For a direction v and a prompt's candidates, chosen = argmax v . r and rejected = argmin v . r; the loss is DPO's,
-log sigmoid(beta (log pi(c)/ref(c) - log pi(r)/ref(r))), with v in the prompt; the reference is the policy of the
iteration before. It is the ordinary loop with `learner: dpo`.

Published: preference-conditioned online DPO on pairs made under sampled weights. Ours: the pool, the signed directions,
beta and the learning rate, and half as many pairs as the pooled loop trains rows, since a pair is two responses.
"""

from dpa.recipes.baselines.lab import Method
from dpa.recipes.baselines.loops import last_of_loop

METHOD = Method(
    name="online_dpo",
    title="online DPO by direction",
    color=("#7a4fb5", "#c59bff"),
    kind="variant",
    train=last_of_loop,
)
