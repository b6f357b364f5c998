"""Supervised finetuning on demonstrations: what people wrote, as it is; no direction is known.

max sum log pi(y | x) over the rows of `ratings` whose `source` is `expert`, whatever they scored, as many passes as the
budget allows. `changes` may name other `ratings` for it than the methods share: all the answers people wrote, say.
Published: finetuning on demonstrations (InstructGPT's first step, 2203.02155). Ours: the name of the source.
"""

import pyarrow.compute as pc

from dpa.core.errors import DataError
from dpa.recipes.baselines.lab import Lab, Method, Trained, as_candidates, unstated
from dpa.stages.ratings import leave_out, read_ratings

SOURCE = "expert"


def train(lab: Lab) -> list[Trained]:
    """One policy, one point. Raises DataError when no rated row is a demonstration."""
    rows = as_candidates(leave_out(read_ratings(lab.config.ratings), lab.held_out).table)
    rows = rows.filter(pc.equal(rows["source"], SOURCE))
    if not len(rows):
        raise DataError(f"demonstrations: no rated row has the source `{SOURCE}`; leave this method out.")
    return [lab.as_point("SFT on demonstrations", lab.finetune(0, lab.start_policy, unstated(rows), lab.budget))]


METHOD = Method(
    name="demonstrations",
    title="SFT on demonstrations",
    color=("#6b5b2a", "#d8c27a"),
    point=True,
    bar=0.0,
    by_default=False,
    train=train,
)
