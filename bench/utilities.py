"""Utilities of a selection, seen on one run's pools before anything is trained: which winners would be learned from?

    python bench/utilities.py RUN [-t 1] [--directions 9]

For each utility, and for rays from other reference points, the winners of every direction of the grid over the pools of
iteration t (t = 0: the rated responses), scored by the run's scorer and, where `evaluate.gold` has one, by the true
reward: expected utility, hypervolume, span and largest jump between neighbouring directions of the winners' mean.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from dpa.core.config import load_config
from dpa.core.measures import all_measures
from dpa.core.records import places_of
from dpa.core.selection import select
from dpa.core.utility import Utility
from dpa.scoring.function_scorer import FunctionScorer
from dpa.storage.run_folder import RunFolder
from dpa.storage.tables import read_table

UTILITIES = {
    "linear": Utility(),
    "ray": Utility("ray"),
    "ray, augmentation 0.1": Utility("ray", 0.1),
    "ray, augmentation 0.3": Utility("ray", 0.3),
    "ray, augmentation 1": Utility("ray", 1.0),
    "chebyshev": Utility("chebyshev"),
    "chebyshev, augmentation 0.3": Utility("chebyshev", 0.3),
}


def rays(scores_PNK: np.ndarray, directions_DK: np.ndarray, valid_PN: np.ndarray, start: str) -> np.ndarray:
    """winners_PD of rays that start at each pool's mean, or a tenth of its range behind its worst (`start`)."""
    known_PNK = np.where(valid_PN[..., None], scores_PNK, np.nan)
    low_PK, high_PK = np.nanmin(known_PNK, axis=1), np.nanmax(known_PNK, axis=1)
    behind_PK = 0.1 * (high_PK - low_PK)
    start_PDK = np.where(directions_DK > 0, (low_PK - behind_PK)[:, None], (high_PK + behind_PK)[:, None])
    if start == "mean":
        start_PDK = np.broadcast_to(np.nanmean(known_PNK, axis=1)[:, None], start_PDK.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain_PDNK = (scores_PNK[:, None] - start_PDK[:, :, None]) / directions_DK[None, :, None]
    gain_PDNK = np.where(np.abs(directions_DK)[None, :, None] > 1e-9, gain_PDNK, np.inf)
    linear_PDN = np.einsum("pnk,dk->pdn", scores_PNK, directions_DK)
    return np.where(valid_PN[:, None], gain_PDNK.min(axis=3) + 0.01 * linear_PDN, -np.inf).argmax(axis=2)


def main() -> None:
    """Print one row for each utility and reward."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("-t", "--iteration", type=int, default=1)
    parser.add_argument("--directions", type=int, default=9)
    args = parser.parse_args()
    config = load_config(args.run / "config.yaml")
    space, folder = config.space.build(), RunFolder(args.run)
    scored, chosen = folder.stage(args.iteration, "score"), folder.stage(args.iteration, "select").whole_table()
    if args.iteration == 0:
        table = read_table(args.run / "ratings.parquet")
    else:
        table = folder.stage(args.iteration, "rollout").whole_table()
    text = dict(zip(chosen["prompt_id"].to_pylist(), chosen["messages"].to_pylist(), strict=True))
    scores = {"model": space.combine(*scored.scores())}
    if config.evaluate.gold:
        gold = FunctionScorer(config.evaluate.gold, "evaluate.gold")
        messages = [json.loads(text[prompt_id]) for prompt_id in table["prompt_id"].to_pylist()]
        true_RM = gold.score(messages, table["response"].to_pylist())
        own = set(space.names) <= set(gold.attributes)  # the objectives themselves, or what they are made of
        scores["true"] = (
            true_RM[:, list(map(gold.attributes.index, space.names))]
            if own
            else space.combine(true_RM, gold.attributes)
        )
    rows = list(places_of(table["prompt_id"].to_pylist()).values())
    place_PN = np.full((len(rows), max(map(len, rows))), -1)
    for p, members in enumerate(rows):
        place_PN[p, : len(members)] = members
    pools_PNK = scores["model"][place_PN]
    valid_PN = np.isfinite(pools_PNK).all(axis=2) & (place_PN >= 0)
    grid_DK = space.grid(args.directions)
    winners = {name: select(pools_PNK, grid_DK, valid_PN, utility) for name, utility in UTILITIES.items()}
    known_P = valid_PN.any(axis=1)
    for start in ("mean", "worst"):
        own = rays(pools_PNK[known_P], grid_DK, valid_PN[known_P], start)
        winners[f"ray from the pool's {start}"] = np.full((len(rows), len(grid_DK)), -1)
        winners[f"ray from the pool's {start}"][known_P] = own
    for name, winners_PD in winners.items():
        for reward, scores_RK in scores.items():
            means_DK = scores_RK[np.take_along_axis(place_PN[known_P], winners_PD[known_P], axis=1)].mean(axis=0)
            found = dict(all_measures(means_DK, space, grid_DK, config.evaluate.reference))
            kept = ("expected_utility", "hypervolume", "span", "kendall_tau", "largest_jump")
            said = ", ".join(
                f"{key} {objective or ''} {value:,.2f}" for (key, objective), value in found.items() if key in kept
            )
            print(f"{name:28s} {reward:6s} {said}")


if __name__ == "__main__":
    main()
