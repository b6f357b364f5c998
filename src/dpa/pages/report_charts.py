"""The charts of a run's report. `policies` are those of its record (dpa.pages.report), a line for each.
Run its tests: pytest tests/test_report.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpa.pages.charts import Chart, Point, Series, range_of
from dpa.pages.writing import degrees, number, reward_title, spread

Policies = Sequence[Mapping[str, Any]]

SIDES = {1: "more is better", -1: "less is better", 0: "asked both ways"}
"""Sign of what is asked of an objective -> what its axis says."""


def asked_signs(policies: Policies, names: Sequence[str]) -> dict[str, int]:
    """Objective -> 1 where no direction measured weighs it below 0, so that more of it is better for every user;
    -1 where none weighs it above 0; 0 where it is asked both ways, and neither is better by itself."""
    directions = policies[-1]["evaluation"]["directions"] if policies else []
    weights_KD = [[direction["weights"][k] for direction in directions] for k in range(len(names))]
    return {
        name: int(all(w > -1e-9 for w in weights_D)) - int(all(w < 1e-9 for w in weights_D))
        for name, weights_D in zip(names, weights_KD, strict=True)
    }


def front_chart(
    policies: Policies, reward: str, arc: str, upward: str, max_angle: float, signs: Mapping[str, int]
) -> Chart:
    """Achieved (arc's objective, center's objective) along the arc, the asked angle at both ends of the last policy."""

    def points(policy: Mapping[str, Any]) -> list[Point]:
        on_arc, found = _on_arc(policy, arc), []
        ends = (0, len(on_arc) - 1) if policy is policies[-1] else ()
        for place, (angle, direction) in enumerate(on_arc):
            x, y = (direction["objectives"][reward][name] for name in (arc, upward))
            asked = f"{policy['name']}, asked {degrees(angle)} ({direction['direction']})"
            tooltip = f"{asked}: {arc} {spread(x)}, {upward} {spread(y)}"
            label = degrees(angle) if place in ends else ""
            if x["value"] is not None and y["value"] is not None:
                found.append(Point(x["value"], y["value"], range_of(x), range_of(y), tooltip, label))
        return found

    return Chart(
        [Series(policy["name"], index, points(policy)) for index, policy in enumerate(policies)],
        f"Fronts by {reward_title(reward)}: {upward} against {arc}",
        f"{arc}: {SIDES[signs[arc]]}",
        f"{upward}: {SIDES[signs[upward]]}",
        f"One line for each policy, one mark for each direction asked from -{max_angle:g} to {max_angle:g} degrees, "
        "with 95% intervals; the numbers are in the table Every direction.",
    )


def pools_charts(
    policies: Policies, arcs: Sequence[str], upward: str, max_angle: float, signs: Mapping[str, int]
) -> list[Chart]:
    """The same of the best candidate of each pool, for the policies that chose from some."""
    colors = [color for color, policy in enumerate(policies) if policy.get("pools")]
    pools = [{"name": policies[color]["name"], "evaluation": policies[color]["pools"]} for color in colors]

    def drawn(arc: str) -> Chart:
        chart = front_chart(pools, "model", arc, upward, max_angle, signs)
        return replace(
            chart,
            series=[replace(one, color=color) for one, color in zip(chart.series, colors, strict=True)],
            title=f"Best of the pools: {upward} against {arc}",
            description="One line for each iteration, one mark for what each direction would keep, with 95% intervals.",
        )

    return [drawn(arc) for arc in arcs] if pools else []


def achieved_chart(policies: Policies, reward: str, arc: str, max_angle: float) -> Chart:
    """(asked angle, achieved mean) along the arc."""

    def points(policy: Mapping[str, Any]) -> list[Point]:
        achieved = [(angle, direction["objectives"][reward][arc]) for angle, direction in _on_arc(policy, arc)]
        return [
            Point(angle, y["value"], None, range_of(y), f"{policy['name']}, asked {degrees(angle)}: {arc} {spread(y)}")
            for angle, y in achieved
            if y["value"] is not None
        ]

    return Chart(
        [Series(policy["name"], index, points(policy)) for index, policy in enumerate(policies)],
        f"{arc} achieved, by {reward_title(reward)}",
        f"asked: degrees from the center towards {arc}",
        f"{arc} achieved",
        "One line for each policy with its 95% band; a policy that ignores its direction is flat.",
        x_ticks=[(share * max_angle, degrees(share * max_angle)) for share in (-1, -0.5, 0, 0.5, 1)],
        band=True,
    )


def target_charts(policies: Policies, reward: str) -> list[Chart]:
    """(value asked, mean achieved) of each objective that targets hold, for the policies that know targets."""
    known = [
        (index, policy["name"], policy["evaluation"]["targets"]["targets"])
        for index, policy in enumerate(policies)
        if policy["evaluation"].get("targets")
    ]

    def points(name: str, targets: Sequence[Mapping[str, Any]], objective: str) -> list[Point]:
        own = [target for target in targets if target["objective"] == objective]
        achieved = [(target, target["objectives"][reward][objective]) for target in own]
        return [
            Point(t["asked"], y["value"], None, range_of(y), f"{name}, asked {t['target']}: {objective} {spread(y)}")
            for t, y in achieved
            if y["value"] is not None
        ]

    return [
        Chart(
            [Series(name, index, points(name, targets, objective)) for index, name, targets in known],
            f"{objective} asked and kept, by {reward_title(reward)}",
            f"{objective} asked",
            f"{objective} achieved",
            "One line for each policy with its 95% band, one mark for each value asked; on the dashed line a policy "
            "keeps what it is asked.",
            band=True,
            diagonal="as asked",
        )
        for objective in dict.fromkeys(target["objective"] for _, _, targets in known for target in targets)
    ]


def listening_charts(policies: Policies) -> list[Chart]:
    """Over the optimizer steps of all iterations, whether a policy read its direction while it was trained; none where
    nothing was measured. Their `listening` is as `stages.finetune.listening_curve` reads it."""
    shares, gaps, before = [], [], 0.0
    for index, policy in enumerate(policies):
        name, curve = policy["name"], policy.get("listening")
        if curve:
            steps = [(before + entry["step"], entry) for entry in curve]
            shares.append(Series(name, index, [_heard(name, step, entry, "share", 100, 0) for step, entry in steps]))
            gaps.append(Series(name, index, [_heard(name, step, entry, "gap_response", 1, 2) for step, entry in steps]))
            before = steps[-1][0]
    return [
        Chart(
            series,
            title,
            "optimizer steps, all iterations",
            label,
            "One line for each policy, one mark for each measurement with its 95% interval; the last ones are in the "
            "table below.",
            level=level,
        )
        for series, title, label, level in (
            (shares, "Rows whose own direction makes them likelier", "% of held-out rows", (50.0, "chance")),
            (gaps, "Flip gap", "nats a response", (0.0, "not read")),
        )
        if series
    ]


def measure_chart(policies: Policies, reward: str, measure: str) -> Chart:
    """A measure of each policy, in order of time."""
    label = measure.replace("_", " ")
    found = [(policy["name"], policy["evaluation"]["measures"][reward][measure]) for policy in policies]
    return Chart(
        [
            Series(name, index, [Point(index, m["value"], None, range_of(m), f"{name}: {spread(m)}")])
            for index, (name, m) in enumerate(found)
            if m["value"] is not None
        ],
        f"{label} by {reward_title(reward)}",
        "policy",
        label,
        "One mark for each policy with its 95% interval; the numbers are in the table below.",
        x_ticks=[(float(index), name) for index, (name, _) in enumerate(found)],
    )


def _on_arc(policy: Mapping[str, Any], arc: str) -> list[tuple[float, Mapping[str, Any]]]:
    """(asked angle, direction record) along an arc, in the order of the angle."""
    directions = policy["evaluation"]["directions"]
    return sorted(((d["angles"][arc], d) for d in directions if arc in d["angles"]), key=lambda item: item[0])


def _heard(name: str, step: float, entry: Mapping[str, float], figure: str, times: float, digits: int) -> Point:
    value, low, high = (times * entry[f"{figure}{end}"] for end in ("", "_low", "_high"))
    said = f"{number(value, digits)} ({number(low, digits)} to {number(high, digits)})"
    return Point(step, value, None, (low, high), f"{name}, step {step:,.0f}: {said}")
