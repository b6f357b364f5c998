"""Options that several commands take.
Run its tests: pytest tests/test_cli.py
"""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dpa.core.errors import ConfigError
from dpa.serve.settings import flag_of, flaws_of

Settings = TypeVar("Settings", bound=BaseModel)

ConfigPath = Annotated[Path, typer.Argument(help="YAML configuration; docs/configuration.md lists every field.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: --set rollout.samples=8")
]
Temperature = Annotated[float, typer.Option(help="Softmax temperature.", min=0.01, max=100)]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]


def overridden(overrides: list[str] | None) -> dict[str, str]:
    """Field and value of each `--set FIELD=VALUE`. Raises ConfigError."""
    pairs = {}
    for item in overrides or []:
        field, equals, value = item.partition("=")
        if not equals or not field:
            raise ConfigError(f"--set: {item!r} is not FIELD=VALUE; write for example --set rollout.samples=8.")
        pairs[field] = value
    return pairs


def as_yaml(value: int | Path) -> str:
    """The value of a flag as `--set` takes it: a path stays what it is, whatever YAML makes of `2026` or ` #`."""
    return json.dumps(str(value), ensure_ascii=False) if isinstance(value, Path) else str(value)


def check_unused(context: typer.Context, what: str, *names: str) -> None:
    """No parameter is given that `what` would not look at. Raises ConfigError."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            flag = next((flag for flag in parameter.opts if flag.startswith("--")), parameter.name.upper())
            raise ConfigError(f"{what} does not use {flag}; leave it out.")


def check_new_folder(out: Path) -> None:
    """What a command writes as a whole folder would replace what lies there. Raises ConfigError."""
    try:
        taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        from dpa.storage.tables import disk_error

        raise disk_error(error, out, "looking at it") from None
    if taken:
        raise ConfigError(f"--out: {out} exists, and it would be replaced as a whole; choose a new folder.")


def takes_fields(
    kind: type[Settings], argument: str, short: dict[str, str]
) -> Callable[[Callable[[Settings], None]], Callable[..., None]]:
    """A command whose options are the fields of a settings class, which its function takes; `argument` names the field
    that is given by its place, `short` has the letters of those that have one.
    """

    def parameter(name: str, field: FieldInfo) -> inspect.Parameter:
        if name == argument:
            info = typer.Argument(help=field.description)
        else:
            bounds = ((item, sign, edge) for item in field.metadata for sign, edge in _EDGES)
            edges = {edge: getattr(item, sign) for item, sign, edge in bounds if hasattr(item, sign)}
            flags = [] if field.annotation is bool else [flag_of(name, field)]  # typer's own: --clamp/--no-clamp
            info = typer.Option(*flags, *filter(None, [short.get(name)]), help=field.description, **edges)
        default = field.get_default(call_default_factory=True)
        annotation = Annotated[field.annotation, info]  # type: ignore[name-defined]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def wrap(function: Callable[[Settings], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            try:
                settings = kind(**given)
            except ValidationError as error:  # what typer lets pass, such as inf
                raise ConfigError(f"{flaws_of(error, kind)}.") from None
            function(settings)

        parameters = [parameter(name, field) for name, field in kind.model_fields.items()]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return wrap


_EDGES = (("ge", "min"), ("le", "max"))
