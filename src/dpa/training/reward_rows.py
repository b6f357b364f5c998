"""Rated rows as a reward model is trained on them: encoded, split by prompt, those that are too long counted.
Run its tests: pytest tests/test_reward_data.py tests/test_reward_training.py
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dpa.core.errors import DataError
from dpa.core.records import Messages, stable_hash
from dpa.core.sections.reward import RewardTrainConfig
from dpa.scoring.reward_model import encode
from dpa.training.cutting import ANY_LENGTH, cut_prompt

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RatedExample:
    """A response and its M marks on 0-100, NaN where it was not rated."""

    prompt_id: str
    messages: Messages
    response: str
    marks: tuple[float, ...]


@dataclass(frozen=True)
class EncodedRows:
    """Rated rows that fit, as the model sees them: token ids and marks_NM (NaN: missing), and their split.

    `left_out` and `cut` count the rows that were too long; `limit` is the longest that fits.
    """

    examples: list[RatedExample]
    ids_N: list[list[int]]
    marks_NM: np.ndarray
    train: list[int]
    held_out: list[int]
    limit: int
    left_out: int
    cut: int

    @property
    def prompt_ids(self) -> list[str]:
        """Of each row."""
        return [example.prompt_id for example in self.examples]

    def ids(self, rows: Sequence[int]) -> list[list[int]]:
        """Token ids of some rows."""
        return [self.ids_N[row] for row in rows]


def split_by_prompt(prompt_ids: Sequence[str], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to hold out: a share of the PROMPTS, at least one, with all their rows.

    Which prompts depends on their ids and the seed alone. Raises DataError when there are fewer than two prompts.
    """
    prompts = sorted(set(prompt_ids), key=lambda prompt_id: stable_hash("held-out", seed, prompt_id))
    if len(prompts) < 2:
        raise DataError(f"ratings: {len(prompts)} usable prompts are too few to hold some out; rate at least two.")
    chosen = set(prompts[: min(len(prompts) - 1, max(1, round(held_out * len(prompts))))])
    train = [row for row, prompt_id in enumerate(prompt_ids) if prompt_id not in chosen]
    return train, [row for row, prompt_id in enumerate(prompt_ids) if prompt_id in chosen]


def encode_rated(
    examples: Sequence[RatedExample],
    attributes: Sequence[str],
    tokenizer: Any,
    template: str | None,
    max_length: int,
    config: RewardTrainConfig,
    seed: int,
) -> EncodedRows:
    """Encode and split; rows without a mark or too long are left out.

    Raises DataError when more than `config.max_left_out` are, or an attribute has no mark left.
    """
    rated = [example for example in examples if not np.isnan(example.marks).all()]
    ids_N = encode(tokenizer, template, max_length, [e.messages for e in rated], [e.response for e in rated])
    cut = 0
    if config.too_long == "cut_prompt":
        for row, example in enumerate(rated):
            if ids_N[row] is None:
                fitting = cut_prompt(tokenizer, template, max_length, example.messages, example.response)
                if fitting is not None:
                    rated[row], ids_N[row] = replace(example, messages=fitting[0]), fitting[1]
                    cut += 1
    kept = [(example, ids) for example, ids in zip(rated, ids_N, strict=True) if ids is not None]
    left_out = [example for example, ids in zip(rated, ids_N, strict=True) if ids is None]
    if left_out:
        sentence = _left_out(left_out, len(rated), tokenizer, template, max_length, config)
        if len(left_out) > config.max_left_out * len(rated):
            raise DataError(f"{sentence}, or raise reward.train.max_left_out ({config.max_left_out:g}).")
        _log.warning("%s.", sentence)
    marks_NM = np.array([example.marks for example, _ in kept], dtype=np.float64).reshape(len(kept), len(attributes))
    train, hold = split_by_prompt([example.prompt_id for example, _ in kept], config.held_out, seed)
    for name, marks_N in zip(attributes, marks_NM[train].T, strict=True):
        if np.isnan(marks_N).all():
            raise DataError(
                f"ratings: no row to train on has a mark on {name} ({len(hold)} rows are held out, {len(left_out)} do "
                f"not fit max_length {max_length}); leave it out, or rate more."
            )
    examples_kept, ids_kept = [example for example, _ in kept], [ids for _, ids in kept]
    return EncodedRows(examples_kept, ids_kept, marks_NM, train, hold, max_length, len(left_out), cut)


def _left_out(
    examples: Sequence[RatedExample],
    total: int,
    tokenizer: Any,
    template: str | None,
    max_length: int,
    config: RewardTrainConfig,
) -> str:
    """How many rated rows do not fit, how long they are, and what to do about it."""
    messages, responses = [example.messages for example in examples], [example.response for example in examples]
    lengths = [len(ids) for ids in encode(tokenizer, template, ANY_LENGTH, messages, responses) if ids]
    refused = f" ({len(examples) - len(lengths)} are refused by the template)" if len(lengths) < len(examples) else ""
    longest = f", up to {max(lengths):,}" if lengths else ""
    mend = f"raise reward.train.max_length ({config.max_length:,})"
    if max_length < config.max_length:
        mend = f"take a backbone with a longer context than {max_length:,}"
    if config.too_long == "leave_out":
        mend += ", or set reward.train.too_long: cut_prompt"
    return (
        f"reward model: LEFT OUT: {len(examples):,} of {total:,} rated rows ({len(examples) / total:.0%}) are longer "
        f"than {max_length:,} tokens{longest}{refused}, and train nothing; {mend}"
    )
