"""The measured front that lies beside a model: what asking for each direction was found to give.
Run its tests: pytest tests/test_gateway.py -k front
"""

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

from dpa.core.directions import DirectionSpace
from dpa.core.errors import DirectionError
from dpa.models.files import EVALUATION_FILE

MAX_BYTES = 16_000_000

_log = logging.getLogger(__name__)


class Front(NamedTuple):
    """Points of a front, and the reward they are measured by: "gold" (the true one) where there is one, or "model".
    `examples`: a few questions the model was measured on, for people to try."""

    points: list[dict[str, Any]] | None = None
    reward: str | None = None
    examples: tuple[str, ...] = ()
    follows: bool | None = None
    """Whether the model was found to follow its direction (stages.evaluate); None where nothing says so."""


def load_front(folder: Path, space: DirectionSpace) -> Front:
    """Nothing where nothing was measured; a record that does not fit the space is left out with a warning."""
    file = folder / EVALUATION_FILE
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES:,} bytes")
        record = json.loads(file.read_text(encoding="utf-8"))
        reward = "gold" if all("gold" in point["objectives"] for point in record["directions"]) else "model"
        points = [_point(point, reward, space) for point in record["directions"]]
        follows = record["listens"]["verdict"] is True if "listens" in record else None
        return Front(points, reward, tuple(map(str, record.get("examples", ()))), follows)
    except FileNotFoundError:
        return Front()
    except (
        OSError,
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        RecursionError,
        DirectionError,
    ) as error:
        _log.warning("%s is not used: %s", file, " ".join(f"{type(error).__name__}: {error}".split())[:200])
        return Front()


def _point(point: dict[str, Any], reward: str, space: DirectionSpace) -> dict[str, Any]:
    direction = space.direction(point["weights"])
    measured = point["objectives"][reward]
    words = point.get("words")
    return {
        "weights": direction.as_mapping(),
        "text": str(direction),
        "objectives": {
            name: {bound: _known(measured[name][bound]) for bound in ("value", "low", "high")} for name in space.names
        },
        "words": _known(words["value"]) if words else None,
    }


def _known(number: Any) -> float | None:
    """None where nothing was measured: an answer that no reward could score, or no number in a foreign file."""
    return float(number) if number is not None and math.isfinite(number) else None
