"""What is asked so that the answers are best under a direction, found by trying it on training prompts.
Run its tests: pytest tests/test_baselines.py -k best
"""

from collections.abc import Callable, Sequence

import numpy as np

from dpa.core.records import Sampler, places_of
from dpa.recipes.baselines.lab import Lab

TRIED, SHARE = 80, 0.1
"""Ways of asking that are tried at most, and the share of the budget that trying them would cost if every answer were
as long as a rated row, prompt included; answers alone are counted, so that it costs less than half of that."""


def answers_to_try(lab: Lab) -> int:
    """How many answers trying may take in all."""
    return max(2, int(SHARE * lab.budget / lab.row_tokens))


def best_tried(
    lab: Lab, t: int, build: Callable[[], Sampler], asked_LK: np.ndarray
) -> Callable[[Sequence[float]], tuple[float, ...]]:
    """A function that gives, for a direction v, the asked numbers whose answers the reward model scores highest:
    argmax_l v . mean r(y_l). What was never scored is never the best.

    The sampler that `build` gives is asked each of asked_LK as if it were a direction. The means are over one answer to
    each of some training prompts, the same under all, sampled once in iteration t of `lab` and charged to it.
    """
    count = max(1, answers_to_try(lab) // len(asked_LK))
    lab.rollout(t, build, asked_LK, count=count, samples=1)
    asked, scores_RK = lab.stage(t, "rollout").whole_table(), lab.objectives(lab.stage(t, "score"))
    places = places_of(map(tuple, asked["direction"].to_pylist()))
    scored = {numbers: scores_RK[own][np.isfinite(scores_RK[own]).all(axis=1)] for numbers, own in places.items()}
    known = {numbers: own_RK.mean(axis=0) for numbers, own_RK in scored.items() if len(own_RK)}
    tried, mean_LK = list(known), np.array(list(known.values()))
    return lambda direction: tried[int((mean_LK @ np.asarray(direction, dtype=float)).argmax())]
