"""What a comparison found: fronts, leads at equal verbosity, measures and costs, over seeds; and which claims hold.
Run its tests: pytest tests/test_comparison.py
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from dpa.core.compare_config import CompareConfig
from dpa.core.comparison import Entry, Front, height_at, lead, main_objective, over_seeds
from dpa.core.directions import DirectionSpace
from dpa.core.measures import BOUNDS, all_measures, bootstrap_means, mean_over_prompts
from dpa.core.sections.evaluate import EvaluateConfig

Scores = Mapping[tuple[str, str], Sequence[Mapping[str, np.ndarray]]]
"""(method, policy) -> for each seed, reward -> scores_DPK."""


def summarise(
    methods: Mapping[str, Entry],
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    scores: Scores,
    space: DirectionSpace,
    settings: EvaluateConfig,
    config: CompareConfig,
    same_prompts: bool = False,
) -> dict[str, Any]:
    """The numbers of the report, all of it JSON; every interval is over seeds and prompts.

    same_prompts: all seeds are measured on the same prompts.

    methods        what each method says of itself
    upward, arcs   the objective that fronts are compared in, and those held equal
    policies       one per (method, policy): method, title, name, last, point, words,
                   fronts {reward: {arc: [{angle, direction, x, y}]}}, measures {name: interval, or {objective: ..}},
                   utility {reward: interval}
    equal          {arc: {"at": [x], "rows": {title: [interval or null]}}}, by the best reward
    leads          {arc: [{method, title, bar, least, least_at, mean, low, high, share, holds, sentence}]}
    rises          [{from, to, arc, least, mean, hypervolume}] of the subject's iterations
    thrift         a method that is to save generated tokens against the one it saves on; null where one is missing
    costs          [{method, title, generated, training, total, of_budget, scored, wall_s, equal}]
    claims         [{holds, sentence}], the first thing to read
    """
    grid_DK = space.grid(settings.directions)
    reward = "gold" if settings.gold else "model"
    upward = main_objective(space)
    arcs = [arc for arc in space.arc_names if arc != upward]
    how = space, grid_DK, config.resamples, settings.reference, reward, upward, same_prompts
    data = [_Policy(methods[method], name, by_seed, *how) for (method, name), by_seed in scores.items()]
    last = {policy.method.name: policy for policy in data}
    policies = [policy.record(policy is last[policy.method.name], found[policy.method.name], arcs) for policy in data]
    leads, rises, equal = {}, [], {}
    subject = next((policy for policy in last.values() if policy.method.kind == "subject"), None)
    if subject:
        for arc in arcs:
            leads[arc] = [_lead(subject, other, arc) for other in last.values() if other is not subject]
            steered = [policy for policy in last.values() if not policy.method.point]
            equal[arc] = _equal(subject.front(arc), {policy.method.title: policy.front(arc) for policy in steered})
        own = [policy for policy in data if policy.method is subject.method]
        rises = [_rise(before, after, arcs[0]) for before, after in pairwise(own)]
    costs = [_cost(methods[name], found[name], config) for name in found]
    thrift, said = _thrift(last, found), fields(Entry)
    return {
        "methods": {name: {field.name: getattr(methods[name], field.name) for field in said} for name in found},
        "upward": upward,
        "arcs": arcs,
        "reward": reward,
        "policies": policies,
        "equal": equal,
        "leads": leads,
        "rises": rises,
        "thrift": thrift,
        "costs": costs,
        "claims": _claims(methods, leads, rises, thrift, costs, arcs, upward, config),
    }


class _Policy:
    """One policy over the seeds: means and draws, and what follows from them."""

    def __init__(
        self,
        method: Entry,
        name: str,
        by_seed: Sequence[Mapping[str, np.ndarray]],
        space: DirectionSpace,
        grid_DK: np.ndarray,
        resamples: int,
        reference: float,
        reward: str,
        upward: str,
        same_prompts: bool,
    ) -> None:
        self.method, self.name, self.space, self.grid_DK = method, name, space, grid_DK
        self.reward, self.upward, self.same_prompts = reward, upward, same_prompts
        self.over_seeds = partial(over_seeds, same_prompts=same_prompts)
        self.means = {name: np.stack([mean_over_prompts(one[name]) for one in by_seed]) for name in by_seed[0]}
        self.draws = {
            name: np.stack(
                [bootstrap_means(one[name], resamples, seed=0 if same_prompts else s) for s, one in enumerate(by_seed)]
            )
            for name in by_seed[0]
        }
        each = [dict(all_measures(means_DK, space, grid_DK, reference)) for means_DK in self.means[reward]]
        self.values = {key: np.array([one[key] for one in each]) for key in each[0]}
        drawn = [
            [dict(all_measures(means_DK, space, grid_DK, reference)) for means_DK in draws_RDK]
            for draws_RDK in self.draws[reward]
        ]
        self.drawn = {key: np.array([[one[key] for one in seed] for seed in drawn]) for key in each[0]}

    def front(self, arc: str, reward: str | None = None) -> Front:
        """The path of the arc's directions, in the order they are asked; by the best reward unless one is named."""
        rows, reward = self._rows(arc), reward or self.reward
        x, y = self.space.names.index(arc), self.space.names.index(self.upward)
        means_SDK, draws_SRDK = self.means[reward][:, rows], self.draws[reward][:, :, rows]
        front = Front(means_SDK[..., x], means_SDK[..., y], draws_SRDK[..., x], draws_SRDK[..., y], self.same_prompts)
        return front.as_point() if self.method.point else front

    def measure(self, key: tuple[str, str | None]) -> tuple[np.ndarray, np.ndarray]:
        """(values_S, draws_SR) of a measure."""
        return self.values[key], self.drawn[key]

    def record(self, is_last: bool, found: Sequence[Mapping[str, Any]], arcs: Sequence[str]) -> dict[str, Any]:
        """What the report shows of it."""
        measures: dict[str, Any] = {}
        for (measure, objective), value_S in self.values.items():
            interval = self.over_seeds(
                value_S, self.drawn[measure, objective], bounds=BOUNDS.get(measure, (-np.inf, np.inf))
            )
            if objective is None:
                measures[measure] = interval
            else:
                measures.setdefault(measure, {})[objective] = interval
        evaluations = [next(p["evaluation"] for p in one["policies"] if p["name"] == self.name) for one in found]
        words_SD = np.array([[d["words"]["value"] for d in evaluation["directions"]] for evaluation in evaluations])
        return {
            "method": self.method.name,
            "title": self.method.title,
            "name": self.name,
            "last": is_last,
            "point": self.method.point,
            "words": [float(words_SD.mean(axis=0).min()), float(words_SD.mean(axis=0).max())],
            "fronts": {reward: {arc: self._points(arc, reward) for arc in arcs} for reward in self.means},
            "measures": measures,
            "utility": {
                reward: self.over_seeds(self._utility(self.means[reward]), self._utility(self.draws[reward]))
                for reward in self.means
            },
        }

    def _points(self, arc: str, reward: str) -> list[dict[str, Any]]:
        front, rows, point = self.front(arc, reward), self._rows(arc), self.method.point
        angles = self.space.asked_angle(self.grid_DK[rows], arc)
        return [
            {
                "angle": None if point else round(float(angles[d]), 6) + 0.0,
                "direction": None if point else str(self.space.direction(self.grid_DK[rows[d]])),
                "x": self.over_seeds(front.x_SD[:, d], front.x_SRD[:, :, d]),
                "y": self.over_seeds(front.y_SD[:, d], front.y_SRD[:, :, d]),
            }
            for d in range(front.x_SD.shape[1])
        ]

    def _rows(self, arc: str) -> np.ndarray:
        rows = np.flatnonzero(self.space.on_arc(self.grid_DK, arc))
        return rows[np.argsort(self.space.asked_angle(self.grid_DK[rows], arc))]

    def _utility(self, means: np.ndarray) -> np.ndarray:
        return np.einsum("...dk,dk->...d", means, self.grid_DK).mean(axis=-1)


def _lead(subject: _Policy, other: _Policy, arc: str) -> dict[str, Any]:
    theirs, upward, bar = other.front(arc), subject.upward, other.method.bar
    found = lead(subject.front(arc), theirs)
    title, us = other.method.title, subject.method.title
    about: dict[str, Any] = {"method": other.method.name, "title": title, "bar": bar, "holds": None}
    point = theirs.x_SD.shape[1] == 1
    if found.least is None or found.mean is None:
        where = f"its {arc} ({theirs.x_SD.mean():.0f})" if point else f"any {arc} in every seed"
        sentence = f"{us} and {title} cannot be compared: they do not share {where}."
        return {**about, "least": None, "least_at": None, "mean": None, "low": None, "high": None, "sentence": sentence}
    least, mean, low, high = found.least, found.mean, float(found.at_X[0]), float(found.at_X[-1])
    wanted = bar or 0.0
    assert least["value"] is not None
    above = least["value"] >= wanted if wanted else least["value"] > 0
    sure = all(_beyond_chance(each) for each in found.lead_X)
    lowest = min((each["low"] for each in found.lead_X if each["low"] is not None), default=None)
    where = f"at its {arc} of {low:.0f}" if point else f"at every shared {arc} ({low:.0f} to {high:.0f})"
    by = f" by {wanted:g} points or more" if wanted else ""
    least_and_mean = _said(least) if point else f"{_said(least)} at least; {_said(mean)} on average"
    if above:
        doubt = "" if sure else ", but the interval includes none"
        if sure and lowest is not None and lowest < wanted:
            doubt = f", but the interval includes less than {wanted:g}"
        sentence = f"{us} IS above {title}{by} in {upward} {where}: by {least_and_mean}{doubt}."
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
    if not np.isfinite(high - low):  # in one seed a direction has no score
        return {"at": [], "rows": {title: [] for title in fronts}}
    step = 5 if high - low <= 60 else 10
    at = [float(x) for x in np.arange(np.ceil(low / step) * step, high + 1e-9, step)]
    return {"at": at, "rows": {title: [height_at(front, x) for x in at] for title, front in fronts.items()}}


def _rise(old: _Policy, new: _Policy, arc: str) -> dict[str, Any]:
    found = lead(new.front(arc), old.front(arc))
    about = {"from": old.name, "to": new.name, "arc": arc, "least": found.least, "mean": found.mean}
    return about | _volumes(new, old, np.subtract)


def _volumes(new: _Policy, old: _Policy, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> dict[str, Any]:
    """The change of both hypervolumes from one policy to another."""
    changed = {}
    for name in ("hypervolume", "cone_hypervolume"):
        value_S, draws_SR = map(change, new.measure((name, None)), old.measure((name, None)))
        changed[name] = new.over_seeds(value_S, draws_SR)
    return changed


def _thrift(last: Mapping[str, _Policy], found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any] | None:
    cheap = next((policy for policy in last.values() if policy.method.saves_on in last), None)
    if cheap is None:
        return None
    full = last[str(cheap.method.saves_on)]
    tokens = [np.mean([one["cost"]["tokens_generated"] for one in found[p.method.name]]) for p in (cheap, full)]
    with np.errstate(divide="ignore", invalid="ignore"):  # volumes of nothing
        volumes = _volumes(cheap, full, lambda ours, theirs: 100 * (ours / theirs - 1))
    return {
        "titles": [cheap.method.title, full.method.title],
        "tokens": [float(each) for each in tokens],
        "share": float(tokens[0] / tokens[1]),
        **volumes,
    }


def _cost(method: Entry, found: Sequence[Mapping[str, Any]], config: CompareConfig) -> dict[str, Any]:
    ledgers = [one["cost"] for one in found]
    total_S = np.array([ledger["tokens_generated"] + ledger["training_tokens"] for ledger in ledgers])
    of_budget_S = total_S / config.budget
    return {
        "method": method.name,
        "title": method.title,
        "generated": float(np.mean([ledger["tokens_generated"] for ledger in ledgers])),
        "training": float(np.mean([ledger["training_tokens"] for ledger in ledgers])),
        "total": float(total_S.mean()),
        "of_budget": [float(of_budget_S.min()), float(of_budget_S.max())],
        "scored": float(np.mean([ledger["candidates_scored"] for ledger in ledgers])),
        "wall_s": float(np.mean([ledger["wall_s"] for ledger in ledgers])),
        "equal": bool((abs(of_budget_S - 1) <= config.tolerance).all()),
    }


def _claims(
    methods: Mapping[str, Entry],
    leads: Mapping[str, Sequence[Mapping[str, Any]]],
    rises: Sequence[Mapping[str, Any]],
    thrift: Mapping[str, Any] | None,
    costs: Sequence[Mapping[str, Any]],
    arcs: Sequence[str],
    upward: str,
    config: CompareConfig,
) -> list[dict[str, Any]]:
    barred = [row for arc in arcs[:1] for row in leads.get(arc, []) if row["bar"] is not None]
    claims = [(bool(row["holds"]), row["sentence"]) for row in barred]
    if rises:
        title = next(method.title for method in methods.values() if method.kind == "subject")
        up = [rise for rise in rises if rise["mean"] and rise["mean"]["value"] > 0]
        steps = ", ".join(
            f"{r['to']} {_said(r['mean'])}" if r["mean"] else f"{r['to']} nowhere to compare" for r in rises
        )
        holds = len(up) == len(rises)
        text = "rises with every iteration" if holds else "does NOT rise with every iteration"
        changes = f"{upward} at equal {arcs[0]} changes on average by (against the iteration before) {steps}"
        unsure = [rise["to"] for rise in up if not _beyond_chance(rise["mean"])]
        if holds and unsure:
            changes += f", but the interval of {' and '.join(unsure)} includes none"
        claims.append((holds, f"The front of {title} {text}: {changes}."))
    if thrift:
        volume, (cheap, full) = thrift["hypervolume"], thrift["titles"]
        reached = volume["value"] is not None and volume["value"] >= 0
        holds = thrift["share"] <= 1 / 3 and reached
        reach = "reaches" if reached else "does NOT reach"
        found = "one of the two is 0, so that nothing can be said in per cent"
        if volume["value"] is not None:
            found = f"{_said(volume)} % of difference (cone hypervolume {_said(thrift['cone_hypervolume'])} %)"
        tokens = f"{100 * thrift['share']:.0f}% of the tokens that {full} generates"
        claims.append((holds, f"{cheap}, with {tokens}, {reach} its last hypervolume: {found}."))
    off = [row["title"] for row in costs if not row["equal"] and not methods[row["method"]].spends_less]
    within = f"within {100 * config.tolerance:.0f}% of {config.budget:,} tokens generated and trained on"
    spending = f"NOT every method spends {within}: {', '.join(off)}." if off else f"Every method spends {within}."
    return [{"holds": holds, "sentence": sentence} for holds, sentence in (*claims, (not off, spending))]


def _beyond_chance(gain: Mapping[str, Any]) -> bool:
    """Whether the interval of a gain is known and does not include none."""
    return gain["low"] is not None and gain["low"] > 0


def _said(interval: Mapping[str, Any]) -> str:
    ends = (interval[end] for end in ("value", "low", "high"))
    value, low, high = ("" if end is None else f"{end:+.1f}" for end in ends)
    return f"{value} [{low}, {high}]" if low else value
