"""The demo: writes the world out as plain files (rated rows, prompts, a configuration), then runs the ordinary loop.

dpa demo            is            dpa run runs/demo-world/demo.yaml            after writing those files
"""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dpa.core.config import load_config
from dpa.recipes.dpa import Loop
from dpa.storage.console import print_table
from dpa.storage.tables import read_json, write_bytes
from dpa.world.questions import Question, make_questions
from dpa.world.rated_rows import PANELS, rated_rows

RATED_QUESTIONS = 400
"""Questions each panel rates, eight answers each."""
PROMPT_COUNT = 2400
"""Questions without ratings, for the online iterations."""
HELD_OUT_QUESTIONS = 100

START_MODEL = Path(str(files("dpa.world"))) / "assets" / "start_model"
RECIPE = Path(str(files("dpa.world"))) / "assets" / "demo.yaml"


def write_world(
    folder: Path,
    out: Path,
    seed: int = 0,
    development: bool = False,
    rated_questions: int = RATED_QUESTIONS,
    prompts: int = PROMPT_COUNT,
) -> Path:
    """Write the demo's files into `folder` and return the path of its configuration.

    Held-out questions come from a seed of their own; `development` measures on others, so that whoever tunes the demo
    never looks at the held-out ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held_out = make_questions(HELD_OUT_QUESTIONS, seed=777_000 + seed)
    development_set = make_questions(HELD_OUT_QUESTIONS, seed=555_000 + seed, exclude=held_out)
    panels = list(PANELS)
    training = make_questions(rated_questions * len(panels) + prompts, seed, exclude=[*held_out, *development_set])
    for place, panel in enumerate(panels):
        asked = training[place * rated_questions : (place + 1) * rated_questions]
        _write_jsonl(folder / f"{panel}.jsonl", list(rated_rows(asked, panel, seed)))
    _write_jsonl(folder / "prompts.jsonl", _prompts(training[-prompts:]))
    _write_jsonl(folder / "held_out.jsonl", _prompts(development_set if development else held_out))
    return fill_recipe(RECIPE, folder, {"WORLD": folder, "OUT": out, "START_MODEL": START_MODEL, "SEED": seed})


def fill_recipe(recipe: Path, folder: Path, values: Mapping[str, Path | int]) -> Path:
    """Write a recipe into `folder` with its `${NAME}` filled in, and return its path."""
    text = recipe.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"${{{name}}}", str(value) if isinstance(value, int) else yaml_string(str(value)))
    write_bytes(folder / recipe.name, text.encode())
    return folder / recipe.name


def run_demo(out: Path, seed: int = 0, development: bool = False, overrides: Mapping[str, str] | None = None) -> Path:
    """Write the world beside the run folder, run the loop, show what came out; returns the report's path."""
    world = out.with_name(f"{out.name}-world")
    recipe = write_world(world, out, seed, development)
    with Loop(load_config(recipe, overrides)) as loop:
        page = loop.run(ignore_free_space=True)
        show_results(loop.console, read_json(page.with_name("results.json")))
        loop.console.print(f"the same loop, as you would run your own: dpa run {recipe}", markup=False)
        policy = loop.policy(loop.config.iterations)
        loop.console.print(f"try it: dpa chat {policy} --direction terse", markup=False)
        loop.console.print(f"report: {page}", markup=False)
    return page


def show_results(console: Console, results: Mapping[str, Any]) -> None:
    """Print a table of the iterations, by the true reward, and one question answered in several directions."""
    table = Table(
        title="On held-out questions, by the TRUE reward",
        caption="[95% bootstrap interval over questions]; hypervolume in thousands; words of the tersest and the "
        "wordiest direction; tau: Kendall's, asked angle against achieved",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    arcs = results["policies"][0]["evaluation"]["arcs"]
    for heading in ("policy", "hypervolume", "utility", "words", *(f"tau\n{arc}" for arc in arcs)):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    for policy in results["policies"]:
        measures = policy["evaluation"]["measures"]["gold"]
        words = [direction["words"]["value"] for direction in policy["evaluation"]["directions"]]
        table.add_row(
            policy["name"],
            _interval(measures["hypervolume"], per=1000),
            _interval(measures["expected_utility"], digits=1),
            f"{min(words):.0f} to {max(words):.0f}",
            *(f"{measures['kendall_tau'][arc]['value']:.2f}" for arc in arcs),
        )
    print_table(table, console)
    if (targets := results["policies"][-1]["evaluation"].get("targets")) is not None:
        errors = {name: errors["per_response"] for name, errors in targets["errors"]["gold"].items()}
        said = ", ".join(f"{name} {_interval(error, digits=1)}" for name, error in errors.items())
        console.print(f"targets, median error of one answer in points: {said}")
    question = results["samples"]["questions"][0]
    console.print(f"\n{question['prompt']}\n", markup=False)
    for answer in question["answers"]:
        console.print(f"{answer['direction']} ({answer['words']} words)", style="bold", markup=False)
        console.print(f"  {answer['response']}\n", markup=False)


def _interval(found: Mapping[str, float], per: float = 1.0, digits: int = 0) -> str:
    value, low, high = (f"{found[name] / per:,.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} \\[{low}, {high}]"


def yaml_string(text: str) -> str:
    """Escape a path for use inside a double-quoted YAML string."""
    return yaml.dump(text, default_style='"', allow_unicode=True, width=10_000).strip()[1:-1]


def _prompts(questions: list[Question]) -> list[dict]:
    return [{"id": question.question_id, "prompt": question.text} for question in questions]


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
