"""How well a policy keeps the values it is asked for: asked against achieved, with intervals over prompts.
Run its tests: pytest tests/test_target_measures.py

Letters: T targets, P prompts, S answers of each prompt under a target, R bootstrap resamples.
"""

import numpy as np

from dpa.core.comparison import main_objective
from dpa.core.directions import DirectionSpace
from dpa.core.measures import Interval, interval
from dpa.core.targets import Held, Target, free_center, to_step

ASKED = (10, 30, 50, 70, 90)
"""Values asked of each objective in turn, as the policy reads them: rounded to its `target_step`."""


def target_grid(space: DirectionSpace) -> list[Target]:
    """Fixed targets for evaluation: each objective but the main one held at each of ASKED, the center's rest free."""
    found, values = [], dict.fromkeys(to_step(space, value) for value in ASKED)
    for k, name in enumerate(space.names):
        held: list[Held] = [tuple(value if place == k else None for place in range(space.K)) for value in values]
        center_K = free_center(space, held[0])
        if name != main_objective(space) and center_K is not None:
            found += [Target(space.names, tuple(center_K.tolist()), tuple(own)) for own in held]
    return found


def control_errors(asked_T: np.ndarray, achieved_TPS: np.ndarray, resamples: int, seed: int) -> dict[str, Interval]:
    """Median absolute errors of what is achieved (NaN: no score) against what is asked, in points of the scale.

    `per_response`: over all answers, what a user who asks once meets; `per_target`: over the targets, of each one's
    mean over all answers. Each with its 95% bootstrap interval over prompts.
    """
    P = achieved_TPS.shape[1]
    rng = np.random.default_rng(seed)
    draws_R2 = np.array([_medians(asked_T, achieved_TPS[:, rng.integers(P, size=P)]) for _ in range(resamples)])
    per_response, per_target = _medians(asked_T, achieved_TPS)
    return {
        "per_response": interval(per_response, draws_R2[:, 0]),
        "per_target": interval(per_target, draws_R2[:, 1]),
    }


def _medians(asked_T: np.ndarray, achieved_TPS: np.ndarray) -> tuple[float, float]:
    """(per response, per target); NaN where nothing has a score."""
    known_TPS = np.isfinite(achieved_TPS)
    counts_T = known_TPS.sum(axis=(1, 2))
    if not counts_T.any():
        return np.nan, np.nan
    error_N = np.abs(achieved_TPS - asked_T[:, None, None])[known_TPS]
    some_T = counts_T > 0
    mean_T = np.where(known_TPS, achieved_TPS, 0.0).sum(axis=(1, 2))[some_T] / counts_T[some_T]
    return float(np.median(error_N)), float(np.median(np.abs(mean_T - asked_T[some_T])))
