"""Studies of the loop: one change at a time from the demo comparison's pooled loop, on development questions.

    python bench/studies.py [--out runs/studies] [--seeds 0,1] [--only cone,replay] [--set budget=...] [--table]

Prints one row for each variant: expected utility, hypervolumes, span and Kendall tau by the true reward, and tokens,
as means over seeds, with the difference from the unchanged loop in every seed (the same worlds, prompts and questions).
What holds over seeds becomes the default, and every row goes to docs/findings.md, failures included. Resumable.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from tune_baselines import Trial, development_config

from dpa.recipes.baselines.methods import METHODS
from dpa.recipes.compare import ComparisonJob
from dpa.recipes.job_processes import do_jobs
from dpa.storage.tables import read_json

UNCHANGED = "pooled, as configured"
VARIANTS: dict[str, dict[str, str]] = {
    UNCHANGED: {},
    "pool: 3 candidates instead of 9": {"rollout.directions": "3"},
    "pool: 3 samples of 3 directions": {"rollout.directions": "3", "rollout.samples": "3"},
    "prompts: twice as many, 5 directions served": {"prompts.count": "225", "selection.directions": "5"},
    "cone: 45 degrees in training": {"space.training_angle": "45"},
    "cone: 65 degrees in training": {"space.training_angle": "65"},
    "ends: no emphasis": {"space.training_ends": "0"},
    "arcs: no emphasis": {"space.training_arcs": "0"},
    "arcs: 0.8 of the directions": {"space.training_arcs": "0.8"},
    "replay: half as many earlier winners": {"finetune.replay": "0.5"},
    "standardised scores": {"selection.standardise": "true"},
    "iterations: 5, shorter": {"iterations": "5", "prompts.count": "66"},
    "temperature: 0.6": {"rollout.temperature": "0.6"},
    "temperature: 1": {"rollout.temperature": "1.0"},
}
"""What is changed -> fields. The policy of t = 0 is the same for all of them. The literal loop, a third of its samples,
the random control and `learner: dpo` are methods of `dpa compare`, over more seeds."""

MEASURES = ("expected_utility", "hypervolume", "cone_hypervolume")


def measured(trial: Trial) -> dict[str, Any]:
    """The last policy of a finished trial, by the true reward."""
    record = read_json(trial.folder / "job.json")
    measures = record["policies"][-1]["evaluation"]["measures"]["gold"]
    row = {name: measures[name]["value"] for name in MEASURES}
    row |= {f"span {name}": span["value"] for name, span in measures["span"].items()}
    row |= {f"tau {name}": tau["value"] for name, tau in measures["kendall_tau"].items()}
    row["tokens"] = record["cost"]["tokens_generated"] + record["cost"]["training_tokens"]
    return row


def table(config: Any, seeds: list[int], names: list[str]) -> str:
    """Markdown: means over seeds, and for the utility the difference from the unchanged loop in each seed."""
    trials = {name: [Trial(config, METHODS["pooled"], seed, VARIANTS[name]) for seed in seeds] for name in names}
    done = {name: list(map(measured, each)) for name, each in trials.items() if all(trial.done for trial in each)}
    if UNCHANGED not in done:
        return "the unchanged loop is not done yet"
    columns = list(done[UNCHANGED][0])
    lines = [f"| variant | {' | '.join(columns)} | utility against unchanged, each seed |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for name, rows in done.items():
        cells = []
        for column in columns:
            value = sum(row[column] for row in rows) / len(rows)
            cells.append(f"{value:,.0f}" if value > 1000 else f"{value:.2f}")
        against = [a["expected_utility"] - b["expected_utility"] for a, b in zip(rows, done[UNCHANGED], strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(f'{each:+.2f}' for each in against)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the variants that are not done, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--only", default="", help="comma-separated parts of variants' names")
    parser.add_argument("--set", action="append", default=[], dest="flags")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    wanted = [part.strip() for part in args.only.split(",")]
    names = [name for name in VARIANTS if name == UNCHANGED or any(part in name for part in wanted)]
    config = development_config(args.out, seeds, dict(flag.split("=", 1) for flag in args.flags))
    trials = [Trial(config, METHODS["pooled"], seed, VARIANTS[name]) for name in names for seed in seeds]
    if not args.table:
        failed = do_jobs([*(ComparisonJob(config, None, seed) for seed in seeds), *trials], args.workers, Console())
        print("\n".join(failed))
    print(table(config, seeds, names))


if __name__ == "__main__":
    main()
