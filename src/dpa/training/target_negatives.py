"""What a winner is contrasted with: directions that do not choose it; for a target's row, values that it does not have.
Run its tests: pytest tests/test_contrastive.py
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dpa.core.directions import DirectionSpace
from dpa.core.records import SCALE
from dpa.core.target_selection import TOLERANCE, can_be_held
from dpa.core.targets import Held, free_center
from dpa.storage.schemas import held_values, number_matrix
from dpa.training.contrastive import negative_directions


class Stated(NamedTuple):
    """What a prompt states: K weights, and the values of a target."""

    direction: Sequence[float]
    held: Held | None = None


def negatives(rows: pa.Table, space: DirectionSpace, count: int, seed: int) -> list[list[Stated]]:
    """For each row (select shard columns) up to `count` statements that are wrong of its response.

    A direction's row: `contrastive.negative_directions`. A target's: its numbers stated of other objectives, so that a
    policy has to read whose number it is, and other numbers stated of its own (mirrored on the scale); each further
    from the score that the response has than TOLERANCE and than rounding to `target_step` goes, drawn in random order.
    """
    found = [[Stated(direction) for direction in own] for own in negative_directions(rows, space, count, seed)]
    held_R = held_values(rows)
    if not any(held_R):
        return found
    rng = np.random.default_rng([seed, 0x7A26E7])
    scores_RK = number_matrix(rows, space.names)
    for row, (weights, held) in enumerate(zip(rows["direction"].to_pylist(), held_R, strict=True)):
        if held is not None:
            wrong = [values for values in _others(held, space) if _is_wrong(values, scores_RK[row], space.target_step)]
            drawn = rng.permutation(len(wrong))[:count]
            found[row] = [Stated(_free_weights(space, weights, wrong[place]), wrong[place]) for place in drawn]
    return found


def _free_weights(space: DirectionSpace, weights: Sequence[float], held: Held) -> Sequence[float]:
    """The row's own direction as far as `held` leaves it free; the center's rest where it leaves nothing."""
    free_K = np.where([value is None for value in held], weights, 0.0)
    if np.linalg.norm(free_K) > 1e-6:
        return space.direction(free_K).weights
    center_K = free_center(space, held)
    assert center_K is not None  # can_be_held
    return center_K.tolist()


def _others(held: Held, space: DirectionSpace) -> list[Held]:
    """The same numbers in other places that can be held, and other numbers in the same places."""
    numbers = [value for value in held if value is not None]
    places = tuple(k for k, value in enumerate(held) if value is not None)
    moved = [tuple(numbers[::-1])] if len(numbers) > 1 else []
    stated = [(places, values) for values in moved]
    stated += [(other, tuple(numbers)) for other in can_be_held(space) if len(other) == len(places) and other != places]
    stated.append((places, tuple(round(sum(SCALE)) - number for number in numbers)))
    return [tuple(dict(zip(at, values, strict=True)).get(k) for k in range(space.K)) for at, values in stated]


def _is_wrong(held: Held, scores_K: np.ndarray, step: int) -> bool:
    apart = [abs(score - value) for score, value in zip(scores_K, held, strict=True) if value is not None]
    return max(apart) > max(TOLERANCE, step / 2)
