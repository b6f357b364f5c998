"""Which candidate a direction keeps: argmax of v . r over a prompt's pool.
Run its tests: pytest tests/test_selection.py
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

BLOCK = 4_000_000
"""Utilities held at a time (32 MB), so that memory stays bounded; it changes no winner."""


def select(
    scores_PNK: np.ndarray, directions: np.ndarray, valid_PN: np.ndarray | None = None, *, block: int = BLOCK
) -> np.ndarray:
    """winners_PD (int64): for each prompt and direction, the index n of the candidate with the largest v . r.

    All N candidates of a prompt form one pool, whatever direction they were made under, so one pool serves any
    direction (our choice; the paper, arXiv 2402.18571 algorithm 1, does not say whether it pools).

    `directions`: DK, the same for every prompt, or PDK. `valid_PN` marks rows that may win (pools of unequal size
    are padded with invalid rows). A row with NaN or an infinite score never wins; -1 where no row may. Of equal
    utilities the lowest index wins, and identical rows always have equal utilities: each is multiplied and added
    alone (einsum without BLAS), so neither position, padding nor blocks change a bit.
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
        may_win_PN = np.isfinite(scores_PNK[rows]).all(axis=2)
        if valid_PN is not None:
            may_win_PN &= valid_PN[rows]
        finite_PNK = np.where(may_win_PN[..., None], scores_PNK[rows], 0.0)
        finite_PKN = np.ascontiguousarray(finite_PNK.swapaxes(1, 2), dtype=np.float64)
        for start in range(0, D, columns):
            part = np.s_[start : start + columns]
            if directions.ndim == 2:
                utility_PDN = np.einsum("pkn,dk->pdn", finite_PKN, directions[part])
            else:
                utility_PDN = np.einsum("pkn,pdk->pdn", finite_PKN, directions[rows, part])
            np.putmask(utility_PDN, np.broadcast_to(~may_win_PN[:, None], utility_PDN.shape), -np.inf)
            winners_PD[rows, part] = utility_PDN.argmax(axis=2)
        winners_PD[rows][~may_win_PN.any(axis=1)] = -1
    return winners_PD


def select_per_direction(
    scores_PDNK: np.ndarray, directions_PDK: np.ndarray, valid_PDN: np.ndarray | None = None
) -> np.ndarray:
    """winners_PD: the best of the N samples made UNDER each direction, the literal reading of the paper's step 3.

    Same rules as `select`, with a pool for each (prompt, direction).
    """
    P, D, N, K = scores_PDNK.shape
    winners = select(
        scores_PDNK.reshape(P * D, N, K),
        directions_PDK.reshape(P * D, 1, K),
        None if valid_PDN is None else valid_PDN.reshape(P * D, N),
    )
    return winners.reshape(P, D)


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
) -> tuple[np.ndarray, np.ndarray]:
    """(winners_PD, losers_PD): for each prompt and direction the best candidate and one to prefer it to.

    The winner is `select`'s. The loser has a lower utility: the lowest of all ("worst"; of equal ones the lowest
    index), or one drawn uniformly from those below the winner ("random", by the prompt's own generator), or the winner
    of another direction of the prompt ("other_direction", see `pair_directions`). -1 in both where there is no loser.
    """
    winners_PD = select(scores_PNK, directions_PDK, valid_PN)
    if rejected == "other_direction":
        losers_PD = np.array(
            [
                pair_directions(scores_NK, winners_D, directions_DK, rng)
                for scores_NK, winners_D, directions_DK, rng in zip(
                    scores_PNK, winners_PD, directions_PDK, rngs, strict=True
                )
            ],
            dtype=np.int64,
        ).reshape(winners_PD.shape)
        return np.where(losers_PD >= 0, winners_PD, -1), losers_PD
    losers_PD = np.full_like(winners_PD, -1)
    known_PN = valid_PN & np.isfinite(scores_PNK).all(axis=2)
    scores_PKN = np.ascontiguousarray(np.where(known_PN[..., None], scores_PNK, 0.0).swapaxes(1, 2))
    for p, d in np.ndindex(winners_PD.shape):
        utility_N = np.einsum("kn,k->n", scores_PKN[p], directions_PDK[p, d])
        below = np.flatnonzero(known_PN[p] & (utility_N < utility_N[winners_PD[p, d]]))
        if winners_PD[p, d] < 0 or len(below) == 0:
            winners_PD[p, d] = -1
        elif rejected == "random":
            losers_PD[p, d] = rngs[p].choice(below)
        else:
            losers_PD[p, d] = below[utility_N[below].argmin()]
    return winners_PD, losers_PD


def pair_directions(
    scores_NK: np.ndarray, winners_D: np.ndarray, directions_DK: np.ndarray, rng: np.random.Generator
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
        gain_2K = (scores_NK[winners_D[d]] - scores_NK[winners_D[e]]) * np.array([[1.0], [-1.0]])
        if (np.einsum("dk,dk->d", gain_2K, directions_DK[[d, e]]) > 0).all():  # else a direction prefers neither
            losers_D[d], losers_D[e] = winners_D[e], winners_D[d]
    return losers_D


def standard_deviations(scores_NK: np.ndarray) -> np.ndarray:
    """scale_K: the standard deviation of each objective over the rows that are finite; 1 where it does not vary."""
    known_NK = scores_NK[np.isfinite(scores_NK).all(axis=1)]
    if len(known_NK) == 0:
        return np.ones(scores_NK.shape[1])
    scale_K = known_NK.std(axis=0)
    return np.where((np.ptp(known_NK, axis=0) > 0) & (scale_K > 0), scale_K, 1.0)
