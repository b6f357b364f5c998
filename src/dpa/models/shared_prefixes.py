"""Sequences that begin alike, so that what they share is read once: who goes with whom, and their row for a model.
Run its tests: pytest tests/test_shared_prefixes.py

    found = families(ids_N)                            # 9 directions behind a question: one family of 9
    inputs, places_N = pack_families(ids_N, found)     # the question once, then 9 endings that each go on from it
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, cast

import numpy as np

from dpa.models.attention import pack_inputs

WORTH_SHARING = 0.75
"""Sequences go on from what they share where that leaves at most this share of their tokens, on average: each is an
attention call of its own."""

LEAST_SHARED = 64
"""Fewer first tokens in common are no reason for examples of a training to lie beside each other, out of the order that
was drawn."""


class Family(NamedTuple):
    """Items, by their places in a list, of which the first `shared` tokens are read once; 0: an item alone."""

    shared: int
    places: tuple[int, ...]


def families(ids_N: Sequence[Sequence[int]], capacity: int | None = None) -> list[Family]:
    """`group_families` of items that are a sequence each."""
    return group_families([[ids] for ids in ids_N], capacity=capacity)


def group_families(
    groups_N: Sequence[Sequence[Sequence[int]]],
    answers_N: Sequence[int] | None = None,
    capacity: int | None = None,
    least: int = 1,
) -> list[Family]:
    """Each item in one family, families and the items of each in the order given; an item is one or more sequences that
    stay together. `answers_N`: tokens that follow each sequence of an item, and are never shared.

    Every sequence keeps a token of its own behind what is shared, its last at least. Sorted, items stand beside those
    they share most with. One joins the family before it where that saves a quarter of its tokens, however much less the
    others then share, and where no fewer than `least` are shared. A family of more than `capacity` tokens is cut, still
    sorted, so that its parts share more.
    """
    answers = answers_N or [0] * len(groups_N)
    items = [_Growing.of(*item, least) for item in zip(groups_N, answers, strict=True)]
    found: list[tuple[_Growing, list[int]]] = []
    for place in sorted(range(len(items)), key=lambda place: cast(Any, items[place].first)):
        item = items[place]
        family, places = found[-1] if found else (item, [])
        joined = family.joined(item)
        if places and joined.tokens <= family.tokens + WORTH_SHARING * item.tokens:
            places.append(place)
            found[-1] = joined, places
        else:
            found.append((item, [place]))
    whole = (Family(family.shared, tuple(places)) for family, places in found)
    cut = whole if capacity is None else (part for one in whole for part in _cut(one.places, items, capacity))
    return sorted((Family(shared, tuple(sorted(places))) for shared, places in cut), key=lambda family: family.places)


def tokens_read(ids_N: Sequence[Sequence[int]], found: Iterable[Family]) -> int:
    """Tokens of these families, shared ones counted once."""
    return sum(sum(len(ids_N[place]) for place in places) - (len(places) - 1) * shared for shared, places in found)


def common_prefix(ids_N: Sequence[Sequence[int]]) -> int:
    """How many first tokens all of these sequences have in common and go on from; 0 of one alone."""
    if len(ids_N) == 1:
        return 0
    alike = _alike(min(map(list, ids_N)), max(map(list, ids_N)))  # what these share, all between them share
    return min(alike, min(map(len, ids_N)) - 1)


def lay_out(groups: Iterable[tuple[int, Iterable[Sequence[int]]]]) -> tuple[list[Sequence[int]], list[int]]:
    """(segments that make a row, for each the place of the one it goes on from, or -1): of each group the `shared`
    first tokens once, then what follows them in each of its sequences."""
    segments: list[Sequence[int]] = []
    before: list[int] = []
    for shared, sequences in groups:
        start = -1
        for ids in sequences:
            if shared and start < 0:
                start = len(segments)
                segments.append(ids[:shared])
                before.append(-1)
            segments.append(ids[shared:])
            before.append(start)
    return segments, before


def pack_families(ids_N: Sequence[Sequence[int]], found: Sequence[Family]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """(what a model is given in a block of `packed_attention`, for each sequence where its tokens stand in the row).

    Only where attention `may_go_on` a row is read in which something is shared. A sequence that is in no family has no
    places.
    """
    inputs = pack_inputs(*lay_out((shared, [ids_N[place] for place in places]) for shared, places in found))
    places_N = [np.empty(0, np.int64)] * len(ids_N)
    tokens = 0
    for shared, places in found:
        shared_places = np.arange(tokens, tokens + shared)
        tokens += shared
        for place in places:
            start, tokens = tokens, tokens + len(ids_N[place]) - shared
            places_N[place] = np.r_[shared_places, start:tokens]
    return inputs, places_N


class _Growing(NamedTuple):
    """A family while it grows."""

    first: Sequence[int]
    shortest: int
    common: int
    sequences: int
    alone: int
    """Tokens where nothing is shared."""
    least: int

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], answer: int, least: int) -> "_Growing":
        common = len(sequences[0])
        for other in sequences[1:]:
            common = _alike(sequences[0], other, common)
        alone = sum(len(ids) + answer for ids in sequences)
        return cls(sequences[0], min(map(len, sequences)), common, len(sequences), alone, least)

    def joined(self, item: "_Growing") -> "_Growing":
        return _Growing(
            self.first,
            min(self.shortest, item.shortest),
            _alike(self.first, item.first, min(self.common, item.common)),
            self.sequences + item.sequences,
            self.alone + item.alone,
            self.least,
        )

    @property
    def shared(self) -> int:
        """All that is common, but for a last token, or nothing where that is not worth it."""
        shared = min(self.common, self.shortest - 1)
        worth = self.sequences > 1 and shared >= (1 - WORTH_SHARING) * self.alone / self.sequences
        return shared if worth and shared >= self.least else 0

    @property
    def tokens(self) -> int:
        """To be read."""
        return self.alone - (self.sequences - 1) * self.shared


def _cut(places: Sequence[int], items: Sequence[_Growing], capacity: int) -> Iterator[Family]:
    """The family of these items in parts of at most `capacity` tokens, or of one item."""
    first, part = 0, items[places[0]]
    for number, place in enumerate(places[1:], start=1):
        longer = part.joined(items[place])
        if longer.tokens > capacity:
            yield Family(part.shared, tuple(places[first:number]))
            first, longer = number, items[place]
        part = longer
    yield Family(part.shared, tuple(places[first:]))


def _alike(one: Sequence[int], other: Sequence[int], most: int | None = None) -> int:
    """How many first tokens two sequences have in common, at most `most`."""
    pairs = zip(one[:most], other[:most], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
