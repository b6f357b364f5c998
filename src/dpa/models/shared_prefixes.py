"""Sequences that begin alike, so that what they share is read once: who goes with whom, and their row for a model.
Run its tests: pytest tests/test_shared_prefixes.py

    found = families(ids_N)                            # 9 directions behind a question: one family of 9
    inputs, places_N = pack_families(ids_N, found)     # the question once, then 9 endings that each go on from it
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from dpa.models.attention import pack_inputs

WORTH_SHARING = 0.75
"""Sequences are laid out so where that leaves at most this share of their tokens: each is an attention call of its
own."""


class Family(NamedTuple):
    """Sequences, by their places in a list, of which the first `shared` tokens are read once; 0 of one alone."""

    shared: int
    places: tuple[int, ...]


def families(ids_N: Sequence[Sequence[int]], capacity: int | None = None) -> list[Family]:
    """Each sequence in one family, in the order of their first places; no family of several has more than `capacity`
    tokens, its shared ones counted once.

    Every member keeps a token of its own behind what is shared, its last at least, so equal sequences are a family too.
    Sorted, sequences stand beside those they share most with; of all ways to cut that order, this is one that reads
    the fewest tokens. Takes N steps, times the size of a family that would fit and shares a token: quadratic without
    a capacity where all begin alike (0.2 s for 1,000).
    """
    rows = sorted((tuple(ids), place) for place, ids in enumerate(ids_N))
    length_N = [len(ids) for ids, _ in rows]
    alike_N = [0, *(_alike(one, other) for (one, _), (other, _) in pairwise(rows))]
    # Of the first rows, for each number of them: most tokens saved, where their last family begins and what it shares.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for last, length in enumerate(length_N):
        found, shared, tokens = (best[last][0], last, 0), length - 1, length
        for first in range(last - 1, -1, -1):
            shared = min(shared, alike_N[first + 1], length_N[first] - 1)
            tokens += length_N[first]
            saved = (last - first) * shared
            if shared <= 0 or (capacity is not None and tokens - saved > capacity):
                break
            if best[first][0] + saved > found[0]:
                found = (best[first][0] + saved, first, shared)
        best.append(found)
    cut, end = [], len(rows)
    while end:
        _, first, shared = best[end]
        cut.append(Family(shared, tuple(sorted(place for _, place in rows[first:end]))))
        end = first
    return sorted(cut, key=lambda family: family.places)


def tokens_read(ids_N: Sequence[Sequence[int]], found: Iterable[Family]) -> int:
    """Tokens of these families, shared ones counted once."""
    return sum(sum(len(ids_N[place]) for place in places) - (len(places) - 1) * shared for shared, places in found)


def common_prefix(ids_N: Sequence[Sequence[int]]) -> int:
    """How many first tokens all of these sequences have in common and go on from; 0 of one alone."""
    if len(ids_N) == 1:
        return 0
    alike = _alike(min(map(list, ids_N)), max(map(list, ids_N)))  # what these share, all between them share
    return min(alike, min(map(len, ids_N)) - 1)


def pack_families(ids_N: Sequence[Sequence[int]], found: Iterable[Family]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """(what a model is given in a block of `packed_attention`, for each sequence where its tokens stand in the row).

    Only attention by SEGMENTS reads a row in which something is shared. A sequence that is in no family has no places.
    """
    segments: list[Sequence[int]] = []
    before: list[int] = []
    places_N = [np.empty(0, np.int64)] * len(ids_N)
    tokens = 0
    for shared, places in found:
        start, start_token = -1, tokens
        if shared:
            start = len(segments)
            segments.append(ids_N[places[0]][:shared])
            before.append(-1)
            tokens += shared
        for place in places:
            segments.append(ids_N[place][shared:])
            before.append(start)
            end = tokens + len(segments[-1])
            places_N[place] = np.r_[start_token : start_token + shared, tokens:end]
            tokens = end
    return pack_inputs(segments, before), places_N


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two sequences have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
