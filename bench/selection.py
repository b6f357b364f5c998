"""Selection: 1,000,000 candidates against 100 directions, in seconds, beside the plain einsum and argmax.

    python bench/selection.py [--candidates 1000000] [--pool 16] [--directions 100] [--objectives 3]

The first and the last give the same winners; the plain form holds every utility in memory at once, `select` a block of
2 MB. Between them `select` by the other utilities.
"""

import argparse
import resource
import time
from functools import partial
from typing import get_args

import numpy as np

from dpa.core.selection import select
from dpa.core.utility import LINEAR, Kind, Utility


def plain(scores_PNK: np.ndarray, directions_DK: np.ndarray) -> np.ndarray:
    """The method in one line."""
    return np.einsum("pnk,dk->pdn", scores_PNK, directions_DK).argmax(axis=2)


def peak_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Time both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--pool", type=int, default=16)
    parser.add_argument("--directions", type=int, default=100)
    parser.add_argument("--objectives", type=int, default=3)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    prompts = args.candidates // args.pool
    scores_PNK = rng.uniform(0, 100, (prompts, args.pool, args.objectives))
    directions_DK = rng.standard_normal((args.directions, args.objectives))
    directions_DK /= np.linalg.norm(directions_DK, axis=1, keepdims=True)
    print(
        f"{prompts * args.pool:,} candidates in {prompts:,} pools x {args.directions} directions, K = {args.objectives}"
    )
    winners = {}
    runs = {"select": select} | {
        kind: partial(select, utility=Utility(kind)) for kind in get_args(Kind) if kind != LINEAR.kind
    }
    for name, run in {**runs, "plain": plain}.items():  # select first: memory peaks only grow
        begun = time.perf_counter()
        winners[name] = run(scores_PNK, directions_DK)
        print(f"{name:12s} {time.perf_counter() - begun:6.2f} s   peak memory {peak_mb():6.0f} MB")
    assert (winners["select"] == winners["plain"]).all()


if __name__ == "__main__":
    main()
