"""What SteerLM and Rewards-in-Context share: scores written into the prompt, and which scores to ask for.
Run its tests: pytest tests/test_baselines.py -k labels
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from dpa.core.directions import DirectionSpace
from dpa.core.records import SampleRequest, messages_text
from dpa.recipes.baselines.asking import with_system
from dpa.storage.schemas import ANSWERS, WINNERS

LOWEST, HIGHEST = 0.02, 0.98
"""Quantiles of the scores seen in training that count as the least and the most that can be asked for."""

Write = Callable[[np.ndarray], str]
"""Writes scores_K as the label the policy reads."""


def labelled(rows: pa.Table, scores_RK: np.ndarray, write: Write) -> pa.Table:
    """Rows (columns of ANSWERS) that state what each response scored, and no direction.

    A row without a score is left out.
    """
    known = np.flatnonzero(np.isfinite(scores_RK).all(axis=1))
    kept = rows.select(ANSWERS.names).take(pa.array(known))
    messages = [
        messages_text(with_system(json.loads(text), write(scores_K)))
        for text, scores_K in zip(kept["messages"].to_pylist(), scores_RK[known], strict=True)
    ]
    place, field = ANSWERS.get_field_index("messages"), WINNERS.field("direction")
    kept = kept.set_column(place, ANSWERS.field(place), pa.array(messages, pa.string()))
    return kept.add_column(place + 1, field, pa.nulls(len(kept), field.type))


def target_rule(scores_RK: np.ndarray, space: DirectionSpace) -> Callable[[Sequence[float]], np.ndarray]:
    """A function that gives the scores_K to ask for under a direction, from those seen in training.

    The objective with the largest weight is asked for at its most; every other lies between its least and its most as
    its weight lies between the least and the most that the cone allows: the piecewise-linear rule of Rewards-in-Context
    (its `linf`, arXiv 2402.10207 section 3.4), carried over to signed weights (our choice).
    """
    least_K, most_K = np.nanquantile(scores_RK, [LOWEST, HIGHEST], axis=0)
    lowest_K, highest_K = weight_range(space)

    def targets(direction: Sequence[float]) -> np.ndarray:
        weight_K = np.asarray(direction, dtype=float)
        share_K = np.clip((weight_K - lowest_K) / np.maximum(highest_K - lowest_K, 1e-9), 0, 1)
        share_K[weight_K >= weight_K.max() - 1e-9] = 1.0
        return least_K + share_K * (most_K - least_K)

    return targets


def weight_range(space: DirectionSpace) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest weight of each objective over the cone: cos(angle to the axis -+ max_angle), +-1 at most."""
    angle_K = np.degrees(np.arccos(np.clip(space.center_K, -1, 1)))
    nearest_K = np.maximum(angle_K - space.max_angle, 0)
    farthest_K = np.minimum(angle_K + space.max_angle, 180)
    return np.cos(np.radians(farthest_K)), np.cos(np.radians(nearest_K))


def asking(space: DirectionSpace, scores_RK: np.ndarray, write: Write) -> Callable[[SampleRequest], SampleRequest]:
    """Translate a request's direction into a label that asks for its targets."""
    targets = target_rule(scores_RK, space)

    def translate(request: SampleRequest) -> SampleRequest:
        assert request.direction is not None
        text = write(targets(request.direction))
        return replace(request, direction=None, messages=with_system(request.messages, text))

    return translate
