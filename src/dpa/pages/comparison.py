"""The page of a comparison, its table.csv and its results.json. Every number on the page comes from the record.
Run its tests: pytest tests/test_compare.py tests/test_comparison.py

The record is what `stages.compare.summarise` found, and name, version, seeds, missing [jobs not done], space, config,
shared [records of what methods share, one for each seed].
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpa.core.directions import DirectionSpace
from dpa.pages.charts import Chart, Point, Series, ramp, range_of
from dpa.pages.rendering import render
from dpa.pages.writing import degrees, spread
from dpa.storage.tables import write_bytes, write_json

Record = Mapping[str, Any]


def write_comparison(folder: Path, results: Record) -> Path:
    """Write results.json, table.csv and report.html into `folder`, each whole or not at all; the page's path."""
    write_json(folder / "results.json", results)
    write_bytes(folder / "table.csv", table_csv(results).encode())
    page = folder / "report.html"
    write_bytes(page, comparison_html(results).encode())
    return page


def table_csv(results: Record) -> str:
    """One row for each policy, reward, arc and direction: where it lands, with intervals over seeds and prompts."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = ("", "_low", "_high")
    writer.writerow(
        ["method", "policy", "reward", "arc", "asked_degrees", "direction"]
        + [f"{axis}{end}" for axis in ("arc_objective", results["upward"]) for end in ends]
    )
    for policy in results["policies"]:
        for reward, arcs in policy["fronts"].items():
            for arc, points in arcs.items():
                for point in points:
                    intervals = [point[axis][end] for axis in ("x", "y") for end in ("value", "low", "high")]
                    where = [point["angle"], point["direction"]]
                    writer.writerow([policy["method"], policy["name"], reward, arc, *where, *intervals])
    return out.getvalue()


def comparison_html(results: Record) -> str:
    """The page: self-contained, without scripts; every text of the run is escaped.

    A method's colour and mark are the same everywhere, by its place among the methods; those of the subject's
    iterations come after.
    """
    methods, arcs = results["methods"], results["arcs"]
    places = {name: place for place, name in enumerate(methods)}
    kinds = {name: method["kind"] for name, method in methods.items()}
    own = [policy for policy in results["policies"] if kinds[policy["method"]] == "subject"]
    last = [policy for policy in results["policies"] if policy["last"]]
    panels = {"what it is compared with": "other", "its variants and its control": "variant"}
    fronts = [
        _chart(
            results,
            [(p["title"], places[p["method"]], p) for p in last if kinds[p["method"]] in ("subject", kind)],
            f"{results['upward']} against {arc}: DPA and {caption}",
            arc,
        )
        for arc in arcs
        for caption, kind in panels.items()
        if kind == "other" or kind in kinds.values()
    ]
    iterations = [(policy["name"], len(methods) + place, policy) for place, policy in enumerate(own)]
    title = f"{own[0]['title']}, over its iterations: {results['upward']} against {arcs[0]}" if own else ""
    reward = [one["ledger"]["train_reward"]["training_tokens"] for one in results["shared"] if one["ledger"]]
    return render(
        "comparison.html",
        record=results,
        subject=own[-1] if own else None,
        colors=[method["color"] for method in methods.values()] + ramp(len(own)),
        without_bar=[
            row["sentence"]
            for arc, rows in results["leads"].items()
            for row in rows
            if row["bar"] is None or arc != arcs[0]
        ],
        fronts=[chart for chart in fronts if chart.series],
        iterations=_chart(results, iterations, title, arcs[0]) if len(own) > 1 else None,
        reward_tokens=sum(reward) / len(reward) if reward else None,
    )


def _chart(results: Record, shown: Sequence[tuple[str, int, Record]], title: str, arc: str) -> Chart:
    """The fronts of policies along an arc; `shown`: (name, color, policy)."""
    upward, ranges = results["upward"], DirectionSpace.from_dict(results["space"]).ranges
    axes = {name: f"{name} (mean, {low:g} to {high:g})" for name, (low, high) in ranges.items()}

    def points(policy: Record) -> list[Point]:
        found = []
        for point in policy["fronts"][results["reward"]][arc]:
            x, y = point["x"], point["y"]
            asked = "" if point["angle"] is None else f", asked {degrees(point['angle'])} ({point['direction']})"
            tooltip = f"{policy['title']}, {policy['name']}{asked}: {arc} {spread(x)}, {upward} {spread(y)}"
            if x["value"] is not None and y["value"] is not None:  # in one seed the direction has no score
                found.append(Point(x["value"], y["value"], range_of(x), range_of(y), tooltip))
        return found

    return Chart(
        [Series(name, color, points(policy)) for name, color, policy in shown],
        title,
        axes[arc],
        axes[upward],
        "One line for each method, one mark for each direction asked, with 95% intervals; the numbers are in the table "
        "Every direction.",
    )
