"""Write what a run found: results.json (the record), and from it table.csv, samples.jsonl and one report.html.
Run its tests: pytest tests/test_report.py

The record, all of it JSON:
  name, seed, version     title, seed of the run, version of the package
  space                   DirectionSpace.to_dict()
  config                  the resolved configuration
  policies                in order of time: {name ("start", "t = 0", ...), evaluation (stages.evaluate.evaluate),
                          ledger {stage: Ledger as a mapping}, listening (stages.finetune.listening_curve)}
  samples                 {policy, questions (stages.evaluate.side_by_side)}, or null
  ledger                  {stage: Ledger as a mapping} of what is done once: ratings, train_reward
  reward_model            {attribute: {figure: number or null}}, the held-out quality; or null
  reward_precision        what the reward model loses in half precision (dpa_reward.json); or null, or absent
Every number on the page comes from the record.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dpa.core.charts import Point, Series, dial, line_chart
from dpa.core.directions import DirectionSpace
from dpa.core.listening_page import listening_section
from dpa.core.page import (
    STYLE,
    bar,
    degrees,
    duration,
    figure,
    memory,
    number,
    ratio,
    series_colors,
    spread,
    table,
    tile,
    value_and_range,
)
from dpa.storage.tables import write_bytes, write_json

REWARD_TITLES = {"gold": "true reward", "model": "model reward"}
LEDGER_COLUMNS = {
    "rows": "rows",
    "rejects": "rejects",
    "prompt_tokens": "prompt tokens",
    "tokens_generated": "tokens generated",
    "candidates_scored": "candidates scored",
    "training_tokens": "training tokens",
    "wall_s": "wall time",
    "peak_memory": "peak memory",
}

LISTENING = "A policy that listens rises from left to right; one that ignores its direction is flat."
GLOSSARY = {
    "hypervolume": "what the front dominates above the reference point.",
    "cone hypervolume": "the same in the utilities of the cone's extreme directions, so that asking for less counts "
    "too (this project's choice).",
    "expected utility": "what a user drawn from the grid gets along the direction asked.",
    "projection regret": "what asking for another direction would have given in the one that was wanted; 0 is best.",
    "span": "largest minus smallest mean over the grid; in brackets its share of the widest span of any policy here.",
    "end coverage": "share of that range which lies between the two ends asked; 1 is best.",
}

Record = Mapping[str, Any]


def write_report(folder: Path, results: Record) -> Path:
    """Write the four files into `folder`, each whole or not at all, and return the path of report.html."""
    folder = Path(folder)
    write_json(folder / "results.json", results)
    write_bytes(folder / "table.csv", table_csv(results).encode())
    write_bytes(folder / "samples.jsonl", samples_jsonl(results).encode())
    page = folder / "report.html"
    write_bytes(page, report_html(results).encode())
    return page


def table_csv(results: Record) -> str:
    """One row for each policy, direction of the grid and reward; intervals beside each mean."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names, arcs = _objectives(results), _space(results).arc_names
    measured = [*names, "words", "tokens"]
    writer.writerow(
        ["policy", "reward", "direction", *(f"weight_{name}" for name in names), *(f"asked_{arc}" for arc in arcs)]
        + [f"{name}{end}" for name in measured for end in ("", "_low", "_high")]
        + ["on_front"]
    )
    for policy in results["policies"]:
        for direction in policy["evaluation"]["directions"]:
            for reward, objectives in direction["objectives"].items():
                found = [*(objectives[name] for name in names), direction["words"], direction["tokens"]]
                writer.writerow(
                    [policy["name"], reward, direction["direction"], *direction["weights"]]
                    + [direction["angles"].get(arc) for arc in arcs]
                    + [interval[end] for interval in found for end in ("value", "low", "high")]
                    + [direction["front"][reward]]
                )
    return out.getvalue()


def samples_jsonl(results: Record) -> str:
    """One answer a line, with its prompt, direction and scores."""
    samples = results["samples"] or {"policy": None, "questions": []}
    return "".join(
        json.dumps(
            {"policy": samples["policy"], "prompt_id": question["prompt_id"], "prompt": question["prompt"], **answer},
            ensure_ascii=False,
        )
        + "\n"
        for question in samples["questions"]
        for answer in question["answers"]
    )


def report_html(results: Record) -> str:
    """The page: self-contained, without scripts; every text of the run is escaped."""
    measured = bool(results["policies"])
    sections = [
        ("Fronts", _fronts(results) if measured else ""),
        ("Asked against achieved", _asked_against_achieved(results) if measured else ""),
        ("Listening, while it was trained", _listening(results)),
        ("The same question, several directions", _side_by_side(results)),
        ("Measures", _measures(results) if measured else ""),
        ("Cost", _ledger(results)),
        ("Reward model", _reward_model(results)),
        ("Every direction", _every_direction(results)),
        ("Configuration", _configuration(results)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    name = escape(str(results["name"]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>{name} · directional preference alignment</title>'
        f"<style>{STYLE}{series_colors(len(results['policies']))}</style></head><body><main>"
        f"<header><p class='kicker'>Directional preference alignment · dpa {escape(str(results['version']))} · "
        f"seed {escape(str(results['seed']))}</p><h1>{name}</h1>{_headline(results)}</header>{body}"
        "</main></body></html>\n"
    )


# --- sections ------------------------------------------------------------------------------------------------------


def _headline(results: Record) -> str:
    policies = results["policies"]
    if not policies:
        return "<p>No policy has been measured yet.</p>"
    first, last = policies[0], policies[-1]
    listens = last["evaluation"]["listens"]
    kind = "good" if listens["verdict"] else "bad"
    role = "status" if kind == "good" else "alert"
    verdict = f'<p class="verdict {kind}" role="{role}">{escape(listens["sentence"])}</p>'
    reward = _rewards(results)[0]
    before, after = (policy["evaluation"]["measures"][reward] for policy in (first, last))
    words = [d["words"]["value"] for d in last["evaluation"]["directions"] if d["words"]["value"] is not None]
    tiles = [
        tile(
            ratio(after["hypervolume"]["value"], before["hypervolume"]["value"]),
            f"hypervolume, {first['name']} to {last['name']}",
        ),
        tile(
            number(after["expected_utility"]["value"]),
            f"expected utility (was {number(before['expected_utility']['value'])})",
        ),
        tile(f"{number(min(words), 0)} to {number(max(words), 0)}", "words, tersest to wordiest direction"),
        *(
            tile(number(tau["value"], 2), f"Kendall tau, {arc}: asked against achieved")
            for arc, tau in after["kendall_tau"].items()
        ),
    ]
    scope = (
        f"Measured on {last['evaluation']['prompts']:,} held-out prompts ({last['evaluation']['answers']:,} answers) "
        f"by the {REWARD_TITLES.get(reward, reward)}; intervals are 95% bootstrap intervals over prompts."
    )
    return f'{verdict}<div class="tiles">{"".join(tiles)}</div><p class="note">{escape(scope)}</p>'


def _fronts(results: Record) -> str:
    space, upward = _space(results), _upward(results)
    figures = []
    for reward, arc in _panels(results):
        title = f"Fronts by {REWARD_TITLES.get(reward, reward)}: {upward} against {arc}"
        chart = line_chart(
            [
                Series(
                    policy["name"], index, _front_points(policy, reward, arc, upward, policy is results["policies"][-1])
                )
                for index, policy in enumerate(results["policies"])
            ],
            title,
            f"{arc} (mean, 0 to 100)",
            f"{upward} (mean, 0 to 100)",
            description=f"One line for each policy, one mark for each direction asked from -{space.max_angle:g} to "
            f"{space.max_angle:g} degrees, with 95% intervals; the numbers are in the table Every direction.",
        )
        figures.append(figure(chart, title))
    note = (
        "One line per policy, one mark per direction asked, crosses are 95% intervals. Up and to the right is better; "
        "the further a line reaches to both sides, the more a user can choose."
    )
    return f'<p class="note">{note}</p>{_legend(results)}<div class="figures">{"".join(figures)}</div>'


def _front_points(policy: Record, reward: str, arc: str, upward: str, labelled: bool) -> tuple[Point, ...]:
    """Achieved (arc's objective, center's objective) along the arc; `labelled`: the asked angle at both ends."""
    on_arc = _on_arc(policy, arc)
    points = []
    for place, (angle, direction) in enumerate(on_arc):
        x, y = (direction["objectives"][reward][name] for name in (arc, upward))
        if x["value"] is None or y["value"] is None:
            continue
        asked = f"{policy['name']}, asked {degrees(angle)} ({direction['direction']})"
        tooltip = f"{asked}: {arc} {spread(x)}, {upward} {spread(y)}"
        label = degrees(angle) if labelled and place in (0, len(on_arc) - 1) else ""
        points.append(Point(x["value"], y["value"], _range(x), _range(y), tooltip, label))
    return tuple(points)


def _asked_against_achieved(results: Record) -> str:
    max_angle = _space(results).max_angle
    figures = []
    for reward, arc in _panels(results):
        title = f"{arc} achieved, by {REWARD_TITLES.get(reward, reward)}"
        chart = line_chart(
            [
                Series(policy["name"], index, _achieved_points(policy, reward, arc))
                for index, policy in enumerate(results["policies"])
            ],
            title,
            f"asked: degrees from the center towards {arc}",
            f"{arc} achieved",
            description=f"One line for each policy with its 95% band. {LISTENING}",
            x_ticks=[(share * max_angle, degrees(share * max_angle)) for share in (-1, -0.5, 0, 0.5, 1)],
            band=True,
        )
        figures.append(figure(chart, title))
    return f'<p class="note">{LISTENING}</p>{_legend(results)}<div class="figures">{"".join(figures)}</div>'


def _listening(results: Record) -> str:
    section = listening_section(results["policies"])
    return section.replace("</p>", f"</p>{_legend(results)}", 1)


def _achieved_points(policy: Record, reward: str, arc: str) -> tuple[Point, ...]:
    """(asked angle, achieved mean) along the arc."""
    achieved = [(angle, direction["objectives"][reward][arc]) for angle, direction in _on_arc(policy, arc)]
    return tuple(
        Point(angle, y["value"], None, _range(y), f"{policy['name']}, asked {degrees(angle)}: {arc} {spread(y)}")
        for angle, y in achieved
        if y["value"] is not None
    )


def _side_by_side(results: Record) -> str:
    if not results["samples"] or not results["samples"]["questions"]:
        return ""
    max_angle = results["space"]["max_angle"]
    blocks = []
    for question in results["samples"]["questions"]:
        cards = []
        for answer in question["answers"]:
            towards, angle = max(answer["angles"].items(), key=lambda item: abs(item[1]))
            scores: Record = next(iter(_best_reward_first(answer["objectives"]).values()), {})
            bars = "".join(bar(name, score) for name, score in scores.items())
            cards.append(
                f'<article class="card"><header>{dial(angle, towards, max_angle)}<div>'
                f"<b>{escape(answer['direction'])}</b><span>{answer['words']:,} words</span></div></header>"
                f'<div class="answer" dir="auto" tabindex="0">{escape(answer["response"])}</div>'
                f'<dl class="bars">{bars}</dl></article>'
            )
        blocks.append(
            f'<div class="question" dir="auto" tabindex="0">{escape(question["prompt"])}</div>'
            f'<div class="cards">{"".join(cards)}</div>'
        )
    note = (
        f"Answers of {results['samples']['policy']}, the first held-out prompts in order. The dial's needle is the "
        "direction: straight up is the center, right is more of the named objective; the shaded part was trained."
    )
    return f'<p class="note">{escape(note)}</p>{"".join(blocks)}'


def _measures(results: Record) -> str:
    names = [policy["name"] for policy in results["policies"]]
    ticks = [(float(index), name) for index, name in enumerate(names)]
    figures, tables = [], []
    for reward in _rewards(results):
        title = REWARD_TITLES.get(reward, reward)
        found = [policy["evaluation"]["measures"][reward] for policy in results["policies"]]
        for measure, label in (
            ("hypervolume", "hypervolume"),
            ("cone_hypervolume", "cone hypervolume"),
        ):
            series = [
                Series(
                    names[index],
                    index,
                    (
                        Point(
                            index,
                            m[measure]["value"],
                            None,
                            _range(m[measure]),
                            f"{names[index]}: {spread(m[measure])}",
                        ),
                    ),
                )
                for index, m in enumerate(found)
                if m[measure]["value"] is not None
            ]
            if series:
                chart = line_chart(
                    series,
                    f"{label} by {title}",
                    "policy",
                    label,
                    description="One mark for each policy with its 95% interval; the numbers are in the table below.",
                    x_ticks=ticks,
                )
                figures.append(figure(chart, f"{label} by {title}"))
        tables.append(_measure_table(f"Measures by {title}, with 95% intervals", names, found))
    glossary = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in GLOSSARY.items())
    return f'<div class="figures">{"".join(figures)}</div>{"".join(tables)}<dl class="words">{glossary}</dl>'


def _measure_table(caption: str, names: Sequence[str], found: Sequence[Record]) -> str:
    rows: list[list[str | tuple[str, str]]] = []
    for measure in found[0]:
        title = measure.replace("_", " ")
        if "value" in found[0][measure]:
            rows.append([title, *(value_and_range(m[measure]) for m in found)])
            continue
        for objective in found[0][measure]:
            intervals = [m[measure][objective] for m in found]
            cells = [value_and_range(interval, 1 if measure == "span" else 2) for interval in intervals]
            if measure == "span":
                cells = [
                    (f"{value} {share}", low_high)
                    for (value, low_high), share in zip(cells, _shares(intervals), strict=True)
                ]
            rows.append([f"{title}, {objective}", *cells])
    return table(caption, ["measure", *names], rows)


def _shares(spans: Sequence[Record]) -> list[str]:
    """`(87%)` of the widest span: the published policy loses its terse end as it improves."""
    widest = max(span["value"] or 0.0 for span in spans)
    return [f"({100 * (span['value'] or 0.0) / widest:.0f}%)" if widest else "" for span in spans]


def _ledger(results: Record) -> str:
    entries = [("", stage, ledger) for stage, ledger in results["ledger"].items()]
    entries += [
        (policy["name"], stage, ledger) for policy in results["policies"] for stage, ledger in policy["ledger"].items()
    ]
    if not entries:
        return ""
    total = {
        column: (max if column == "peak_memory" else sum)(ledger.get(column, 0) for _, _, ledger in entries)
        for column in LEDGER_COLUMNS
    }
    rows = [[name, stage.replace("_", " "), *_costs(ledger)] for name, stage, ledger in entries]
    rows.append(["total", "", *_costs(total)])
    return table("What each stage cost", ["policy", "stage", *LEDGER_COLUMNS.values()], rows, total=True)


def _costs(ledger: Record) -> list[str]:
    shown = {"wall_s": duration, "peak_memory": memory}
    return [
        shown[column](ledger.get(column, 0)) if column in shown else f"{ledger.get(column, 0):,}"
        for column in LEDGER_COLUMNS
    ]


def _reward_model(results: Record) -> str:
    quality = results["reward_model"]
    if not quality:
        return ""
    columns = list(dict.fromkeys(figure for figures in quality.values() for figure in figures))
    rows = [
        [attribute, *(number(figures.get(column), None) for column in columns)]
        for attribute, figures in quality.items()
    ]
    shown = table(
        "The reward model on held-out prompts",
        ["attribute", *(column.replace("_", " ") for column in columns)],
        rows,
    )
    precision = results.get("reward_precision")
    if precision:
        tau = precision["kendall"]
        shown += (
            f"<p>In {precision['dtype']}, on {precision['rows']} held-out rows, no score is further than "
            f"{precision['largest_difference']:.2f} from fp32"
            f"{'' if tau is None else f', and Kendall’s tau within prompts is at least {tau:.3f}'}.</p>"
        )
    return shown


def _every_direction(results: Record) -> str:
    names, blocks = _objectives(results), []
    for policy in results["policies"]:
        for reward in _rewards(results):
            rows = [
                [
                    direction["direction"],
                    *(value_and_range(direction["objectives"][reward][name]) for name in names),
                    value_and_range(direction["words"]),
                    value_and_range(direction["tokens"]),
                    "yes" if direction["front"][reward] else "",
                ]
                for direction in policy["evaluation"]["directions"]
            ]
            title = f"{policy['name']}, {REWARD_TITLES.get(reward, reward)}"
            rows_table = table(title, ["direction asked", *names, "words", "tokens", "on the front"], rows)
            blocks.append(f"<details><summary>{escape(title)}</summary>{rows_table}</details>")
    return "".join(blocks)


def _configuration(results: Record) -> str:
    text = json.dumps(results["config"], indent=2, ensure_ascii=False)
    return f"<details><summary>resolved configuration</summary><pre>{escape(text)}</pre></details>"


# --- what the record says ------------------------------------------------------------------------------------------


def _objectives(results: Record) -> list[str]:
    return [objective["name"] for objective in results["space"]["objectives"]]


def _space(results: Record) -> DirectionSpace:
    return DirectionSpace.from_dict(results["space"])


def _upward(results: Record) -> str:
    """The objective on the charts' y axis: the one nearest to the center."""
    space = _space(results)
    return space.names[int(abs(space.center_K).argmax())]


def _panels(results: Record) -> list[tuple[str, str]]:
    """(reward, arc) of each chart: every arc but that of the objective that points up."""
    arcs = [arc for arc in _space(results).arc_names if arc != _upward(results)]
    return [(reward, arc) for reward in _rewards(results) for arc in arcs]


def _rewards(results: Record) -> list[str]:
    """Names of the rewards measured by, the true one first."""
    if not results["policies"]:
        return []
    return list(_best_reward_first(results["policies"][0]["evaluation"]["measures"]))


def _best_reward_first(by_reward: Record) -> dict[str, Any]:
    return dict(sorted(by_reward.items(), key=lambda item: item[0] != "gold"))


def _on_arc(policy: Record, arc: str) -> list[tuple[float, Record]]:
    """(asked angle, direction record) along an arc, in the order of the angle."""
    directions = policy["evaluation"]["directions"]
    return sorted(((d["angles"][arc], d) for d in directions if arc in d["angles"]), key=lambda item: item[0])


def _range(interval: Record) -> tuple[float, float] | None:
    return None if interval["low"] is None else (interval["low"], interval["high"])


def _legend(results: Record) -> str:
    marks = ("●", "■", "◆", "▲")  # as charts draws them
    items = "".join(
        f'<li class="s{index}"><i aria-hidden="true">{marks[index % len(marks)]}</i>{escape(policy["name"])}</li>'
        for index, policy in enumerate(results["policies"])
    )
    return f'<ul class="legend">{items}</ul>'
