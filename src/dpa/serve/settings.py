"""What a gateway is told when it starts; every limit has a default that is safe on a laptop."""

from dataclasses import dataclass, field
from typing import Literal

from dpa.core.directions import Direction, DirectionSpace


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may ask for."""

    body_bytes: int = 1_000_000
    max_tokens: int = 2048
    """New tokens of one answer; also what is asked for where a request names no number."""
    n: int = 8
    """Answers to one request: `n` for each of its prompts."""
    best_of: int = 32
    """Answers sampled for one `best_of` or `robust` selection."""
    requests: int = 64
    """Requests in flight; the next one is answered 429 at once."""
    connections: int = 512
    """Open at once, of all clients together; beyond it the one that has kept the server waiting longest is closed."""
    header_seconds: float = 10.0
    """That a client has to send a request's header, from when it connected or was last answered."""
    body_seconds: float = 30.0
    """That a client has to send the body."""
    seconds: float = 120.0
    """For one answer, from when the request is there to its last byte."""
    stall_seconds: float = 30.0
    """Of silence from the engine within a stream."""
    drain_seconds: float = 30.0
    """That accepted requests have to finish after SIGTERM."""


@dataclass(frozen=True)
class Settings:
    """One served model."""

    name: str
    """What clients call it."""
    upstream_model: str
    """What the upstream calls it."""
    space: DirectionSpace
    default: Direction | None = None
    """The direction of requests that state none."""
    outside: Literal["error", "clamp"] = "error"
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    """Names the Host header may carry (empty: any): a page of another site must not reach a gateway on localhost."""
    limits: Limits = field(default_factory=Limits)
    log_text: bool = False
    """Whether logs may hold what users and the model say."""
    front: list[dict] | None = None
    front_reward: str | None = None
    examples: tuple[str, ...] = ()
    """Questions the page offers to try."""
