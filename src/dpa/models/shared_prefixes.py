"""Which token sequences begin alike, so that what they share is read once (attention.py, `before_N`).
Run its tests: pytest tests/test_shared_prefixes.py
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

WORTH_SHARING = 0.75
"""Sequences lie behind what they share where that leaves at most this share of their tokens: each is an attention call
of its own."""


LEAST_SHARED = 64
"""Fewer first tokens in common are no reason to lie beside each other."""


class Family(NamedTuple):
    """Items whose sequences all begin with the same `shared` tokens and go on from there; 0: an item alone."""

    shared: int
    places: list[int]


def families(
    sequences_N: Sequence[Sequence[Sequence[int]]],
    answers_N: Sequence[int] | None = None,
    capacity: int | None = None,
) -> list[Family]:
    """Items put together by what they begin with; an item is one or more sequences that stay together.

    `answers_N`: tokens that follow each sequence of an item, and are never shared.

    Neighbours in alphabetical order share most. One joins the family before it where that saves a quarter of its
    tokens, however much less the others then share. A family of more than `capacity` tokens is cut, its items in the
    order given, so that what is drawn beside what stays a draw. Every item is in one family, families too in the order
    given.
    """
    answers = answers_N or [0] * len(sequences_N)
    items = [_Growing.of(place, *item) for place, item in enumerate(zip(sequences_N, answers, strict=True))]
    found: list[_Growing] = []
    for alone in sorted(items, key=lambda item: item.first):
        joined = found[-1].joined(alone) if found else None
        if joined is not None and joined.tokens <= found[-1].tokens + WORTH_SHARING * alone.tokens:
            found[-1] = joined
        else:
            found.append(alone)
    cut = found if capacity is None else [part for one in found for part in _cut(one, items, capacity)]
    return sorted((Family(one.shared, sorted(one.places)) for one in cut), key=lambda family: family.places[0])


def _cut(family: "_Growing", items: Sequence["_Growing"], capacity: int) -> Iterator["_Growing"]:
    """A family in parts of at most `capacity` tokens, or of one item."""
    part: _Growing | None = None
    for place in sorted(family.places):
        longer = items[place] if part is None else part.joined(items[place])
        if part is not None and longer.tokens > capacity:
            yield part
            longer = items[place]
        part = longer
    if part is not None:
        yield part


class _Growing(NamedTuple):
    places: list[int]
    first: Sequence[int]
    shortest: int
    """Of the sequences; each goes on by a token at least."""
    common: int
    """First tokens that all have."""
    sequences: int
    alone: int
    """Tokens where nothing is shared."""

    @classmethod
    def of(cls, place: int, sequences: Sequence[Sequence[int]], answer: int) -> "_Growing":
        shortest, common = min(map(len, sequences)), len(sequences[0])
        for other in sequences[1:]:
            common = common_prefix(sequences[0], other, common)
        return cls([place], sequences[0], shortest, common, len(sequences), sum(len(ids) + answer for ids in sequences))

    def joined(self, other: "_Growing") -> "_Growing":
        most = min(self.common, other.common)
        return _Growing(
            [*self.places, *other.places],
            self.first,
            min(self.shortest, other.shortest),
            common_prefix(self.first, other.first, most),
            self.sequences + other.sequences,
            self.alone + other.alone,
        )

    @property
    def shared(self) -> int:
        """How much of what is common is shared: all, but for a last token, or nothing where it is not worth it."""
        shared = min(self.common, self.shortest - 1)
        worth = self.alone - (self.sequences - 1) * shared <= WORTH_SHARING * self.alone
        return shared if worth and shared >= LEAST_SHARED else 0

    @property
    def tokens(self) -> int:
        """To be read."""
        return self.alone - (self.sequences - 1) * self.shared


def common_prefix(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many first tokens two sequences have in common, at most `most`."""
    pairs = zip(one[:most], other[:most], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
