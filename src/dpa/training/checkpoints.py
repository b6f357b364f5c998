"""Checkpoints of a Trainer: sealed once they are whole, and the newest that still is.
Run its tests: pytest tests/test_faults_training.py
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from dpa.core.errors import DamageError
from dpa.storage.tables import TEMPORARY, read_json, write_json
from dpa.training.ranks import is_first, wait_for_all

_SEAL_FILE = "dpa_seal.json"

_log = logging.getLogger(__name__)


def train_on(trainer: Trainer) -> None:
    """Train from the newest checkpoint of the Trainer's output folder, where there is one; what it saves is sealed."""
    trainer.add_callback(_SealCheckpoints())
    newest = newest_checkpoint(Path(str(trainer.args.output_dir)))
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))


class _SealCheckpoints(TrainerCallback):
    """Notes how large every file of a checkpoint is, once all ranks have saved their part of it: a power cut leaves
    files that are too short. Checksums of weights and optimizer would take as long as writing them."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write it beside them."""
        wait_for_all()
        if is_first():
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            (checkpoint / _SEAL_FILE).unlink(missing_ok=True)  # of what is written over
            files = (file for file in sorted(checkpoint.rglob("*")) if file.is_file() and TEMPORARY not in file.name)
            sizes = {str(file.relative_to(checkpoint)): file.stat().st_size for file in files}
            write_json(checkpoint / _SEAL_FILE, sizes)


def newest_checkpoint(work: Path) -> Path | None:
    """The `checkpoint-STEP` of the highest step that is complete and undamaged, or None.

    The Trainer writes trainer_state.json last: a checkpoint without a readable one was cut off while it was saved. It
    is skipped with a warning, as is one with a file that is not as large as it was saved, and the Trainer writes over
    it when it comes to that step again. Raises StorageError where it cannot be read.
    """
    found = [path for path in work.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        if _step(path / "trainer_state.json") != int(path.name.removeprefix("checkpoint-")):
            _log.warning("%s is incomplete (interrupted while it was saved); skipped.", path)
        elif (trouble := _trouble(path)) is not None:
            _log.warning("%s; %s is skipped.", trouble, path.name)
        else:
            return path
    return None


def remove_checkpoints(work: Path) -> None:
    """Free what only an interrupted training needs: three times the model's size, or more."""
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _step(state: Path) -> Any:
    """The step that a state was saved at; None where it was not saved whole."""
    try:
        found = read_json(state) if state.exists() else None
    except DamageError:
        return None
    return found.get("global_step") if isinstance(found, dict) else None


def _trouble(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; nothing is known of one that was interrupted before it was sealed."""
    file = checkpoint / _SEAL_FILE
    if not file.exists():
        return None
    try:
        for name, size in read_json(file).items():
            saved = checkpoint / name
            if not saved.is_file() or saved.stat().st_size != size:
                return f"{saved} is damaged: it has not the {size} bytes that were saved"
    except (DamageError, AttributeError):
        return f"{file} is damaged"
    return None
