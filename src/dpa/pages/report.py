"""Write what a run found: results.json (the record), and from it table.csv, samples.jsonl and one report.html.
Run its tests: pytest tests/test_report.py

The record, all of it JSON:
  name, seed, version     title, seed of the run, version of the package
  space                   DirectionSpace.to_dict()
  config                  the resolved configuration
  policies                in order of time: {name ("start", "t = 0", ...), evaluation (stages.evaluate.evaluate),
                          ledger {stage: Ledger as a mapping}, listening (stages.finetune.listening_curve),
                          pools (stages.pools.pool_front, or null)}; the last two may be absent
  samples                 {policy, questions (stages.evaluate.side_by_side), typical (stages.evaluate.typical_question,
                          or null, or absent)}, or null
  ledger                  {stage: Ledger as a mapping} of what is done once: train_reward
  reward_model            {attribute: {figure: number or null}}, the held-out quality; or null
  reward_precision        what the reward model loses in half precision (dpa_reward.json); or null, or absent
Every number on the page comes from the record.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpa.core.comparison import main_objective
from dpa.core.directions import DirectionSpace
from dpa.core.records import JUDGE_COSTS
from dpa.pages.achievement import achievement
from dpa.pages.charts import ramp
from dpa.pages.rendering import render
from dpa.pages.report_charts import (
    achieved_chart,
    asked_signs,
    front_chart,
    listening_charts,
    measure_chart,
    pools_charts,
    target_charts,
)
from dpa.pages.writing import listed
from dpa.storage.tables import write_bytes, write_json

LEDGER = (
    "rows",
    "rejects",
    "tokens_generated",
    "candidates_scored",
    "training_tokens",
    "wall_s",
    "peak_memory",
)

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
    space = DirectionSpace.from_dict(results["space"])
    names, arcs = space.names, space.arc_names
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
    space, policies = DirectionSpace.from_dict(results["space"]), results["policies"]
    upward = main_objective(space)
    rewards = list(_best_first(policies[0]["evaluation"]["measures"])) if policies else []
    arcs = [arc for arc in space.arc_names if arc != upward]
    signs = asked_signs(policies, space.names)
    return render(
        "report.html",
        record=results,
        names=list(space.names),
        ranges=space.ranges,
        rewards=rewards,
        colors=ramp(len(policies)),
        achievement=achievement(policies, space) if policies else None,
        typical=_typical(results["samples"]),
        fronts={
            reward: [front_chart(policies, reward, arc, upward, space.max_angle, signs) for arc in arcs]
            for reward in rewards
        },
        how_to_read=_how_to_read(upward, arcs, signs),
        achieved={
            reward: [achieved_chart(policies, reward, arc, space.max_angle) for arc in arcs] for reward in rewards
        },
        targets={reward: charts for reward in rewards if (charts := target_charts(policies, reward))},
        knowing=[policy for policy in policies if policy["evaluation"].get("targets")],
        upward=upward,
        listening=listening_charts(policies),
        pools=pools_charts(policies, arcs, upward, space.max_angle, signs),
        questions=_questions(results["samples"]),
        measures=[
            chart
            for reward in rewards
            for measure in ("hypervolume", "cone_hypervolume")
            if (chart := measure_chart(policies, reward, measure)).series
        ],
        widest={reward: _widest_spans(policies, reward) for reward in rewards},
        costs=_costs(results),
    )


def _how_to_read(upward: str, arcs: Sequence[str], signs: Mapping[str, int]) -> str:
    """Which way is better in the fronts, and that is not up and to the right where less is asked for too."""
    if all(signs[name] == 1 for name in (upward, *arcs)):
        return "Up and to the right is better."
    sides = {1: "more {} is better", -1: "less {} is better", 0: "more and less {} are asked for, so neither is better"}
    said = {side: [name for name in (upward, *arcs) if signs[name] == side] for side in sides}
    better = "; ".join(sides[side].format(listed(names)) for side, names in said.items() if names)
    wider = ": the further a line reaches to both sides, the more a user can choose" if said[0] else ""
    return f"{better[0].upper()}{better[1:]}{wider}."


def _questions(samples: Record | None) -> list[dict[str, Any]]:
    """The questions asked, each answer with its scores by the best reward, and the arc its direction leans to most."""
    questions = samples["questions"] if samples else []
    return [{**question, "answers": [_shown(answer) for answer in question["answers"]]} for question in questions]


def _typical(samples: Record | None) -> dict[str, Any] | None:
    """The question at the top, each of its answers under a heading that says what was asked for."""
    question = samples.get("typical") if samples else None
    if not question:
        return None

    def heading(angle: float) -> str:
        return f"{'more' if angle > 0 else 'less'} {question['arc']}" if angle else "the center"

    answers = [
        {**_shown(answer), "towards": question["arc"], "angle": angle, "heading": heading(angle)}
        for answer in question["answers"]
        for angle in [answer["angles"][question["arc"]]]
    ]
    return {**question, "answers": answers}


def _shown(answer: Record) -> dict[str, Any]:
    towards, angle = max(answer["angles"].items(), key=lambda item: abs(item[1]))
    by_reward = _best_first(answer["objectives"])
    reward = next(iter(by_reward), None)
    scores = by_reward[reward] if reward else {}
    return {**answer, "towards": towards, "angle": angle, "heading": "", "reward": reward, "scores": scores}


def _widest_spans(policies: Sequence[Record], reward: str) -> dict[str, float]:
    """By title (`span, verbosity`), the widest: the published policy loses its terse end as it improves."""
    spans = [policy["evaluation"]["measures"][reward]["span"] for policy in policies]
    return {f"span, {name}": max(span[name]["value"] or 0.0 for span in spans) for name in spans[0]}


def _costs(results: Record) -> list[tuple[str, str, dict[str, Any]]]:
    """(policy or "", stage, ledger) of everything that was done, and the total last."""
    of = {"": results["ledger"]} | {policy["name"]: policy["ledger"] for policy in results["policies"]}
    done = [(name, stage, ledger) for name, stages in of.items() for stage, ledger in stages.items()]
    paid = [column for column in JUDGE_COSTS if any(column in ledger.get("extra", {}) for _, _, ledger in done)]
    costs = [
        (
            name,
            stage,
            {column: ledger.get(column, 0) for column in LEDGER}
            | {column: int(ledger.get("extra", {}).get(column, 0)) for column in paid},
        )
        for name, stage, ledger in done
    ]
    ledgers = [ledger for _, _, ledger in costs]
    total = {
        column: (max if column == "peak_memory" else sum)(ledger[column] for ledger in ledgers)
        for column in ((*LEDGER, *paid) if costs else ())
    }
    return [*costs, ("total", "", total)] if costs else []


def _best_first(by_reward: Record) -> dict[str, Any]:
    """The true reward before the model's."""
    return dict(sorted(by_reward.items(), key=lambda item: item[0] != "gold"))
