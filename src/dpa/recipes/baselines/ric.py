"""Rewards-in-Context: rewards in the prompt, offline on all rows, then online rounds kept by a Pareto filter
(arXiv 2402.10207, github.com/YangRui2015/RiC).

max sum log pi(y | x, R_1..R_K) with R the rewards y received, standardised and rounded to a tenth. Online: answer new
prompts under desired rewards near the front, score the answers, keep those that no other answer to the same prompt
dominates, and train on them (with their own rewards) together with the rated rows near the front. At inference a
preference is mapped to desired rewards.

Published: the three stages, one decimal, mixing offline rows back in, two online rounds, the piecewise-linear map.
Ours: tenths are written as whole numbers (`helpfulness 12 verbosity -5`); dominance is judged in the utilities of the
cone's edges, because less of an objective is a wish too; desired rewards online are those of drawn directions; half of
the budget offline, a quarter for each round.
"""

from functools import partial

import numpy as np
import pyarrow as pa

from dpa.core.directions import DirectionSpace
from dpa.core.measures import edge_directions, pareto_front
from dpa.core.records import places_of
from dpa.core.selection import standard_deviations
from dpa.recipes.baselines.lab import Lab, Method, Trained
from dpa.recipes.baselines.labels import Labelled, asking, labelled
from dpa.storage.schemas import ANSWERS

OFFLINE, ROUNDS = 0.5, 2
"""Share of the budget for the rated rows, and the online rounds."""


def train(lab: Lab) -> list[Trained]:
    """The policy after the last round, asked by the rule."""
    policy, write, kept_RK = labelled_policy(lab)
    return [lab.trained("RiC", policy, asking(lab.space, kept_RK, write))]


def labelled_policy(lab: Lab) -> Labelled:
    """The policy after the last of the ROUNDS."""
    rated, scores_RK = lab.rated, lab.rated_scores()
    write = partial(write_rewards, lab.space, np.nanmean(scores_RK, axis=0), standard_deviations(scores_RK))
    policy = lab.finetune(
        0, lab.start_policy, labelled(rated, scores_RK, write, lab.space.placement), OFFLINE * lab.budget
    )
    good = near_front(rated["prompt_id"].to_pylist(), scores_RK, lab.space)
    kept, kept_RK = rated.take(pa.array(good)), scores_RK[good]
    for t in range(1, ROUNDS + 1):
        ask = asking(lab.space, kept_RK, write)
        goal = (1 - OFFLINE) * lab.budget * (ROUNDS - t) / ROUNDS  # what must be left after this round
        lab.rollout(t, partial(lab.sampler, policy, translate=ask))
        own, own_RK = lab.candidates(t)
        good = near_front(own["prompt_id"].to_pylist(), own_RK, lab.space)
        kept = pa.concat_tables([table.select(ANSWERS.names) for table in (kept, own.take(pa.array(good)))])
        kept_RK = np.concatenate([kept_RK, own_RK[good]])
        policy = lab.finetune(
            t, policy, labelled(kept, kept_RK, write, lab.space.placement), lab.left - goal, online=True
        )
    return Labelled(policy, write, kept_RK)


def write_rewards(space: DirectionSpace, mean_K: np.ndarray, spread_K: np.ndarray, scores_K: np.ndarray) -> str:
    """`helpfulness 12 verbosity -5`: standardised scores in tenths."""
    tenths_K = np.clip(np.round(10 * (scores_K - mean_K) / spread_K), -99, 99).astype(int)
    return " ".join(f"{name} {value}" for name, value in zip(space.names, tenths_K, strict=True))


def near_front(prompt_ids: list[str], scores_RK: np.ndarray, space: DirectionSpace) -> np.ndarray:
    """Places of the rows that no other row of the same prompt dominates in the utilities of the cone's edges."""
    utility_RE = scores_RK @ edge_directions(space).T
    kept = [np.array(own)[pareto_front(utility_RE[own])] for own in places_of(prompt_ids).values()]
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, dtype=int)


METHOD = Method(
    name="ric",
    title="Rewards-in-Context",
    color=("#c22f5b", "#ff768e"),
    bar=2.0,
    train=train,
)
