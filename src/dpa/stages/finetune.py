"""Finetune: the policy learns to give each direction its winner.
Run its tests: pytest tests/test_finetuning.py
"""

import time
from pathlib import Path

import pyarrow as pa

from dpa.core.config import FinetuneConfig
from dpa.core.directions import DirectionSpace
from dpa.core.records import Ledger
from dpa.models.finetuning import finetune, remove_checkpoints
from dpa.models.policy import SPACE_FILE
from dpa.models.ranks import is_first
from dpa.storage.memory import peak_memory
from dpa.storage.run_folder import StageFolder


def finetune_policy(
    stage: StageFolder,
    select_stage: StageFolder,
    policy: str | Path,
    space: DirectionSpace,
    out: Path,
    config: FinetuneConfig,
    seed: int,
    remote_code_revision: str | None = None,
) -> Ledger:
    """Finetune `policy` on the winners of a finished selection, save the new policy at `out`, return what it cost.

    A finished stage whose policy stands is left alone; an interrupted one goes on from its newest checkpoint.
    `log.jsonl` in the stage's folder has the loss of every step; rows that cannot be trained on go to rejects. The
    ledger's `extra` counts optimizer steps. In a launched training every rank calls this, and the first one writes.

    Raises what `models.finetuning.finetune` raises, and RunFolderError when the selection is not finished.
    """
    if stage.done and (out / SPACE_FILE).is_file():
        return stage.ledger
    begun = time.monotonic()
    rows = pa.concat_tables(list(select_stage.tables()))
    result = finetune(
        policy,
        rows,
        space,
        out=out,
        work=stage.path,
        config=config,
        seed=seed,
        remote_code_revision=remote_code_revision,
        label=stage.name,
    )
    ledger = Ledger(
        training_tokens=result.training_tokens,
        rows=len(rows) - len(result.rejects),
        rejects=len(result.rejects),
        wall_s=time.monotonic() - begun,
        peak_memory=peak_memory(),
        extra={"steps": result.steps},
    )
    if is_first():
        stage.write_rejects(result.rejects)
        stage.finish(ledger)
        remove_checkpoints(stage.path)
    return ledger
