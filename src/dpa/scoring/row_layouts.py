"""Rows of token ids laid out for one forward pass: padded, behind each other, or behind the prompt that they share.
Run its tests: pytest tests/test_row_layouts.py tests/test_scorers.py

A layout cuts its rows into batches, counts the tokens of a batch and makes what a model is given for it. Scores do not
depend on it beyond rounding.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from dpa.core.records import places_of
from dpa.models.attention import pack_inputs
from dpa.models.shared_prefixes import WORTH_SHARING, Family, common_prefix, pack_families


class RowsAlone(NamedTuple):
    """Rows padded to the longest of their batch, or `packed` behind each other; of any prompts."""

    ids_N: Sequence[Sequence[int]]
    pad_token_id: int
    packed: bool

    def batches(self, token_budget: int) -> Iterator[list[int]]:
        return batches([len(ids) for ids in self.ids_N], token_budget, self.packed)

    def tokens(self, rows: Sequence[int]) -> int:
        """Of a batch, padding included."""
        lengths_B = [len(self.ids_N[row]) for row in rows]
        return sum(lengths_B) if self.packed else len(rows) * max(lengths_B)

    def inputs(self, rows: Sequence[int]) -> tuple[dict[str, Any], torch.Tensor | None]:
        ids_B = [self.ids_N[row] for row in rows]
        return (pack_inputs(ids_B) if self.packed else pad_batch(ids_B, self.pad_token_id)), None


class SharedPrompts:
    """A prompt once, and behind it all that was answered to it: an answer sees its prompt and itself, nothing else.

    16 answers of 40 tokens to a prompt of 300 are 5,440 tokens alone and 940 like this. `prompts_N` names the prompt of
    each row; what its rows share is the tokens that all of them begin with.
    """

    packed = True

    def __init__(self, ids_N: Sequence[Sequence[int]], prompts_N: Sequence[Hashable]) -> None:
        self._ids_N, self._prompts_N = ids_N, prompts_N
        self._rows = places_of(prompts_N)
        self._shared = {prompt: common_prefix([ids_N[row] for row in rows]) for prompt, rows in self._rows.items()}

    def tokens(self, rows: Sequence[int]) -> int:
        """Tokens of these rows in one pass, those that rows of a prompt share counted once."""
        prompts = {self._prompts_N[row] for row in rows}
        read = sum(len(self._ids_N[row]) - self._shared[self._prompts_N[row]] for row in rows)
        return read + sum(self._shared[prompt] for prompt in prompts)

    @property
    def worth_it(self) -> bool:
        """Whether most tokens are shared."""
        alone = sum(map(len, self._ids_N))
        return self.tokens(range(len(self._ids_N))) <= WORTH_SHARING * alone

    def batches(self, token_budget: int) -> Iterator[list[int]]:
        """Row numbers in batches within the budget, or of one row; a prompt's rows beside each other, the prompt with
        the longest row first (so that a batch that does not fit is met at once)."""

        def adds(row: int, batch: list[int]) -> int:
            same = batch and self._prompts_N[batch[-1]] == self._prompts_N[row]
            return len(self._ids_N[row]) - (self._shared[self._prompts_N[row]] if same else 0)

        prompts = sorted(self._rows.values(), key=lambda rows: -max(len(self._ids_N[row]) for row in rows))
        return _cut(chain.from_iterable(prompts), token_budget, adds)

    def inputs(self, rows: Sequence[int]) -> tuple[dict[str, Any], torch.Tensor]:
        """(what a model is given in a block of `packed_attention`, the place of each row's last token)."""
        found = [
            Family(self._shared[prompt], tuple(members))
            for prompt, members in places_of(self._prompts_N[row] for row in rows).items()
        ]
        inputs, places_B = pack_families([self._ids_N[row] for row in rows], found)
        return inputs, torch.tensor([places[-1] for places in places_B])


def pad_batch(ids_B: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, T), padded on the right."""
    width = max(len(ids) for ids in ids_B)
    return {
        "input_ids": torch.tensor([[*ids, *[pad_token_id] * (width - len(ids))] for ids in ids_B]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in ids_B]),
    }


def batches(lengths_N: Sequence[int], token_budget: int, packed: bool) -> Iterator[list[int]]:
    """Row numbers, longest first (so that a batch that does not fit is met at once), in batches within the budget, or
    of one row. Rows that are not `packed` are padded to the longest."""

    def adds(row: int, batch: list[int]) -> int:
        return lengths_N[row] if packed or not batch else lengths_N[batch[0]]

    return _cut(sorted(range(len(lengths_N)), key=lambda row: -lengths_N[row]), token_budget, adds)


def _cut(rows: Iterable[int], token_budget: int, adds: Callable[[int, list[int]], int]) -> Iterator[list[int]]:
    """The rows in batches within the budget, or of one row; `adds(row, batch)`: tokens that a row adds to a batch."""
    batch: list[int] = []
    tokens = 0
    for row in rows:
        if batch and tokens + adds(row, batch) > token_budget:
            yield batch
            batch, tokens = [], 0
        tokens += adds(row, batch)
        batch.append(row)
    if batch:
        yield batch
