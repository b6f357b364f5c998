"""Online GRPO by direction: the policy's own answers, rewarded by v . r while it learns (arXiv 2402.03300).

A = (v . r - mean) / std over the answers to one prompt under one direction; the loss is -A log pi(y | x, v), with v in
the prompt. It is the ordinary loop with `learner: grpo`: as many answers are sampled, none is selected.

Published: groups of answers of the policy as it is, one reward. Ours: v . r, a direction drawn for each prompt, no KL
term, and what a comparison sets in `changes.online_grpo` (it was not tuned: `methods` must name it).
"""

from functools import partial

from dpa.recipes.baselines.lab import Method
from dpa.recipes.baselines.loops import last_of_loop

METHOD = Method(
    name="online_grpo",
    title="online GRPO by direction",
    color=("#a8397f", "#ff9ad5"),
    kind="variant",
    by_default=False,
    train=partial(last_of_loop, learner="grpo"),
)
