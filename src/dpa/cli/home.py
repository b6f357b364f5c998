"""`~` in a path given to a command. A shell writes it out at the start of a word only: not in `--out=~/runs/x`.
Run its tests: pytest tests/test_home.py
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from dpa.core.errors import ConfigError
from dpa.core.sections.section import expand_home

PATHS_AS_TEXT = frozenset({"model", "reward", "base", "space", "first", "second", "run", "files", "policy"})
"""Parameters that are text because they may also name something that is no path (a Hub id, a published space)."""


class Commands(typer.Typer):
    """A typer app whose commands get every path with its `~` written out."""

    def command(self, *arguments: Any, **fields: Any) -> Callable[[Callable[..., Any]], Any]:
        """As typer's; the function is wrapped."""
        register = super().command(*arguments, **fields)
        return lambda function: register(with_home(function))


def with_home(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same command: Path arguments, and those in PATHS_AS_TEXT, have their `~` written out. Raises ConfigError."""

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        return function(**{name: _written_out(name, value) for name, value in given.items()})

    return command


def _written_out(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_written_out(name, item) for item in value]
    is_path = isinstance(value, Path) or (isinstance(value, str) and name in PATHS_AS_TEXT)
    if not is_path or not str(value).startswith("~"):
        return value
    try:
        return type(value)(expand_home(str(value)))
    except ValueError as error:
        raise ConfigError(f"{name}: {str(value)!r} is not accepted; {error}.") from None
