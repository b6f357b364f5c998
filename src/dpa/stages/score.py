"""Score: every candidate, or every rated response, gets its vector of attributes once.
Run its tests: pytest tests/test_score_select.py
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dpa.core.errors import DataError, EngineError
from dpa.core.records import Ledger, Messages, Prompt, Scored, Scorer, score_in_full, stable_hash
from dpa.storage.memory import peak_memory
from dpa.storage.progress import ProgressBar
from dpa.storage.run_folder import Reject, StageFolder
from dpa.storage.schemas import SCORES, name_taken, score_schema
from dpa.storage.stopping import StopOnSignal

RATED_ROWS_PER_SHARD = 4096


class _Batch(NamedTuple):
    """The rows of one shard."""

    candidate_ids: list[str]
    prompt_ids: list[str]
    messages: list[Messages]
    responses: list[str]


def score(
    stage: StageFolder, rollout_stage: StageFolder, prompts: Sequence[Prompt], scorer: Scorer | Sequence[Scorer]
) -> Ledger:
    """Score every candidate of a finished rollout; return what the stage cost. Several scorers share the shards.

    Shards have the rollout's numbers and rows, in the same order: candidate_id, prompt_id, one float column per
    attribute (0-100), valid. A row with NaN or an infinite score is kept as not valid, counted in the ledger's
    `extra["invalid"]`, and never selected; where the scorer says why, it is among the rejects too, and what the scorer
    paid is in `extra`. Shards already scored by this scorer from these candidates are left as they
    are, so several scorers (a known true reward, say) score one rollout, each in a stage folder of its own.

    Raises RunFolderError when the rollout is not finished, Interrupted on SIGTERM or SIGINT, EngineError when the
    scorer does not return one row per response.
    """
    messages = {prompt.prompt_id: prompt.messages for prompt in prompts}

    def read(number: int) -> _Batch:
        table = rollout_stage.table(number)
        prompt_ids = table["prompt_id"].to_pylist()
        asked = [messages[prompt_id] for prompt_id in prompt_ids]
        return _Batch(table["candidate_id"].to_pylist(), prompt_ids, asked, table["response"].to_pylist())

    scorers = _alike(scorer)
    revision = scorers[0].revision
    made_from = [stable_hash(rollout_stage.shard_digest(number), revision) for number in range(rollout_stage.shards)]
    return _score_shards(stage, made_from, read, scorers)


def score_rows(stage: StageFolder, ratings: pa.Table, scorer: Scorer | Sequence[Scorer]) -> Ledger:
    """Score the responses of a rated data set (columns of ratings.parquet), so that missing marks do not matter.

    Rows come out in the table's order, `candidate_id` being the row_id; otherwise as `score`.
    """
    parts = [ratings.slice(start, RATED_ROWS_PER_SHARD) for start in range(0, ratings.num_rows, RATED_ROWS_PER_SHARD)]

    def read(number: int) -> _Batch:
        part = parts[number]
        asked = [json.loads(text) for text in part["messages"].to_pylist()]
        return _Batch(part["row_id"].to_pylist(), part["prompt_id"].to_pylist(), asked, part["response"].to_pylist())

    scorers, texts = _alike(scorer), ("row_id", "messages", "response")
    revision = scorers[0].revision
    made_from = [stable_hash(*(text for name in texts for text in part[name].to_pylist()), revision) for part in parts]
    return _score_shards(stage, made_from, read, scorers)


def _alike(scorer: Scorer | Sequence[Scorer]) -> Sequence[Scorer]:
    """One or several scorers as a sequence; they must hold one model."""
    scorers = scorer if isinstance(scorer, Sequence) else [scorer]
    revisions = {scorer.revision for scorer in scorers}
    if len(revisions) != 1:
        raise ValueError(f"scorers of one stage must hold one revision, not {sorted(revisions)}")
    return scorers


def _score_shards(
    stage: StageFolder, made_from: Sequence[str], read: Callable[[int], _Batch], scorers: Sequence[Scorer]
) -> Ledger:
    """Score each shard that is not there yet; `made_from` names the rows and the scorer of each."""
    if taken := name_taken(SCORES, scorers[0].attributes):
        raise DataError(f"{stage.name}: attribute `{taken}` has the name of a column; rename it.")
    missing, own = stage.missing(made_from), [number for number in range(len(made_from)) if stage.mine(number)]
    finished = len(own) - len(missing)

    def score_shard(scorer: Scorer, number: int) -> tuple[pa.Table, Scored]:
        return _score_batch(read(number), scorer)

    with StopOnSignal() as stop, ProgressBar(stage.name, len(own), "shards", "rows", done=finished) as progress:
        started = time.monotonic()
        for number, (table, given) in stop.work_through(missing, scorers, score_shard):
            now = time.monotonic()
            ledger = Ledger(
                candidates_scored=table.num_rows,
                rows=table.num_rows,
                rejects=len(given.reasons),
                wall_s=now - started,
                peak_memory=peak_memory(),
                extra={"invalid": float(np.sum(~table["valid"].to_numpy(zero_copy_only=False))), **given.costs},
            )
            started = now
            rejects = [Reject(table["candidate_id"][row].as_py(), reason) for row, reason in given.reasons.items()]
            stage.write_shard(number, table, ledger, rejects, made_from[number])
            finished += 1
            progress.advance(1, amount=table.num_rows)
        whole = finished == len(own) and stage.may_finish(made_from)
        if whole and not stage.done:
            stage.finish(shards=len(made_from))
        if stop.requested:
            raise stop.interrupted(stage.name, finished, len(own), "shards")
    return stage.ledger if whole else stage.ledger_of(own)


def _score_batch(batch: _Batch, scorer: Scorer) -> tuple[pa.Table, Scored]:
    shape = (len(batch.responses), len(scorer.attributes))
    given = score_in_full(scorer, batch.messages, batch.responses) if batch.responses else Scored(np.zeros(shape))
    scores_NM = np.asarray(given.scores_NM, dtype=np.float64)
    if scores_NM.shape != shape:
        raise EngineError(f"the scorer returned scores of shape {scores_NM.shape} for {shape}; it must score each row.")
    columns = [batch.candidate_ids, batch.prompt_ids, *scores_NM.T, np.isfinite(scores_NM).all(axis=1)]
    return pa.table(columns, schema=score_schema(scorer.attributes)), given
