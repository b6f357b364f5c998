"""Checkpoints of a Trainer: the newest that was written to its end.
Run its tests: pytest tests/test_reward_training.py
"""

import json
import logging
from pathlib import Path

_log = logging.getLogger(__name__)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete `checkpoint-STEP` of the highest step, or None.

    The Trainer writes trainer_state.json last: a checkpoint without a readable one was cut off while it was saved. It
    is skipped with a warning, and the Trainer writes over it when it comes to that step again.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            if state["global_step"] != int(path.name.removeprefix("checkpoint-")):
                raise ValueError("another step")
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            _log.warning("%s is incomplete (interrupted while it was saved); skipped.", path)
        else:
            return path
    return None
