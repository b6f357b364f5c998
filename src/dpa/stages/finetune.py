"""Finetune: the policy learns, as its learner does, from the rows of a finished stage.
Run its tests: pytest tests/test_finetuning.py tests/test_loop_options.py
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpa.core.records import Ledger
from dpa.core.reference import Model
from dpa.models.files import SPACE_FILE
from dpa.models.memory import free_memory
from dpa.storage.memory import peak_memory
from dpa.storage.run_folder import StageFolder
from dpa.training.checkpoints import remove_checkpoints
from dpa.training.learner import Learner
from dpa.training.listening import PREFIX, advice, hold_out
from dpa.training.policy_training import train_policy
from dpa.training.ranks import is_first

_log = logging.getLogger(__name__)


def finetune_policy(
    stage: StageFolder,
    rows_stage: StageFolder,
    policy: Model,
    learner: Learner[Any],
    out: Path,
    earlier: Sequence[StageFolder] = (),
) -> Ledger:
    """Finetune `policy` on the rows of a finished stage, save the new policy at `out`, return what it cost.

    The rows are what the learner reads. `replay` of its section adds rows of `earlier` stages (see `with_replay`). A
    finished stage whose policy is as it was sealed is left alone, and a damaged policy is made again; an interrupted
    training goes on from its newest checkpoint. `log.jsonl` in the stage's folder has the loss of every step; rows that
    cannot be trained on go to rejects. A few selected rows are held out to measure listening (training/listening.py); a
    policy that hardly reads its direction is warned of. The ledger's `extra` has what was measured, counts optimizer
    steps, replayed rows and what the learner counts. In a launched training every rank calls this, and the first one
    writes.

    Raises what `training.policy_training.train_policy` raises, and RunFolderError when a stage is not finished.
    """
    if stage.done and (stage.seals or (out / SPACE_FILE).is_file()):
        if is_first():
            remove_checkpoints(stage.path)  # a process may have ended before it did
        return stage.ledger
    begun, config = time.monotonic(), learner.config
    held = 0 if learner.reads == "prompts" else config.listening_rows
    gated = learner.reads != "prompts" and config.min_listening is not None
    selected, held_out = hold_out(pa.concat_tables(_pools(rows_stage)), held, gated)
    known = pc.unique(held_out["prompt_id"])
    replayed = [
        table.filter(pc.invert(pc.is_in(table["prompt_id"], value_set=known)))
        for before in earlier
        for table in _pools(before)
    ]
    rows = with_replay(selected, replayed, config.replay, learner.seed)
    measured_on = held_out if len(held_out) or gated else None
    done = train_policy(learner, policy, rows, out, stage.path, stage.name, measured_on)
    free_memory()  # the caches of what samples next are counted by what is free
    ledger = learner.cost(done)
    extra = {"replayed": float(len(rows) - len(selected))} if config.replay else {}
    extra |= ledger.extra
    if done.listening is not None:
        extra |= {**done.listening.to_log(), "listening_tokens": float(done.listening_tokens)}
        if not done.listening.heard and is_first():
            _log.warning("%s: %s", stage.name, advice(done.listening, learner.advice))
    ledger = replace(
        ledger,
        rows=len(rows) - len(done.rejects),
        rejects=len(done.rejects),
        wall_s=done.earlier_s + time.monotonic() - begun,
        peak_memory=peak_memory(),
        extra={"steps": done.steps, **extra},
    )
    if is_first():
        stage.write_rejects(done.rejects)
        stage.finish(ledger, sealed=[out])
        remove_checkpoints(stage.path)
    return ledger


def listening_curve(stage: StageFolder) -> list[dict[str, float]]:
    """What was measured while training, in order: the figures of `training.listening.Listening`, and their `step`."""
    file = stage.path / "log.jsonl"
    entries = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # a damaged line of what is only drawn
    return [
        {"step": entry["step"], **{k.removeprefix(PREFIX): v for k, v in entry.items() if k.startswith(PREFIX)}}
        for entry in entries
        if isinstance(entry, dict) and f"{PREFIX}share" in entry and "step" in entry
    ]


def _pools(stage: StageFolder) -> list[pa.Table]:
    """The stage's tables, and in the column `pool` which of their rows were chosen from the same candidates: a prompt
    may come again in another iteration, with others."""
    return [
        table.append_column("pool", pa.array([f"{stage.name}:{name}" for name in table["prompt_id"].to_pylist()]))
        for table in stage.tables()
    ]


def with_replay(rows: pa.Table, earlier: Sequence[pa.Table], share: float, seed: int) -> pa.Table:
    """`rows`, and after them share x len(rows) of the earlier ones, drawn without replacement (all, where fewer)."""
    count = min(round(share * len(rows)), sum(map(len, earlier)))
    if count == 0:
        return rows
    pool = pa.concat_tables(earlier, promote_options="default")  # an earlier version's had fewer columns
    drawn = np.random.default_rng([seed, 0x4E91A4]).choice(len(pool), size=count, replace=False)
    return pa.concat_tables([rows, pool.take(np.sort(drawn))], promote_options="default")
