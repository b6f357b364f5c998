"""Reading a direction a user wrote: a bounded, hand-written reader of ASCII text, and the words of its refusals.
Run its tests: pytest tests/test_directions.py
"""

import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from dpa.core.errors import DirectionError
from dpa.core.lookup import nearest

MAX_TEXT = 4000  # characters: far more than a real direction, few enough to refuse the rest at once
MAX_NAME = 64

_NAME = re.compile(r"[A-Za-z_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?", re.ASCII)
NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", re.ASCII)
_NAME_END = re.compile(r"(?![A-Za-z0-9_])", re.ASCII)


def read_expression(text: str, names: Sequence[str], presets: Sequence[str] = ()) -> dict[str, float]:
    """Read `name`, `name*number` or `number*name` joined by `+` and `-`, once from left to right.

    A number may have a sign of its own: `helpfulness*97 + verbosity*-26`. Returns name -> weight. Raises
    DirectionError for anything else: nothing is evaluated, nested or skipped. `presets` are names of whole directions:
    a lone word that is nearly one of them is told so.
    """
    example = f"write e.g. `{names[0]}*0.8 - {names[1]}*0.6`."
    if len(text) > MAX_TEXT:
        raise DirectionError(f"direction {shown(text)} is longer than {MAX_TEXT} characters; {example}")
    if not text.isascii():
        raise DirectionError(f"direction {shown(text)} is not plain ASCII; {example}")
    tokens = _tokens(text, names, presets, example)
    tokens.reverse()  # the next one is the last
    weights: dict[str, float] = {}
    while tokens or not weights:
        sign = "+" if not weights and tokens[-1:] not in (["+"], ["-"]) else tokens.pop()
        factors = [_factor(tokens)]
        if tokens[-1:] == ["*"]:
            tokens.pop()
            factors.append(_factor(tokens))
        found = [factor for factor in factors if isinstance(factor, str)]
        numbers = [factor for factor in factors if not isinstance(factor, str)] or [1.0]
        if sign not in ("+", "-") or len(found) != 1 or len(numbers) != 1 or numbers[0] is None:
            raise DirectionError(
                f"direction {shown(text)}: term {len(weights) + 1} is not an objective times a number; {example}"
            )
        if found[0] in weights:
            raise DirectionError(f"direction {shown(text)}: `{found[0]}` is named twice; give it one weight.")
        weights[found[0]] = numbers[0] if sign == "+" else -numbers[0]
    return weights


def read_degrees(text: str) -> float:
    """Read `-15deg`: a number from -180 to 180. Raises DirectionError."""
    number = text.removesuffix("deg").strip()
    unsigned = number[1:] if number[:1] in ("+", "-") else number
    if len(text) > MAX_NAME or not NUMBER.fullmatch(unsigned) or not -180 <= float(number) <= 180:
        raise DirectionError(f"direction {shown(text)} is not an angle; write a number from -180 to 180, then `deg`.")
    return float(number)


def read_number(value: Any, where: str) -> float:
    """A finite number that is not a bool, as a float. Raises DirectionError, which names `where`."""
    if not isinstance(value, Real) or isinstance(value, bool | np.bool_):
        raise DirectionError(f"{where}: {shown(value)} is not a number; give a finite one.")
    try:
        number = float(value)
    except OverflowError:  # an int beyond the floats
        number = math.inf
    if not math.isfinite(number):
        raise DirectionError(f"{where}: a weight is {number}; give a finite number.")
    return number


def read_weights(value: Any, names: Sequence[str], where: str) -> tuple[float, ...]:
    """K plain floats in the objectives' order, from a mapping (those left out are 0) or K numbers. Raises
    DirectionError, which names `where`."""
    if isinstance(value, Mapping):
        weights = [0.0] * len(names)
        for name, weight in value.items():
            weights[index_of(name, names, where)] = read_number(weight, f"{where}: `{name}`")
        return tuple(weights)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if len(value) != len(names):
            raise DirectionError(
                f"{where}: {len(value)} numbers given; {len(names)} are needed, for {', '.join(names)}."
            )
        return tuple(read_number(weight, where) for weight in value)
    raise DirectionError(f"{where}: {shown(value)} is no direction; write e.g. `{names[0]}*0.8 - {names[1]}*0.6`.")


def index_of(name: Any, names: Sequence[str], where: str) -> int:
    """Place of a name. Raises DirectionError where it is none of them."""
    if isinstance(name, str) and name in names:
        return names.index(name)
    raise unknown(name, names, where)


def is_name(value: Any) -> bool:
    """Whether an objective or a preset can have this name."""
    return isinstance(value, str) and len(value) <= MAX_NAME and _NAME.fullmatch(value) is not None


def unknown(name: Any, known: Iterable[str], where: str) -> DirectionError:
    """The refusal of a name, with the nearest known one."""
    hint = nearest(str(name)[:MAX_NAME], known, cutoff=0.6)
    return DirectionError(f"{where}: {shown(name)} is unknown; {hint}")


def shown(value: Any) -> str:
    """A user's value, short and printable, however long or deep it is."""
    return _SHORT.repr(value).encode("ascii", "backslashreplace").decode()


def printable(text: str, kept: str = "") -> str:
    """A text of others for a terminal: what is no character there (its commands, a turn of the direction of writing,
    half a character) is escaped, save what is `kept`."""
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in kept else ascii(found[0])[1:-1], text)


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2


def _factor(tokens: list[str | float]) -> str | float | None:
    """Take a name or a number with an optional sign off the end of `tokens`; None where neither stands there."""
    sign = tokens.pop() if tokens[-1:] in (["+"], ["-"]) else None
    factor = tokens.pop() if tokens else None
    if isinstance(factor, float):
        return -factor if sign == "-" else factor
    return factor if sign is None and factor not in ("+", "-", "*") else None


def _tokens(text: str, names: Sequence[str], presets: Sequence[str], example: str) -> list[str | float]:
    """Operators and names as text, numbers as floats. Of the known names the longest wins: a name may hold `-`."""
    longest_first = sorted(names, key=len, reverse=True)
    tokens: list[str | float] = []
    at = 0
    while at < len(text):
        number = NUMBER.match(text, at)
        name = next((n for n in longest_first if text.startswith(n, at) and _NAME_END.match(text, at + len(n))), None)
        if text[at] in " \t\r\n":
            at += 1
        elif text[at] in "+-*":
            tokens.append(text[at])
            at += 1
        elif number:
            tokens.append(read_number(float(number.group()), "direction"))
            at = number.end()
        elif name:
            tokens.append(name)
            at += len(name)
        elif stranger := _NAME.match(text, at):
            alone = stranger.group() == text.strip()  # no preset can be weighed
            raise unknown(stranger.group(), [*names, *(presets if alone else ())], "direction")
        else:
            raise DirectionError(
                f"direction {shown(text)}: {shown(text[at])} at character {at + 1} is not understood; {example}"
            )
    return tokens
