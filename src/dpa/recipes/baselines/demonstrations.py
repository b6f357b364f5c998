"""Supervised finetuning on demonstrations: what people wrote, as it is; no direction is known.

max sum log pi(y | x) over the rated rows whose `source` is `expert`, whatever they scored, as many passes as the budget
allows. Published: finetuning on demonstrations (InstructGPT's first step, 2203.02155). Ours: the name of the source.
"""

import pyarrow.compute as pc

from dpa.core.errors import DataError
from dpa.recipes.baselines.lab import Lab, Trained, unstated

SOURCE = "expert"


def train(lab: Lab) -> list[Trained]:
    """One policy, one point. Raises DataError when no rated row is a demonstration."""
    rows = lab.rated.filter(pc.equal(lab.rated["source"], SOURCE))
    if not len(rows):
        raise DataError(f"demonstrations: no rated row has the source `{SOURCE}`; leave this method out.")
    return [lab.as_point("SFT on demonstrations", lab.finetune(0, lab.config.policy, unstated(rows), lab.budget))]
