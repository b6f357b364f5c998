"""Select: for each prompt and direction keep the candidate with the largest utility; no model is called.
Run its tests: pytest tests/test_score_select.py
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dpa.core.directions import DirectionSpace
from dpa.core.errors import DataError, RejectRateError, StorageError
from dpa.core.pools import Pools, pools_of
from dpa.core.records import Ledger, Prompt, messages_text, stable_hash
from dpa.core.sections.selection import SelectionConfig
from dpa.core.selection import of_largest_advantage, scale_of, select, select_best_mean, select_pairs, select_random
from dpa.core.target_selection import serve_targets
from dpa.core.utility import Utility
from dpa.storage.memory import peak_memory
from dpa.storage.run_folder import StageFolder
from dpa.storage.schemas import completeness, name_taken, score_matrix, selection_schema, with_numbers
from dpa.storage.stage_records import Reject, count_reasons

CELLS = 27
"""Directions of the grid (so many for two objectives) around which winners are compared (`advantage_share`)."""

ELSEWHERE = 16
"""Directions drawn for each prompt, of which one that its pool keeps another response for becomes a negative."""

NO_SCORE = "no candidate has a valid score"
NO_PAIR = "no candidate is better than another under any direction"


class _Winners(NamedTuple):
    """Of some prompts: what each pool serves, and whom it keeps for it, as places in the pool (-1: nobody);
    `advantage_PD` by `best_mean`."""

    pools: Pools
    directions_PDK: np.ndarray
    held_PDK: np.ndarray | None
    winners_PD: np.ndarray
    losers_PD: np.ndarray | None
    advantage_PD: np.ndarray | None = None


class _How(NamedTuple):
    """What selection goes by. `scale_K` divides the objectives before they are weighed."""

    space: DirectionSpace
    config: SelectionConfig
    seed: int
    pairs: bool
    scale_K: np.ndarray

    @property
    def utility(self) -> Utility:
        """Of scores that were divided by `scale_K`."""
        return Utility(self.config.utility, self.config.augmentation, self.scale_K)

    @property
    def identity(self) -> str:
        """Equal exactly for selections that would write the same rows."""
        by = () if self.config.utility == "linear" else (self.config.utility, self.config.augmentation)
        held = (self.config.targets,) if self.targets else ()
        top = (f"advantage {self.config.advantage_share} of {CELLS}",) if self.leaves_out else ()
        parts = self.space.to_dict(), self.config, self.seed, self.pairs, self.scale_K.tolist(), *by, *held, *top
        return stable_hash(*parts, f"negative_direction of {ELSEWHERE}", digits=32)

    @property
    def targets(self) -> bool:
        """Whether some winners are those of targets."""
        return self.config.target_share > 0 and not self.pairs

    @property
    def leaves_out(self) -> bool:
        """Whether only the winners with the largest advantage are kept."""
        return self.config.advantage_share < 1 and self.config.method == "best_mean"


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

    `config.advantage_share`: the share of best_mean's winners that are kept, over all shards, the largest advantages
    (core/selection.py) first, among the winners whose directions lie nearest to the same one of a fixed grid. Rejection
    sampling trains on one row a prompt and direction, whether ten points hang on it or none, so that what matters is
    outvoted by what does not (ours).

    `pairs`: multi-objective online DPO (arXiv 2503.00295) instead of winners alone: (chosen, rejected) of the pool
    by the same utility. Published: prompts carry the weights they are judged by, the pair is the better and the worse
    of two samples under them. Ours: the pair is the best and the worst (or a random one) of the pool, `per_direction`
    with two samples being theirs; directions are signed and drawn by angle, theirs are weights from a Dirichlet.

    Random choices are keyed by (seed, stage, prompt). Of equal utilities the lowest candidate (in rollout's order)
    wins. A prompt without a valid candidate, or without any pair, goes to rejects.

    Raises RejectRateError when no prompt has one, RunFolderError when rollout or score is not finished.
    """
    texts = {prompt.prompt_id: messages_text(prompt.messages) for prompt in prompts}
    how = _How(space, config, seed, pairs, _scale(score_stage, space, config))
    numbers = range(rollout_stage.shards)
    digests = [(rollout_stage.shard_digest(number), score_stage.shard_digest(number)) for number in numbers]
    every = (str(digests),) if how.leaves_out else ()
    made_from = [stable_hash(*digests[number], how.identity, *every) for number in numbers]
    missing = [number for number in numbers if stage.shard_digest(number, made_from[number]) is None]
    kept = None
    if how.leaves_out and missing:
        shards = (_candidates(rollout_stage, score_stage, number) for number in numbers)
        kept = _of_largest_advantage((one for shard in shards for one in _found(*shard, how, stage.name)), how)
    for number in missing:
        candidates, scores = _candidates(rollout_stage, score_stage, number)
        _write_winners(stage, number, made_from[number], candidates, scores, texts, how, kept)
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
    how = _How(space, offline, seed, False, _scale(score_stage, space, config))
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
    if not config.standardise:  # then no score need be read
        return np.ones(space.K)
    return scale_of(space.combine(*score_stage.scores()), config)


def _candidates(rollout_stage: StageFolder, score_stage: StageFolder, number: int) -> tuple[pa.Table, pa.Table]:
    """A shard's candidates and their scores."""
    candidates, scores = rollout_stage.table(number), score_stage.table(number)
    if not candidates["candidate_id"].equals(scores["candidate_id"]):
        raise StorageError(
            f"{score_stage.path}: shard {number} scores other candidates than {rollout_stage.path} holds; "
            "delete the score stage's folder and run the same command again."
        )
    return candidates, scores


def _of_largest_advantage(found: Iterable[_Winners], how: _How) -> dict[str, np.ndarray]:
    """kept_D of each prompt: which of its winners are kept (`selection.advantage_share`)."""
    grid_CK = how.space.grid(CELLS)
    prompt_ids: list[str] = []
    advantages, cells = [], []
    for winners in found:
        assert winners.advantage_PD is not None
        prompt_ids += winners.pools.prompt_ids
        advantages += list(winners.advantage_PD)
        cells += list(np.where(winners.winners_PD >= 0, (winners.directions_PDK @ grid_CK.T).argmax(axis=2), -1))
    shape = len(prompt_ids), how.config.directions
    advantage_PD, cell_PD = np.reshape(advantages, shape), np.reshape(cells, shape)
    kept_R = of_largest_advantage(advantage_PD.ravel(), cell_PD.ravel(), how.config.advantage_share)
    return dict(zip(prompt_ids, kept_R.reshape(shape), strict=True))


def _write_winners(
    stage: StageFolder,
    number: int,
    made_from: str,
    candidates: pa.Table,
    scores: pa.Table,
    texts: Mapping[str, str],
    how: _How,
    kept: Mapping[str, np.ndarray] | None = None,
) -> None:
    """`kept`: prompt -> kept_D, which of its winners are; None: all."""
    started = time.monotonic()
    found = _found(candidates, scores, how, stage.name)
    if kept is not None:
        found = [
            one._replace(winners_PD=np.where([kept[own] for own in one.pools.prompt_ids], one.winners_PD, -1))
            for one in found
        ]
    table, rejects = _winner_rows(found, candidates, texts, how, stage.name)
    ledger = Ledger(
        rows=table.num_rows, rejects=len(rejects), wall_s=time.monotonic() - started, peak_memory=peak_memory()
    )
    stage.write_shard(number, table, ledger, rejects, made_from)


def _found(candidates: pa.Table, scores: pa.Table, how: _How, stage: str) -> list[_Winners]:
    scores_RK = how.space.combine(*score_matrix(scores))
    groups = pools_of(candidates["prompt_id"].to_pylist(), scores_RK, how.scale_K)
    return [_winners(pools, candidates, how, stage) for pools in groups]


def _winners(pools: Pools, candidates: pa.Table, how: _How, stage: str) -> _Winners:
    rngs = _rngs("select", pools, how, stage)
    losers_PD = held_PDK = advantage_PD = None
    if how.config.method == "per_direction":
        directions_PDK, winners_PD, losers_PD = _per_direction(pools, candidates, how, rngs)
    else:
        D = how.config.directions
        directions_PDK = _served(pools, candidates, how.space, D, rngs)
        if how.config.method == "random":
            winners_PD = np.array(
                [select_random(pools.valid_PN[p : p + 1], D, rng)[0] for p, rng in enumerate(rngs)]
            ).reshape(len(rngs), D)
        elif how.pairs:
            winners_PD, losers_PD = select_pairs(
                pools.weighed_PNK, directions_PDK, pools.valid_PN, how.config.rejected, rngs, how.utility
            )
        else:
            winners_PD, advantage_PD = _kept_for(directions_PDK, pools, candidates, how)
    if how.targets:
        found = pools.scores_PNK, pools.weighed_PNK, pools.valid_PN, directions_PDK, winners_PD
        directions_PDK, held_PDK, winners_PD = serve_targets(*found, how.config.targets, how.space, rngs)
    return _Winners(pools, directions_PDK, held_PDK, winners_PD, losers_PD, advantage_PD)


def _kept_for(
    directions_PDK: np.ndarray, pools: Pools, candidates: pa.Table, how: _How
) -> tuple[np.ndarray, np.ndarray | None]:
    """winners_PD of any directions, with advantage_PD by `best_mean`."""
    if how.config.method != "best_mean":
        return select(pools.weighed_PNK, directions_PDK, pools.valid_PN, how.utility), None
    samples = len(pools.prompt_ids), -1, _samples(candidates)
    weighed_PANK, valid_PAN = pools.weighed_PNK.reshape(*samples, how.space.K), pools.valid_PN.reshape(samples)
    return select_best_mean(weighed_PANK, directions_PDK, valid_PAN, how.utility)


def _rngs(what: str, pools: Pools, how: _How, stage: str) -> list[np.random.Generator]:
    return [np.random.default_rng(int(stable_hash(what, how.seed, stage, one), 16)) for one in pools.prompt_ids]


def _elsewhere(pools: Pools, candidates: pa.Table, how: _How, stage: str) -> tuple[np.ndarray, np.ndarray] | None:
    """drawn_PEK of the training cone and winners_PE, whom the pools keep for them; None where the method cannot say."""
    if how.config.method in ("per_direction", "random"):
        return None
    drawn = [how.space.sample(ELSEWHERE, rng) for rng in _rngs("elsewhere", pools, how, stage)]
    drawn_PEK = np.reshape(drawn, (-1, ELSEWHERE, how.space.K))
    return drawn_PEK, _kept_for(drawn_PEK, pools, candidates, how)[0]


def _served(
    pools: Pools, candidates: pa.Table, space: DirectionSpace, count: int, rngs: Sequence[np.random.Generator]
) -> np.ndarray:
    """directions_PDK of `count` directions for each prompt: those it was asked under in this space, then new draws."""
    asked_PDK = np.empty((len(rngs), 0, space.K))
    if "direction" in candidates.column_names and candidates.num_rows and len(candidates["direction"][0]) == space.K:
        asked_PDK = _asked(pools, candidates)[:, :count]
    missing = count - asked_PDK.shape[1]
    drawn_PDK = np.array([space.sample(missing, rng) for rng in rngs]).reshape(len(rngs), missing, space.K)
    return np.concatenate([asked_PDK, drawn_PDK], axis=1)


def _asked(pools: Pools, candidates: pa.Table) -> np.ndarray:
    """directions_PDK the candidates of each prompt were made under; rollout keeps a prompt whole, N samples each."""
    K, N = pools.scores_PNK.shape[-1], _samples(candidates)
    direction_RK = np.array(candidates["direction"].to_pylist(), dtype=np.float64).reshape(-1, K)
    return direction_RK[pools.row_PN[:, ::N]]


def _samples(candidates: pa.Table) -> int:
    """N, under each direction."""
    return int(candidates["k"].to_numpy().max(initial=0)) + 1


def _per_direction(
    pools: Pools, candidates: pa.Table, how: _How, rngs: Sequence[np.random.Generator]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rollout's own directions_PDK, and winners_PD (with losers_PD where pairs are wanted) as places in each pool."""
    directions_PDK = _asked(pools, candidates)
    P, D, K = directions_PDK.shape
    N = pools.row_PN.shape[1] // max(D, 1)
    of_each = (
        pools.weighed_PNK.reshape(P * D, N, K),
        directions_PDK.reshape(P * D, 1, K),
        pools.valid_PN.reshape(P * D, N),
    )

    def in_pool(places: np.ndarray) -> np.ndarray:
        places_PD = places.reshape(P, D)
        return np.where(places_PD >= 0, places_PD + N * np.arange(D), -1)

    if not how.pairs:
        return directions_PDK, in_pool(select(*of_each, how.utility)), None
    of_each_rng = [rng for rng in rngs for _ in range(D)]
    winners, losers = select_pairs(*of_each, how.config.rejected, of_each_rng, how.utility)
    return directions_PDK, in_pool(winners), in_pool(losers)


def _winner_rows(
    found: Sequence[_Winners], candidates: pa.Table, texts: Mapping[str, str], how: _How, stage: str
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
    for pools, directions_PDK, held_PDK, winners_PD, losers_PD, _ in found:
        elsewhere = _elsewhere(pools, candidates, how, stage)
        for p, d in np.ndindex(winners_PD.shape):
            winner, direction_K = winners_PD[p, d], directions_PDK[p, d]
            if winner < 0:
                continue
            prompt_id = pools.prompt_ids[p]
            row = {"prompt_id": prompt_id, "messages": texts[prompt_id], "direction": direction_K.tolist()}
            if held_PDK is not None and np.isfinite(held_PDK[p, d]).any():
                row["held"] = [int(value) if np.isfinite(value) else None for value in held_PDK[p, d]]
            elif elsewhere is not None:
                own, read = responses[pools.row_PN[p, winner]], how.space.direction(direction_K).integers
                kept = zip(elsewhere[0][p].tolist(), pools.row_PN[p, elsewhere[1][p]], strict=True)
                row["negative_direction"] = next(
                    (one for one, at in kept if responses[at] != own and how.space.direction(one).integers != read), []
                )
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
