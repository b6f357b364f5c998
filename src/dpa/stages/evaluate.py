"""Measure one policy on held-out prompts: what each direction of the grid got, and whether the policy listens at all.
Run its tests: pytest tests/test_evaluate.py

Sampling and scoring are the ordinary stages rollout and score; this one only reads their finished tables.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dpa.core.comparison import main_objective
from dpa.core.directions import DirectionSpace
from dpa.core.errors import DataError
from dpa.core.measures import (
    Interval,
    bootstrap_means,
    edge_directions,
    finite_or_none,
    intervals_over_prompts,
    mean_over_prompts,
    measure,
    pairs_in_order,
    pareto_front,
)
from dpa.core.records import Messages
from dpa.core.sections.evaluate import EvaluateConfig
from dpa.core.target_measures import control_errors, target_grid
from dpa.storage.schemas import held_values, score_matrix

LISTENS_AT = 0.5
"""A policy listens when Kendall's tau of asked angle against achieved mean reaches this for at least one objective (and
its interval lies above 0), or does so where every difference within chance counts as none."""

EVALUATION = ("objectives", "arcs", "prompts", "answers", "unscored", "directions", "measures", "listens")
"""Fields of what `evaluate` finds."""


def evaluate(
    rollout: pa.Table,
    scores: Mapping[str, pa.Table],
    space: DirectionSpace,
    config: EvaluateConfig,
    seed: int,
) -> dict[str, Any]:
    """The JSON-able record of one policy.

    `rollout`: every answer, in the columns of a rollout shard, its directions those of `space.grid(config.directions)`.
    `scores`: by name of the reward ("model", and "gold" where a true reward is known) a table in the columns of a
    score shard, in the rows' order. Rows that are not valid count as missing.

    The record:
      objectives, arcs   names of the K objectives, and of those that have an arc of their own
      prompts, answers   counts;  unscored: reward -> answers without a score
      directions         one per grid point: direction (text), weights, angles {arc: asked degrees} for the arcs it lies
                         on, words and tokens {value, low, high}, objectives {reward: {name: {value, low, high}}} and
                         front {reward: whether no other grid point is as good under every wish of the cone}
      measures           reward -> core.measures.measure(...)
      listens            verdict, by (the reward it rests on), threshold, tau {arc: value}, sentence
      targets            where the policy knows targets: `evaluate_targets`, added by recipes.run

    Raises DataError when no answer is left, or when the tables do not belong together.
    """
    if rollout.num_rows == 0:
        raise DataError("evaluate: no answers were sampled; look at the rejects of the rollout stage.")
    grid_DK = space.grid(config.directions)
    cell_N = _cells(rollout, grid_DK)
    scores_by_reward = _objectives_by_reward(scores, rollout, space)
    responses, tokens = rollout["response"].to_pylist(), rollout["tokens"].to_numpy()
    words_N = np.array([len(response.split()) for response in responses], dtype=np.float64)
    D, P = len(grid_DK), int(cell_N[1].max()) + 1

    def per_prompt(values_NX: np.ndarray) -> np.ndarray:
        return _mean_in_cells(values_NX, cell_N, D, P)

    lengths_DX = intervals_over_prompts(per_prompt(np.stack([words_N, tokens], axis=1)), config.resamples, seed)
    directions: list[dict[str, Any]] = [
        {
            "direction": str(space.direction(weights_K)),
            "weights": weights_K.tolist(),
            "angles": space.asked_angles(weights_K),
            "words": words,
            "tokens": token_count,
            "objectives": {},
            "front": {},
        }
        for weights_K, (words, token_count) in zip(grid_DK, lengths_DX, strict=True)
    ]
    measures = {}
    for reward, scores_NK in scores_by_reward.items():
        scores_DPK = per_prompt(scores_NK)
        measures[reward] = measure(scores_DPK, space, grid_DK, config.reference, config.resamples, seed)
        intervals_DK = intervals_over_prompts(scores_DPK, config.resamples, seed)
        front_D = pareto_front(mean_over_prompts(scores_DPK) @ edge_directions(space).T)
        for record, intervals_K, on_front in zip(directions, intervals_DK, front_D, strict=True):
            record["objectives"][reward] = dict(zip(space.names, intervals_K, strict=True))
            record["front"][reward] = bool(on_front)
    by = deciding_reward(measures)
    pairs = _pairs(bootstrap_means(per_prompt(scores_by_reward[by]), config.resamples, seed), space, grid_DK)
    return {
        "objectives": list(space.names),
        "arcs": list(space.arc_names),
        "prompts": P,
        "answers": rollout.num_rows,
        "unscored": {name: int((~np.isfinite(s).all(axis=1)).sum()) for name, s in scores_by_reward.items()},
        "directions": directions,
        "measures": measures,
        "listens": verdict(by, measures[by], pairs),
    }


def evaluate_targets(
    rollout: pa.Table,
    scores: Mapping[str, pa.Table],
    space: DirectionSpace,
    config: EvaluateConfig,
    seed: int,
) -> dict[str, Any]:
    """What a policy makes of the targets of `core.target_measures.target_grid`; tables as in `evaluate`, with `held`.

    targets   one per target: target (text), objective (the held one), asked, words {value, low, high}, objectives
              {reward: {name: {value, low, high}}} and error {reward: {value, low, high}}, the median absolute error
              of its answers
    errors    reward -> objective -> core.target_measures.control_errors over its targets
    """
    grid = target_grid(space)
    place = {(target.weights, target.held): t for t, target in enumerate(grid)}
    asked = zip(rollout["direction"].to_pylist(), held_values(rollout), strict=True)
    prompts: dict[str, int] = {}
    at_N = [prompts.setdefault(prompt_id, len(prompts)) for prompt_id in rollout["prompt_id"].to_pylist()]
    cell = [place[tuple(weights), tuple(held or ())] for weights, held in asked], at_N, rollout["k"].to_pylist()
    shape = len(grid), len(prompts), max(cell[2], default=-1) + 1

    def in_cells(values_NX: np.ndarray) -> np.ndarray:
        found = np.full((*shape, values_NX.shape[1]), np.nan)
        found[cell] = values_NX
        return found

    def means(values_TPSX: np.ndarray) -> list[list[Interval]]:
        T, P, S, X = values_TPSX.shape
        means_TPX = mean_over_prompts(values_TPSX.reshape(T * P, S, X)).reshape(T, P, X)
        return intervals_over_prompts(means_TPX, config.resamples, seed)

    words_N1 = np.array([[len(response.split())] for response in rollout["response"].to_pylist()], dtype=np.float64)
    records: list[dict[str, Any]] = [
        {
            "target": str(target),
            "objective": next(iter(target.values)),
            "asked": next(iter(target.values.values())),
            "words": words,
            "objectives": {},
            "error": {},
        }
        for target, (words,) in zip(grid, means(in_cells(words_N1)), strict=True)
    ]
    names_T = [record["objective"] for record in records]
    asked_T = np.array([record["asked"] for record in records], dtype=np.float64)
    errors: dict[str, dict[str, Any]] = {}
    for reward, scores_NK in _objectives_by_reward(scores, rollout, space).items():
        scores_TPSK = in_cells(scores_NK)
        for t, (record, intervals_K) in enumerate(zip(records, means(scores_TPSK), strict=True)):
            record["objectives"][reward] = dict(zip(space.names, intervals_K, strict=True))
            own_1PS, asked_1 = scores_TPSK[t : t + 1, ..., space.names.index(names_T[t])], asked_T[t : t + 1]
            record["error"][reward] = control_errors(asked_1, own_1PS, config.resamples, seed)["per_response"]
        errors[reward] = {}
        for name in dict.fromkeys(names_T):
            own_T = np.array([other == name for other in names_T])
            achieved_TPS = scores_TPSK[own_T][..., space.names.index(name)]
            errors[reward][name] = control_errors(asked_T[own_T], achieved_TPS, config.resamples, seed)
    return {"targets": records, "errors": errors}


def scores_by_prompt(
    rollout: pa.Table,
    scores: Mapping[str, pa.Table],
    space: DirectionSpace,
    grid_DK: np.ndarray,
    prompt_ids: Sequence[str],
) -> dict[str, np.ndarray]:
    """reward -> scores_DPK, prompts in the order of `prompt_ids`, NaN where a prompt has no answer or no score.

    For whoever compares policies on the same prompts, draw by draw (core.comparison). Tables as in `evaluate`.
    """
    cell_N = _cells(rollout, grid_DK)
    place = {prompt_id: p for p, prompt_id in enumerate(prompt_ids)}
    cell_N[1] = [place[prompt_id] for prompt_id in rollout["prompt_id"].to_pylist()]
    return {
        reward: _mean_in_cells(scores_NK, cell_N, len(grid_DK), len(prompt_ids))
        for reward, scores_NK in _objectives_by_reward(scores, rollout, space).items()
    }


def verdict(by: str, measures: Mapping[str, Any], pairs: Mapping[str, tuple[int, int, int]]) -> dict[str, Any]:
    """Does the policy listen, by the measures of the reward that decides? A reversed order is not listening.

    `pairs`: arc -> core.measures.pairs_in_order. Directions that rightly get the same answer are in an order of chance,
    which says nothing of those that do not.
    """
    tau = {arc: found["value"] for arc, found in measures["kendall_tau"].items()}
    listed = ", ".join(f"{arc} {'unknown' if value is None else format(value, '.2f')}" for arc, value in tau.items())
    sure = {arc: found for arc, found in pairs.items() if found[0] - found[1] >= LISTENS_AT * max(1, found[2])}
    reached = [arc for arc, value in tau.items() if value is not None and value >= LISTENS_AT]
    in_order = any((measures["kendall_tau"][arc]["low"] or 0) > 0 for arc in reached)
    if in_order:
        sentence = f"The policy follows its direction (Kendall tau of asked against achieved: {listed})."
    elif sure:
        counts = ", ".join(
            f"{arc} {right} of {all_of_them} pairs of directions in order, {wrong} reversed"
            for arc, (right, wrong, all_of_them) in sure.items()
        )
        sentence = (
            f"The policy follows its direction where its answers differ by more than chance ({counts}), and answers "
            f"other directions alike (Kendall tau of asked against achieved: {listed})."
        )
    elif reached:
        sentence = (
            f"THE POLICY MAY NOT FOLLOW ITS DIRECTION: Kendall tau of asked against achieved is {listed}, which may be "
            "chance, for its interval reaches 0; measure it on more prompts (evaluate.prompts)."
        )
    else:
        sentence = (
            f"THE POLICY DOES NOT FOLLOW ITS DIRECTION: Kendall tau of asked against achieved is {listed}, "
            f"below {LISTENS_AT} for every objective; its front says nothing about steering."
        )
    listens = in_order or bool(sure)
    return {"verdict": listens, "by": by, "threshold": LISTENS_AT, "tau": tau, "sentence": sentence}


def _pairs(means_RDK: np.ndarray, space: DirectionSpace, grid_DK: np.ndarray) -> dict[str, tuple[int, int, int]]:
    """Arc -> `pairs_in_order` of the directions on it, by the objective it leads to."""
    found = {}
    for arc in space.arc_names:
        arc_D = space.on_arc(grid_DK, arc)
        means_RD = means_RDK[:, arc_D, space.names.index(arc)]
        found[arc] = pairs_in_order(means_RD, space.asked_angle(grid_DK[arc_D], arc))
    return found


def side_by_side(
    rollout: pa.Table,
    scores: Mapping[str, pa.Table],
    prompts: Mapping[str, Messages],
    space: DirectionSpace,
    config: EvaluateConfig,
    count: int = 4,
) -> list[dict[str, Any]]:
    """The first `count` prompts (in the order they were asked) under the center and the ends of every arc.

    Chosen by position, never by how well they came out. Each: prompt_id, prompt (the last user turn), answers: a list
    of direction, angles, response, words, tokens, objectives {reward: {name: score or None}}.
    """
    asked = _FirstAnswers(rollout, scores, space, space.grid(config.directions))
    shown = _showcase(asked.grid_DK, space)
    return [asked.question(p, shown, prompts) for p in range(min(count, len(asked.prompt_ids)))]


def typical_question(
    rollout: pa.Table,
    scores: Mapping[str, pa.Table],
    prompts: Mapping[str, Messages],
    space: DirectionSpace,
    config: EvaluateConfig,
) -> dict[str, Any] | None:
    """The question that shows what a direction does to one answer, neither the best nor the worst of them.

    Along the arc whose ends differ most on average, every prompt has a difference: its answer's score in the arc's
    objective at the high end minus that at the low end, by the gold reward where there is one. The prompt with the
    median difference (of two the lower, of equal ones the first) is it, under the low end, the center and the high
    end. As in `side_by_side`, and beside it: arc, by (the reward), difference, questions (how many were in question).
    None where no prompt has a scored answer at both ends and an answer at the center.
    """
    asked = _FirstAnswers(rollout, scores, space, space.grid(config.directions))
    by = deciding_reward(scores)
    center = int(space.angle_to_center(asked.grid_DK).argmin())
    found: tuple[float, str, list[int], dict[int, float]] | None = None
    for arc in space.arc_names:
        if arc == main_objective(space):
            continue
        low, high = _ends(asked.grid_DK, space, arc)
        score_N = asked.scores[by][:, space.names.index(arc)]
        complete = [p for p in range(len(asked.prompt_ids)) if all((d, p) in asked.row for d in (low, center, high))]
        differences = {p: float(score_N[asked.row[high, p]] - score_N[asked.row[low, p]]) for p in complete}
        differences = {p: difference for p, difference in differences.items() if np.isfinite(difference)}
        if differences:
            apart = abs(sum(differences.values()) / len(differences))
            if found is None or apart > found[0]:
                found = apart, arc, list(dict.fromkeys([low, center, high])), differences
    if found is None:
        return None
    _, arc, shown, differences = found
    chosen = sorted(differences, key=lambda p: (differences[p], p))[(len(differences) - 1) // 2]
    about = {"arc": arc, "by": by, "difference": differences[chosen], "questions": len(differences)}
    return {**asked.question(chosen, shown, prompts), **about}


def deciding_reward(rewards: Mapping[str, Any]) -> str:
    """The name of the reward that verdicts rest on: the gold one where there is one."""
    return "gold" if "gold" in rewards else next(iter(rewards))


class _FirstAnswers:
    """The first answer to each prompt under each direction of the grid."""

    def __init__(
        self, rollout: pa.Table, scores: Mapping[str, pa.Table], space: DirectionSpace, grid_DK: np.ndarray
    ) -> None:
        self.space, self.grid_DK = space, grid_DK
        self.scores = _objectives_by_reward(scores, rollout, space)
        self.responses, self.tokens = rollout["response"].to_pylist(), rollout["tokens"].to_pylist()
        prompt_ids = rollout["prompt_id"].to_pylist()
        self.prompt_ids = list(dict.fromkeys(prompt_ids))
        self.row: dict[tuple[int, int], int] = {}
        """(direction of the grid, prompt in order of appearance) -> row of the rollout."""
        for row, (d, p) in enumerate(_cells(rollout, grid_DK).T.tolist()):
            self.row.setdefault((d, p), row)

    def question(self, p: int, directions: Sequence[int], prompts: Mapping[str, Messages]) -> dict[str, Any]:
        """The prompt and its answers under these directions, those that there are."""
        prompt_id = self.prompt_ids[p]
        answers = [self._answer(d, self.row[d, p]) for d in directions if (d, p) in self.row]
        return {"prompt_id": prompt_id, "prompt": prompts[prompt_id][-1]["content"], "answers": answers}

    def _answer(self, d: int, row: int) -> dict[str, Any]:
        return {
            "direction": str(self.space.direction(self.grid_DK[d])),
            "angles": self.space.asked_angles(self.grid_DK[d]),
            "response": self.responses[row],
            "words": len(self.responses[row].split()),
            "tokens": self.tokens[row],
            "objectives": {
                reward: {
                    name: finite_or_none(score) for name, score in zip(self.space.names, scores_NK[row], strict=True)
                }
                for reward, scores_NK in self.scores.items()
            },
        }


def _showcase(grid_DK: np.ndarray, space: DirectionSpace) -> list[int]:
    """Grid points to show side by side: the low ends of the arcs, the center, the high ends."""
    ends = [_ends(grid_DK, space, arc) for arc in (space.arc_names[-1:] if space.K == 2 else space.arc_names)]
    center = int(space.angle_to_center(grid_DK).argmin())
    return list(dict.fromkeys([low for low, _ in ends] + [center] + [high for _, high in ends]))


def _ends(grid_DK: np.ndarray, space: DirectionSpace, arc: str) -> tuple[int, int]:
    """Grid points at the low and the high end of an arc."""
    rows = np.flatnonzero(space.on_arc(grid_DK, arc))
    asked = space.asked_angle(grid_DK[rows], arc)
    return int(rows[asked.argmin()]), int(rows[asked.argmax()])


def _cells(rollout: pa.Table, grid_DK: np.ndarray) -> np.ndarray:
    """(2, N): index of each row's direction in the grid, and of its prompt in order of appearance."""
    directions_NK = np.array(rollout["direction"].to_pylist(), dtype=np.float64)
    if directions_NK.shape[1:] != grid_DK.shape[1:]:
        raise DataError(
            f"evaluate: answers were sampled under directions of {directions_NK.shape[-1]} weights but the space has "
            f"{grid_DK.shape[1]}; sample them again."
        )
    distance_ND = np.abs(directions_NK[:, None] - grid_DK[None]).max(axis=2)
    if distance_ND.min(axis=1).max() > 1e-6:
        raise DataError("evaluate: some answers were sampled under a direction that is not in the grid; sample again.")
    place: dict[str, int] = {}
    prompt_N = [place.setdefault(prompt_id, len(place)) for prompt_id in rollout["prompt_id"].to_pylist()]
    return np.stack([distance_ND.argmin(axis=1), np.array(prompt_N)])


def _objectives_by_reward(
    scores: Mapping[str, pa.Table], rollout: pa.Table, space: DirectionSpace
) -> dict[str, np.ndarray]:
    """reward -> scores_NK in the rollout's order; NaN where not valid. Of a reward but the gold one a column that has
    the name of an objective is an attribute still, to be weighed like any other."""
    found = {}
    for reward, table in scores.items():
        if table["candidate_id"].to_pylist() != rollout["candidate_id"].to_pylist():
            raise DataError("evaluate: the scores belong to other answers than the rollout; score again.")
        scores_NM, attributes = score_matrix(table)
        if reward == "gold" and set(attributes) == set(space.names):  # it scores the objectives themselves
            found[reward] = scores_NM[:, [attributes.index(name) for name in space.names]]
        else:
            found[reward] = space.combine(scores_NM, attributes)
    return found


def _mean_in_cells(values_NX: np.ndarray, cell_N: np.ndarray, D: int, P: int) -> np.ndarray:
    """means_DPX of the rows of each (direction, prompt); NaN where there is none, or none with a score."""
    known_NX = np.isfinite(values_NX)
    total_DPX = np.zeros((D, P, values_NX.shape[1]))
    count_DPX = np.zeros_like(total_DPX)
    np.add.at(total_DPX, tuple(cell_N), np.where(known_NX, values_NX, 0.0))
    np.add.at(count_DPX, tuple(cell_N), known_NX)
    return np.divide(total_DPX, count_DPX, out=np.full_like(total_DPX, np.nan), where=count_DPX > 0)
