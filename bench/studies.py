"""Studies of the loop: one change at a time from the demo comparison's pooled loop, on development questions.

    python bench/studies.py [--out runs/studies] [--seeds 0,1] [--only cone,replay] [--set budget=...] [--table]

Prints one row for each variant: expected utility, hypervolumes, span, Kendall tau and the largest jump between
neighbouring directions by the true reward, errors of targets where they are trained, and tokens, as means over seeds,
with the difference from the unchanged loop in every seed (the same worlds, prompts and questions). What holds over
seeds becomes the default, and every row goes to docs/findings.md, failures included. Resumable.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from tune_baselines import Trial, development_config

from dpa.core.compare_config import CompareConfig
from dpa.recipes.baselines.methods import METHODS
from dpa.recipes.compare import ComparisonJob
from dpa.recipes.job_processes import do_jobs
from dpa.storage.tables import read_json


class Variant(NamedTuple):
    """`changes` of the online iterations. `offline`: of the whole run, so of the policy of t = 0 too, which those with
    the same share."""

    changes: Mapping[str, str] = {}
    offline: Mapping[str, str] = {}


def by_utility(utility: str, augmentation: str = "0.01") -> dict[str, str]:
    """The fields of a selection by another utility."""
    return {"selection.utility": utility, "selection.augmentation": augmentation}


def whole(fields: Mapping[str, str]) -> dict[str, str]:
    """Fields of a run as those of the comparison's configuration."""
    return {f"run.{name}": value for name, value in fields.items()}


RAY, CHEBYSHEV = by_utility("ray"), by_utility("chebyshev")
TARGETS, MORE_TARGETS = {"selection.targets": "0.25"}, {"selection.targets": "0.5"}
UNCHANGED = "pooled, as configured"
VARIANTS = {
    UNCHANGED: Variant(),
    "utility: ray, everywhere": Variant(RAY, whole(RAY)),
    "utility: ray at t = 0 only": Variant(by_utility("linear"), whole(RAY)),
    "utility: ray from t = 1 on": Variant(RAY),
    "utility: ray mixed with linear, everywhere": Variant(by_utility("ray", "1"), whole(by_utility("ray", "1"))),
    "utility: chebyshev, everywhere": Variant(CHEBYSHEV, whole(CHEBYSHEV)),
    "utility: chebyshev at t = 0 only": Variant(by_utility("linear"), whole(CHEBYSHEV)),
    "utility: chebyshev from t = 1 on": Variant(CHEBYSHEV),
    "targets: a quarter of the rows, everywhere": Variant(TARGETS, whole(TARGETS)),
    "targets: half of the rows, everywhere": Variant(MORE_TARGETS, whole(MORE_TARGETS)),
    "contrastive: weight 0.3, half of the rows": Variant({"finetune.contrastive": "0.3", "prompts.count": "60"}),
    "pool: 3 candidates instead of 9": Variant({"rollout.directions": "3"}),
    "pool: 3 samples of 3 directions": Variant({"rollout.directions": "3", "rollout.samples": "3"}),
    "prompts: twice as many, 5 directions served": Variant({"prompts.count": "225", "selection.directions": "5"}),
    "cone: 45 degrees in training": Variant({"space.training_angle": "45"}),
    "cone: 65 degrees in training": Variant({"space.training_angle": "65"}),
    "ends: no emphasis": Variant({"space.training_ends": "0"}),
    "arcs: no emphasis": Variant({"space.training_arcs": "0"}),
    "arcs: 0.8 of the directions": Variant({"space.training_arcs": "0.8"}),
    "replay: half as many earlier winners": Variant({"finetune.replay": "0.5"}),
    "standardised scores": Variant({"selection.standardise": "true"}),
    "iterations: 5, shorter": Variant({"iterations": "5", "prompts.count": "66"}),
    "temperature: 0.6": Variant({"rollout.temperature": "0.6"}),
    "temperature: 1": Variant({"rollout.temperature": "1.0"}),
}
"""What is changed -> fields. The literal loop, a third of its samples, the random control and `learner: dpo` are
methods of `dpa compare`, over more seeds."""

MEASURES = ("expected_utility", "hypervolume", "cone_hypervolume")


def measured(trial: Trial) -> dict[str, Any]:
    """The last policy of a finished trial, by the true reward."""
    record = read_json(trial.folder / "job.json")
    evaluation = record["policies"][-1]["evaluation"]
    measures = evaluation["measures"]["gold"]
    row = {name: measures[name]["value"] for name in MEASURES}
    row |= {f"span {name}": span["value"] for name, span in measures["span"].items()}
    row |= {f"tau {name}": tau["value"] for name, tau in measures["kendall_tau"].items()}
    row |= {f"jump {name}": jump["value"] for name, jump in measures["largest_jump"].items()}
    for name, error in evaluation.get("targets", {"errors": {"gold": {}}})["errors"]["gold"].items():
        row |= {f"error {name}, {of}": error[of]["value"] for of in ("per_target", "per_response")}
    row["tokens"] = record["cost"]["tokens_generated"] + record["cost"]["training_tokens"]
    return row


def trials_of(configs: Mapping[str, CompareConfig], seeds: list[int]) -> dict[str, list[Trial]]:
    """The trials of each variant, one a seed."""
    return {
        name: [Trial(config, METHODS["pooled"], seed, dict(VARIANTS[name].changes)) for seed in seeds]
        for name, config in configs.items()
    }


def table(trials: Mapping[str, list[Trial]]) -> str:
    """Markdown: means over seeds, and for the utility the difference from the unchanged loop in each seed."""
    done = {name: list(map(measured, each)) for name, each in trials.items() if all(trial.done for trial in each)}
    if UNCHANGED not in done:
        return "the unchanged loop is not done yet"
    columns = list(dict.fromkeys(column for rows in done.values() for column in rows[0]))
    lines = [f"| variant | {' | '.join(columns)} | utility against unchanged, each seed |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for name, rows in done.items():
        cells = []
        for column in columns:
            if column not in rows[0]:
                cells.append("")
                continue
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
    flags = dict(flag.split("=", 1) for flag in args.flags)
    wanted = [part.strip() for part in args.only.split(",")]
    names = [name for name in VARIANTS if name == UNCHANGED or any(part in name for part in wanted)]
    offline = {str(sorted(VARIANTS[name].offline.items())): VARIANTS[name].offline for name in names}
    folders = {key: args.out / ("-".join(fields.values()) or "as-configured") for key, fields in offline.items()}
    shared = {key: development_config(folders[key], seeds, flags | dict(offline[key])) for key in offline}
    trials = trials_of({name: shared[str(sorted(VARIANTS[name].offline.items()))] for name in names}, seeds)
    if not args.table:
        first = [ComparisonJob(config, None, seed) for config in shared.values() for seed in seeds]
        failed = do_jobs([*first, *(trial for each in trials.values() for trial in each)], args.workers, Console())
        print("\n".join(failed))
    print(table(trials))


if __name__ == "__main__":
    main()
