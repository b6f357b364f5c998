"""`~` in a path given to any command is the home folder, also where the shell leaves it alone.
pytest tests/test_home.py
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpa.cli.commands import app
from dpa.cli.home import PATHS_AS_TEXT, with_home
from dpa.core.errors import ConfigError

NO_PATHS = {
    *("overrides", "shard", "prompt", "direction", "upstream", "upstream_model", "name", "host", "allow_host"),
    *("remote_code_revision", "directions", "form", "format", "bake", "preset", "hub_id", "preference", "judge_model"),
    *("base_url", "seeds", "device", "split", "prompt_column", "response_column", "mark"),
}
"""Texts of commands that hold no path. A new text is either in PATHS_AS_TEXT or named here."""

COMMANDS: dict[str, Callable[..., Any]] = {
    command.callback.__name__: command.callback
    for part in (app, *(group.typer_instance for group in app.registered_groups))
    for command in part.registered_commands
}


def test_every_text_of_a_command_is_a_path_or_known_to_be_none() -> None:
    assert {"run", "generate", "serve", "export", "judge", "estimate", "doctor"} <= COMMANDS.keys()
    for name, command in COMMANDS.items():
        for parameter in inspect.signature(command).parameters.values():
            if "str" in str(parameter.annotation):
                assert parameter.name in PATHS_AS_TEXT | NO_PATHS, (name, parameter.name)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_writes_the_home_folder_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ivy")
    signature, got = inspect.signature(COMMANDS[name]), {}

    def stand_in(**given: Any) -> None:
        got.update(given)

    asked = {}
    for parameter in signature.parameters.values():
        many = "list[" in str(parameter.annotation)
        if parameter.name in PATHS_AS_TEXT or "Path" in str(parameter.annotation):
            value = "~/x" if parameter.name in PATHS_AS_TEXT else Path("~/x")
            asked[parameter.name] = [value] if many else value
    with_home(stand_in)(**asked, prompt="~/x is a path")
    assert {str(value[0] if isinstance(value, list) else value) for key, value in got.items() if key in asked} == {
        "/home/ivy/x"
    }
    assert got["prompt"] == "~/x is a path"
    assert hasattr(COMMANDS[name], "__wrapped__"), "it was registered through dpa.cli.home.Commands"


def test_a_home_nobody_has_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"^config: .* no home folder is known"):
        app(["ratings", "~nobody-of-that-name/x.yaml"], standalone_mode=False)
