"""The comparison on the demo world: writes one world for each seed and the configuration over them, then compares.

dpa compare            is            dpa compare runs/compare-world/compare.yaml            after writing those files
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from dpa.core.compare_config import load_comparison
from dpa.recipes.compare import Comparison
from dpa.world.demo import START_MODEL, fill_recipe, write_world

RECIPE = Path(str(files("dpa.world"))) / "assets" / "compare.yaml"

QUICK = {
    "seeds": "[0]",
    "budget": "16000",
    "run.iterations": "1",
    "run.prompts.count": "8",
    "run.rollout.max_new_tokens": "60",
    "run.rollout.prompts_per_shard": "4",
    "run.selection.directions": "3",
    "run.reward.train.method": "ridge",
    "run.reward.train.allow_worse_than_mean": "true",
    "run.evaluate.directions": "3",
    "run.evaluate.prompts.count": "8",
    "run.evaluate.resamples": "20",
    "resamples": "50",
    "changes.pooled": "{}",
    "changes.random_candidate": "{selection.method: random}",
    "changes.pooled_third": "{prompts.count: 3, selection.directions: 8}",
    "changes.soups": "{rollout.directions: 1}",
    "changes.mod": "{rollout.directions: 1}",
    "changes.moc": "{rollout.directions: 1, rollout.samples: 4}",
    "changes.scalar_rsf": "{rollout.directions: 1}",
}
"""A comparison of everything in a few minutes: it shows that all of it works, and nothing about which is better."""

QUICK_QUESTIONS, QUICK_PROMPTS = 20, 60


def write_recipe(folder: Path, out: Path) -> Path:
    """Write the configuration over the worlds in `folder` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    return fill_recipe(RECIPE, folder, {"WORLD": folder, "OUT": out, "START_MODEL": START_MODEL})


def write_worlds(folder: Path, out: Path, seeds: Sequence[int], development: bool = False, quick: bool = False) -> None:
    """Write a world for each seed into `folder`/seed_<seed>.

    `development`: measured on other questions than the held-out ones; whoever tunes a method measures there.
    """
    small = {"rated_questions": QUICK_QUESTIONS, "prompts": QUICK_PROMPTS} if quick else {}
    for seed in seeds:
        write_world(folder / f"seed_{seed}", out, seed, development, **small)


def compare_demo(
    out: Path, development: bool = False, quick: bool = False, overrides: Mapping[str, str] | None = None
) -> Path:
    """Write the worlds beside the results folder, compare everything on them, return the report's path."""
    flags = {**(QUICK if quick else {}), **(overrides or {})}
    world = out.with_name(f"{out.name}-world")
    recipe = write_recipe(world, out)
    config = load_comparison(recipe, flags)
    comparison = Comparison(config)
    write_worlds(world, out, config.seeds, development, quick)
    return comparison.run()
