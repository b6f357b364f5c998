"""What the pools of some prompts serve and keep: their directions, and the winner of each.
Run its tests: pytest tests/test_score_select.py tests/test_loop_options.py
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dpa.core.directions import DirectionSpace
from dpa.core.pools import Pools, pools_of
from dpa.core.records import stable_hash
from dpa.core.sections.selection import SelectionConfig
from dpa.core.selection import select, select_best_mean, select_pairs, select_per_direction, select_random
from dpa.core.target_selection import serve_targets
from dpa.core.utility import Utility
from dpa.storage.schemas import score_matrix

CELLS = 27
"""Directions of the grid around which winners are alike (`selection.top_margin`)."""


class Winners(NamedTuple):
    """Of some prompts: what each pool serves, and whom it keeps for it, as places in the pool (-1: nobody)."""

    pools: Pools
    directions_PDK: np.ndarray
    held_PDK: np.ndarray | None
    winners_PD: np.ndarray
    losers_PD: np.ndarray | None


class How(NamedTuple):
    """What selection goes by. `scale_K` divides the objectives before they are weighed; `kept`: prompt ->
    kept_D, which of its winners are kept (`selection.top_margin`; None: all)."""

    space: DirectionSpace
    config: SelectionConfig
    seed: int
    pairs: bool
    scale_K: np.ndarray
    kept: Mapping[str, np.ndarray] | None = None

    @property
    def utility(self) -> Utility:
        """Of scores that were divided by `scale_K`."""
        return Utility(self.config.utility, self.config.augmentation, self.scale_K)

    @property
    def identity(self) -> str:
        """Tells shards that would have the same rows."""
        by = () if self.config.utility == "linear" else (self.config.utility, self.config.augmentation)
        held = (self.config.targets,) if self.targets else ()
        top = (f"top margin {self.config.top_margin} of {CELLS}",) if self.leaves_out else ()
        parts = self.space.to_dict(), self.config, self.seed, self.pairs, self.scale_K.tolist(), *by, *held, *top
        return stable_hash(*parts, digits=32)

    @property
    def targets(self) -> bool:
        """Whether some winners are those of targets."""
        return self.config.target_share > 0 and not self.pairs

    @property
    def leaves_out(self) -> bool:
        """Whether only the winners with the largest margins are kept."""
        return self.config.top_margin < 1 and self.config.method == "best_mean"


def winners_of(candidates: pa.Table, scores: pa.Table, how: How, stage: str) -> list[Winners]:
    """What the candidates of some prompts, and the table of their scores, keep. `stage`: its name is in the draws."""
    return [_winners(pools, candidates, how, stage) for pools in _pools(candidates, scores, how)]


def margins_of(
    candidates: pa.Table, scores: pa.Table, how: How, stage: str
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The prompts, margin_PD of best_mean's winners, and cell_PD: which of CELLS directions their own lies nearest to.
    Every prompt serves equally many."""
    cells_CK = how.space.grid(CELLS)
    prompt_ids: list[str] = []
    margins, cells = [], []
    for pools in _pools(candidates, scores, how):
        directions_PDK, _, margin_PD = _best_mean(pools, candidates, how, _rngs(pools, how, stage))
        prompt_ids += pools.prompt_ids
        margins.append(margin_PD)
        cells.append((directions_PDK @ cells_CK.T).argmax(axis=2))
    return prompt_ids, np.concatenate(margins), np.concatenate(cells)


def _pools(candidates: pa.Table, scores: pa.Table, how: How) -> list[Pools]:
    scores_RK = how.space.combine(*score_matrix(scores))
    return pools_of(candidates["prompt_id"].to_pylist(), scores_RK, how.scale_K)


def _rngs(pools: Pools, how: How, stage: str) -> list[np.random.Generator]:
    return [
        np.random.default_rng(int(stable_hash("select", how.seed, stage, prompt_id), 16))
        for prompt_id in pools.prompt_ids
    ]


def _winners(pools: Pools, candidates: pa.Table, how: How, stage: str) -> Winners:
    rngs = _rngs(pools, how, stage)
    losers_PD = held_PDK = None
    if how.config.method == "per_direction":
        directions_PDK, winners_PD, losers_PD = _per_direction(pools, candidates, how, rngs)
    elif how.config.method == "best_mean":
        directions_PDK, winners_PD, _ = _best_mean(pools, candidates, how, rngs)
        if how.kept is not None:
            kept_PD = np.array([how.kept[prompt_id] for prompt_id in pools.prompt_ids])
            winners_PD = np.where(kept_PD, winners_PD, -1)
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
            winners_PD = select(pools.weighed_PNK, directions_PDK, pools.valid_PN, how.utility)
    if how.targets:
        found = pools.scores_PNK, pools.weighed_PNK, pools.valid_PN, directions_PDK, winners_PD
        directions_PDK, held_PDK, winners_PD = serve_targets(*found, how.config.targets, how.space, rngs)
    return Winners(pools, directions_PDK, held_PDK, winners_PD, losers_PD)


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


def _best_mean(
    pools: Pools, candidates: pa.Table, how: How, rngs: Sequence[np.random.Generator]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The directions_PDK that are served, winners_PD as places in each pool, and margin_PD."""
    directions_PDK = _served(pools, candidates, how.space, how.config.directions, rngs)
    P, K, N = len(rngs), how.space.K, _samples(candidates)
    weighed_PDNK, valid_PDN = pools.weighed_PNK.reshape(P, -1, N, K), pools.valid_PN.reshape(P, -1, N)
    return directions_PDK, *select_best_mean(weighed_PDNK, directions_PDK, valid_PDN, how.utility)


def _per_direction(
    pools: Pools, candidates: pa.Table, how: How, rngs: Sequence[np.random.Generator]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rollout's own directions_PDK, and winners_PD (with losers_PD where pairs are wanted) as places in each pool."""
    directions_PDK = _asked(pools, candidates)
    P, D, K = directions_PDK.shape
    N = pools.row_PN.shape[1] // max(D, 1)
    weighed_PDNK, valid_PDN = pools.weighed_PNK.reshape(P, D, N, K), pools.valid_PN.reshape(P, D, N)

    def in_pool(places_PD: np.ndarray) -> np.ndarray:
        return np.where(places_PD >= 0, places_PD + N * np.arange(D), -1)

    if not how.pairs:
        winners = select_per_direction(weighed_PDNK, directions_PDK, valid_PDN, how.utility)
        return directions_PDK, in_pool(winners), None
    winners, losers = select_pairs(
        weighed_PDNK.reshape(P * D, N, K),
        directions_PDK.reshape(P * D, 1, K),
        valid_PDN.reshape(P * D, N),
        how.config.rejected,
        [rng for rng in rngs for _ in range(D)],
        how.utility,
    )
    return directions_PDK, in_pool(winners.reshape(P, D)), in_pool(losers.reshape(P, D))
