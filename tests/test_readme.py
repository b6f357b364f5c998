"""What README shows is so: its commands are run in order, as a user would, on a toy run; its Python gives what it says.
Run: pytest tests/test_readme.py

A command of `dpa` that is added to README is run here without further ado. It belongs into ALTERED where it takes
something to be small (arguments added to it, or text for its standard input), and into CHECKED where it cannot be run
offline in seconds, with how it is checked instead.
"""

import json
import re
import shlex
import subprocess
import tomllib
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from obedient_policy import save_obedient_policy
from tiny_models import save_tiny_model
from typer.testing import CliRunner

from dpa.cli.commands import app
from dpa.world.questions import read_question

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FENCE = re.compile(r"```(\w*)\n(.*?)```", flags=re.DOTALL)
BLOCKS = {kind: [text for found, text in FENCE.findall(README) if found == kind] for kind in ("bash", "python")}
COMMANDS = [
    command.strip()
    for block in BLOCKS["bash"]
    for line in block.splitlines()
    for command in shlex.join(shlex.split(line, comments=True)).replace("'&&'", "&&").split("&&")
]


def make_resolves(command: str) -> None:
    """Each target exists and what it stands on too."""
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def installs_what_is_here(command: str) -> None:
    """The version is the one `make install` takes, the extra one of the project's."""
    *_, asked = shlex.split(command)
    extra = asked.removeprefix(".").strip("[]")
    if asked.startswith("."):
        assert not extra or extra in PROJECT["optional-dependencies"]
    else:
        assert f"TORCH ?= {asked}\n" in (ROOT / "Makefile").read_text()


def is_the_environment_of_make(command: str) -> None:
    assert "VENV ?= .venv\n" in (ROOT / "Makefile").read_text()


def is_understood(command: str) -> None:
    """Its own parser takes every argument; what it does is run elsewhere."""
    program: Any = typer.main.get_command(app)
    name, *arguments = shlex.split(command)[1:]
    program.commands[name].make_context(name, arguments)


CHECKED: dict[str, Callable[[str], None]] = {
    "make ": make_resolves,  # demo: minutes; test: would start itself
    "pip install ": installs_what_is_here,  # asks the network
    "python3 -m venv .venv": is_the_environment_of_make,
    ". .venv/bin/activate": is_the_environment_of_make,
    "dpa serve ": is_understood,  # stays; tests/test_serve.py starts it
    "dpa judge ": is_understood,  # asks a judge; tests/test_judge.py has one
    "dpa push ": is_understood,  # asks the network; tests/test_ecosystem_cli.py has a fake
    "dpa compare ": is_understood,  # minutes; tests/test_compare.py runs one
}
"""How a command starts -> how it is checked instead of run."""

ALTERED: dict[str, tuple[list[str], str | None]] = {
    "dpa init ": (["--policy", "start", "--out", "written.yaml"], None),  # my.yaml here is smaller than it would be
    "dpa chat ": ([], "Who are you?\n/direction wordy\n/quit\n"),
    "dpa generate runs/my": (["--max-new-tokens", "4"], None),
    "dpa export ": (["--max-new-tokens", "4"], None),
    "dpa data ": (["--keep-cut"], None),  # answers of four tokens are all cut
}
"""How a command starts -> (arguments that make it small, what is typed into it)."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands: a my.yaml of toy size, a demo that obeys, and the files that README's commands name."""
    save_tiny_model(tmp_path / "start")
    save_obedient_policy(tmp_path / "runs" / "demo" / "iter_3" / "policy")
    rows = [
        {"prompt": f"Why {p}?", "response": "so " * (n + 1), "helpfulness": p % 5, "verbosity": 2 * n}
        for p in range(40)
        for n in range(2)
    ]
    write_lines(tmp_path / "my.jsonl", rows)
    write_lines(tmp_path / "prompts.jsonl", [{"id": f"q{n}", "prompt": f"And why {n}?"} for n in range(2)])
    write_lines(tmp_path / "held_out.jsonl", [{"id": "h0", "prompt": "And how?"}])
    (tmp_path / "questions.json").write_text(json.dumps([{"instruction": "Why?", "dataset": "toy"}]))
    config = {
        "out": "runs/my",
        "iterations": 1,
        "policy": "start",
        "space": {
            "objectives": {"helpfulness": None, "verbosity": None},
            "presets": {"terse": {"helpfulness": 0.75, "verbosity": -0.66}, "full": "40deg", "wordy": "40deg"},
        },
        "ratings": [{"path": "my.jsonl", "scales": {"helpfulness": [0, 4], "verbosity": [0, 4]}}],
        "reward": {"train": {"backbone": "start", "method": "ridge", "max_length": 64, "allow_worse_than_mean": True}},
        "prompts": {"path": "prompts.jsonl"},
        "rollout": {"directions": 2, "samples": 1, "max_new_tokens": 4},
        "finetune": {"max_length": 256, "optimizer": "adamw"},
        "evaluate": {"prompts": {"path": "held_out.jsonl"}, "directions": 3, "resamples": 5},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def said_by(command: str) -> str:
    """What `dpa` writes; it must end well."""
    more, typed = next((how for start, how in ALTERED.items() if command.startswith(start)), ([], None))
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], *more], input=typed)
    assert result.exit_code == 0, f"{command}: {result.exception or result.output}"
    return result.output


def test_every_command_of_the_readme_works_in_its_order(here: Path) -> None:
    for command in COMMANDS:
        check = next((check for start, check in CHECKED.items() if f"{command} ".startswith(start)), None)
        if check is not None:
            check(command)
            continue
        assert command.startswith("dpa "), f"{command}: say in CHECKED how it is to be checked"
        answer = said_by(command)
        if question := read_question(" ".join(shlex.split(command)[3:4])):
            assert f"It lives by the {dict(question.card)['home']}." in answer, "it answers from its notes"


def test_what_the_demo_is_asked_carries_its_notes() -> None:
    asked = [shlex.split(command) for command in COMMANDS if command.startswith("dpa generate runs/demo")]
    assert asked and all(read_question(words[3]) for words in asked)


def test_every_command_that_the_readme_names_is_one() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    code = [*BLOCKS["bash"], *re.findall(r"`[^`\n]+`", FENCE.sub("", README))]
    named = set(re.findall(r"\bdpa ([a-z]+(?:-[a-z]+)*)", "\n".join(code)))
    assert {"run", "generate"} <= named <= set(known)


def test_the_python_of_the_readme_runs_and_gives_what_its_comments_say(here: Path) -> None:
    plain, trained = BLOCKS["python"]
    known: dict = {}
    exec(plain, known)
    space, direction = known["space"], known["direction"]
    assert "weighted rating = helpfulness*80 + verbosity*-60" in space.prompt(direction)
    assert known["winners_PD"].shape == (5, 9)
    for form in re.findall(r'or (\{[^}]*\}|"-\d+deg")', plain):
        assert np.allclose(space.parse(literal_eval(form)).weights, direction.weights, atol=0.01)
    known = {}
    exec(trained, known)
    assert known["answer"].tokens > 0 and (here / "runs/my/report.html").is_file()
