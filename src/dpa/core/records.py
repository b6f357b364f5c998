"""The records that travel through the loop, and the two interfaces (Sampler, Scorer) of what is heavy in it.
Run its tests: pytest tests/test_records.py
"""

import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypedDict, TypeVar

import numpy as np

Thing = TypeVar("Thing", bound=Hashable)

SCALE = (0.0, 100.0)
"""Every attribute and objective is on this scale inside the package; a rated data set's own scale is recorded."""

_LONG = 1000
"""Members of a list from which on its text is not made at once."""


class Message(TypedDict):
    """One chat message, as Hugging Face chat templates take it."""

    role: Literal["system", "user", "assistant"]
    content: str


Messages = list[Message]


def messages_text(messages: Messages) -> str:
    """The JSON text of chat messages that tables hold and ids are made of."""
    return json.dumps(messages, ensure_ascii=False)


@dataclass(frozen=True)
class Prompt:
    """A question put to the policy: chat messages that end with a user's turn."""

    prompt_id: str
    messages: Messages


@dataclass(frozen=True)
class SampleRequest:
    """Ask for `len(seeds)` responses to one prompt under one direction, or under a target.

    `direction` is a unit vector over the objectives of the policy's own direction space (None: no preference is
    stated), `held` the values of a target's held objectives (core/targets.py; None: no target). Each sample has a seed
    of its own, so what it says never depends on what else is in the batch.
    """

    messages: Messages
    direction: tuple[float, ...] | None
    seeds: tuple[int, ...]
    held: tuple[int | None, ...] | None = None


@dataclass(frozen=True)
class Sample:
    """One response. `tokens` counts generated tokens, the end token included; `ids` are these tokens, where the sampler
    keeps them (TransformersSampler does)."""

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"] = "stop"
    ids: tuple[int, ...] = field(default=(), repr=False, compare=False)


class Sampler(Protocol):
    """A policy that answers. Fakes, transformers, worker processes and HTTP servers all look like this."""

    @property
    def revision(self) -> str:
        """Names the weights: part of every candidate's id."""
        ...

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """Return, for each request, one Sample per seed, in the order of the seeds.

        A request that cannot be served gets an empty list (it is retried alone, then rejected).
        """
        ...


class Scorer(Protocol):
    """A reward model: one number per attribute for a response to a prompt."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the M outputs, in order."""
        ...

    @property
    def revision(self) -> str:
        """Names the weights or functions: recorded with every score."""
        ...

    def score(self, prompts: Sequence[Messages], responses: Sequence[str]) -> np.ndarray:
        """Return scores_NM on the 0-100 scale (float64). A row that cannot be scored is NaN."""
        ...


class Scored(NamedTuple):
    """Scores, with what a scorer that knows more says of them: why a row (by its place) has none, and what was paid."""

    scores_NM: np.ndarray
    reasons: Mapping[int, str] = {}
    costs: Mapping[str, float] = {}


def score_in_full(scorer: Scorer, prompts: Sequence[Messages], responses: Sequence[str]) -> Scored:
    """What a scorer gives, with reasons and costs where it has a method of this name."""
    detailed = getattr(scorer, "score_in_full", None)
    return Scored(scorer.score(prompts, responses)) if detailed is None else detailed(prompts, responses)


@dataclass
class Ledger:
    """What a stage cost. Times in seconds, memory in bytes."""

    tokens_generated: int = 0
    candidates_scored: int = 0
    training_tokens: int = 0
    rows: int = 0
    rejects: int = 0
    wall_s: float = 0.0
    peak_memory: int = 0
    extra: dict[str, float] = field(default_factory=dict)

    def add(self, other: "Ledger") -> None:
        """Accumulate: counts and times add, peak memory is a maximum."""
        for name in ("tokens_generated", "candidates_scored", "training_tokens", "rows", "rejects"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.wall_s += other.wall_s
        self.peak_memory = max(self.peak_memory, other.peak_memory)
        add_costs(self.extra, other.extra)


JUDGE_COSTS = ("judge_requests", "judge_tokens_read", "judge_tokens_written")
"""What a language model that judges was paid, in a ledger's `extra`; tokens as the server's `usage` counts them."""


def add_costs(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Add figures to those of the same names."""
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


def places_of(things: Iterable[Thing]) -> dict[Thing, list[int]]:
    """Where each thing stands, things in the order in which they first appear."""
    places: dict[Thing, list[int]] = {}
    for place, thing in enumerate(things):
        places.setdefault(thing, []).append(place)
    return places


def stable_hash(*parts: object, digits: int = 16) -> str:
    """Hex digest of the parts' text, the same in every process and on every machine."""
    is_long = any(type(part) is list and len(part) > _LONG for part in parts)
    texts = _pieces(parts) if is_long else ["\x1f".join([str(part) for part in parts])]
    found = hashlib.blake2b(digest_size=digits // 2)
    for text in texts:
        found.update(text.encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _pieces(parts: Iterable[object]) -> Iterator[str]:
    """The parts' text; of a list one member at a time, since the token ids of all rows would be gigabytes of it."""
    for place, part in enumerate(parts):
        yield "\x1f" if place else ""
        if type(part) is list:
            yield "["
            for number, member in enumerate(part):
                yield f", {member!r}" if number else repr(member)
            yield "]"
        else:
            yield str(part)


def candidate_id(
    prompt_id: str,
    direction: Sequence[float] | None,
    k: int,
    seed: int,
    revision: str,
    held: Sequence[int | None] | None = None,
) -> str:
    """Identity of one sample: hash of (prompt, direction or target, k, seed, policy revision)."""
    weights = "none" if direction is None else ",".join(f"{weight:.9f}" for weight in direction)
    weights += "" if held is None else f";{','.join(map(str, held))}"
    return stable_hash(prompt_id, weights, k, seed, revision)


def seed_of(identity: str) -> int:
    """The 63-bit seed that belongs to an id."""
    return int(stable_hash("seed", identity), 16) >> 1
