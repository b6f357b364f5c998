"""A cone of directions on the unit sphere: drawing, turning and gridding around its center, as numbers without names.
Run its tests: pytest tests/test_directions.py
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpa.core.errors import DirectionError

OUTER = 0.8
"""Where the ends of a cone begin, as a share of its half-angle."""

SAME = 1e-9
"""Largest difference of a weight in directions that count as one."""


@dataclass(frozen=True, eq=False)
class Cone:
    """`center_K`: the unit axis. `poles_AK`: A >= 1 unit vectors orthogonal to it, where the arcs of objectives lead.

    Angles are degrees from the center. K = 2: positive ones lead towards the last pole.
    """

    center_K: np.ndarray
    poles_AK: np.ndarray

    def turn(self, degrees_D: np.ndarray, pole: np.ndarray) -> np.ndarray:
        """directions_DK: the center turned by each angle towards `pole` (K, or DK: one for each angle)."""
        radians_D = np.radians(degrees_D)
        turned_DK = np.cos(radians_D)[:, None] * self.center_K + np.sin(radians_D)[:, None] * pole
        turned_DK[np.abs(turned_DK) < 1e-15] = 0.0  # cos(90 degrees) is 6e-17 in floats
        return turned_DK

    def arc(self, pole_K: np.ndarray, angle: float, count: int) -> np.ndarray:
        """directions_DK at `count` evenly spaced angles -angle..angle towards a pole."""
        return self.turn(np.linspace(-angle, angle, count), pole_K)

    def angles(self, directions_DK: np.ndarray) -> np.ndarray:
        """Degrees in [0, 180] between each direction and the center."""
        along_D = directions_DK @ self.center_K
        across_D = np.linalg.norm(directions_DK - np.outer(along_D, self.center_K), axis=1)
        return np.degrees(np.arctan2(across_D, along_D))

    def edge(self, weights_K: np.ndarray, angle: float) -> np.ndarray:
        """The direction at `angle` on the great circle from the center through this one."""
        across_K = weights_K - (weights_K @ self.center_K) * self.center_K
        length = np.linalg.norm(across_K)
        # Straight behind the center every edge is as near; one is taken, always the same.
        pole_K = across_K / length if length > SAME else self.poles_AK[-1]
        return self.turn(np.array([angle]), pole_K)[0]

    def draw(self, count: int, rng: np.random.Generator, angle: float, ends: float, arcs: float) -> np.ndarray:
        """directions_DK drawn within `angle`, a share `ends` in its outer fifth, a share `arcs` on arcs of objectives;
        `DirectionSpace.sample` says how."""
        K = len(self.center_K)
        if K == 2:
            degrees_D = (2.0 * _stratified(count, rng) - 1.0) * angle
            return self.turn(_towards_ends(degrees_D, angle, ends, rng), self.poles_AK[-1])
        polar_D = _stratified(count, rng) * angle
        if K == 3:
            azimuth_D = 2.0 * np.pi * (_stratified(count, rng) + rng.random())
            first_K, second_K = _across(self.center_K)
            normal_DK = np.cos(azimuth_D)[:, None] * first_K + np.sin(azimuth_D)[:, None] * second_K
        else:
            normal_DK = rng.standard_normal((count, K))
            normal_DK -= np.outer(normal_DK @ self.center_K, self.center_K)
            normal_DK /= np.linalg.norm(normal_DK, axis=1, keepdims=True)
        if arcs > 0:  # else not a number more is drawn
            along_DA = normal_DK @ self.poles_AK.T
            nearest_D = np.abs(along_DA).argmax(axis=1)
            sign_D = np.sign(np.take_along_axis(along_DA, nearest_D[:, None], axis=1))
            moved_D = rng.random(count) < arcs
            normal_DK = np.where(moved_D[:, None], sign_D * self.poles_AK[nearest_D], normal_DK)
        return self.turn(_towards_ends(polar_D, angle, ends, rng), normal_DK)

    def grid(self, angle: float, count: int) -> np.ndarray:
        """directions_DK: the arc of `count` towards each pole, then the diagonals between every two at angle / 2 and
        angle, each once."""
        points = [row for pole_K in self.poles_AK for row in self.arc(pole_K, angle, count)]
        for i, first in enumerate(self.poles_AK):
            for second in self.poles_AK[i + 1 :]:
                for diagonal in (first + second, first - second, second - first, -first - second):
                    length = np.linalg.norm(diagonal)
                    if length > 1e-6:
                        points.extend(self.turn(np.array([angle / 2, angle]), diagonal / length))
        kept: list[np.ndarray] = []
        for point in points:
            if all(np.abs(point - other).max() > SAME for other in kept):
                kept.append(point)
        return np.array(kept)

    def around(self, weights_K: np.ndarray, angle: float, count: int) -> np.ndarray:
        """directions_DK: `count` on the circle `angle` degrees around one; K = 2: on both sides, up to `angle`."""
        first_K, *others = _across(weights_K)
        if len(weights_K) == 2:
            half = math.ceil(count / 2)
            steps = np.arange(1, half + 1) / half
            turns_D = np.concatenate([-steps, steps[: count - half]]) * math.radians(angle)
            pole_K = first_K if first_K @ self.poles_AK[-1] >= 0 else -first_K
            return np.cos(turns_D)[:, None] * weights_K + np.sin(turns_D)[:, None] * pole_K
        around_D = 2 * math.pi * np.arange(count) / max(count, 1)
        circle_DK = np.cos(around_D)[:, None] * first_K + np.sin(around_D)[:, None] * others[0]
        return math.cos(math.radians(angle)) * weights_K + math.sin(math.radians(angle)) * circle_DK


def unit(weights: Sequence[float], where: str) -> tuple[float, ...]:
    """Normalise: w / (sum of w*w)**0.5.

    Added up by hand in the objectives' order: a chat template repeats these float operations bit for bit, while
    Python's own `sum` is compensated from 3.12 on.
    """
    squares = 0.0
    for weight in weights:
        squares += weight * weight
    if all(weight == 0 for weight in weights):
        raise DirectionError(f"{where}: all weights are zero; give at least one objective a weight.")
    if not 1e-200 < squares < 1e200:  # beyond this, squares lose digits, vanish or overflow
        raise DirectionError(f"{where}: the weights are too large or too small; scale them to about 1.")
    norm = squares**0.5
    return tuple(weight / norm for weight in weights)


def _towards_ends(degrees_D: np.ndarray, angle: float, share: float, rng: np.random.Generator) -> np.ndarray:
    """A share of the angles replaced by ones of the same sign in the outer fifth."""
    if share == 0:
        return degrees_D  # and not a number more is drawn
    moved_D = rng.random(len(degrees_D)) < share
    outer_D = rng.uniform(OUTER * angle, angle, len(degrees_D))
    return np.where(moved_D, np.copysign(outer_D, degrees_D), degrees_D)


def _stratified(count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` uniform numbers in [0, 1), one in each of `count` equal parts, in random order."""
    return (rng.permutation(count) + rng.random(count)) / max(count, 1)


def _across(axis_K: np.ndarray) -> list[np.ndarray]:
    """One or two unit vectors orthogonal to the axis and to each other, the same on every machine: Gram-Schmidt on the
    coordinate axes, those least along `axis_K` first."""
    basis = [axis_K]
    for k in np.argsort(np.abs(axis_K), kind="stable")[: min(2, len(axis_K) - 1)]:
        across_K = np.eye(len(axis_K))[k]
        for known_K in basis:
            across_K = across_K - (across_K @ known_K) * known_K
        basis.append(across_K / np.linalg.norm(across_K))
    return basis[1:]
