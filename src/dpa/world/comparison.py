"""The comparison on the demo world: writes one world for each seed and the configuration over them, then compares.

dpa compare            is            dpa compare runs/compare-world/compare.yaml            after writing those files
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from dpa.core.compare_config import load_comparison
from dpa.recipes.compare import Comparison
from dpa.storage.tables import write_bytes
from dpa.world.demo import START_MODEL, write_world, yaml_string

RECIPE = Path(str(files("dpa.world"))) / "assets" / "compare.yaml"

QUICK = {
    "seeds": "[0]",
    "budget": "30000",
    "run.iterations": "1",
    "run.prompts.count": "16",
    "run.rollout.directions": "2",
    "run.rollout.samples": "3",
    "run.rollout.max_new_tokens": "60",
    "run.rollout.prompts_per_shard": "8",
    "run.selection.directions": "2",
    "run.reward.train.method": "ridge",
    "run.evaluate.directions": "3",
    "run.evaluate.prompts.count": "8",
    "run.evaluate.resamples": "20",
    "resamples": "50",
    "changes": "{per_direction: {selection.method: per_direction}, random_candidate: {selection.method: random}, "
    "pooled_third: {rollout.samples: 1}}",
}
"""A comparison of everything in a few minutes: it shows that all of it works, and nothing about which is better."""

QUICK_QUESTIONS, QUICK_PROMPTS = 20, 60


def write_comparison_world(
    folder: Path, out: Path, seeds: Sequence[int] = (0, 1, 2), development: bool = False, quick: bool = False
) -> Path:
    """Write a world for each seed into `folder` and return the path of the configuration over them.

    `development`: measured on other questions than the held-out ones; whoever tunes a method measures there.
    """
    for seed in seeds:
        small = {"rated_questions": QUICK_QUESTIONS, "prompts": QUICK_PROMPTS} if quick else {}
        write_world(folder / f"seed_{seed}", out, seed, development, **small)
    text = RECIPE.read_text(encoding="utf-8")
    for name, value in {"WORLD": folder, "OUT": out, "START_MODEL": START_MODEL}.items():
        text = text.replace(f"${{{name}}}", yaml_string(str(value)))
    config = folder / "compare.yaml"
    write_bytes(config, text.encode())
    return config


def compare_demo(
    out: Path,
    seeds: Sequence[int] | None = None,
    development: bool = False,
    quick: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> Path:
    """Write the worlds beside the results folder, compare everything on them, return the report's path."""
    flags = {**(QUICK if quick else {}), **(overrides or {})}
    if seeds is not None:
        flags["seeds"] = str(list(seeds))
    world = out.with_name(f"{out.name}-world")
    recipe = write_comparison_world(world, out, [0], development, quick)  # to read which seeds it asks for
    asked = load_comparison(recipe, flags).seeds
    write_comparison_world(world, out, asked, development, quick)
    return Comparison(load_comparison(recipe, flags)).run()
