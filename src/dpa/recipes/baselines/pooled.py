"""DPA with pooled selection: this project's loop.

For each prompt all candidates form one pool, whatever direction they were made under; under v the winner is
argmax_n v . r(x, y_n); the policy is finetuned on (v, x, winner), and asked v in its system prompt (arXiv 2402.18571).

Published: the loop, the prompt, the reward model. Ours: the pool serves first the directions it was made under, so that
best-of-(D x N) costs no more generation than best-of-N did; the numbers of prompts, directions, samples and iterations.
"""

from dpa.recipes.baselines.lab import Method
from dpa.recipes.baselines.loops import run_loop

METHOD = Method(name="pooled", title="DPA, pooled", color=("#143f8c", "#6fc3ff"), kind="subject", train=run_loop)
