"""Numbers and names written for people, all of it plain text.
Run its tests: pytest tests/test_report.py
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dpa.core.directions import DirectionSpace
from dpa.core.records import SCALE


def number(value: float | None, digits: int | None = 1) -> str:
    """A number for people, millions as M; `digits` None: whole numbers plain, others to three places."""
    if value is None:
        return "–"
    if abs(value) >= 1e6 and digits is not None:
        return f"{value / 1e6:,.2f}M".replace("-", "−")
    if digits is None:
        return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    return f"{value:,.{digits}f}".replace("-", "−")


def value_and_range(interval: Mapping[str, Any] | None, digits: int = 1) -> tuple[str, str]:
    """("51.2", "[50.1, 52.3]"), the parts of a table's cell; large values without decimals; a dash for None."""
    if interval is None:
        return "–", ""
    value = interval["value"]
    digits = 0 if value is not None and abs(value) >= 1000 else digits
    if value is None or interval["low"] is None:
        return number(value, digits), ""
    return number(value, digits), f"[{number(interval['low'], digits)}, {number(interval['high'], digits)}]"


def spread(interval: Mapping[str, Any]) -> str:
    """`51.2 [50.1, 52.3]`."""
    return " ".join(value_and_range(interval)).strip()


def percent(interval: Mapping[str, Any]) -> str:
    """A share as `51%`, or with its interval `51% (50% to 52%)`."""
    if interval["low"] is None:
        return f"{interval['value']:.0%}"
    return f"{interval['value']:.0%} ({interval['low']:.0%} to {interval['high']:.0%})"


def degrees(angle: float) -> str:
    """`+15°`, `−15°`, `0°`."""
    return f"{angle:+g}°".replace("-", "−") if angle else "0°"


def ratio(after: float | None, before: float | None) -> str:
    """`×1.46`."""
    return f"×{after / before:.2f}" if after is not None and before else "–"


def duration(seconds: float) -> str:
    """`88.4 s`, `61 min 40 s`, `5 h 02 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def memory(count: int) -> str:
    """Bytes as `95 MiB` or `1.3 GiB`."""
    if count < 1024**3:
        return f"{count / 1024**2:,.0f} MiB"
    return f"{count / 1024**3:,.1f} GiB"


def reward_title(reward: str) -> str:
    """`true reward` or `model reward`."""
    return {"gold": "true reward", "model": "model reward"}.get(reward, reward)


def titled_measures(measures: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], int]]:
    """Title -> (interval, its digits), of measures as records hold them: {measure: interval, or {objective: interval}}.

    "hypervolume", "span, verbosity", "kendall tau, verbosity".
    """
    titled: dict[str, tuple[Mapping[str, Any], int]] = {}
    for measure, found in measures.items():
        title = measure.replace("_", " ")
        if all(isinstance(one, Mapping) for one in found.values()):  # an objective may be called "value" too
            digits = 1 if measure == "span" else 2
            titled |= {f"{title}, {objective}": (interval, digits) for objective, interval in found.items()}
        else:
            titled[title] = (found, 1)
    return titled


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def scale(space: DirectionSpace) -> str:
    """` on 0-100`; nothing where an objective has another range."""
    return " on 0-100" if set(space.ranges.values()) == {SCALE} else ""


def example_preference(space: DirectionSpace) -> str:
    """A direction off the center as JSON: what a card's example hands to the chat template."""
    return json.dumps({name: round(float(w), 3) for name, w in zip(space.names, space.grid(3)[0], strict=True)})
