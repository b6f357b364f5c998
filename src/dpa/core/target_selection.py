"""Which candidate a target keeps, and which targets a pool can serve.
Run its tests: pytest tests/test_target_selection.py

Letters as in selection.py, and T targets of a prompt. `held_PTK` holds the values, NaN where an objective is free.
"""

from collections.abc import Sequence

import numpy as np

from dpa.core.directions import DirectionSpace
from dpa.core.records import SCALE
from dpa.core.selection import BLOCK, finite_columns, may_win
from dpa.core.targets import Held, draw_free, free_center
from dpa.core.utility import LINEAR

TOLERANCE = 5.0
"""Points of the scale within which a candidate counts as having the value that is held."""

SEVERAL = 0.25
"""Share of the drawn targets that hold more than one objective, where several can be held."""


def select_targets(
    scores_PNK: np.ndarray,
    weights_PTK: np.ndarray,
    held_PTK: np.ndarray,
    valid_PN: np.ndarray | None = None,
    weighed_PNK: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
    *,
    block: int = BLOCK,
) -> np.ndarray:
    """winners_PT (int64): of the candidates whose held scores are all within `tolerance` of their values the one with
    the largest utility of the free objectives; where none is, the one whose furthest held score is nearest.

    The utility is weights . `weighed_PNK` (default: the scores), distances are in points of `scores_PNK`. A row with
    NaN or an infinite score, or that is not valid, never wins; -1 where none may. Of equal ones the lowest index wins.
    """
    P, N, K = scores_PNK.shape
    T = held_PTK.shape[1]
    winners_PT = np.full((P, T), -1, dtype=np.int64)
    if N == 0:
        return winners_PT
    weighed_PNK = scores_PNK if weighed_PNK is None else weighed_PNK
    prompts = max(1, block // (N * max(1, T)))
    for first in range(0, P, prompts):
        rows = slice(first, first + prompts)
        may_win_PN = may_win(scores_PNK[rows], None if valid_PN is None else valid_PN[rows])
        scores_PKN = finite_columns(scores_PNK[rows], may_win_PN)
        apart_PTN = np.zeros((len(scores_PKN), T, N))
        for k in range(K):
            held_PT1 = held_PTK[rows, :, k, None]
            apart = np.abs(scores_PKN[:, None, k] - np.nan_to_num(held_PT1))
            np.maximum(apart_PTN, apart, out=apart_PTN, where=np.broadcast_to(np.isfinite(held_PT1), apart.shape))
        utility_PTN = LINEAR.of(finite_columns(weighed_PNK[rows], may_win_PN), weights_PTK[rows], may_win_PN)
        near_PTN = (apart_PTN <= tolerance) & may_win_PN[:, None]
        best_PT = np.where(near_PTN, utility_PTN, -np.inf).argmax(axis=2)
        nearest_PT = np.where(may_win_PN[:, None], apart_PTN, np.inf).argmin(axis=2)
        winners_PT[rows] = np.where(near_PTN.any(axis=2), best_PT, nearest_PT)
        winners_PT[rows][~may_win_PN.any(axis=1)] = -1
    return winners_PT


def can_be_held(space: DirectionSpace) -> list[tuple[int, ...]]:
    """Which objectives a target may hold together, as places: each that is not the center itself alone, then all of
    these together, wherever something of the center is left free."""
    each = [(space.names.index(name),) for name in space.arc_names]
    together = tuple(place for places in each for place in places)
    sets = [*each, together] if len(together) > 1 else each
    return [places for places in sets if free_center(space, _holding(places, space.K)) is not None]


def draw_targets(
    scores_NK: np.ndarray, count: int, space: DirectionSpace, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(weights_TK, held_TK) of `count` targets that a pool of N >= 1 scored candidates can serve.

    What is held goes round the objectives, from a random one on, and is more than one in a share SEVERAL. Values are
    uniform over the range the pool has, one in each of `count` equal parts of it, in random order. The free direction:
    `core.targets.draw_free`.
    """
    sets = can_be_held(space)
    alone = [places for places in sets if len(places) == 1] or sets
    several = [places for places in sets if len(places) > 1]
    part_T, start = rng.permutation(count), int(rng.integers(len(alone)))
    low_K, high_K = scores_NK.min(axis=0), scores_NK.max(axis=0)
    weights_TK, held_TK = np.empty((count, space.K)), np.full((count, space.K), np.nan)
    for t in range(count):
        places = list(alone[(start + t) % len(alone)])
        if several and rng.random() < SEVERAL:
            places = list(several[0])
            at = rng.random(len(places))  # parts of one range would tie the values to each other
        else:
            at = (part_T[t] + rng.random(1)) / count
        held_TK[t, places] = low_K[places] + at * (high_K[places] - low_K[places])
        weights_TK[t] = draw_free(space, _holding(places, space.K), rng)
    return weights_TK, held_TK


def serve_targets(
    scores_PNK: np.ndarray,
    weighed_PNK: np.ndarray,
    valid_PN: np.ndarray,
    directions_PDK: np.ndarray,
    winners_PD: np.ndarray,
    share: float,
    space: DirectionSpace,
    rngs: Sequence[np.random.Generator],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(directions_PDK, held_PDK, winners_PD): a share of each prompt's D winners, the last ones, become those of
    targets; the rows before them stay what they are. `held_PDK` is NaN throughout where a direction is left.

    A prompt has `share` x D targets, rounded up or down at random so that the share holds on average. Targets are drawn
    by the prompt's own generator (`draw_targets`) and keep `select_targets`'s winner, and then state the winner's own
    score, rounded to `target_step`, as the value: what a row says of its response is true.
    """
    P, D, K = directions_PDK.shape
    directions_PDK, winners_PD = directions_PDK.copy(), winners_PD.copy()
    asked_PDK = np.full((P, D, K), np.nan)
    for p, rng in enumerate(rngs):
        count = min(D, int(share * D + rng.random()))
        known_N = valid_PN[p] & np.isfinite(scores_PNK[p]).all(axis=1)
        if count and known_N.any():
            weights_TK, held_TK = draw_targets(scores_PNK[p, known_N], count, space, rng)
            directions_PDK[p, D - count :], asked_PDK[p, D - count :] = weights_TK, held_TK
    target_PD = np.isfinite(asked_PDK).any(axis=2)
    kept_PD = select_targets(scores_PNK, directions_PDK, asked_PDK, valid_PN, weighed_PNK)
    winners_PD[target_PD] = kept_PD[target_PD]
    own_PDK = np.take_along_axis(scores_PNK, np.maximum(winners_PD, 0)[..., None], axis=1)
    values_PDK = (own_PDK.clip(*SCALE) / space.target_step).round() * space.target_step
    return directions_PDK, np.where(np.isfinite(asked_PDK), values_PDK, np.nan), winners_PD


def _holding(places: Sequence[int], K: int) -> Held:
    """Some value at these places, None at the others."""
    return [0 if k in places else None for k in range(K)]
