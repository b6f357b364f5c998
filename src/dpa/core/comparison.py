"""Comparing fronts: what one policy gives at the verbosity of another, with intervals over seeds and prompts.
Run its tests: pytest tests/test_comparison.py

Letters: S seeds, R bootstrap draws, D directions along an arc in the order they are asked, X places on the axis that
is held equal. A front is the path through the D mean points (x, y), here (verbosity, helpfulness).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from dpa.core.directions import DirectionSpace
from dpa.core.measures import Interval, interval

PLACES = 21
"""Evenly spaced places of the shared range at which two fronts are compared."""


def main_objective(space: DirectionSpace) -> str:
    """The objective nearest the center of the cone: the one that fronts are drawn and compared in."""
    return space.names[int(abs(space.center_K).argmax())]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a method says of itself to a comparison and its report.

    name         how a configuration and a results folder call it
    title        how people do
    color        on light and on dark pages
    kind         subject: what the others are compared with; variant: a variant of it, or a control; other: not ours
    point        it knows no direction: one point instead of a front
    bar          points by which the subject's front is to be above it wherever both are; 0: simply above; None: no bar
    saves_on     the method of whose generated tokens it is to need at most a third for the same hypervolume
    spends_less  it may spend less than the budget
    by_default   compared where a configuration names no methods
    """

    name: str
    title: str
    color: tuple[str, str]
    kind: Literal["subject", "variant", "other"] = "other"
    point: bool = False
    bar: float | None = None
    saves_on: str | None = None
    spends_less: bool = False
    by_default: bool = True


class Front(NamedTuple):
    """Where each direction of an arc lands: means and bootstrap draws of both coordinates, for every seed.

    Draw r of a seed must be of the same prompts for every front that is compared (core.measures.bootstrap_means), and
    of the same prompts in every seed where all seeds ask the same ones (`same_prompts`).
    """

    x_SD: np.ndarray
    y_SD: np.ndarray
    x_SRD: np.ndarray
    y_SRD: np.ndarray
    same_prompts: bool = False

    def as_point(self) -> "Front":
        """The mean over the arc: for a policy that is told no direction, whose arc is noise around one point."""
        x_SD, y_SD, x_SRD, y_SRD = (values.mean(axis=-1, keepdims=True) for values in self[:4])
        return Front(x_SD, y_SD, x_SRD, y_SRD, self.same_prompts)


class Lead(NamedTuple):
    """How far one front is above another where both have points.

    `at_X` are the places compared; `lead_X` the difference there, averaged over seeds; `least` the smallest of them, at
    `least_at`; `mean` their average. No places: the fronts share no range in every seed.
    """

    at_X: np.ndarray
    lead_X: list[Interval]
    least: Interval | None
    least_at: float | None
    mean: Interval | None


def heights(x_ND: np.ndarray, y_ND: np.ndarray, at_NX: np.ndarray) -> np.ndarray:
    """height_NX: the y of N paths at the places x, by linear interpolation between neighbours; NaN off the path.

    Where a path passes a place more than once (a policy that overshoots), the highest passage counts: a user would ask
    for that one. A path of one point has a height everywhere, its own y: it is compared at its own x.
    """
    if x_ND.shape[-1] == 1:
        return np.broadcast_to(y_ND, np.broadcast_shapes(y_ND.shape, at_NX.shape)).astype(float)
    x0, x1 = x_ND[..., None, :-1], x_ND[..., None, 1:]
    y0, y1 = y_ND[..., None, :-1], y_ND[..., None, 1:]
    at = at_NX[..., None]
    width = x1 - x0
    share = np.divide(at - x0, width, out=np.zeros(np.broadcast_shapes(at.shape, width.shape)), where=width != 0)
    inside = (at >= np.minimum(x0, x1)) & (at <= np.maximum(x0, x1))
    y = np.where(width == 0, np.maximum(y0, y1), y0 + share * (y1 - y0))
    best = np.where(inside, y, -np.inf).max(axis=-1)
    return np.where(np.isfinite(best), best, np.nan)


def lead(ours: Front, theirs: Front) -> Lead:
    """How far `ours` is above `theirs` at equal x.

    Fronts are compared at PLACES evenly spaced places of the range that both cover in every seed. A front of one point
    is compared where it stands, in each seed and each draw.
    """
    if theirs.x_SD.shape[1] == 1:
        at_X = np.array([theirs.x_SD.mean()])
        lead_SX = heights(ours.x_SD, ours.y_SD, theirs.x_SD) - theirs.y_SD
        draws_SRX = heights(ours.x_SRD, ours.y_SRD, theirs.x_SRD) - theirs.y_SRD
    else:
        low = max(front.x_SD.min(axis=1).max() for front in (ours, theirs))
        high = min(front.x_SD.max(axis=1).min() for front in (ours, theirs))
        at_X = np.linspace(low, high, PLACES) if low < high else np.empty(0)
        lead_SX = heights(ours.x_SD, ours.y_SD, at_X[None]) - heights(theirs.x_SD, theirs.y_SD, at_X[None])
        draws_SRX = heights(ours.x_SRD, ours.y_SRD, at_X[None, None]) - heights(
            theirs.x_SRD, theirs.y_SRD, at_X[None, None]
        )
    if not len(at_X) or np.isnan(lead_SX).any():
        return Lead(np.empty(0), [], None, None, None)
    same = ours.same_prompts
    lead_X = [over_seeds(lead_SX[:, x], draws_SRX[:, :, x], same_prompts=same) for x in range(len(at_X))]
    least = int(lead_SX.mean(axis=0).argmin())
    with np.errstate(invalid="ignore"):
        known_SR = np.isfinite(draws_SRX).sum(axis=2)
        mean_SR = np.where(known_SR > 0, np.nansum(draws_SRX, axis=2) / np.maximum(known_SR, 1), np.nan)
    mean = over_seeds(lead_SX.mean(axis=1), mean_SR, same_prompts=same)
    return Lead(at_X, lead_X, lead_X[least], float(at_X[least]), mean)


def height_at(front: Front, x: float) -> Interval | None:
    """The front's y at one x, averaged over seeds; None where it does not reach that x in every seed."""
    at = np.array([x])
    value_S = heights(front.x_SD, front.y_SD, at[None])[:, 0]
    if np.isnan(value_S).any():
        return None
    draws_SR = heights(front.x_SRD, front.y_SRD, at[None, None])[:, :, 0]
    return over_seeds(value_S, draws_SR, same_prompts=front.same_prompts)


def over_seeds(
    value_S: np.ndarray,
    draws_SR: np.ndarray,
    seed: int = 0,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    *,
    same_prompts: bool = False,
) -> Interval:
    """Mean over seeds and its 95% interval over seeds and prompts.

    Two levels: each draw takes S seeds with replacement, and of each of them a draw of prompts. With few seeds such
    draws vary by a factor sqrt((S - 1) / S) too little, so they are widened by its inverse about the mean, though
    not beyond `bounds`, what the quantity can be. One seed: over prompts alone.

    `same_prompts`: all seeds ask the same ones, draw r is of the same prompts in each. Then more seeds make prompts no
    more certain: a draw's prompts are those of every seed it takes, and only what seeds differ in is widened.
    """
    value_S, draws_SR = np.asarray(value_S, dtype=float), np.asarray(draws_SR, dtype=float)
    S, R = draws_SR.shape
    value = float(value_S.mean())
    if S == 1:
        return interval(value, draws_SR[0])
    seeds_RS = np.random.default_rng(seed).integers(S, size=(R, S))
    widened = np.sqrt(S / (S - 1))
    if same_prompts:
        by_seed_R = value_S[seeds_RS].mean(axis=1)
        by_prompt_R = draws_SR[seeds_RS, np.arange(R)[:, None]].mean(axis=1) - by_seed_R
        return interval(value, np.clip(value + widened * (by_seed_R - value) + by_prompt_R, *bounds))
    rows_RS = (np.arange(R)[:, None] + np.arange(S) * (R // S)) % R  # the same seed twice: other prompts
    means_R = draws_SR[seeds_RS, rows_RS].mean(axis=1)
    return interval(value, np.clip(value + widened * (means_R - value), *bounds))
