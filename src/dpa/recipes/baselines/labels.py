"""What SteerLM and Rewards-in-Context share: scores written into the prompt, and which scores to ask for.
Run its tests: pytest tests/test_baselines.py -k label

Which ones: those of a rule (`asking`), or of all candidates those whose answers are best under v (`asking_best`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dpa.core.directions import DirectionSpace
from dpa.core.records import Messages, SampleRequest, messages_text, places_of
from dpa.core.sentences import Placement
from dpa.models.chat_template import with_sentence
from dpa.recipes.baselines.lab import Lab
from dpa.recipes.baselines.trying import TRIED, answers_to_try, best_tried
from dpa.storage.schemas import ANSWERS, WINNERS

LOWEST, HIGHEST = 0.02, 0.98
"""Quantiles of the scores seen in training that count as the least and the most that can be asked for."""

WISHED, ALWAYS_WISHED = (0.0, 0.25, 0.5, 0.75, 1.0), (0.6, 0.8, 1.0)
"""Shares of the way from the least to the most at which candidates stand, for an objective of which less may be wished
and for one of which more always is."""
LATTICE = 10_000
"""Combinations that are written down at most."""

Write = Callable[[np.ndarray], str]
"""Writes scores_K as the label the policy reads."""
Translate = Callable[[SampleRequest], SampleRequest]


class Labelled(NamedTuple):
    """A policy that reads labels, how they are written, and the scores_RK it was trained under."""

    policy: Path
    write: Write
    scores_RK: np.ndarray


def labelled(rows: pa.Table, scores_RK: np.ndarray, write: Write, placement: Placement) -> pa.Table:
    """Rows (columns of ANSWERS) that state what each response scored, where a direction would stand, and no direction.

    A row without a score is left out.
    """
    known = np.flatnonzero(np.isfinite(scores_RK).all(axis=1))
    kept = rows.select(ANSWERS.names).take(pa.array(known))
    messages = [
        messages_text(with_label(json.loads(text), write(scores_K), placement))
        for text, scores_K in zip(kept["messages"].to_pylist(), scores_RK[known], strict=True)
    ]
    place, field = ANSWERS.get_field_index("messages"), WINNERS.field("direction")
    kept = kept.set_column(place, ANSWERS.field(place), pa.array(messages, pa.string()))
    return kept.add_column(place + 1, field, pa.nulls(len(kept), field.type))


def with_label(messages: Messages, label: str, placement: Placement) -> Messages:
    """The messages with a label where a policy of this `placement` reads its direction."""
    return with_sentence(messages, label, placement, system_role=True)


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


def asking(space: DirectionSpace, scores_RK: np.ndarray, write: Write) -> Translate:
    """Translate a request's direction into a label that asks for its targets."""
    return asking_for(target_rule(scores_RK, space), write, space.placement)


def asking_for(targets: Callable[[Sequence[float]], np.ndarray], write: Write, placement: Placement) -> Translate:
    """Translate a request's direction into a label that asks for `targets` of it."""

    def translate(request: SampleRequest) -> SampleRequest:
        assert request.direction is not None
        text = write(targets(request.direction))
        return replace(request, direction=None, messages=with_label(request.messages, text, placement))

    return translate


def candidate_targets(
    scores_RK: np.ndarray, space: DirectionSpace, write: Write, seed: int, most: int = TRIED
) -> np.ndarray:
    """targets_LK that are labels apart: combinations of a few values of each objective, `most` of them, or all; of more
    than LATTICE combinations (seven objectives) as many drawn at random."""
    least_K, most_K = np.nanquantile(scores_RK, [LOWEST, HIGHEST], axis=0)
    lowest_K, _ = weight_range(space)
    steps, rng = [ALWAYS_WISHED if lowest > 0 else WISHED for lowest in lowest_K], np.random.default_rng(seed)
    if prod(map(len, steps)) <= LATTICE:
        shares_LK = np.array(list(product(*steps)))
    else:
        shares_LK = np.stack([rng.choice(own, LATTICE) for own in steps], axis=1)
    targets_LK = least_K + shares_LK * (most_K - least_K)
    targets_LK = targets_LK[[places[0] for places in places_of(map(write, targets_LK)).values()]]
    if len(targets_LK) <= most:
        return targets_LK
    return targets_LK[np.sort(rng.choice(len(targets_LK), most, replace=False))]


def asking_best(lab: Lab, t: int, labelled: Labelled) -> Translate:
    """Translate a direction v into the label whose answers the reward model scores highest: argmax_l v . mean r(y_l).

    They are tried as iteration t of `lab` (`trying.best_tried`).
    """
    most = min(TRIED, answers_to_try(lab))
    write, placement = labelled.write, lab.space.placement
    targets_LK = candidate_targets(labelled.scores_RK, lab.space, write, lab.config.seed, most)
    translate = asking_for(np.asarray, write, placement)
    ask = partial(lab.sampler, labelled.policy, measuring=True, translate=translate)
    best = best_tried(lab, t, ask, targets_LK)  # in the column `direction` stand the scores that were asked for
    return asking_for(lambda direction: np.array(best(direction)), write, placement)
