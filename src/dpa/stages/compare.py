"""What a comparison found: fronts, leads at equal verbosity, measures and costs, over seeds; and which claims hold.
Run its tests: pytest tests/test_comparison.py
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from dpa.core.compare_config import UNTRAINED, CompareConfig, Method
from dpa.core.comparison import Front, height_at, lead, over_seeds
from dpa.core.config import EvaluateConfig
from dpa.core.directions import DirectionSpace
from dpa.core.measures import all_measures, bootstrap_means, mean_over_prompts

SUBJECT: Method = "pooled"
"""The method the others are compared with."""

TITLES: dict[Method, str] = {
    "pooled": "DPA, pooled",
    "pooled_third": "DPA, pooled, a third of the samples",
    "per_direction": "DPA, literal",
    "online_dpo": "online DPO by direction",
    "random_candidate": "random candidate",
    "scalar_rsf": "scalar RSF",
    "sft": "SFT",
    "dpo": "DPO",
    "steerlm": "SteerLM",
    "ric": "Rewards-in-Context",
    "soups": "Rewarded Soups",
    "demonstrations": "SFT on demonstrations",
    "prompted": "start policy, told a length",
    "best_of_start": "start policy, best of n",
}
POINTS: tuple[Method, ...] = ("sft", "dpo", "scalar_rsf", "demonstrations")
"""Methods that know no direction: one point instead of a front."""

BARS: dict[Method, float] = {
    "steerlm": 2.0,
    "ric": 2.0,
    "sft": 2.0,
    "dpo": 2.0,
    "scalar_rsf": 2.0,
    "soups": 0.0,
    "demonstrations": 0.0,
    "prompted": 0.0,
    "best_of_start": 0.0,
}
"""Points by which the subject's front is to be above a method's, wherever both are; 0: simply above."""

SMALL_BUDGET: tuple[Method, ...] = ("pooled_third",)
"""Saves on generation, and may spend less for it."""

Scores = Mapping[tuple[Method, str], Sequence[Mapping[str, np.ndarray]]]
"""(method, policy) -> for each seed, reward -> scores_DPK."""


def summarise(
    found: Mapping[Method, Sequence[Mapping[str, Any]]],
    scores: Scores,
    space: DirectionSpace,
    settings: EvaluateConfig,
    config: CompareConfig,
) -> dict[str, Any]:
    """The numbers of the report, all of it JSON; every interval is over seeds and prompts.

    upward, arcs   the objective that fronts are compared in, and those held equal
    policies       one per (method, policy): method, title, name, last, point, words,
                   fronts {reward: {arc: [{angle, direction, x, y}]}}, measures {name: interval, or {objective: ..}},
                   utility {reward: interval}
    equal          {arc: {"at": [x], "rows": {title: [interval or null]}}}, by the best reward
    leads          {arc: [{method, title, bar, least, least_at, mean, low, high, share, holds, sentence}]}
    rises          [{from, to, arc, least, mean, hypervolume}] of the subject's iterations
    thrift         the pooled loop at a third of the samples against the literal one; null where one is missing
    costs          [{method, title, generated, training, total, of_budget, scored, wall_s, equal}]
    claims         [{holds, sentence}], the first thing to read
    """
    grid_DK = space.grid(settings.directions)
    reward = "gold" if settings.gold else "model"
    upward = space.names[int(abs(space.center_K).argmax())]
    arcs = [arc for arc in space.arc_names if arc != upward]
    data = {
        key: _Policy(by_seed, space, grid_DK, config.resamples, settings.reference, reward)
        for key, by_seed in scores.items()
    }
    last = {method: (method, [p for m, p in scores if m == method][-1]) for method in found}
    policies = [data[key].record(key, last[key[0]] == key, found[key[0]], upward, arcs) for key in scores]
    fronts = {
        (key, arc): data[key].front(arc, upward, reward, point=key[0] in POINTS) for key in scores for arc in arcs
    }
    leads, rises, equal = {}, [], {}
    if SUBJECT in last:
        for arc in arcs:
            ours = fronts[last[SUBJECT], arc]
            leads[arc] = [
                _lead(method, ours, fronts[last[method], arc], arc, upward) for method in last if method != SUBJECT
            ]
            equal[arc] = _equal(ours, {TITLES[m]: fronts[last[m], arc] for m in last if m not in POINTS})
        names = [policy for method, policy in scores if method == SUBJECT]
        rises = [
            _rise(before, after, data[SUBJECT, before], data[SUBJECT, after], arcs[0], upward, reward)
            for before, after in pairwise(names)
        ]
    costs = [_cost(method, found[method], config) for method in found]
    thrift = _thrift(data, last, found)
    return {
        "upward": upward,
        "arcs": arcs,
        "reward": reward,
        "policies": policies,
        "equal": equal,
        "leads": leads,
        "rises": rises,
        "thrift": thrift,
        "costs": costs,
        "claims": _claims(leads, rises, thrift, costs, arcs, upward, config),
    }


class _Policy:
    """One policy over the seeds: means and draws, and what follows from them."""

    def __init__(
        self,
        by_seed: Sequence[Mapping[str, np.ndarray]],
        space: DirectionSpace,
        grid_DK: np.ndarray,
        resamples: int,
        reference: float,
        reward: str,
    ) -> None:
        self.space, self.grid_DK = space, grid_DK
        self.means = {name: np.stack([mean_over_prompts(one[name]) for one in by_seed]) for name in by_seed[0]}
        self.draws = {
            name: np.stack([bootstrap_means(one[name], resamples, seed) for seed, one in enumerate(by_seed)])
            for name in by_seed[0]
        }
        each = [dict(all_measures(means_DK, space, grid_DK, reference)) for means_DK in self.means[reward]]
        self.values = {key: np.array([one[key] for one in each]) for key in each[0]}
        drawn = [
            [dict(all_measures(means_DK, space, grid_DK, reference)) for means_DK in draws_RDK]
            for draws_RDK in self.draws[reward]
        ]
        self.drawn = {key: np.array([[one[key] for one in seed] for seed in drawn]) for key in each[0]}

    def front(self, arc: str, upward: str, reward: str, point: bool = False) -> Front:
        """The path of the arc's directions, in the order they are asked."""
        rows = self._rows(arc)
        x, y = self.space.names.index(arc), self.space.names.index(upward)
        means_SDK, draws_SRDK = self.means[reward][:, rows], self.draws[reward][:, :, rows]
        front = Front(means_SDK[..., x], means_SDK[..., y], draws_SRDK[..., x], draws_SRDK[..., y])
        return front.as_point() if point else front

    def measure(self, key: tuple[str, str | None]) -> tuple[np.ndarray, np.ndarray]:
        """(values_S, draws_SR) of a measure."""
        return self.values[key], self.drawn[key]

    def record(
        self,
        key: tuple[Method, str],
        is_last: bool,
        found: Sequence[Mapping[str, Any]],
        upward: str,
        arcs: Sequence[str],
    ) -> dict[str, Any]:
        """What the report shows of it."""
        method, name = key
        measures: dict[str, Any] = {}
        for (measure, objective), value_S in self.values.items():
            interval = over_seeds(value_S, self.drawn[measure, objective])
            if objective is None:
                measures[measure] = interval
            else:
                measures.setdefault(measure, {})[objective] = interval
        evaluations = [next(p["evaluation"] for p in one["policies"] if p["name"] == name) for one in found]
        words_SD = np.array([[d["words"]["value"] for d in evaluation["directions"]] for evaluation in evaluations])
        return {
            "method": method,
            "title": TITLES[method],
            "name": name,
            "last": is_last,
            "point": method in POINTS,
            "words": [float(words_SD.mean(axis=0).min()), float(words_SD.mean(axis=0).max())],
            "fronts": {
                reward: {arc: self._points(arc, upward, reward, method in POINTS) for arc in arcs}
                for reward in self.means
            },
            "measures": measures,
            "utility": {
                reward: over_seeds(self._utility(self.means[reward]), self._utility(self.draws[reward]))
                for reward in self.means
            },
        }

    def _points(self, arc: str, upward: str, reward: str, point: bool) -> list[dict[str, Any]]:
        front, rows = self.front(arc, upward, reward, point), self._rows(arc)
        angles = self.space.asked_angle(self.grid_DK[rows], arc)
        return [
            {
                "angle": None if point else round(float(angles[d]), 6) + 0.0,
                "direction": None if point else str(self.space.direction(self.grid_DK[rows[d]])),
                "x": over_seeds(front.x_SD[:, d], front.x_SRD[:, :, d]),
                "y": over_seeds(front.y_SD[:, d], front.y_SRD[:, :, d]),
            }
            for d in range(front.x_SD.shape[1])
        ]

    def _rows(self, arc: str) -> np.ndarray:
        rows = np.flatnonzero(self.space.on_arc(self.grid_DK, arc))
        return rows[np.argsort(self.space.asked_angle(self.grid_DK[rows], arc))]

    def _utility(self, means: np.ndarray) -> np.ndarray:
        return np.einsum("...dk,dk->...d", means, self.grid_DK).mean(axis=-1)


def _lead(method: Method, ours: Front, theirs: Front, arc: str, upward: str) -> dict[str, Any]:
    found, bar = lead(ours, theirs), BARS.get(method)
    title, us = TITLES[method], TITLES[SUBJECT]
    about: dict[str, Any] = {"method": method, "title": title, "bar": bar, "holds": None}
    point = theirs.x_SD.shape[1] == 1
    if found.least is None or found.mean is None:
        where = f"its {arc} ({theirs.x_SD.mean():.0f})" if point else f"any {arc} in every seed"
        sentence = f"{us} and {title} cannot be compared: they do not share {where}."
        return {**about, "least": None, "least_at": None, "mean": None, "low": None, "high": None, "sentence": sentence}
    least, mean, low, high = found.least, found.mean, float(found.at_X[0]), float(found.at_X[-1])
    wanted = bar or 0.0
    assert least["value"] is not None
    above = least["value"] >= wanted if wanted else least["value"] > 0
    sure = least["low"] is not None and least["low"] > 0
    where = f"at its {arc} of {low:.0f}" if point else f"at every shared {arc} ({low:.0f} to {high:.0f})"
    by = f" by {wanted:g} points or more" if wanted else ""
    average = "" if point else f"; {_said(mean)} on average"
    if above:
        doubt = "" if sure else ", but the interval includes none"
        sentence = f"{us} IS above {title}{by} in {upward} {where}: by {_said(least)} at least{average}{doubt}."
        if point:
            sentence = f"{us} IS above {title}{by} in {upward} {where}: by {_said(least)}{doubt}."
    else:
        share = float(np.mean([each["value"] > 0 for each in found.lead_X if each["value"] is not None]))
        there = f" at {arc} {found.least_at:.0f}" if not point else ""
        sentence = f"{us} is NOT above {title}{by} in {upward} {where}: the lead is {_said(least)}{there}" + (
            "." if point else f", {_said(mean)} on average; it is ahead on {100 * share:.0f}% of the range."
        )
    return {
        **about,
        "least": least,
        "least_at": found.least_at,
        "mean": mean,
        "low": low,
        "high": high,
        "holds": bool(above) if bar is not None else None,
        "sure": bool(above and sure),
        "sentence": sentence,
    }


def _equal(ours: Front, fronts: Mapping[str, Front]) -> dict[str, Any]:
    """Heights at round places between the least and the most that our front reaches in every seed."""
    low, high = ours.x_SD.min(axis=1).max(), ours.x_SD.max(axis=1).min()
    step = 5 if high - low <= 60 else 10
    at = [float(x) for x in np.arange(np.ceil(low / step) * step, high + 1e-9, step)]
    return {"at": at, "rows": {title: [height_at(front, x) for x in at] for title, front in fronts.items()}}


def _rise(before: str, after: str, old: _Policy, new: _Policy, arc: str, upward: str, reward: str) -> dict[str, Any]:
    found = lead(new.front(arc, upward, reward), old.front(arc, upward, reward))
    volumes = (each.measure(("hypervolume", None)) for each in (new, old))
    (value_S, draws_SR), (was_S, was_SR) = volumes
    cones = (each.measure(("cone_hypervolume", None)) for each in (new, old))
    (cone_S, cone_SR), (cone_was_S, cone_was_SR) = cones
    return {
        "from": before,
        "to": after,
        "arc": arc,
        "least": found.least,
        "mean": found.mean,
        "hypervolume": over_seeds(value_S - was_S, draws_SR - was_SR),
        "cone_hypervolume": over_seeds(cone_S - cone_was_S, cone_SR - cone_was_SR),
    }


def _thrift(
    data: Mapping[tuple[Method, str], _Policy],
    last: Mapping[Method, tuple[Method, str]],
    found: Mapping[Method, Sequence[Mapping[str, Any]]],
) -> dict[str, Any] | None:
    if "pooled_third" not in last or "per_direction" not in last:
        return None
    cheap, literal = data[last["pooled_third"]], data[last["per_direction"]]
    tokens = [np.mean([one["cost"]["tokens_generated"] for one in found[m]]) for m in ("pooled_third", "per_direction")]
    result: dict[str, Any] = {"tokens": [float(each) for each in tokens], "share": float(tokens[0] / tokens[1])}
    for name in ("hypervolume", "cone_hypervolume"):
        (a_S, a_SR), (b_S, b_SR) = (each.measure((name, None)) for each in (cheap, literal))
        result[name] = over_seeds(100 * (a_S / b_S - 1), 100 * (a_SR / b_SR - 1))
    return result


def _cost(method: Method, found: Sequence[Mapping[str, Any]], config: CompareConfig) -> dict[str, Any]:
    ledgers = [one["cost"] for one in found]
    total_S = np.array([ledger["tokens_generated"] + ledger["training_tokens"] for ledger in ledgers])
    of_budget_S = total_S / config.budget
    return {
        "method": method,
        "title": TITLES[method],
        "generated": float(np.mean([ledger["tokens_generated"] for ledger in ledgers])),
        "training": float(np.mean([ledger["training_tokens"] for ledger in ledgers])),
        "total": float(total_S.mean()),
        "of_budget": [float(of_budget_S.min()), float(of_budget_S.max())],
        "scored": float(np.mean([ledger["candidates_scored"] for ledger in ledgers])),
        "wall_s": float(np.mean([ledger["wall_s"] for ledger in ledgers])),
        "equal": bool((abs(of_budget_S - 1) <= config.tolerance).all()),
    }


def _claims(
    leads: Mapping[str, Sequence[Mapping[str, Any]]],
    rises: Sequence[Mapping[str, Any]],
    thrift: Mapping[str, Any] | None,
    costs: Sequence[Mapping[str, Any]],
    arcs: Sequence[str],
    upward: str,
    config: CompareConfig,
) -> list[dict[str, Any]]:
    claims = [
        {"holds": bool(row["holds"]), "sentence": row["sentence"]}
        for arc in arcs[:1]
        for row in leads.get(arc, [])
        if row["bar"] is not None
    ]
    if rises:
        up = [rise for rise in rises if rise["mean"] and rise["mean"]["value"] > 0]
        steps = ", ".join(
            f"{r['to']} {_said(r['mean'])}" if r["mean"] else f"{r['to']} nowhere to compare" for r in rises
        )
        holds = len(up) == len(rises)
        text = "rises with every iteration" if holds else "does NOT rise with every iteration"
        claims.append(
            {
                "holds": holds,
                "sentence": f"The front of {TITLES[SUBJECT]} {text}: {upward} at equal {arcs[0]} changes on average by "
                f"(against the iteration before) {steps}.",
            }
        )
    if thrift:
        volume = thrift["hypervolume"]
        holds = thrift["share"] <= 1 / 3 and volume["value"] >= 0
        reach = "reaches" if volume["value"] >= 0 else "does NOT reach"
        claims.append(
            {
                "holds": holds,
                "sentence": f"Pooled selection with {100 * thrift['share']:.0f}% of the generated tokens {reach} the "
                f"literal loop's last hypervolume: {_said(volume)} % of difference (cone hypervolume "
                f"{_said(thrift['cone_hypervolume'])} %).",
            }
        )
    free = (*SMALL_BUDGET, *UNTRAINED)
    off = [row["title"] for row in costs if not row["equal"] and row["method"] not in free]
    within = f"within {100 * config.tolerance:.0f}% of {config.budget:,} tokens generated and trained on"
    claims.append(
        {
            "holds": not off,
            "sentence": f"Every method spends {within}."
            if not off
            else f"NOT every method spends {within}: {', '.join(off)}.",
        }
    )
    return claims


def _said(interval: Mapping[str, Any], digits: int = 1) -> str:
    value, low, high = ("" if interval[end] is None else f"{interval[end]:+.{digits}f}" for end in _ENDS)
    return f"{value} [{low}, {high}]" if low else value


_ENDS = ("value", "low", "high")
