"""What the pools of an iteration had to choose from, before anything is learned from them: a policy cannot tell
directions apart that would keep the same answers.
Run its tests: pytest tests/test_pools.py
"""

from typing import Any

import pyarrow as pa

from dpa.core.directions import DirectionSpace
from dpa.core.measures import intervals_over_prompts
from dpa.core.pools import best_of_pools, pools_of
from dpa.core.sections.evaluate import EvaluateConfig
from dpa.core.sections.selection import SelectionConfig
from dpa.core.selection import scale_of
from dpa.core.utility import Utility
from dpa.storage.schemas import score_matrix

MOST_DOMINATED = 0.9
"""Share of the pools that may be dominated without a warning. Of two answers with independent marks one is
the best in a whole cone of 45 degrees half of the time: the other half of many prompts still teaches."""

POOLS = ("prompts", "candidates", "different", "dominated", "directions", "verdict", "sentence")
"""Fields of what `pool_front` finds."""


def pool_front(
    scores: pa.Table, space: DirectionSpace, selection: SelectionConfig, evaluation: EvaluateConfig, seed: int
) -> dict[str, Any]:
    """The JSON-able record of what each direction of the grid would keep, a prompt's candidates being one pool.

    `scores`: a finished score stage, in the columns of a score shard. Whatever `selection.method` keeps, the best of
    all of a prompt's candidates is looked for, by the utility and scale of `selection`:
      prompts, candidates  how many with a valid candidate, and valid candidates of one, on average
      different            candidates of a pool that some direction keeps, on average
      dominated            share of the pools in which one candidate is the best in every direction
      directions           one per grid point: direction (text), weights, angles {arc: asked degrees}, and objectives
                           {"model": {name: {value, low, high}}} of what it keeps
      verdict, sentence    whether most pools offer a choice, and all of it in words
    """
    scores_RK = space.combine(*score_matrix(scores))
    scale_K = scale_of(scores_RK, selection)
    groups = pools_of(scores["prompt_id"].to_pylist(), scores_RK, scale_K)
    grid_DK = space.grid(evaluation.directions)
    utility = Utility(selection.utility, selection.augmentation, scale_K)
    best_DPK, different_P = best_of_pools(groups, grid_DK, utility)
    intervals_DK = intervals_over_prompts(best_DPK, evaluation.resamples, seed)
    P = len(different_P)
    found = {
        "prompts": P,
        "candidates": sum(int(pools.valid_PN.sum()) for pools in groups) / max(1, P),
        "different": float(different_P.sum()) / max(1, P),
        "dominated": float((different_P == 1).sum()) / max(1, P),
    }
    verdict = found["dominated"] <= MOST_DOMINATED
    sentence = (
        f"of a prompt's {found['candidates']:.1f} candidates {len(grid_DK)} directions would keep "
        f"{found['different']:.1f} different ones; for {found['dominated']:.0%} of the prompts all would keep the same"
    )
    if not verdict:
        sentence += ", which teaches no direction: rate or sample more answers to each prompt"
    return {
        **found,
        "directions": [
            {
                "direction": str(space.direction(weights_K)),
                "weights": weights_K.tolist(),
                "angles": space.asked_angles(weights_K),
                "objectives": {"model": dict(zip(space.names, intervals_K, strict=True))},
            }
            for weights_K, intervals_K in zip(grid_DK, intervals_DK, strict=True)
        ],
        "verdict": verdict,
        "sentence": f"{sentence}.",
    }
