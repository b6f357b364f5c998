"""Select: for each prompt and direction keep the candidate with the largest v . r; no model is called.
Run its tests: pytest tests/test_score_select.py
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dpa.core.config import SelectionConfig
from dpa.core.directions import DirectionSpace
from dpa.core.errors import DataError, RejectRateError, StorageError
from dpa.core.records import Ledger, Prompt, stable_hash
from dpa.core.selection import select, select_per_direction, select_random
from dpa.storage.memory import peak_memory
from dpa.storage.run_folder import Reject, StageFolder, count_reasons

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", pa.string()),
        ("direction", pa.list_(pa.float64())),
        ("candidate_id", pa.string()),
        ("response", pa.string()),
        ("utility", pa.float64()),
    ]
)
"""Followed by one float column per objective."""

NOT_ATTRIBUTES = ("candidate_id", "prompt_id", "valid")

NO_SCORE = "no candidate has a valid score"


class _Pools(NamedTuple):
    """The candidates of some prompts, padded to the largest pool; `row_PN` is the row of each (-1: padding)."""

    prompt_ids: list[str]
    row_PN: np.ndarray
    scores_PNK: np.ndarray
    valid_PN: np.ndarray


def select_winners(
    stage: StageFolder,
    rollout_stage: StageFolder,
    score_stage: StageFolder,
    prompts: Sequence[Prompt],
    space: DirectionSpace,
    config: SelectionConfig,
    seed: int,
) -> Ledger:
    """Select from a finished rollout and its scores, shard by shard; return what the stage cost.

    `config.method`:
      pooled         all candidates of a prompt form one pool, whatever direction they were made under, and the pool
                     serves `config.directions` directions: those the prompt was asked under, then new ones (our
                     choice; the paper is silent)
      per_direction  the best of the samples made under each of rollout's own directions (step 3 of arXiv 2402.18571)
      random         as pooled, but a random valid candidate: the control at equal budget

    Random choices are keyed by (seed, stage, prompt). Of equal utilities the lowest candidate (in rollout's order)
    wins. A prompt without a valid candidate goes to rejects.

    Raises RejectRateError when no prompt has one, RunFolderError when rollout or score is not finished.
    """
    texts = {prompt.prompt_id: json.dumps(prompt.messages, ensure_ascii=False) for prompt in prompts}
    for number in range(rollout_stage.shards):
        digests = rollout_stage.shard_digest(number), score_stage.shard_digest(number)
        made_from = stable_hash(*digests, space.to_dict(), config, seed)
        if stage.shard_digest(number, made_from) is not None:
            continue
        candidates, scores = rollout_stage.table(number), score_stage.table(number)
        if not candidates["candidate_id"].equals(scores["candidate_id"]):
            raise StorageError(
                f"{score_stage.path}: shard {number} scores other candidates than {rollout_stage.path} holds; "
                "delete the score stage's folder and run the same command again."
            )
        _write_winners(stage, number, made_from, candidates, scores, texts, space, config, seed)
    return _finish(stage, rollout_stage.shards)


def select_rated(
    stage: StageFolder,
    ratings: pa.Table,
    score_stage: StageFolder,
    space: DirectionSpace,
    config: SelectionConfig,
    seed: int,
) -> Ledger:
    """The same selection over a rated data set's own responses: t = 0, offline.

    `ratings` has the columns of ratings.parquet, `score_stage` its rows' scores (`stages.score.score_rows`). The
    responses were made under no direction, so `per_direction` selects as `pooled` here.
    """
    scores = pa.concat_tables(list(score_stage.tables()))
    if not ratings["row_id"].combine_chunks().equals(scores["candidate_id"].combine_chunks()):
        raise StorageError(
            f"{score_stage.path}: it scores other rows than the ratings hold; delete that folder and run the same "
            "command again."
        )
    texts = dict(zip(ratings["prompt_id"].to_pylist(), ratings["messages"].to_pylist(), strict=True))
    candidates = ratings.select(["prompt_id", "response"]).append_column("candidate_id", ratings["row_id"])
    offline = config.model_copy(update={"method": "pooled"}) if config.method == "per_direction" else config
    digests = [score_stage.shard_digest(number) for number in range(score_stage.shards)]
    made_from = stable_hash(*digests, space.to_dict(), config, seed)
    if stage.shard_digest(0, made_from) is None:
        _write_winners(stage, 0, made_from, candidates, scores, texts, space, offline, seed)
    return _finish(stage, 1)


def _finish(stage: StageFolder, shards: int) -> Ledger:
    if not stage.done:
        rejects = [reject for number in range(shards) for reject in stage.shard_rejects(number)]
        if not any(stage.shard_ledger(number).rows for number in range(shards)):
            raise RejectRateError(
                f"{stage.name}: no winner could be selected ({count_reasons(rejects) or 'no candidates'}); "
                "look at the scorer."
            )
        stage.finish(shards=shards)
    return stage.ledger


def _write_winners(
    stage: StageFolder,
    number: int,
    made_from: str,
    candidates: pa.Table,
    scores: pa.Table,
    texts: Mapping[str, str],
    space: DirectionSpace,
    config: SelectionConfig,
    seed: int,
) -> None:
    started = time.monotonic()
    pools = _pools(candidates["prompt_id"].to_pylist(), *_objectives(scores, space))
    rngs = [
        np.random.default_rng(int(stable_hash("select", seed, stage.name, prompt_id), 16))
        for prompt_id in pools.prompt_ids
    ]
    match config.method:
        case "per_direction":
            directions_PDK, winners_PD = _per_direction(pools, candidates)
        case "pooled":
            directions_PDK = _served(pools, candidates, space, config.directions, rngs)
            winners_PD = select(pools.scores_PNK, directions_PDK, pools.valid_PN)
        case "random":
            directions_PDK = _served(pools, candidates, space, config.directions, rngs)
            valid_PN = pools.valid_PN
            winners_PD = np.array(
                [select_random(valid_PN[p : p + 1], config.directions, rng)[0] for p, rng in enumerate(rngs)]
            ).reshape(len(rngs), config.directions)
    table, rejects = _winner_rows(pools, directions_PDK, winners_PD, candidates, texts, space)
    ledger = Ledger(
        rows=table.num_rows, rejects=len(rejects), wall_s=time.monotonic() - started, peak_memory=peak_memory()
    )
    stage.write_shard(number, table, ledger, rejects, made_from)


def _objectives(scores: pa.Table, space: DirectionSpace) -> tuple[np.ndarray, np.ndarray]:
    """scores_RK of the objectives, and valid_R: which rows have a finite score for every attribute."""
    attributes = [name for name in scores.column_names if name not in NOT_ATTRIBUTES]
    scores_RM = np.array([scores[name].to_numpy() for name in attributes]).T.reshape(scores.num_rows, len(attributes))
    return space.combine(scores_RM, attributes), scores["valid"].to_numpy(zero_copy_only=False)


def _pools(prompt_ids: list[str], scores_RK: np.ndarray, valid_R: np.ndarray) -> _Pools:
    """Rows grouped by prompt, prompts and rows in the order in which they first appear."""
    rows: dict[str, list[int]] = {}
    for row, prompt_id in enumerate(prompt_ids):
        rows.setdefault(prompt_id, []).append(row)
    row_PN = np.full((len(rows), max(map(len, rows.values()), default=0)), -1)
    for p, members in enumerate(rows.values()):
        row_PN[p, : len(members)] = members
    return _Pools(list(rows), row_PN, scores_RK[row_PN], valid_R[row_PN] & (row_PN >= 0))


def _served(
    pools: _Pools, candidates: pa.Table, space: DirectionSpace, count: int, rngs: Sequence[np.random.Generator]
) -> np.ndarray:
    """directions_PDK of `count` directions for each prompt: those it was asked under in this space, then new draws."""
    asked_PDK = np.empty((len(rngs), 0, space.K))
    if "direction" in candidates.column_names and candidates.num_rows and len(candidates["direction"][0]) == space.K:
        asked_PDK = _asked(pools, candidates)[:, :count]
    missing = count - asked_PDK.shape[1]
    drawn_PDK = np.array([space.sample(missing, rng) for rng in rngs]).reshape(len(rngs), missing, space.K)
    return np.concatenate([asked_PDK, drawn_PDK], axis=1)


def _asked(pools: _Pools, candidates: pa.Table) -> np.ndarray:
    """directions_PDK the candidates of each prompt were made under; rollout keeps a prompt whole, N samples each."""
    K = pools.scores_PNK.shape[-1]
    N = int(candidates["k"].to_numpy().max(initial=-1)) + 1
    direction_RK = np.array(candidates["direction"].to_pylist(), dtype=np.float64).reshape(-1, K)
    return direction_RK[pools.row_PN[:, :: max(N, 1)]].reshape(len(pools.row_PN), -1, K)


def _per_direction(pools: _Pools, candidates: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Rollout's own directions_PDK, and winners_PD as places in each prompt's pool."""
    directions_PDK = _asked(pools, candidates)
    P, D, K = directions_PDK.shape
    N = pools.row_PN.shape[1] // max(D, 1)
    winners_PD = select_per_direction(
        pools.scores_PNK.reshape(P, D, N, K), directions_PDK, pools.valid_PN.reshape(P, D, N)
    )
    return directions_PDK, np.where(winners_PD >= 0, winners_PD + N * np.arange(D), -1)


def _winner_rows(
    pools: _Pools,
    directions_PDK: np.ndarray,
    winners_PD: np.ndarray,
    candidates: pa.Table,
    texts: Mapping[str, str],
    space: DirectionSpace,
) -> tuple[pa.Table, list[Reject]]:
    clash = {field.name for field in SCHEMA} & set(space.names)
    if clash:
        raise DataError(f"space.objectives: `{clash.pop()}` is the name of a column; rename the objective.")
    ids, responses = candidates["candidate_id"].to_pylist(), candidates["response"].to_pylist()
    rows: list[dict] = []
    for p, prompt_id in enumerate(pools.prompt_ids):
        for direction_K, winner in zip(directions_PDK[p], winners_PD[p], strict=True):
            if winner < 0:
                continue
            row = pools.row_PN[p, winner]
            scores_K = pools.scores_PNK[p, winner]
            rows.append(
                {
                    "prompt_id": prompt_id,
                    "messages": texts[prompt_id],
                    "direction": direction_K.tolist(),
                    "candidate_id": ids[row],
                    "response": responses[row],
                    "utility": float(direction_K @ scores_K),
                    **dict(zip(space.names, scores_K.tolist(), strict=True)),
                }
            )
    schema = pa.schema([*SCHEMA, *(pa.field(name, pa.float64()) for name in space.names)])
    rejects = [
        Reject(prompt_id, NO_SCORE) for p, prompt_id in enumerate(pools.prompt_ids) if not pools.valid_PN[p].any()
    ]
    return pa.Table.from_pylist(rows, schema), rejects
