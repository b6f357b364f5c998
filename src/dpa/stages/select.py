"""Select: for each prompt and direction keep the candidate with the largest utility; no model is called.
Run its tests: pytest tests/test_score_select.py
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from dpa.core.directions import DirectionSpace
from dpa.core.errors import DataError, RejectRateError, StorageError
from dpa.core.records import Ledger, Prompt, messages_text, stable_hash
from dpa.core.sections.selection import SelectionConfig
from dpa.core.selection import of_largest_margin, standard_deviations
from dpa.stages.winners import How, Winners, margins_of, winners_of
from dpa.storage.memory import peak_memory
from dpa.storage.run_folder import StageFolder
from dpa.storage.schemas import completeness, name_taken, selection_schema, with_numbers
from dpa.storage.stage_records import Reject, count_reasons

NO_SCORE = "no candidate has a valid score"
NO_PAIR = "no candidate is better than another under any direction"


def select_winners(
    stage: StageFolder,
    rollout_stage: StageFolder,
    score_stage: StageFolder,
    prompts: Sequence[Prompt],
    space: DirectionSpace,
    config: SelectionConfig,
    seed: int,
    pairs: bool = False,
) -> Ledger:
    """Select from a finished rollout and its scores, shard by shard; return what the stage cost.

    `config.method`:
      pooled         all candidates of a prompt form one pool, whatever direction they were made under, and the pool
                     serves `config.directions` directions: those the prompt was asked under, then new ones (our
                     choice; the paper is silent)
      best_mean      the same, but of those made under whichever of the prompt's directions did best on average (ours)
      per_direction  the best of the samples made under each of rollout's own directions (step 3 of arXiv 2402.18571)
      random         as pooled, but a random valid candidate: the control at equal budget

    `config.utility` says what is best under a direction (core/utility.py). `config.standardise` weighs r / standard
    deviation, over all valid candidates of the stage; the column `utility` is v . r in the units that were weighed,
    whatever the winner was chosen by.

    `config.targets`: the share of the winners that are those of targets (core/target_selection.py), and say so in the
    column `held`; pooled winners only.

    `config.top_margin`: the share of best_mean's winners that are kept, over all shards, the largest margins first,
    among the winners whose directions lie nearest to the same one of CELLS fixed ones: a mean of winners is no mean of
    utilities (one row each, whether ten points hang on it or none), and without it what matters is outvoted by what
    does not (ours).

    `pairs`: multi-objective online DPO (arXiv 2503.00295) instead of winners alone: (chosen, rejected) of the pool
    by the same utility. Published: prompts carry the weights they are judged by, the pair is the better and the worse
    of two samples under them. Ours: the pair is the best and the worst (or a random one) of the pool, `per_direction`
    with two samples being theirs; directions are signed and drawn by angle, theirs are weights from a Dirichlet.

    Random choices are keyed by (seed, stage, prompt). Of equal utilities the lowest candidate (in rollout's order)
    wins. A prompt without a valid candidate, or without any pair, goes to rejects.

    Raises RejectRateError when no prompt has one, RunFolderError when rollout or score is not finished.
    """
    texts = {prompt.prompt_id: messages_text(prompt.messages) for prompt in prompts}
    how = How(space, config, seed, pairs, _scale(score_stage, space, config))
    numbers = range(rollout_stage.shards)
    digests = [(rollout_stage.shard_digest(number), score_stage.shard_digest(number)) for number in numbers]
    every = (str(digests),) if how.leaves_out else ()
    made_from = [stable_hash(*digests[number], how.identity, *every) for number in numbers]
    missing = [number for number in numbers if stage.shard_digest(number, made_from[number]) is None]
    if how.leaves_out and missing:
        how = how._replace(kept=_of_largest_margin(rollout_stage, score_stage, how, stage.name))
    for number in missing:
        candidates, scores = _candidates(rollout_stage, score_stage, number)
        _write_winners(stage, number, made_from[number], candidates, scores, texts, how)
    return _finish(stage, rollout_stage.shards)


def select_rated(
    stage: StageFolder,
    ratings: pa.Table,
    score_stage: StageFolder,
    space: DirectionSpace,
    config: SelectionConfig,
    seed: int,
) -> Ledger:
    """The same selection of winners over a rated data set's own responses: t = 0, offline.

    `ratings` has the columns of ratings.parquet, `score_stage` its rows' scores (`stages.score.score_rows`). The
    responses were made under no direction, so `per_direction` and `best_mean` select as `pooled` here.
    """
    scores = score_stage.whole_table()
    if not ratings["row_id"].combine_chunks().equals(scores["candidate_id"].combine_chunks()):
        raise StorageError(
            f"{score_stage.path}: it scores other rows than the ratings hold; delete that folder and run the same "
            "command again."
        )
    texts = dict(zip(ratings["prompt_id"].to_pylist(), ratings["messages"].to_pylist(), strict=True))
    candidates = ratings.select(["prompt_id", "response"]).append_column("candidate_id", ratings["row_id"])
    pooled = {"method": "pooled", "targets": config.target_share}
    offline = config if config.method == "random" else config.model_copy(update=pooled)
    how = How(space, offline, seed, False, _scale(score_stage, space, config))
    digests = [score_stage.shard_digest(number) for number in range(score_stage.shards)]
    made_from = stable_hash(*digests, how.identity)
    if stage.shard_digest(0, made_from) is None:
        _write_winners(stage, 0, made_from, candidates, scores, texts, how)
    return _finish(stage, 1)


def _finish(stage: StageFolder, shards: int) -> Ledger:
    if not stage.done:
        rejects = [reject for number in range(shards) for reject in stage.shard_rejects(number)]
        if not stage.ledger_of(range(shards)).rows:
            raise RejectRateError(
                f"{stage.name}: no winner could be selected ({count_reasons(rejects) or 'no candidates'}); "
                "look at the scorer."
            )
        stage.finish(shards=shards)
    return stage.ledger


def _scale(score_stage: StageFolder, space: DirectionSpace, config: SelectionConfig) -> np.ndarray:
    """scale_K over the whole stage, so that every shard is weighed alike; ones where nothing is standardised."""
    if not config.standardise:
        return np.ones(space.K)
    scores_RK = space.combine(*score_stage.scores())
    return standard_deviations(scores_RK[np.isfinite(scores_RK).all(axis=1)])


def _candidates(rollout_stage: StageFolder, score_stage: StageFolder, number: int) -> tuple[pa.Table, pa.Table]:
    """A shard's candidates and their scores."""
    candidates, scores = rollout_stage.table(number), score_stage.table(number)
    if not candidates["candidate_id"].equals(scores["candidate_id"]):
        raise StorageError(
            f"{score_stage.path}: shard {number} scores other candidates than {rollout_stage.path} holds; "
            "delete the score stage's folder and run the same command again."
        )
    return candidates, scores


def _of_largest_margin(
    rollout_stage: StageFolder, score_stage: StageFolder, how: How, stage: str
) -> dict[str, np.ndarray]:
    """kept_D of each prompt of the stage: which of its winners are kept (`selection.top_margin`)."""
    shards = [
        margins_of(*_candidates(rollout_stage, score_stage, number), how, stage)
        for number in range(rollout_stage.shards)
    ]
    prompt_ids = [prompt_id for own, _, _ in shards for prompt_id in own]
    margin_PD, cell_PD = (np.concatenate([shard[part] for shard in shards]) for part in (1, 2))
    kept_R = of_largest_margin(margin_PD.ravel(), cell_PD.ravel(), how.config.top_margin)
    return dict(zip(prompt_ids, kept_R.reshape(margin_PD.shape), strict=True))


def _write_winners(
    stage: StageFolder,
    number: int,
    made_from: str,
    candidates: pa.Table,
    scores: pa.Table,
    texts: Mapping[str, str],
    how: How,
) -> None:
    started = time.monotonic()
    found = winners_of(candidates, scores, how, stage.name)
    table, rejects = _winner_rows(found, candidates, texts, how)
    ledger = Ledger(
        rows=table.num_rows, rejects=len(rejects), wall_s=time.monotonic() - started, peak_memory=peak_memory()
    )
    stage.write_shard(number, table, ledger, rejects, made_from)


def _winner_rows(
    found: Sequence[Winners], candidates: pa.Table, texts: Mapping[str, str], how: How
) -> tuple[pa.Table, list[Reject]]:
    """Rows of WINNERS, or of PAIRS where there are losers, prompts in the candidates' order; rejects are the prompts
    that have none."""
    names = how.space.names
    schema = selection_schema(how.pairs, how.targets)
    if taken := name_taken(schema, names):
        raise DataError(f"space.objectives: `{taken}` is the name of a column; rename the objective.")
    ids, responses = candidates["candidate_id"].to_pylist(), candidates["response"].to_pylist()
    complete = completeness(candidates)
    rows: list[dict] = []
    reasons: dict[str, str] = {}
    for pools, directions_PDK, held_PDK, winners_PD, losers_PD in found:
        for p, d in np.ndindex(winners_PD.shape):
            winner, direction_K = winners_PD[p, d], directions_PDK[p, d]
            if winner < 0:
                continue
            prompt_id = pools.prompt_ids[p]
            row = {"prompt_id": prompt_id, "messages": texts[prompt_id], "direction": direction_K.tolist()}
            if held_PDK is not None and np.isfinite(held_PDK[p, d]).any():
                row["held"] = [int(value) if np.isfinite(value) else None for value in held_PDK[p, d]]
            best, utility = pools.row_PN[p, winner], float(direction_K @ pools.weighed_PNK[p, winner])
            if losers_PD is None:
                row |= {"candidate_id": ids[best], "response": responses[best], "utility": utility}
                row["complete"] = complete[best]
            else:
                loser = losers_PD[p, d]
                other = pools.row_PN[p, loser]
                row |= {"chosen": responses[best], "rejected": responses[other], "utility_chosen": utility}
                row["utility_rejected"] = float(direction_K @ pools.weighed_PNK[p, loser])
                row |= {"chosen_id": ids[best], "rejected_id": ids[other]}
                row |= {"chosen_complete": complete[best], "rejected_complete": complete[other]}
            rows.append(row | dict(zip(names, pools.scores_PNK[p, winner].tolist(), strict=True)))
        for p, prompt_id in enumerate(pools.prompt_ids):
            if not pools.valid_PN[p].any():
                reasons[prompt_id] = NO_SCORE
            elif losers_PD is not None and (losers_PD[p] < 0).all():
                reasons[prompt_id] = NO_PAIR
    place = {prompt_id: at for at, prompt_id in enumerate(dict.fromkeys(candidates["prompt_id"].to_pylist()))}
    rows.sort(key=lambda row: place[row["prompt_id"]])
    table = pa.Table.from_pylist(rows, with_numbers(schema, names))
    return table, [Reject(prompt_id, reasons[prompt_id]) for prompt_id in place if prompt_id in reasons]
