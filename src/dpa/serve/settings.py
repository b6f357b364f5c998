"""What `dpa serve` can be told. A field stands here once: from it come the option of the command line, the argument of
the engine's process and the row in docs/configuration.md; every default is safe on a laptop.
Run its tests: pytest tests/test_serve.py
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from dpa.core.directions import DirectionSpace
from dpa.core.targets import Wish


def flag_of(name: str, about: FieldInfo) -> str:
    """How a field is called on a command line."""
    extra = about.json_schema_extra
    return str(extra["flag"]) if isinstance(extra, dict) else f"--{name.replace('_', '-')}"


def flaws_of(error: ValidationError, settings: type[BaseModel]) -> str:
    """What is wrong with options, each by its flag and with what was given."""
    flaws = [(str(flaw["loc"][0]), flaw["input"], flaw["msg"]) for flaw in error.errors()]
    return "; ".join(f"{flag_of(name, settings.model_fields[name])} {given!r}: {flaw}" for name, given, flaw in flaws)


def _option(default: Any, description: str, flag: str | None = None, **bounds: Any) -> Any:
    extra: Any = {"flag": flag} if flag else None
    return Field(default=default, description=description, json_schema_extra=extra, **bounds)


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Limits(_Settings):
    """What one request, and all of them together, may ask for."""

    requests: int = _option(64, "Requests in flight; beyond it 429 at once.", "--max-requests", ge=1)
    max_tokens: int = _option(
        2048, "New tokens of one answer; also what is asked for where a request names no number.", ge=1
    )
    body_bytes: int = _option(1_000_000, "Bytes of one request.", "--max-body", ge=1000)
    n: int = _option(8, "Answers to one request: `n` for each of its prompts.", "--max-n", ge=1)
    best_of: int = _option(32, "Answers sampled for one `best_of` or `robust` selection.", "--max-best-of", ge=1)
    seconds: float = _option(
        120.0, "Seconds for one answer, from when the request is there to its last byte.", "--timeout", ge=0.1
    )
    stall_seconds: float = _option(30.0, "Seconds of silence within a stream.", "--stall", ge=0.1)
    drain_seconds: float = _option(30.0, "Seconds accepted requests have after SIGTERM.", "--drain", ge=1)
    connections: int = _option(
        512, "Open at once; beyond it the one that has kept us waiting longest is closed.", "--max-connections", ge=1
    )
    header_seconds: float = _option(
        10.0, "Seconds to send a header, from when a client connected or was answered.", "--header-timeout", ge=0.1
    )
    body_seconds: float = _option(30.0, "Seconds to send a request's body.", "--body-timeout", ge=0.1)


class _ModelSettings(_Settings):
    model: str | None = _option(None, "Policy folder made by the loop, or Hub id; it starts an engine.")
    name: str | None = _option(None, "What clients call the model; default: after its folder or id.")
    reward: str | None = _option(None, "Reward model, or a run (folder or YAML) that scores: scores, best_of, robust.")
    rows: int = _option(32, "Answers the engine writes at once.", ge=1)
    threads: int | None = _option(None, "Threads of the engine; default: all cores.", ge=1)
    remote_code_revision: str | None = _option(None, "Opt in to the model's own code (commit).")


class EngineSettings(_ModelSettings):
    """A small engine that speaks OpenAI: `python -m dpa.serve.engine --model FOLDER --port 8001`."""

    space: str | None = _option(None, "Policy folder whose objectives the reward must score.")
    uds: str | None = _option(None, "Unix socket to listen on ...")
    port: int = _option(8001, "... or the port of 127.0.0.1.")

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        said = self.model_dump(exclude_defaults=True).items()
        return [f"{flag_of(name, type(self).model_fields[name])}={value}" for name, value in said]

    @classmethod
    def of(cls, arguments: Sequence[str] | None) -> "EngineSettings":
        """What a command line says (None: this process's own); one that cannot be read ends it with exit code 2."""
        parser = argparse.ArgumentParser(prog="python -m dpa.serve.engine", description=cls.__doc__)
        for name, about in cls.model_fields.items():
            parser.add_argument(flag_of(name, about), dest=name, help=about.description, default=argparse.SUPPRESS)
        try:
            return cls(**vars(parser.parse_args(arguments)))
        except ValidationError as error:
            parser.error(flaws_of(error, cls))


class ServeSettings(Limits, _ModelSettings):
    """The command line of `dpa serve` ([serving.md](serving.md) says more)."""

    upstream: str | None = _option(None, "Instead of MODEL: URL of a running OpenAI-compatible server.")
    upstream_model: str | None = _option(None, "What it calls the model; default: its first.")
    space: Path | None = _option(None, "Folder with dpa_config.json; default: MODEL.")
    base: str | None = _option(None, "Model to compare with; default: MODEL, told no direction.")
    host: str = _option("127.0.0.1", "Address to listen on; one others can reach needs a key.")
    port: int = _option(8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    allow_host: list[str] = _option([], "Another name this gateway is reached by.")
    api_key_file: Path | None = _option(None, "Keys, one a line (or one in DPA_API_KEY).")
    direction: str | None = _option(
        None, "What is asked where a request states nothing; default: the cone's center; or none."
    )
    clamp: bool = _option(
        False, "Move directions outside the cone to its edge; default: such a request is answered with 400."
    )
    log_text: bool = _option(False, "Log what users and the model say.")


@dataclass(frozen=True)
class Served:
    """One served model, as the gateway knows it."""

    name: str
    """What clients call it."""
    upstream_model: str
    """What the upstream calls it."""
    space: DirectionSpace
    default: Wish | None = None
    """The direction or target of requests that state none."""
    outside: Literal["error", "clamp"] = "error"
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    """Names the Host header may carry (empty: any): a page of another site must not reach a gateway on localhost."""
    limits: Limits = field(default_factory=lambda: Limits())
    log_text: bool = False
    """Whether logs may hold what users and the model say."""
    front: list[dict] | None = None
    front_reward: str | None = None
    front_follows: bool | None = None
    """Whether the model was found to follow its direction."""
    examples: tuple[str, ...] = ()
    """Questions the page offers to try."""
    parameters: int | None = None
    """Of the served model; None where its weights are not here."""
