"""Options that several commands take.
Run its tests: pytest tests/test_cli.py
"""

from pathlib import Path
from typing import Annotated

import typer

from dpa.core.errors import ConfigError

ConfigPath = Annotated[Path, typer.Argument(help="YAML configuration; docs/configuration.md lists every field.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: --set rollout.samples=8")
]


def overridden(overrides: list[str] | None) -> dict[str, str]:
    """Field and value of each `--set FIELD=VALUE`. Raises ConfigError."""
    pairs = {}
    for item in overrides or []:
        field, equals, value = item.partition("=")
        if not equals or not field:
            raise ConfigError(f"--set: {item!r} is not FIELD=VALUE; write for example --set rollout.samples=8.")
        pairs[field] = value
    return pairs
