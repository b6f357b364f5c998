"""What a candidate is worth under a direction, beside the other candidates of its pool: linear, along a ray, or by
its distance from the best there is.
Run its tests: pytest tests/test_selection.py
"""

from typing import Literal, NamedTuple

import numpy as np

from dpa.core.records import SCALE

Kind = Literal["linear", "ray", "chebyshev"]

NAMED = 1e-9
"""A weight of this size or less names no objective: an exact 0 that was normalised or turned."""

BEHIND = 5.0
"""Points by which a ray starts behind the worst of the scale. At the worst itself, an objective weighed ever so little
would rule out every candidate that has none of it; so it fades out with its weight."""


class Utility(NamedTuple):
    """u_PDN of candidates r_PNK under directions v_PDK, all of them larger for better.

    linear     v . r, as published (arXiv 2402.18571). The best candidate lies on the convex hull of the pool; where the
               front bends inwards two neighbouring directions jump over all that lies between.
    ray        min_k (r_k - c_k) / v_k, how far the candidate comes along the ray c + t v in every objective: the
               largest t with r >= c + t v in the signs of v (Pascoletti and Serafini, JOTA 42, 1984, for the cone of
               v's signs). c is the worst of the scale of rewards in the sign of each weight, moved BEHIND it, so that
               a direction means the same for every prompt (docs/findings.md: starting from a pool's own worst or
               mean is worse).
    chebyshev  -max_k |v_k| |z_k - r_k|, the weighted Chebyshev distance to the pool's ideal point z, its best value of
               each objective in the sign of its weight (Steuer and Choo, Mathematical Programming 26, 1983).

    Both reach every candidate that no other dominates, on the hull or not. To either `augmentation` . (v . r) is added,
    which tells candidates apart that are equal in their weakest objective: the winner is one that no candidate
    dominates in the signs of v. The larger it is, the more of the linear utility is mixed in.

    An objective of weight 0 matters to none of the three, one with a small weight little. `augmentation` does nothing
    to the linear one. `divisor`: what the scores on the scale were divided by, K numbers or one for all (ray only).
    """

    kind: Kind = "linear"
    augmentation: float = 0.01
    divisor: np.ndarray | float = 1.0

    def of(self, scores_PKN: np.ndarray, directions_PDK: np.ndarray, may_win_PN: np.ndarray) -> np.ndarray:
        """u_PDN; -inf where a candidate may not win. `scores_PKN` must be finite; `directions_PDK` may have P = 1.

        Every candidate is multiplied and added alone (einsum without BLAS), so neither its place nor its neighbours
        change a bit: identical rows have equal utilities.
        """
        if len(directions_PDK) == 1:
            utility_PDN = np.einsum("pkn,dk->pdn", scores_PKN, directions_PDK[0])
        else:
            utility_PDN = np.einsum("pkn,pdk->pdn", scores_PKN, directions_PDK)
        if self.kind != "linear":
            utility_PDN *= self.augmentation
            utility_PDN += self._weakest(scores_PKN, directions_PDK, may_win_PN)
        np.putmask(utility_PDN, np.broadcast_to(~may_win_PN[:, None], utility_PDN.shape), -np.inf)
        return utility_PDN

    def _weakest(self, scores_PKN: np.ndarray, directions_PDK: np.ndarray, may_win_PN: np.ndarray) -> np.ndarray:
        """min_k (slope_k r_k + shift_k) of each candidate: both scalarisations are of this form."""
        if self.kind == "ray":
            slope_PDK, shift_PDK = self._along_ray(directions_PDK)
        else:
            slope_PDK, shift_PDK = directions_PDK, -directions_PDK * _ideal(scores_PKN, directions_PDK, may_win_PN)
        weakest_PDN = slope_PDK[..., 0, None] * scores_PKN[:, None, 0]
        weakest_PDN += shift_PDK[..., 0, None]
        gain_PDN = np.empty_like(weakest_PDN)
        for k in range(1, scores_PKN.shape[1]):
            np.multiply(slope_PDK[..., k, None], scores_PKN[:, None, k], out=gain_PDN)
            gain_PDN += shift_PDK[..., k, None]
            np.minimum(weakest_PDN, gain_PDN, out=weakest_PDN)
        return weakest_PDN

    def _along_ray(self, directions_PDK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(slope_PDK, shift_PDK) of (r - c) / v; a shift of infinity where an objective is not named."""
        low_K, high_K = (end / self.divisor for end in (SCALE[0] - BEHIND, SCALE[1] + BEHIND))
        start_PDK = np.where(directions_PDK > 0, low_K, high_K)
        named_PDK = np.abs(directions_PDK) > NAMED
        slope_PDK = np.where(named_PDK, 1.0 / np.where(named_PDK, directions_PDK, 1.0), 0.0)
        return slope_PDK, np.where(named_PDK, -start_PDK * slope_PDK, np.inf)


def _ideal(scores_PKN: np.ndarray, directions_PDK: np.ndarray, may_win_PN: np.ndarray) -> np.ndarray:
    """z_PDK: the best of each pool in the sign of each weight; 0 where nobody may win."""
    ends = [
        end(scores_PKN, axis=2, where=may_win_PN[:, None], initial=beyond)[:, None]
        for end, beyond in ((np.max, -np.inf), (np.min, np.inf))
    ]
    best_PDK = np.where(directions_PDK > 0, *ends)
    return np.where(np.isfinite(best_PDK), best_PDK, 0.0)


LINEAR = Utility()
"""The paper's."""
