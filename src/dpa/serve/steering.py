"""Where a request states a direction, and which statement counts: the steering contract, as one pure function.
Run its tests: pytest tests/test_steering.py

    1 body `dpa` (alias `chat_template_kwargs.preference`)      4 model name `MODEL:preset`, `MODEL@a=0.8;b=-0.6`
    2 header `X-DPA-Direction`                                   5 OpenAI's `verbosity: low|medium|high`
    3 `<dpa>...</dpa>` in the system message                     6 the server's default

The first that is there wins; every other that the request itself made is named as ignored. The direction leaves as
`chat_template_kwargs.preference`: the model's own template writes the sentence (models/chat_template.py). Wherever 1, 2
and 3 take a direction they take a target too (core/targets.py), where the policy knows targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpa.core.direction import Direction
from dpa.core.direction_text import read_expression, shown
from dpa.core.directions import DirectionSpace
from dpa.core.errors import DirectionError, OutsideConeError, UserError
from dpa.core.targets import Wish, read_wish

HEADER = "x-dpa-direction"
OPEN_TAG, CLOSE_TAG = "<dpa>", "</dpa>"
MAX_TAGS = 8
SYSTEM_ROLES = ("system", "developer")
"""Roles whose text the application wrote; `developer` is OpenAI's newer word for `system`."""

VERBOSITY = "verbosity"
_LEVELS = ("low", "medium", "high")

_REMEDY = 'have it moved to the edge ("dpa_options": {"outside": "clamp"}, or `dpa serve --clamp`)'

Source = Literal["body", "header", "tag", "model", "verbosity", "default", "none"]


class UnknownModelError(UserError):
    """The request names a model that is not served here."""


@dataclass(frozen=True)
class Ignored:
    """A statement that lost: where it stood, and what it said (in whole hundredths, if it can be read)."""

    source: str
    direction: str | None


@dataclass(frozen=True)
class Steering:
    """What a request comes down to: the direction or target that counts (None: no preference is stated) and what is
    sent on."""

    direction: Wish | None
    source: Source
    ignored: tuple[Ignored, ...]
    clamped: bool
    base: bool
    """`MODEL@base`, the model it is compared with, was asked: it is told no direction."""
    body: dict[str, Any]
    """The body without anything that only this gateway reads; `model` is untouched."""


def steer(
    body: Mapping[str, Any],
    headers: Sequence[str],
    space: DirectionSpace,
    model: str,
    outside: Literal["error", "clamp"] = "error",
    default: Wish | None = None,
) -> Steering:
    """Resolve a request to its direction. `headers` are the values of X-DPA-Direction, `model` is the served name.

    The body's own `dpa_options.outside` is the caller's to read: it is given as `outside`. Raises DirectionError when
    the statement that counts cannot be used (those that lost are only shown), UnknownModelError for a strange model.
    """
    cleaned = {name: value for name, value in body.items() if name not in ("dpa", "dpa_options")}
    stated: list[tuple[Source, str, Any]] = []
    if "dpa" in body:
        stated.append(("body", "body", body["dpa"]))
    kwargs = body.get("chat_template_kwargs")
    if isinstance(kwargs, Mapping) and "preference" in kwargs:
        stated.append(("body", "chat_template_kwargs", kwargs["preference"]))
    if len(headers) > 1:
        raise DirectionError(f"header X-DPA-Direction: it is given {len(headers)} times; give one.")
    stated += [("header", "header", value) for value in headers]
    tags, messages = take_tags(body.get("messages"))
    if tags:
        cleaned["messages"] = messages
    stated += [("tag", "tag", tag) for tag in reversed(tags)]  # the last one written counts
    named, base = read_model(body.get("model"), model, space)
    if named is not None:
        stated.append(("model", "model", named))
    elif base:  # not a direction but another model, which takes none: whatever else is stated loses
        stated.insert(0, ("model", "model", None))
    level = body.get(VERBOSITY)
    if level is not None and (levels := verbosity_levels(space)):
        stated.append(("verbosity", "verbosity", levels.get(level, level) if isinstance(level, str) else level))
        del cleaned[VERBOSITY]
    source: Source = "none" if default is None else "default"
    chosen: Wish | None
    chosen, clamped = default, False
    if stated:
        source, where, value = stated[0]
        chosen, clamped = read_direction(value, space, outside, where)
    ignored = tuple(Ignored(where, _readable(value, space)) for _, where, value in stated[1:])
    rest = {name: value for name, value in (kwargs or {}).items() if name != "preference"} if kwargs else {}
    if chosen is not None:
        rest["preference"] = chosen.as_mapping()
    if rest:
        cleaned["chat_template_kwargs"] = rest
    elif isinstance(kwargs, Mapping):
        del cleaned["chat_template_kwargs"]
    return Steering(chosen, source, ignored, clamped, base, cleaned)


def read_direction(
    value: Any, space: DirectionSpace, outside: Literal["error", "clamp"], where: str
) -> tuple[Wish | None, bool]:
    """A stated direction or target (None: no preference), and whether it had to be moved to the cone's edge.

    Raises DirectionError, which begins with where it was stated.
    """
    if value is None:
        return None, False
    try:
        if outside == "error":
            return read_wish(space, value), False
        clamped = read_wish(space, value, outside="clamp")
    except OutsideConeError as error:
        raise OutsideConeError(f"{where}: {error.finding}", _REMEDY) from None
    except DirectionError as error:
        raise DirectionError(f"{where}: {error}") from None
    try:
        return read_wish(space, value), False
    except DirectionError:
        return clamped, True


def take_tags(messages: Any) -> tuple[list[str], Any]:
    """What stands in the `<dpa>` tags of system text, and the messages without them; other roles are left alone.

    A tag goes together with the white space before it, and a system message of which nothing is left goes too, so that
    the prompt is the one the same direction gives in any other form. Raises DirectionError for a tag that is not
    closed, or more than MAX_TAGS of them.
    """
    tags: list[str] = []
    kept: list[Any] = []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        if content is None or message.get("role") not in SYSTEM_ROLES:
            kept.append(message)
            continue
        before = len(tags)
        if isinstance(content, str):
            content = _untagged(content, tags)
            empty = not content
        else:
            parts = [
                {**part, "text": _untagged(part["text"], tags)}
                if isinstance(part, Mapping) and isinstance(part.get("text"), str)
                else part
                for part in content
            ]
            content = [part for part in parts if not (isinstance(part, Mapping) and part.get("text") == "")]
            empty = not content
        if len(tags) == before:
            kept.append(message)
        elif not empty:
            kept.append({**message, "content": content})
    return tags, kept


def read_model(name: Any, model: str, space: DirectionSpace) -> tuple[Any, bool]:
    """The direction in a model's name (None: it states none), and whether it is the base model that is asked.

    Raises UnknownModelError, or DirectionError when what follows `@` is no direction.
    """
    if name is None or name == model:
        return None, False
    rest = name.removeprefix(model) if isinstance(name, str) and name.startswith(model) else ""
    if rest == "@base":
        return None, True
    if rest.startswith(":") and rest[1:] in space.presets:
        return rest[1:], False
    if rest.startswith("@"):
        return _assignments(rest[1:], space), False
    known = [model, *(f"{model}:{preset}" for preset in space.presets)]
    raise UnknownModelError(
        f"model: {shown(name)} is not served here; take {', '.join(known[:8])}, "
        f"or {model}@{space.names[0]}=0.8;{space.names[1]}=-0.6."
    )


def verbosity_levels(space: DirectionSpace) -> dict[str, Direction]:
    """OpenAI's three levels as directions: the cone's edge away from `verbosity`, its center, its edge towards it.

    In a cone wider than 45 degrees the edge is taken at 45. Empty where the space has no such objective, or where it is
    the center itself, so that no arc leads there.
    """
    if VERBOSITY not in space.arc_names:
        return {}
    narrow = DirectionSpace(space.objectives, space.center, min(space.max_angle, 45.0), space.template)
    return {level: space.direction(row) for level, row in zip(_LEVELS, narrow.arc(VERBOSITY, 3), strict=True)}


def _untagged(text: str, tags: list[str]) -> str:
    """`text` without its tags; what they hold is added to `tags`. One pass, whatever is in the text."""
    if OPEN_TAG not in text:
        return text
    kept, at = "", 0
    while (start := text.find(OPEN_TAG, at)) >= 0:
        end = text.find(CLOSE_TAG, start)
        if end < 0:
            raise DirectionError("tag: <dpa> in the system message is not closed; write <dpa>...</dpa>.")
        if len(tags) == MAX_TAGS:
            raise DirectionError(f"tag: more than {MAX_TAGS} <dpa> tags in the system messages; one says it all.")
        tags.append(text[start + len(OPEN_TAG) : end])
        kept = (kept + text[at:start]).rstrip()
        at = end + len(CLOSE_TAG)
    rest = text[at:]
    return kept + rest if kept else rest.lstrip()


def _assignments(text: str, space: DirectionSpace) -> dict[str, float]:
    """Read `helpfulness=0.8;verbosity=-0.6`: the reader of expressions does it, term by term."""
    weights: dict[str, float] = {}
    for term in text.split(";", maxsplit=64):
        name, equals, number = term.partition("=")
        read = read_expression(f"{name}*{number}", space.names) if equals else {}
        if list(read) != [name.strip()] or name.strip() in weights:
            raise DirectionError(
                f"model: {shown(term)} in its name is not OBJECTIVE=NUMBER; "
                f"write e.g. @{space.names[0]}=0.8;{space.names[1]}=-0.6."
            )
        weights |= read
    return weights


def _readable(value: Any, space: DirectionSpace) -> str | None:
    """A losing statement for the echo: canonical where it can be read, else as it was written, short."""
    try:
        direction, _ = read_direction(value, space, "clamp", "")
    except DirectionError:
        return shown(value)
    return None if direction is None else str(direction)
