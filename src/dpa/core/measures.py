"""How good a policy is over a fixed grid of directions, and whether it listens, with bootstrap intervals over prompts.
Run its tests: pytest tests/test_measures.py

Letters: P prompts, D directions of the grid, K objectives, R bootstrap resamples. `means_DK` is the mean score of each
objective when each direction is asked, on the 0-100 scale. All objectives are maximised.
"""

from collections.abc import Iterator
from typing import TypedDict

import moocore
import numpy as np

from dpa.core.directions import DirectionSpace
from dpa.core.records import SCALE

MOST_COORDINATES = 7
"""Exact hypervolume in more coordinates takes seconds, and intervals take a thousand of them."""
MOST_CONE_COORDINATES = 6
"""The same in coordinates of the cone: minutes with resampling (`edge_directions` says how many there are)."""

SURE = 0.975
"""Share of draws on one side of 0 from which on a difference is taken for more than chance."""


class Interval(TypedDict):
    """A measure and its 95% bootstrap interval; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


BOUNDS = {"kendall_tau": (-1.0, 1.0), "end_coverage": (-1.0, 1.0)}
"""What a measure can be, where it is bounded."""


# --- fronts --------------------------------------------------------------------------------------------------------


def pareto_front(points_NK: np.ndarray) -> np.ndarray:
    """front_N (bool): points that no other point dominates; of equal points the first; never one that is not finite."""
    finite_N = np.isfinite(points_NK).all(axis=1)
    front_N = np.zeros(len(points_NK), dtype=bool)
    if finite_N.any():
        front_N[finite_N] = moocore.is_nondominated(points_NK[finite_N], maximise=True)
    return front_N


def hypervolume(points_NK: np.ndarray, reference: float | np.ndarray) -> float:
    """Volume, in units of the scale to the power K, that the points dominate above the reference point.

    Exact (moocore; Fonseca et al. 2006). Points at or below the reference add nothing; rows not finite are left out.
    NaN for more than MOST_COORDINATES.
    """
    if points_NK.shape[1] > MOST_COORDINATES:
        return float("nan")
    points_NK = points_NK[np.isfinite(points_NK).all(axis=1)]
    if len(points_NK) == 0:
        return 0.0
    reference_K = np.broadcast_to(np.asarray(reference, dtype=np.float64), points_NK.shape[1:])
    return float(moocore.hypervolume(points_NK, ref=reference_K, maximise=True))


def cone_hypervolume(points_NK: np.ndarray, space: DirectionSpace, reference: float) -> float:
    """Hypervolume in what users of the cone value: utilities along the cone's extreme directions (our choice).

    "Less verbosity" is a wish too, and plain hypervolume, which only counts more of everything, cannot see the terse
    end of a front. So a point's coordinates are v . s for each edge direction v (`edge_directions`). The reference is
    the worst utility of any point of the box [reference, 100]^K. NaN for more than MOST_CONE_COORDINATES: for K > 4,
    and for K = 4 where the center is no objective's axis.
    """
    edges_EK = edge_directions(space)
    if len(edges_EK) > MOST_CONE_COORDINATES:
        return float("nan")
    worst_E = np.minimum(edges_EK * reference, edges_EK * SCALE[1]).sum(axis=1)
    return hypervolume(points_NK @ edges_EK.T, worst_E)


def edge_directions(space: DirectionSpace) -> np.ndarray:
    """edges_EK: the two ends of every arc: two for K = 2 (-max_angle and max_angle); for K > 2 it is 2 (K - 1), or 2 K
    where the center is no objective's axis."""
    return np.concatenate([space.arc(name, 2) for name in space.arc_names[-1 if space.K == 2 else 0 :]])


# --- does each direction get what it asks ----------------------------------------------------------------------------


def expected_utility(means_DK: np.ndarray, directions_DK: np.ndarray) -> float:
    """mean over the grid's directions v of v . s(v): what a user drawn from the grid gets."""
    return float(np.einsum("dk,dk->d", means_DK, directions_DK).mean())


def projection_regret(means_DK: np.ndarray, directions_DK: np.ndarray) -> np.ndarray:
    """regret_D: max over the grid's v' of v . s(v') minus v . s(v), never negative.

    What asking for another direction would have given in the one that was wanted; 0: asking is the best way to get.
    """
    utility_DD = directions_DK @ means_DK.T  # row: wanted, column: asked
    return utility_DD.max(axis=1) - np.diagonal(utility_DD)


def span(means_DK: np.ndarray) -> np.ndarray:
    """span_K: largest minus smallest mean of each objective over the grid."""
    return np.ptp(means_DK, axis=0)


def kendall_tau(asked_D: np.ndarray, achieved_D: np.ndarray) -> float:
    """Kendall's tau-b (scipy) of asked angle against achieved mean: 1 = in order; 0 = no relation, or no change."""
    if np.ptp(achieved_D) == 0 or np.ptp(asked_D) == 0:
        return 0.0
    from scipy.stats import kendalltau  # a second, which not every command pays

    return float(kendalltau(asked_D, achieved_D).statistic)


def end_coverage(asked_D: np.ndarray, achieved_D: np.ndarray) -> float:
    """Share of the arc's whole range of `achieved` that lies between what its two ends get.

    1: asking for the ends gives the ends; 0: the ends give the same; negative: they are swapped.
    """
    widest = np.ptp(achieved_D)
    if widest == 0:
        return 0.0
    return float((achieved_D[asked_D.argmax()] - achieved_D[asked_D.argmin()]) / widest)


def largest_jump(asked_D: np.ndarray, achieved_D: np.ndarray) -> float:
    """The largest difference of `achieved` between directions that are neighbours by their asked angle.

    What a user cannot ask for in between: an even walk over the arc's range would have range / (D - 1).
    """
    return float(np.abs(np.diff(achieved_D[np.argsort(asked_D)])).max(initial=0.0))


# --- all of them, with intervals -------------------------------------------------------------------------------------


def mean_over_prompts(scores_DPK: np.ndarray) -> np.ndarray:
    """means_DK over the prompts that have a score; NaN where none has."""
    known_DPK = np.isfinite(scores_DPK)
    with np.errstate(invalid="ignore"):  # 0 / 0: no prompt was scored
        return np.where(known_DPK, scores_DPK, 0.0).sum(axis=1) / known_DPK.sum(axis=1)


def bootstrap_means(scores_DPK: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """means_RDK of prompts drawn again with replacement; prompts without a score (NaN) do not count.

    The same seed draws the same prompts, so that two policies on the same prompts can be compared draw by draw.
    """
    D, P, K = scores_DPK.shape
    rng = np.random.default_rng(seed)
    known_PX = np.isfinite(scores_DPK).transpose(1, 0, 2).reshape(P, D * K)
    scores_PX = np.where(known_PX, scores_DPK.transpose(1, 0, 2).reshape(P, D * K), 0.0)
    means_RX = np.empty((resamples, D * K))
    rows = max(1, 4_000_000 // max(1, P))  # 32 MB of counts at a time
    for first in range(0, resamples, rows):
        counts_RP = rng.multinomial(P, np.full(P, 1.0 / P), size=min(rows, resamples - first)).astype(np.float64)
        with np.errstate(invalid="ignore"):  # 0 / 0: no scored prompt was drawn
            means_RX[first : first + rows] = (counts_RP @ scores_PX) / (counts_RP @ known_PX)
    # BLAS adds columns in different orders: without rounding, equal columns would come out unequal in the last bit.
    return means_RX.round(9).reshape(resamples, D, K)


def interval(value: float, draws_R: np.ndarray) -> Interval:
    """95% percentile interval of the draws around the value."""
    known = draws_R[np.isfinite(draws_R)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return Interval(value=finite_or_none(value), low=finite_or_none(low), high=finite_or_none(high))


def intervals_over_prompts(values_DPX: np.ndarray, resamples: int, seed: int) -> list[list[Interval]]:
    """Mean and 95% interval over prompts, for each direction and column."""
    means_DX = mean_over_prompts(values_DPX)
    draws_RDX = bootstrap_means(values_DPX, resamples, seed)
    D, X = means_DX.shape
    return [[interval(float(means_DX[d, x]), draws_RDX[:, d, x]) for x in range(X)] for d in range(D)]


def measure(
    scores_DPK: np.ndarray,
    space: DirectionSpace,
    directions_DK: np.ndarray,
    reference: float,
    resamples: int,
    seed: int,
) -> dict[str, Interval | dict[str, Interval]]:
    """Every measure of one policy with its interval over prompts.

    `scores_DPK`: mean score of each objective for each direction and prompt, NaN where nothing could be scored.
    Returns `hypervolume`, `cone_hypervolume`, `expected_utility`, `projection_regret` (mean over the grid),
    `projection_regret_max`, and per objective `span`; per objective with an arc of its own `kendall_tau`,
    `end_coverage` and `largest_jump`, over the directions of that arc. A maximum, so a span, jump or regret too, is
    biased upwards by noise.
    """
    values = dict(all_measures(mean_over_prompts(scores_DPK), space, directions_DK, reference))
    draws: dict[tuple[str, str | None], list[float]] = {key: [] for key in values}
    for means_DK in bootstrap_means(scores_DPK, resamples, seed):
        for key, value in all_measures(means_DK, space, directions_DK, reference):
            draws[key].append(value)
    intervals = {key: interval(value, np.array(draws[key])) for key, value in values.items()}
    result: dict[str, Interval | dict[str, Interval]] = {}
    for name, objective in intervals:
        if objective is None:
            result[name] = intervals[name, None]
        else:
            result[name] = {o: found for (n, o), found in intervals.items() if n == name and o is not None}
    return result


def all_measures(
    means_DK: np.ndarray, space: DirectionSpace, directions_DK: np.ndarray, reference: float
) -> Iterator[tuple[tuple[str, str | None], float]]:
    """((measure, objective or None), value) for each; NaN where a direction has no mean."""
    regret_D = projection_regret(means_DK, directions_DK)
    whole = np.isfinite(means_DK).all()  # a volume of the others would be too small, and look like one
    yield ("hypervolume", None), hypervolume(means_DK, reference) if whole else np.nan
    yield ("cone_hypervolume", None), cone_hypervolume(means_DK, space, reference) if whole else np.nan
    yield ("expected_utility", None), expected_utility(means_DK, directions_DK)
    yield ("projection_regret", None), float(regret_D.mean())
    yield ("projection_regret_max", None), float(regret_D.max())
    for name, width in zip(space.names, span(means_DK), strict=True):
        yield ("span", name), float(width)
    for name in space.arc_names:
        arc_D = space.on_arc(directions_DK, name)
        asked_D = space.asked_angle(directions_DK[arc_D], name)
        achieved_D = means_DK[arc_D, space.names.index(name)]
        yield ("kendall_tau", name), kendall_tau(asked_D, achieved_D)
        yield ("end_coverage", name), end_coverage(asked_D, achieved_D)
        yield ("largest_jump", name), largest_jump(asked_D, achieved_D)


def pairs_in_order(means_RD: np.ndarray, asked_D: np.ndarray) -> tuple[int, int, int]:
    """(in order, reversed, all): pairs of directions asked apart, and those of them whose means differ by more than
    chance, one above the other in 97.5% of the draws over prompts (`bootstrap_means`): as it was asked, or against
    it."""
    above_DD = np.mean(means_RD[:, None, :] > means_RD[:, :, None], axis=0)  # [d, e]: e above d
    apart_DD = np.subtract.outer(asked_D, asked_D) < 0
    sure_DD = above_DD > SURE
    return int((sure_DD & apart_DD).sum()), int((sure_DD.T & apart_DD).sum()), int(apart_DD.sum())


def finite_or_none(value: float) -> float | None:
    """The value as JSON may hold it: None where it is NaN or infinite."""
    return float(value) if np.isfinite(value) else None
