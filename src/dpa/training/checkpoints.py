"""Checkpoints of a Trainer: the newest that was written to its end.
Run its tests: pytest tests/test_reward_training.py
"""

import logging
from pathlib import Path
from typing import Any

from dpa.core.errors import DamageError
from dpa.storage.tables import read_json

_log = logging.getLogger(__name__)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete `checkpoint-STEP` of the highest step, or None.

    The Trainer writes trainer_state.json last: a checkpoint without a readable one was cut off while it was saved. It
    is skipped with a warning, and the Trainer writes over it when it comes to that step again. Raises StorageError
    where it cannot be read.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        if _step(path / "trainer_state.json") == int(path.name.removeprefix("checkpoint-")):
            return path
        _log.warning("%s is incomplete (interrupted while it was saved); skipped.", path)
    return None


def _step(state: Path) -> Any:
    """The step that a state was saved at; None where it was not saved whole."""
    try:
        found = read_json(state) if state.exists() else None
    except DamageError:
        return None
    return found.get("global_step") if isinstance(found, dict) else None
