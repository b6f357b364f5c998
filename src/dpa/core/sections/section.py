"""What every section of a configuration is made of: its base class, paths, numbers, servers.
Run its tests: pytest tests/test_config.py
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from dpa.core.direction_text import shown


def expand_home(text: str) -> str:
    """A path, or a Hub id, with the home folder written out for a leading `~`. ValueError where it can be no path."""
    if not text.strip():
        raise ValueError("give a path")
    if "\x00" in text:
        raise ValueError("a path holds no NUL")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError("no home folder is known for it; write the whole path, or ./ before a name with ~") from None


PathText = Annotated[str, AfterValidator(expand_home)]
"""A field that may hold a path: `~` is written out here, once, so that nothing below the configuration meets it."""
MixedBf16 = Annotated[
    bool | Literal["auto"],
    Field(
        description="Compute in bf16: on a card that supports it always; on a processor false: never; true: yes; "
        "auto: where it has units for it, since others are many times slower with it."
    ),
]


def _read_as_numbers(given: Any, found: Any) -> Any:
    """The first true or false of what was given that became a number; None where there is none."""
    if isinstance(given, bool):
        return given if isinstance(found, int | float) and not isinstance(found, bool) else None
    pairs: list[tuple[Any, Any]] = []
    if isinstance(given, Mapping) and isinstance(found, Mapping):
        pairs = [(value, found.get(name)) for name, value in given.items()]
    elif isinstance(given, list | tuple) and isinstance(found, list | tuple):
        pairs = list(zip(given, found, strict=False))
    return next((odd for pair in pairs if (odd := _read_as_numbers(*pair)) is not None), None)


class Section(BaseModel):
    """Fields that are all known, do not change, and hold no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_truth_for_a_number(cls, given: Any, read: ValidatorFunctionWrapHandler) -> Any:
        """YAML makes true of `yes` and `on`; it is not 1."""
        found = read(given)
        if (odd := _read_as_numbers(given, found)) is not None:
            raise ValueError(f"write a number, not {odd} (YAML reads yes, no, on and off as true and false)")
        return found


def is_address(text: str) -> bool:
    """Whether this is the address of a server."""
    try:
        parts = urlsplit(text)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        return whole and text.isprintable() and " " not in text
    except ValueError:  # a port beyond 65535, half a bracket
        return False


class ServersConfig(Section):
    """Servers, and how they are asked."""

    servers: list[str] = Field(default_factory=list, description="Base addresses, such as http://gpu1:8000/v1.")
    in_flight: int = Field(8, ge=1, description="Requests in flight at each server.")
    request_s: float = Field(120.0, gt=0, description="Seconds one request may take.")
    attempts: int = Field(6, ge=1, description="Tries of one request, with back-off between them.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the servers' key.")

    @model_validator(mode="after")
    def _addresses(self) -> Self:
        for server in self.servers:
            if not is_address(server):
                raise ValueError(f"servers: {shown(server)} is no address; write for example http://localhost:8000/v1")
        return self
