"""The measured front that lies beside a model: what asking for each direction was found to give.
Run its tests: pytest tests/test_gateway.py -k front
"""

import json
import logging
from pathlib import Path
from typing import Any

from dpa.core.directions import DirectionSpace
from dpa.core.errors import DirectionError
from dpa.models.files import EVALUATION_FILE

MAX_BYTES = 16_000_000

_log = logging.getLogger(__name__)


def load_examples(folder: Path) -> list[str]:
    """A few questions the model was measured on, for people to try; none where nothing was measured."""
    try:
        record = _read(folder)
        return [str(text) for text in record.get("examples", [])]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return []  # load_front says what is wrong with the record


def load_front(folder: Path, space: DirectionSpace) -> tuple[list[dict[str, Any]] | None, str | None]:
    """Points of the front, and the reward they are measured by: "gold" (the true one) where there is one, or "model".

    None where nothing was measured; a record that does not fit the space is left out with a warning.
    """
    file = folder / EVALUATION_FILE
    try:
        record = _read(folder)
        reward = "gold" if all("gold" in point["objectives"] for point in record["directions"]) else "model"
        return [_point(point, reward, space) for point in record["directions"]], reward
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, DirectionError) as error:
        _log.warning("%s is not used: %s", file, " ".join(f"{type(error).__name__}: {error}".split())[:200])
        return None, None


def _read(folder: Path) -> dict[str, Any]:
    file = folder / EVALUATION_FILE
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES:,} bytes")
    return json.loads(file.read_text(encoding="utf-8"))


def _point(point: dict[str, Any], reward: str, space: DirectionSpace) -> dict[str, Any]:
    direction = space.direction(point["weights"])
    measured = point["objectives"][reward]
    words = point.get("words")
    return {
        "weights": direction.as_mapping(),
        "text": str(direction),
        "objectives": {
            name: {bound: float(measured[name][bound]) for bound in ("value", "low", "high")} for name in space.names
        },
        "words": float(words["value"]) if words else None,
    }
