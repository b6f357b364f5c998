"""The page of a comparison, its table.csv and its results.json. Every number on the page comes from the record.
Run its tests: pytest tests/test_compare.py
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dpa.core.charts import Point, Series, line_chart
from dpa.core.page import STYLE, degrees, duration, figure, number, spread, table, tile, value_and_range
from dpa.storage.tables import write_bytes, write_json

REWARD_TITLES = {"gold": "true reward", "model": "model reward"}

MARKS = ("●", "■", "◆", "▲")  # as charts draws them

GLOSSARY = {
    "hypervolume": "what the front dominates above the reference point, every objective maximised.",
    "cone hypervolume": "the same in the utilities of the cone's extreme directions, so that asking for less counts "
    "too (this project's choice).",
    "expected utility": "what a user drawn from the grid gets along the direction asked.",
    "projection regret": "what asking for another direction would have given in the one that was wanted; 0 is best.",
    "span": "largest minus smallest mean over the grid.",
    "kendall tau": "asked angle against achieved mean along an arc: 1 is in order, 0 is no relation.",
}

Record = Mapping[str, Any]
Row = Sequence[str | tuple[str, str]]


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
    """The page: self-contained, without scripts; every text of the run is escaped."""
    sections = [
        ("What holds, and what does not", _claims(results)),
        ("Fronts", _fronts(results)),
        (f"{results['upward'].capitalize()} at equal {results['arcs'][0]}", _equal(results)),
        ("The front over the iterations", _iterations(results)),
        ("Measures", _measures(results)),
        ("True against model reward", _over_optimisation(results)),
        ("Cost", _costs(results)),
        ("Every direction", _every_direction(results)),
        ("Configuration", _configuration(results)),
    ]
    body = "".join(f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in sections if content)
    name = escape(str(results["name"]))
    seeds = ", ".join(map(str, results["seeds"]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>{name} · comparison</title>'
        f"<style>{STYLE}{_STYLE}{_colors(results)}</style></head><body><main>"
        f"<header><p class='kicker'>Directional preference alignment · dpa {escape(str(results['version']))} · "
        f"seeds {escape(seeds)}</p><h1>{name}</h1>{_headline(results)}</header>{body}"
        "</main></body></html>\n"
    )


# --- sections ------------------------------------------------------------------------------------------------------


def _headline(results: Record) -> str:
    holding = sum(claim["holds"] for claim in results["claims"])
    subject = next((p for p in _of_kind(results, "subject") if p["last"]), None)
    tiles = [tile(f"{holding} of {len(results['claims'])}", "claims hold (below)")]
    if subject:
        measures = subject["measures"]
        tiles += [
            tile(spread(measures["expected_utility"]), f"expected utility of {subject['title']}"),
            tile(f"{subject['words'][0]:.0f} to {subject['words'][1]:.0f}", "words, tersest to wordiest direction"),
        ]
        tiles += [tile(spread(tau, 2), f"Kendall tau, {arc}") for arc, tau in measures["kendall_tau"].items()]
    budget = results["config"]["budget"]
    scope = (
        f"{len(results['costs'])} methods, {len(results['seeds'])} seeds, {budget:,} tokens generated and trained on "
        f"for each method. Everything is judged by the {REWARD_TITLES[results['reward']]} on held-out prompts. "
        "Intervals are 95%, over seeds and over prompts in each (two-level bootstrap, widened for few seeds)."
    )
    missing = results["missing"]
    alarm = f'<p class="verdict bad" role="alert">Not finished: {escape("; ".join(missing))}.</p>' if missing else ""
    return f'{alarm}<div class="tiles">{"".join(tiles)}</div><p class="note">{escape(scope)}</p>'


def _claims(results: Record) -> str:
    items = "".join(
        f'<li class="{"holds" if claim["holds"] else "fails"}"><b>{"Holds" if claim["holds"] else "Does not hold"}</b>'
        f"<span>{escape(claim['sentence'])}</span></li>"
        for claim in results["claims"]
    )
    others = [
        row["sentence"]
        for arc, rows in results["leads"].items()
        for row in rows
        if row["bar"] is None or arc != results["arcs"][0]
    ]
    rest = "".join(f"<li>{escape(sentence)}</li>" for sentence in others)
    more = f'<details><summary>The other comparisons, without a bar</summary><ul class="rest">{rest}</ul></details>'
    return f'<ul class="claims">{items}</ul>{more if rest else ""}'


def _fronts(results: Record) -> str:
    figures, upward, reward = [], results["upward"], results["reward"]
    for arc in results["arcs"]:
        for caption, kind in (("what it is compared with", "other"), ("its variants and its control", "variant")):
            shown = [policy for policy in _of_kind(results, "subject", kind) if policy["last"]]
            series = [_series(results, policy, arc) for policy in shown]
            title = f"{upward} against {arc}: DPA and {caption}"
            if series:
                figures.append(_chart(series, title, arc, upward))
    note = (
        f"Last policies by the {REWARD_TITLES[reward]}: one mark for each direction asked along the arc, crosses are "
        "95% intervals. Up is better; the further a line reaches to both sides, the more a user can choose. A method "
        "that knows no direction is one mark."
    )
    return f'<p class="note">{note}</p>{_legend(results)}<div class="figures">{"".join(figures)}</div>'


def _equal(results: Record) -> str:
    tables: list[str] = []
    for arc, found in results["equal"].items():
        if found["at"]:
            heights: list[Row] = [
                [title, *(value_and_range(cell) if cell else "–" for cell in cells)]
                for title, cells in found["rows"].items()
            ]
            columns = ["method", *(f"{arc} {x:g}" for x in found["at"])]
            tables.append(table(f"{results['upward']} at equal {arc} (– : its front does not reach)", columns, heights))
    for arc, found in results["leads"].items():
        rows: list[Row] = []
        for row in found:
            if row["least"] is None:
                rows.append([row["title"], "–", "–", "–", "no shared range"])
                continue
            reach = f"{row['low']:.0f}" if row["low"] == row["high"] else f"{row['low']:.0f} to {row['high']:.0f}"
            least = (f"{number(row['least']['value'])} at {row['least_at']:.0f}", value_and_range(row["least"])[1])
            bar = "no bar" if row["bar"] is None else f"{'yes' if row['holds'] else 'NO'} (bar {row['bar']:g})"
            rows.append([row["title"], reach, least, value_and_range(row["mean"]), bar])
        caption = f"Lead of {_of_kind(results, 'subject')[0]['title']}, in {results['upward']} at equal {arc}"
        tables.append(table(caption, ["against", f"shared {arc}", "least lead", "mean lead", "holds"], rows))
    note = "Linear interpolation along each front, per seed; a method that is one point is compared where it stands."
    return f'<p class="note">{note}</p>{"".join(tables)}' if tables else ""


def _iterations(results: Record) -> str:
    policies = _of_kind(results, "subject")
    if len(policies) < 2:
        return ""
    reward, arc, upward = results["reward"], results["arcs"][0], results["upward"]
    series = [
        Series(policy["name"], 100 + place, _points(policy, reward, arc, upward))
        for place, policy in enumerate(policies)
    ]
    title = f"{policies[0]['title']}, over its iterations: {upward} against {arc}"
    legend = "".join(
        f'<li class="s{100 + place}"><i aria-hidden="true">{MARKS[(100 + place) % 4]}</i>{escape(policy["name"])}</li>'
        for place, policy in enumerate(policies)
    )
    rows = [
        [
            f"{rise['from']} to {rise['to']}",
            value_and_range(rise["mean"]) if rise["mean"] else "–",
            value_and_range(rise["least"]) if rise["least"] else "–",
            value_and_range(rise["hypervolume"]),
            value_and_range(rise["cone_hypervolume"]),
        ]
        for rise in results["rises"]
    ]
    columns = ["step", f"mean change at equal {arc}", "least change", "hypervolume", "cone hypervolume"]
    shown = _chart(series, title, arc, upward)
    drawn = f'<ul class="legend">{legend}</ul><div class="alone">{shown}</div>'
    return f"{drawn}{table('Each iteration, against the one before', columns, rows)}"


def _measures(results: Record) -> str:
    last = [policy for policy in results["policies"] if policy["last"]]
    rows: list[list[Any]] = []
    for measure, found in last[0]["measures"].items():
        title = measure.replace("_", " ")
        if "value" in found:
            rows.append([title, *(value_and_range(policy["measures"][measure]) for policy in last)])
            continue
        for objective in found:
            digits = 1 if measure == "span" else 2
            cells = [value_and_range(policy["measures"][measure][objective], digits) for policy in last]
            rows.append([f"{title}, {objective}", *cells])
    flipped = [[policy["title"], *(row[1 + place] for row in rows)] for place, policy in enumerate(last)]
    caption = f"Last policies by the {REWARD_TITLES[results['reward']]}, over every direction of the grid"
    shown = table(caption, ["method", *(row[0] for row in rows)], flipped)
    words = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in GLOSSARY.items())
    return f'{shown}<dl class="words">{words}</dl>'


def _over_optimisation(results: Record) -> str:
    if results["reward"] == "model":
        return ""
    rows: list[Row] = []
    for policy in results["policies"]:
        true, model = policy["utility"]["gold"], policy["utility"]["model"]
        gap = model["value"] - true["value"]
        name = (policy["title"], policy["name"])
        rows.append([name, value_and_range(true), value_and_range(model), number(gap)])
    note = (
        "Expected utility by the true reward and by the reward model that selected the training data. A policy that "
        "learns to please the model gains by it more than by the truth: its gap is larger than that of its start."
    )
    columns = ["policy", "true reward", "model reward", "model minus true"]
    return f'<p class="note">{note}</p>{table("Expected utility, twice", columns, rows)}'


def _costs(results: Record) -> str:
    rows = [
        [
            row["title"],
            f"{row['generated']:,.0f}",
            f"{row['training']:,.0f}",
            f"{row['total']:,.0f}",
            f"{100 * row['of_budget'][0]:.0f} to {100 * row['of_budget'][1]:.0f}%",
            f"{row['scored']:,.0f}",
            duration(row["wall_s"]),
        ]
        for row in results["costs"]
    ]
    reward = [one["ledger"]["train_reward"]["training_tokens"] for one in results["shared"] if one["ledger"]]
    note = (
        "Mean over seeds, from the ledgers: tokens generated for training and tokens trained on. What methods share is "
        "made once for a seed and charged to each that uses it (the policy of t = 0 to the loops)."
    )
    if reward:
        note += (
            f" Beside it every method rests on the reward model, {sum(reward) / len(reward):,.0f} tokens of training, "
            "which selects, labels or pairs its data."
        )
    columns = ["method", "generated", "trained on", "together", "of the budget", "scored", "time, one core"]
    return f'<p class="note">{note}</p>{table("What each method cost, per seed", columns, rows)}'


def _every_direction(results: Record) -> str:
    blocks = []
    for policy in results["policies"]:
        for reward, arcs in policy["fronts"].items():
            rows = [
                [
                    arc,
                    "all" if point["angle"] is None else degrees(point["angle"]),
                    value_and_range(point["x"]),
                    value_and_range(point["y"]),
                ]
                for arc, points in arcs.items()
                for point in points
            ]
            title = f"{policy['title']}, {policy['name']}, {REWARD_TITLES[reward]}"
            shown = table(title, ["arc", "asked", "the arc's objective", results["upward"]], rows)
            blocks.append(f"<details><summary>{escape(title)}</summary>{shown}</details>")
    return "".join(blocks)


def _configuration(results: Record) -> str:
    text = json.dumps(results["config"], indent=2, ensure_ascii=False)
    return f"<details><summary>resolved configuration</summary><pre>{escape(text)}</pre></details>"


# --- pieces --------------------------------------------------------------------------------------------------------


def _of_kind(results: Record, *kinds: str) -> list[Record]:
    return [policy for policy in results["policies"] if results["methods"][policy["method"]]["kind"] in kinds]


def _series(results: Record, policy: Record, arc: str) -> Series:
    points = _points(policy, results["reward"], arc, results["upward"])
    return Series(policy["title"], _place(results, policy), points)


def _points(policy: Record, reward: str, arc: str, upward: str) -> tuple[Point, ...]:
    points = []
    for point in policy["fronts"][reward][arc]:
        x, y = point["x"], point["y"]
        asked = "" if point["angle"] is None else f", asked {degrees(point['angle'])} ({point['direction']})"
        tooltip = f"{policy['title']}, {policy['name']}{asked}: {arc} {spread(x)}, {upward} {spread(y)}"
        points.append(Point(x["value"], y["value"], _range(x), _range(y), tooltip))
    return tuple(points)


def _chart(series: Sequence[Series], title: str, arc: str, upward: str) -> str:
    chart = line_chart(
        series,
        title,
        f"{arc} (mean, 0 to 100)",
        f"{upward} (mean, 0 to 100)",
        description="One line for each method, one mark for each direction asked, with 95% intervals; the numbers are "
        "in the table Every direction.",
    )
    return figure(chart, title)


def _range(interval: Record) -> tuple[float, float] | None:
    return None if interval["low"] is None else (interval["low"], interval["high"])


def _place(results: Record, policy: Record) -> int:
    """Of its method among those compared: its mark and its colour are the same everywhere on the page."""
    return list(results["methods"]).index(policy["method"])


def _legend(results: Record) -> str:
    items = "".join(
        f'<li class="s{place}"><i aria-hidden="true">{MARKS[place % 4]}</i>{escape(method["title"])}</li>'
        for place, method in enumerate(results["methods"].values())
    )
    return f'<ul class="legend">{items}</ul>'


def _colors(results: Record) -> str:
    """CSS classes of the series: a colour for each method, and s100, s101, ... for the iterations, early to late."""
    early_to_late = (("#9a8f7f", "#8f8980"), ("#d17a00", "#f0a93a"), ("#c22f5b", "#ff768e"), ("#6a2c91", "#c593ff"))
    methods = results["methods"].values()
    lasting = next((method["color"] for method in methods if method["kind"] == "subject"), early_to_late[-1])
    iterations = {100 + place: early_to_late[place] if place < len(early_to_late) else lasting for place in range(20)}
    colors = dict(enumerate(method["color"] for method in methods)) | iterations
    light = "".join(f".s{place}{{--c:{pair[0]}}}" for place, pair in colors.items())
    dark = "".join(f".s{place}{{--c:{pair[1]}}}" for place, pair in colors.items())
    return f"{light}@media(prefers-color-scheme:dark){{{dark}}}"


_STYLE = """
.claims{list-style:none;padding:0;display:grid;gap:8px}
.claims li{display:grid;grid-template-columns:8.5em 1fr;gap:12px;border-radius:10px;padding:.6em 1em;
align-items:baseline}
.claims .holds{background:var(--goodbg);color:var(--good)}.claims .fails{background:var(--badbg);color:var(--bad)}
.rest li{margin:.3em 0;color:var(--soft)}
.tile b{font-size:1.25rem}
.alone{max-width:560px}
@media(max-width:520px){.claims li{grid-template-columns:1fr;gap:2px}}
"""
