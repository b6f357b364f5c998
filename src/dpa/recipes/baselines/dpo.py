"""Direct preference optimisation on offline pairs of one scalar (arXiv 2305.18290), after supervised finetuning.

-log sigmoid(beta (log pi(c)/ref(c) - log pi(r)/ref(r))): chosen c is a prompt's best rated response by the center's
scalar, rejected r another one of it; the reference is the SFT policy.

Published: SFT, then DPO on offline pairs; chosen = best, rejected = a random other (Zephyr, 2310.16944). Ours: every
other response is the rejected one of a pair once, in random order; half of the budget for SFT, half for pairs; beta and
the learning rate are guesses until they are tuned (bench/tune_baselines.py).
"""

import numpy as np
import pyarrow as pa

from dpa.recipes.baselines.lab import Lab, Method, Trained, unstated
from dpa.storage.schemas import PAIRS

SFT_SHARE = 0.5


def train(lab: Lab) -> list[Trained]:
    """The policy after DPO, one point."""
    best = unstated(lab.best_rated(lab.space.center_K))
    start = lab.finetune(0, lab.start_policy, best, SFT_SHARE * lab.budget)
    pairs = rated_pairs(lab, best)
    return [lab.as_point("DPO", lab.prefer(1, start, pairs, lab.left))]


def rated_pairs(lab: Lab, best: pa.Table) -> pa.Table:
    """Each prompt's best response against every other one that scores less, shuffled; no direction is stated."""
    # By the same numbers on both sides: a row's `utility` is that of a direction a hair's breadth from the center.
    scalar_R = (lab.rated_scores() @ lab.space.center_K).tolist()
    scalars = dict(zip(lab.ratings["row_id"].to_pylist(), scalar_R, strict=True))
    columns = (lab.ratings[name].to_pylist() for name in ("prompt_id", "response"))
    others: dict[str, list[tuple[str, float]]] = {}
    for prompt_id, response, scalar in zip(*columns, scalar_R, strict=True):
        others.setdefault(prompt_id, []).append((response, scalar))
    pairs = [
        {
            "prompt_id": row["prompt_id"],
            "messages": row["messages"],
            "direction": None,
            "chosen": row["response"],
            "rejected": response,
            "chosen_complete": True,
            "rejected_complete": True,
            "utility_chosen": scalars[row["candidate_id"]],
            "utility_rejected": scalar,
        }
        for row in best.to_pylist()
        for response, scalar in others[row["prompt_id"]]
        if scalar < scalars[row["candidate_id"]] and response != row["response"]
    ]
    order = np.random.default_rng(lab.config.seed).permutation(len(pairs))
    schema = pa.schema(
        [field for field in PAIRS if field.name not in ("chosen_id", "rejected_id")]
    )  # rated rows: no ids
    return pa.Table.from_pylist([pairs[place] for place in order], schema)


METHOD = Method(
    name="dpo",
    title="DPO",
    color=("#b3261e", "#ff8a80"),
    point=True,
    bar=2.0,
    train=train,
)
