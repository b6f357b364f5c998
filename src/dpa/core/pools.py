"""Candidates grouped by their prompts, and what each direction would keep of every group.
Run its tests: pytest tests/test_pools.py
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpa.core.records import places_of
from dpa.core.selection import select
from dpa.core.utility import LINEAR, Utility


class Pools(NamedTuple):
    """The candidates of some prompts, padded to the largest pool of these.

    `row_PN` is the row of each (-1: padding), `weighed_PNK` its scores over the scale.
    """

    prompt_ids: list[str]
    row_PN: np.ndarray
    scores_PNK: np.ndarray
    weighed_PNK: np.ndarray
    valid_PN: np.ndarray


def pools_of(prompt_ids: list[str], scores_RK: np.ndarray, scale_K: np.ndarray) -> list[Pools]:
    """Rows grouped by prompt, prompts and rows in the order in which they first appear; a row is NaN or valid.

    Only pools between the same powers of two are put together: one large pool must not pad all others to its size.
    """
    rows = places_of(prompt_ids)
    groups: dict[int, list[str]] = {}
    for prompt_id, members in rows.items():
        groups.setdefault((len(members) - 1).bit_length(), []).append(prompt_id)
    found = []
    for own in groups.values():
        row_PN = np.full((len(own), max(len(rows[prompt_id]) for prompt_id in own)), -1)
        for p, prompt_id in enumerate(own):
            row_PN[p, : len(rows[prompt_id])] = rows[prompt_id]
        scores_PNK = scores_RK[row_PN]
        valid_PN = np.isfinite(scores_PNK).all(axis=2) & (row_PN >= 0)
        found.append(Pools(own, row_PN, scores_PNK, scores_PNK / scale_K, valid_PN))
    return found


def best_of_pools(
    groups: Sequence[Pools], directions_DK: np.ndarray, utility: Utility = LINEAR
) -> tuple[np.ndarray, np.ndarray]:
    """scores_DPK of what each direction keeps of each pool, and different_P: how many candidates that are, 1 where one
    is the best in every direction. Pools without a valid candidate are left out."""
    scores, different = [], []
    for pools in groups:
        winners_PD = select(pools.weighed_PNK, directions_DK, pools.valid_PN, utility)
        some_P = pools.valid_PN.any(axis=1)
        winners_PD = winners_PD[some_P]
        scores.append(np.take_along_axis(pools.scores_PNK[some_P], winners_PD[..., None], axis=1))
        ordered_PD = np.sort(winners_PD, axis=1)
        different.append(1 + (np.diff(ordered_PD, axis=1) > 0).sum(axis=1))
    empty = np.zeros((0, *directions_DK.shape))
    return np.concatenate([empty, *scores]).swapaxes(0, 1), np.concatenate([np.zeros(0, dtype=np.int64), *different])
