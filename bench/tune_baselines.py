"""Tuning: as many trials for every method of `dpa compare`, on development questions, never the held-out ones.

    python bench/tune_baselines.py [--out runs/tune] [--methods steerlm,ric] [--trials 0,3] [--set budget=...] [--table]

A method that stands on another's training does in its trials what that one's have trained, where both are named.
A trial is a few of the method's settings; the best is the one with the highest expected utility by the true reward (for
methods that know no direction: the highest helpfulness along the center, which is all they can be asked for). Four
trials a method, three where nothing is sampled. Resumable, as everything; `--table` prints the trials that are done.
What came out is in docs/findings.md, the best settings in world/assets/compare.yaml.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from dpa.core.compare_config import CompareConfig, load_comparison
from dpa.core.config import RunConfig, parse_config, set_dotted
from dpa.core.config_identity import resolved
from dpa.recipes.baselines.methods import METHODS
from dpa.recipes.compare import ComparisonJob
from dpa.recipes.job_processes import do_jobs
from dpa.storage.tables import read_json
from dpa.world.comparison import write_recipe, write_worlds


def common(rate: str, rows: str = "2", temperature: str = "1.0") -> dict[str, str]:
    """The fields that are tuned for every method."""
    return {
        "finetune.learning_rate": rate,
        "finetune.packed_rows_per_step": rows,
        "rollout.temperature": temperature,
    }


COMMON = [common("4.0e-3", rows="4"), common("4.0e-3"), common("2.0e-3"), common("2.0e-3", temperature="0.8")]
# At equal budget: 9 candidates are 3 under each of 3 directions, or, as the paper draws one direction for a prompt, 9
# under one, of as many more prompts as the rows not trained on pay for.
ONE = {"rollout.directions": "1", "rollout.samples": "9", "finetune.epochs": "1", "prompts.count": "445"}
TRIALS: dict[str, list[dict[str, str]]] = {
    **dict.fromkeys(METHODS, COMMON),
    "per_direction": [common("4.0e-3") | ONE, *COMMON[1:]],
    "sft": COMMON[:3],
    "dpo": [
        common(before) | {"dpo.learning_rate": rate}
        for before, rate in (("4.0e-3", "5.0e-5"), ("4.0e-3", "1.5e-4"), ("2.0e-3", "1.5e-4"))
    ],
    "online_dpo": [
        common("2.0e-3", temperature=temperature) | {"dpo.learning_rate": rate}
        for temperature, rate in (("1.0", "5.0e-5"), ("1.0", "1.5e-4"), ("1.0", "5.0e-4"), ("0.8", "5.0e-5"))
    ],
    "modpo": [
        common(before) | {"dpo.learning_rate": rate, "dpo.beta": beta}
        for before, rate, beta in (
            ("4.0e-3", "5.0e-5", "0.1"),
            ("4.0e-3", "1.5e-4", "0.1"),
            ("4.0e-3", "5.0e-4", "0.1"),
            ("4.0e-3", "1.5e-4", "0.3"),
        )
    ],
    "moc": [
        {"grpo.learning_rate": rate, "rollout.temperature": temperature, "grpo.warmup": "0"}
        for rate, temperature in (("2.5e-4", "1.0"), ("1.0e-3", "1.0"), ("4.0e-3", "1.0"), ("1.0e-3", "0.8"))
    ],
}
"""Method -> its trials, each a few fields of the run; the others are those of world/assets/compare.yaml."""
AS_POOLED = ("pooled_third", "random_candidate")
"""They run with what is best for `pooled`."""


@dataclass(frozen=True)
class Trial(ComparisonJob):
    """A job whose settings differ in a few fields."""

    changes: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The changes, for people and as a folder's name."""
        return ",".join(f"{name.split('.')[-1]}={value}" for name, value in self.changes.items()) or "as configured"

    @property
    def folder(self) -> Path:
        """Beside the other trials of its method."""
        return Path(self.config.out) / f"seed_{self.seed}" / f"{self.place} {self.label}"

    @property
    def ground(self) -> ComparisonJob | None:
        """The same trial of the method it stands on, where that one has it."""
        below = super().ground
        same = below is not None and below.method is not None and self.changes in TRIALS[below.method.name]
        return below if same else None

    @property
    def settings(self) -> RunConfig:
        """The method's configuration, changed."""
        data = resolved(super().settings)
        for name, value in self.changes.items():
            set_dotted(data, name, value)
        return parse_config(data)

    @property
    def name(self) -> str:
        """For people."""
        return f"seed {self.seed}, {self.place} {self.label}"


def row(trial: Trial) -> dict[str, Any]:
    """What a finished trial came to, by the true reward."""
    record = read_json(trial.folder / "job.json")
    evaluation = record["policies"][-1]["evaluation"]
    measures = evaluation["measures"]["gold"]
    center = max(evaluation["directions"], key=lambda direction: direction["weights"][0])
    return {
        "utility": measures["expected_utility"]["value"],
        "center": center["objectives"]["gold"]["helpfulness"]["value"],
        "volume": measures["hypervolume"]["value"] / 1000,
        "tau": [round(tau["value"], 2) for tau in measures["kendall_tau"].values()],
        "tokens": record["cost"]["tokens_generated"] + record["cost"]["training_tokens"],
        "seconds": record["cost"]["wall_s"],
        "arc": [
            [round(direction["objectives"]["gold"][name]["value"], 1) for name in ("verbosity", "helpfulness")]
            for direction in evaluation["directions"]
            if "verbosity" in direction["angles"]
        ],
    }


def table(trials: list[Trial]) -> str:
    """Markdown, the best of each method marked."""
    done = [(trial, row(trial)) for trial in trials if trial.done]
    lines = [
        "| method | trial | seeds | expected utility | helpfulness, center | hypervolume / 1000 | tau | tokens | s |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for method in dict.fromkeys(trial.method.name for trial, _ in done if trial.method):
        by_label: dict[str, list[dict[str, Any]]] = {}
        for trial, found in done:
            if trial.method == METHODS[method]:
                by_label.setdefault(trial.label, []).append(found)
        key = "center" if METHODS[method].point else "utility"
        means = {label: sum(f[key] for f in found) / len(found) for label, found in by_label.items()}
        for label, found in by_label.items():
            cells = [sum(f[name] for f in found) / len(found) for name in ("utility", "center", "volume")]
            mark = " **best**" if means[label] == max(means.values()) else ""
            cost = sum(f["tokens"] for f in found) / len(found), sum(f["seconds"] for f in found) / len(found)
            lines.append(
                f"| {method} | {label}{mark} | {len(found)} | {cells[0]:.2f} | {cells[1]:.1f} | {cells[2]:.0f} | "
                f"{found[0]['tau']} | {cost[0]:,.0f} | {cost[1]:.0f} |"
            )
    return "\n".join(lines)


def development_config(out: Path, seeds: list[int], flags: dict[str, str]) -> CompareConfig:
    """The demo comparison's configuration over worlds that are measured on development questions."""
    world = out.with_name(f"{out.name}-world")
    config = load_comparison(write_recipe(world, out), {**flags, "seeds": str(seeds)})
    write_worlds(world, out, seeds, development=True)
    return config


def main() -> None:
    """Run the trials that are not done, print the table."""
    tuned = [name for name, method in METHODS.items() if method.by_default and name not in AS_POOLED]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    parser.add_argument("--methods", default=",".join(tuned))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[], dest="flags")
    parser.add_argument("--trials", help="comma-separated places in each method's list of trials")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--arcs", action="store_true", help="print (verbosity, helpfulness) along the arc, too")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    config = development_config(args.out, seeds, dict(flag.split("=", 1) for flag in args.flags))
    config = config.model_copy(update={"methods": args.methods.split(",")})
    places = [int(place) for place in args.trials.split(",")] if args.trials else range(len(COMMON))
    trials = [
        Trial(config, METHODS[method], seed, TRIALS[method][place])
        for place in places
        for method in args.methods.split(",")
        if place < len(TRIALS[method])
        for seed in seeds
    ]
    if not args.table:
        failed = do_jobs([*(ComparisonJob(config, None, seed) for seed in seeds), *trials], args.workers, Console())
        print("\n".join(failed))
    print(table(trials))
    if args.arcs:
        for trial in trials:
            if trial.done:
                print(trial.name, row(trial)["arc"])


if __name__ == "__main__":
    main()
