"""Which candidate a direction keeps: the best of a prompt's pool by its utility, v . r unless another is asked for.
Run its tests: pytest tests/test_selection.py
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from dpa.core.utility import LINEAR, Utility

if TYPE_CHECKING:  # `dpa.select` needs no pydantic
    from dpa.core.sections.selection import SelectionConfig

BLOCK = 250_000
"""Utilities held at a time: 2 MB, which a core's cache holds. It changes no winner."""


def select(
    scores_PNK: np.ndarray,
    directions: np.ndarray,
    valid_PN: np.ndarray | None = None,
    utility: Utility = LINEAR,
    *,
    block: int = BLOCK,
) -> np.ndarray:
    """winners_PD (int64): for each prompt and direction, the index n of the candidate with the largest utility.

    All N candidates of a prompt form one pool, whatever direction they were made under, so one pool serves any
    direction (our choice; the paper, arXiv 2402.18571 algorithm 1, does not say whether it pools).

    `directions`: DK, the same for every prompt, or PDK. `valid_PN` marks rows that may win (pools of unequal size
    are padded with invalid rows). A row with NaN or an infinite score never wins; -1 where no row may. Of equal
    utilities the lowest index wins; neither position, padding nor blocks change a bit.
    """
    P, N, K = scores_PNK.shape
    if directions.shape[-1] != K or directions.ndim not in (2, 3) or (directions.ndim == 3 and len(directions) != P):
        raise ValueError(f"directions of shape {directions.shape} for scores of shape {scores_PNK.shape}")
    if not np.isfinite(directions).all():
        raise ValueError("directions must be finite")
    D = directions.shape[-2]
    winners_PD = np.full((P, D), -1, dtype=np.int64)
    if N == 0:
        return winners_PD
    prompts = max(1, block // (N * max(1, D)))
    columns = max(1, block // N)
    for first in range(0, P, prompts):
        rows = slice(first, first + prompts)
        may_win_PN = may_win(scores_PNK[rows], None if valid_PN is None else valid_PN[rows])
        scores_PKN = finite_columns(scores_PNK[rows], may_win_PN)
        for start in range(0, D, columns):
            part = np.s_[start : start + columns]
            directions_PDK = directions[None, part] if directions.ndim == 2 else directions[rows, part]
            winners_PD[rows, part] = utility.of(scores_PKN, directions_PDK, may_win_PN).argmax(axis=2)
        winners_PD[rows][~may_win_PN.any(axis=1)] = -1
    return winners_PD


def select_best_mean(
    scores_PDNK: np.ndarray, directions_PEK: np.ndarray, valid_PDN: np.ndarray, utility: Utility = LINEAR
) -> tuple[np.ndarray, np.ndarray]:
    """(winners_PE, advantage_PE): for each of E directions the best of the N samples made under whichever of the D
    asked directions did best for it on average, as a place among the prompt's D * N candidates (ours).

    Where a reward is hit or miss, one of many short answers hits, and a direction that would get more from long answers
    keeps the lucky short one of the whole pool, time and again. A mean over N samples is less a matter of luck.

    The advantage is that best mean minus the mean over all asked directions: how much it matters under which of them
    an answer is made, the luck of N samples included, in the units of `utility`. Same rules as `select`: only valid
    samples count, -1 (advantage 0) where there is none, the first of equal ones wins.
    """
    P, D, N, K = scores_PDNK.shape
    pool_PNK, valid_PN = scores_PDNK.reshape(P, D * N, K), valid_PDN.reshape(P, D * N)
    may_win_PN = may_win(pool_PNK, valid_PN)
    utility_PEN = utility.of(finite_columns(pool_PNK, may_win_PN), directions_PEK, may_win_PN)
    utility_PEDN = utility_PEN.reshape(P, directions_PEK.shape[1], D, N)
    may_win_PDN = may_win_PN.reshape(P, D, N)
    counted_PD = may_win_PDN.sum(axis=2)
    total_PED = np.where(may_win_PDN[:, None], utility_PEDN, 0.0).sum(axis=3)
    mean_PED = total_PED / np.maximum(counted_PD, 1)[:, None]
    some_PD = counted_PD > 0
    ranked_PED = np.where(some_PD[:, None], mean_PED, -np.inf)
    best_PE = ranked_PED.argmax(axis=2)
    of_best_PEN = np.take_along_axis(utility_PEDN, best_PE[..., None, None], axis=2)[:, :, 0]
    winners_PE = np.where(some_PD.any(axis=1)[:, None], best_PE * N + of_best_PEN.argmax(axis=2), -1)
    over_all_PE = mean_PED.sum(axis=2) / np.maximum(some_PD.sum(axis=1), 1)[:, None]  # 0 where nothing was counted
    return winners_PE, np.where(winners_PE >= 0, ranked_PED.max(axis=2) - over_all_PE, 0.0)


def of_largest_advantage(advantage_R: np.ndarray, cell_R: np.ndarray, share: float) -> np.ndarray:
    """kept_R: of the rows of each cell the `share`, rounded up, with the largest advantage; of equal ones the first.
    None of cell -1."""
    kept_R = np.zeros(len(advantage_R), dtype=bool)
    for cell in np.unique(cell_R[cell_R >= 0]):
        rows = np.flatnonzero(cell_R == cell)
        order = np.argsort(-advantage_R[rows], kind="stable")
        kept_R[rows[order[: math.ceil(share * len(rows))]]] = True
    return kept_R


def select_random(valid_PN: np.ndarray, directions: int, rng: np.random.Generator) -> np.ndarray:
    """winners_PD: a valid candidate drawn uniformly for each of D directions, -1 where none is: the control."""
    count_P = valid_PN.sum(axis=1)
    draw_PD = np.floor(rng.random((len(valid_PN), directions)) * count_P[:, None]).astype(np.int64)
    valid_first_PN = np.argsort(~valid_PN, axis=1, kind="stable")
    if valid_PN.shape[1] == 0:
        return np.full(draw_PD.shape, -1, dtype=np.int64)
    return np.where(count_P[:, None] > 0, np.take_along_axis(valid_first_PN, draw_PD, axis=1), -1)


def select_pairs(
    scores_PNK: np.ndarray,
    directions_PDK: np.ndarray,
    valid_PN: np.ndarray,
    rejected: Literal["worst", "random", "other_direction"] = "worst",
    rngs: Sequence[np.random.Generator] = (),
    utility: Utility = LINEAR,
) -> tuple[np.ndarray, np.ndarray]:
    """(winners_PD, losers_PD): for each prompt and direction the best candidate and one to prefer it to.

    The winner is `select`'s. The loser has a lower utility: the lowest of all ("worst"; of equal ones the lowest
    index), or one drawn uniformly from those below the winner ("random", by the prompt's own generator), or the winner
    of another direction of the prompt ("other_direction", see `pair_directions`). -1 in both where there is no loser.
    """
    winners_PD = select(scores_PNK, directions_PDK, valid_PN, utility)
    losers_PD = np.full_like(winners_PD, -1)
    may_win_PN = may_win(scores_PNK, valid_PN)
    scores_PKN = finite_columns(scores_PNK, may_win_PN)
    for p in range(len(winners_PD)):
        one = np.s_[p : p + 1]
        utility_DN = utility.of(scores_PKN[one], directions_PDK[one], may_win_PN[one])[0]
        if rejected == "other_direction":
            losers_PD[p] = pair_directions(scores_PNK[p], winners_PD[p], utility_DN, rngs[p])
            continue
        for d, winner in enumerate(winners_PD[p]):
            below = np.flatnonzero(may_win_PN[p] & (utility_DN[d] < utility_DN[d, winner]))
            if winner >= 0 and len(below):
                worst = below[utility_DN[d, below].argmin()]
                losers_PD[p, d] = rngs[p].choice(below) if rejected == "random" else worst
    return np.where(losers_PD >= 0, winners_PD, -1), losers_PD


def pair_directions(
    scores_NK: np.ndarray, winners_D: np.ndarray, utility_DN: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """losers_D: for each direction of one prompt the winner of another direction, -1 where none is left for it.

    Directions are put together in twos whose winners differ, as many as can be (from the two winners with the most
    directions left, at random within them). Each of the two rejects the other's winner, so a pool holds every pair of
    responses as often in one order as in the other: neither response is better in itself, only the direction tells
    them apart. Directions of equal winners beyond that have no loser: a dominant answer says nothing of directions.
    """
    losers_D = np.full(len(winners_D), -1, dtype=np.int64)
    left: dict[tuple[float, ...], list[int]] = {}  # responses of equal scores are as good as one
    for d in rng.permutation(len(winners_D)):
        if winners_D[d] >= 0:
            left.setdefault(tuple(scores_NK[winners_D[d]]), []).append(int(d))
    while len(groups := sorted((group for group in left.values() if group), key=len, reverse=True)) > 1:
        d, e = groups[0].pop(), groups[1].pop()
        of_d, of_e = winners_D[d], winners_D[e]
        if utility_DN[d, of_d] > utility_DN[d, of_e] and utility_DN[e, of_e] > utility_DN[e, of_d]:
            losers_D[d], losers_D[e] = of_e, of_d  # else a direction prefers neither
    return losers_D


def may_win(scores_PNK: np.ndarray, valid_PN: np.ndarray | None) -> np.ndarray:
    """may_win_PN: valid rows whose scores are all finite."""
    known_PN = np.isfinite(scores_PNK).all(axis=2)
    return known_PN if valid_PN is None else known_PN & valid_PN


def finite_columns(scores_PNK: np.ndarray, may_win_PN: np.ndarray) -> np.ndarray:
    """scores_PKN, 0 where a candidate may not win."""
    finite_PNK = np.where(may_win_PN[..., None], scores_PNK, 0.0)
    return np.ascontiguousarray(finite_PNK.swapaxes(1, 2), dtype=np.float64)


def standard_deviations(scores_NK: np.ndarray) -> np.ndarray:
    """scale_K: the standard deviation of each objective over the rows that are finite; 1 where it does not vary."""
    known_NK = scores_NK[np.isfinite(scores_NK).all(axis=1)]
    if len(known_NK) == 0:
        return np.ones(scores_NK.shape[1])
    scale_K = known_NK.std(axis=0)
    return np.where((np.ptp(known_NK, axis=0) > 0) & (scale_K > 0), scale_K, 1.0)


def scale_of(scores_RK: np.ndarray, config: "SelectionConfig") -> np.ndarray:
    """scale_K that `selection.standardise` divides by, over all rows of an iteration; ones where nothing is
    standardised."""
    return standard_deviations(scores_RK) if config.standardise else np.ones(scores_RK.shape[1])
