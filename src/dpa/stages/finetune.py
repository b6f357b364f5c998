"""Finetune: the policy learns to give each direction its winner, or to prefer it to a loser.
Run its tests: pytest tests/test_finetuning.py tests/test_loop_options.py
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpa.core.config import FinetuneConfig, PreferenceConfig
from dpa.core.directions import DirectionSpace
from dpa.core.records import Ledger
from dpa.core.reference import Model
from dpa.models.files import SPACE_FILE
from dpa.models.finetuning import FinetuneResult, finetune
from dpa.models.listening import PREFIX, advice, hold_out
from dpa.models.policy_training import remove_checkpoints
from dpa.models.preference_training import PreferenceResult, preference_finetune
from dpa.models.ranks import is_first
from dpa.storage.memory import peak_memory
from dpa.storage.run_folder import StageFolder

_log = logging.getLogger(__name__)


def finetune_policy(
    stage: StageFolder,
    select_stage: StageFolder,
    policy: Model,
    space: DirectionSpace,
    out: Path,
    config: FinetuneConfig | PreferenceConfig,
    seed: int,
    earlier: Sequence[StageFolder] = (),
) -> Ledger:
    """Finetune `policy` on the rows of a finished selection, save the new policy at `out`, return what it cost.

    The class of `config` says what the rows are: winners, or pairs. `config.replay` adds rows of the `earlier`
    selections (see `with_replay`). A finished stage whose policy is as it was sealed is left alone, and a damaged
    policy is made again; an interrupted training goes on from its newest checkpoint. `log.jsonl` in the stage's folder
    has the loss of every step; rows that cannot be trained on go to rejects. A few rows are held out to measure
    listening (models/listening.py); a policy that hardly reads its direction is warned of. The ledger's `extra` has
    what was measured, counts optimizer steps, replayed rows and, for pairs, the tokens that the reference read too. In
    a launched training every rank calls this, and the first one writes.

    Raises what `models.policy_training.train_policy` raises, and RunFolderError when a selection is not finished.
    """
    if stage.done and (stage.seals or (out / SPACE_FILE).is_file()):
        return stage.ledger
    begun = time.monotonic()
    selected, held_out = hold_out(pa.concat_tables(_pools(select_stage)), config.listening_rows)
    known = pc.unique(held_out["prompt_id"])
    replayed = [
        table.filter(pc.invert(pc.is_in(table["prompt_id"], value_set=known)))
        for stage in earlier
        for table in _pools(stage)
    ]
    rows = with_replay(selected, replayed, config.replay, seed)
    measured_on = held_out if len(held_out) else None
    extra = {"replayed": float(len(rows) - len(selected))} if config.replay else {}
    result: FinetuneResult | PreferenceResult
    if isinstance(config, PreferenceConfig):
        result = preference_finetune(policy, rows, space, out, stage.path, config, seed, stage.name, measured_on)
        extra["reference_tokens"] = result.training_tokens
    else:
        result = finetune(policy, rows, space, out, stage.path, config, seed, stage.name, measured_on)
    if result.listening is not None:
        extra |= {**result.listening.to_log(), "listening_tokens": float(result.listening_tokens)}
        if not result.listening.heard and is_first():
            section = "dpo" if isinstance(config, PreferenceConfig) else "finetune"
            _log.warning("%s: %s", stage.name, advice(result.listening, section))
    ledger = Ledger(
        training_tokens=result.training_tokens,
        rows=len(rows) - len(result.rejects),
        rejects=len(result.rejects),
        wall_s=time.monotonic() - begun,
        peak_memory=peak_memory(),
        extra={"steps": result.steps, **extra},
    )
    if is_first():
        stage.write_rejects(result.rejects)
        stage.finish(ledger, sealed=[out])
        remove_checkpoints(stage.path)
    return ledger


def listening_curve(stage: StageFolder) -> list[dict[str, float]]:
    """What was measured while training, in order: the figures of `models.listening.Listening`, and their `step`."""
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
    pool = pa.concat_tables(earlier)
    drawn = np.random.default_rng([seed, 0x4E91A4]).choice(len(pool), size=count, replace=False)
    return pa.concat_tables([rows, pool.take(np.sort(drawn))])
