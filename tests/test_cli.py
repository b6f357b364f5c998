"""The command line: a user's mistake is one sentence and exit code 2; every recipe loads; the page is current.

pytest tests/test_cli.py
"""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from forks import python
from pydantic import BaseModel, Field

from dpa.__main__ import main
from dpa.cli.options import as_yaml, takes_fields
from dpa.core.compare_config import load_comparison
from dpa.core.config import load_config, parse_config, set_dotted
from dpa.core.errors import ConfigError, UserError
from dpa.core.sections.reward import RewardTrainConfig
from dpa.core.yaml_text import parse_yaml
from dpa.serve.settings import EngineSettings

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def dpa(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "dpa", *arguments, cwd=ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads(path: Path) -> None:
    load = load_comparison if path.stem.endswith("-compare") else load_config
    assert load(path).name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "policy", "--timeout", "inf"], "--timeout inf: .*finite number"),
        (["serve", "policy", "--drain", "inf"], "--drain inf: .*finite number"),
        (["generate", "policy", "Why?", "--temperature", "inf"], "temperature"),
        (["data", "x" * 300], "xxx.*: reading failed .*shorter path"),
        (["adopt", "x" * 300, "run", "-t", "1"], "xxx.*: reading failed .*shorter path"),
        (
            ["judge", "deep.json", "deep.json", "-p", "helpfulness", "--judge", "m", "--space", "dpa-v1"],
            "judge: deep.json",
        ),
        (
            ["judge", "deep.jsonl", "deep.jsonl", "-p", "helpfulness", "--judge", "m", "--space", "dpa-v1"],
            "judge: deep.js",
        ),
    ],
    ids=lambda value: " ".join(map(str, value))[:24] if isinstance(value, list) else None,
)
def test_odd_values_and_paths_are_one_sentence(tmp_path: Path, arguments: list[str], said: str) -> None:
    for name in ("deep.json", "deep.jsonl"):
        (tmp_path / name).write_text("[" * 200_000)
    result = python("-m", "dpa", *arguments, cwd=tmp_path)
    assert result.returncode == 2 and re.search(said, result.stderr), result.stderr
    assert "Traceback" not in result.stderr


def test_help_names_every_command() -> None:
    command = [sys.executable, "-m", "dpa", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for command in ("run", "demo", "ratings", "train-reward", "rollout", "score", "select", "finetune", "evaluate"):
        assert command in text
    for command in ("report", "generate", "chat"):
        assert command in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("out: x\niteration: 3\n", "did you mean `iterations`"),
        ("- a\n", "must be a mapping"),
        ("out: [\n", "not readable YAML"),
        (
            "out: x\npolicy: p\nspace: {objectives: {a: null, b: null}, max_angle: 900}\n"
            "reward: {functions: {a: m:f}}\nprompts: {path: p}\nevaluate: {prompts: {path: p}}\n",
            "space.max_angle: 900",
        ),
    ],
)
def test_a_bad_configuration_is_one_sentence_and_exit_2(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    result = dpa("run", str(file))
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_terminal_obeys_nothing_in_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fails() -> None:
        raise UserError("first: \x1b[2Jit says\x07.\nsecond: é.")

    monkeypatch.setattr("dpa.cli.commands.app", fails)
    monkeypatch.setattr("dpa.__main__._choose_how_threads_wait", lambda: None)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err == "dpa: first: \\x1b[2Jit says\\x07.\nsecond: é.\n"


def test_a_missing_file_and_a_bad_override_exit_2(tmp_path: Path) -> None:
    assert dpa("run", str(tmp_path / "none.yaml")).returncode == 2
    bad = dpa("run", str(RECIPES[0]), "--set", "rollout")
    assert bad.returncode == 2
    assert "FIELD=VALUE" in bad.stderr


def test_the_smallest_configuration_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "configuration.md").read_text(), re.DOTALL)
    fields = parse_yaml(text, "configuration.md")
    assert parse_config(fields).space.objectives.keys() == {"helpfulness", "verbosity"}
    for name in fields:
        with pytest.raises(ConfigError) if name != "ratings" else contextlib.nullcontext():
            parse_config({other: value for other, value in fields.items() if other != name})


def test_the_configuration_page_is_generated_from_the_classes() -> None:
    script = (
        "import sys; sys.path.insert(0, 'scripts'); import make_docs; print(make_docs.configuration_page(), end='')"
    )
    page = python("-c", script, cwd=ROOT).stdout
    assert page == (ROOT / "docs" / "configuration.md").read_text()
    assert all(field in page for field in RewardTrainConfig.model_fields)


def test_the_fields_of_a_settings_class_are_a_commands_options(capsys: pytest.CaptureFixture) -> None:
    """Argument, letter, default, bound, help, several values, true or false: each is said under the field alone."""

    class Oven(BaseModel):
        dish: str | None = Field(default=None, description="What is baked.")
        heat: int = Field(default=180, ge=30, le=300, description="Degrees.", json_schema_extra={"flag": "--degrees"})
        guest: list[str] = Field(default_factory=list)
        fan: bool = False

    baked: list[Oven] = []
    app = typer.Typer()
    app.command()(takes_fields(Oven, argument="dish", short={"heat": "-t"})(lambda oven: baked.append(oven)))
    app([], standalone_mode=False)
    app(["pie", "-t", "200", "--guest", "Ivy", "--guest", "Bo", "--fan"], standalone_mode=False)
    app(["--degrees", "30", "--no-fan"], standalone_mode=False)
    full = Oven(dish="pie", heat=200, guest=["Ivy", "Bo"], fan=True)
    assert baked == [Oven(), full, Oven(heat=30)]
    with pytest.raises(SystemExit) as left:
        app(["--degrees", "20"])
    assert left.value.code == 2 and "30" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        app(["--help"])
    assert "Degrees." in (shown := capsys.readouterr().out) and "180" in shown and "What is baked." in shown


def test_an_engine_is_told_what_its_gateway_was_told(capsys: pytest.CaptureFixture[str]) -> None:
    asked = EngineSettings(
        model="~/a b", name="--rows", rows=7, threads=2, remote_code_revision="c" * 40, uds="/s", port=9
    )
    assert EngineSettings.of(asked.arguments()) == asked
    assert EngineSettings.of([]) == EngineSettings() and EngineSettings().arguments() == []
    for wrong in (["--rows", "0"], ["--rows", "many"], ["--speed", "9"]):
        with pytest.raises(SystemExit) as left:
            EngineSettings.of(wrong)
        assert left.value.code == 2
    EngineSettings.of(["--rows=4"])
    with pytest.raises(SystemExit):
        EngineSettings.of(["--rows=-4"])
    assert "--rows '-4': Input should be greater than or equal to 1" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["2026", "runs/a #2", "{x}", "null", "runs/größe"])
def test_a_path_given_as_a_flag_stays_what_it_is(path: str) -> None:
    data: dict = {}
    set_dotted(data, "out", as_yaml(Path(path)))
    assert data == {"out": path}


def test_a_section_that_is_not_given_yet_takes_a_field_and_a_name_has_none() -> None:
    data = {"finetune": {"lora": None}, "space": "dpa-v1"}
    set_dotted(data, "finetune.lora.rank", "8")
    assert data["finetune"] == {"lora": {"rank": 8}}
    with pytest.raises(ConfigError, match=r"space\.max_angle: `space` is 'dpa-v1' here, which has no fields"):
        set_dotted(data, "space.max_angle", "60")
