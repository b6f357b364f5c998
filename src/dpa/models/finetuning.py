"""Finetuning a policy on (direction, prompt, winner) through TRL's SFTTrainer: the one adapter over it.
Run its tests: pytest tests/test_finetuning.py

The loss is on the response and its end token only, summed over the tokens of an optimizer step and divided by their
number (over all devices and accumulated rows), so that a token counts the same in a short response and a long one.
Examples are packed whole into rows of at most `max_length`, long and short ones together; positions start again with
each example, which keeps them from attending to each other. `finetune.contrastive` adds a term: models/contrastive.py.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer

from dpa.core.config import FinetuneConfig
from dpa.core.directions import DirectionSpace
from dpa.core.reference import Model
from dpa.models.attention import pack_lengths, packed_attention, to_device
from dpa.models.contrastive import AccumulatesContrast, AddsContrast, contrast_slots, negative_directions
from dpa.models.label_logprobs import IGNORED, has_plain_head, label_logprobs, label_places
from dpa.models.listening import Listening
from dpa.models.passes import StepInPasses, Uncut, first_plan, one_card, without_adapters
from dpa.models.policy_training import (
    RowEncoder,
    accumulation,
    adapters,
    optimizer_class,
    shared_arguments,
    train_policy,
)
from dpa.models.ranks import ranks
from dpa.models.training import StopsAtBadStep
from dpa.storage.run_folder import Reject
from dpa.storage.schemas import completeness

_log = logging.getLogger(__name__)

OPEN_ROWS = 32
"""Packed rows that may still take an example."""


@dataclass(frozen=True)
class FinetuneResult:
    """What a finetuning did.

    `training_tokens` were read, prompts and negatives included; `losses` are nats per response token (and the
    contrastive term, where there is one), one per optimizer step; `padding_share` is the part of the packed rows'
    length that no example filled (it costs no computation).
    """

    training_tokens: int
    steps: int
    losses: tuple[float, ...]
    rejects: tuple[Reject, ...]
    padding_share: float
    listening: Listening | None = None
    listening_tokens: int = 0


@dataclass(frozen=True)
class Example:
    """Token ids of prompt, response and end token, and how many of them are the prompt.

    `negatives`: the prompt's ids under directions that do not choose the response (see models/contrastive.py).
    """

    ids: list[int]
    prompt_tokens: int
    negatives: tuple[list[int], ...] = ()

    @property
    def tokens(self) -> int:
        """All that are read: the response is read again behind each negative."""
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def segments(self) -> "list[Example]":
        """This example alone, then its response behind each negative."""
        response = self.ids[self.prompt_tokens :]
        return [Example(self.ids, self.prompt_tokens), *(Example([*p, *response], len(p)) for p in self.negatives)]

    @property
    def labels(self) -> list[int]:
        """The ids, the prompt's replaced by IGNORED."""
        return [IGNORED] * self.prompt_tokens + self.ids[self.prompt_tokens :]


@dataclass(frozen=True)
class Row:
    """A packed row of T tokens: ids_T and labels_T of its segments, their lengths, and how many each example has.

    `labels` are those of the examples themselves, their negatives aside; `learned` is how many examples have one.
    """

    ids_T: torch.Tensor
    labels_T: torch.Tensor
    lengths: list[int]
    sizes: list[int]
    labels: int
    learned: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Row":
        """The examples behind each other, each followed by its negatives."""
        split = [example.segments for example in examples]
        segments = [segment for example in split for segment in example]
        # A first token has a label where an example is all response, but nothing before it to be predicted from.
        labels = [len(example.ids) - max(1, example.prompt_tokens) for example in examples]
        return cls(
            torch.tensor([token for segment in segments for token in segment.ids]),
            torch.tensor([label for segment in segments for label in (IGNORED, *segment.labels[1:])]),
            [len(segment.ids) for segment in segments],
            [len(example) for example in split],
            sum(labels),
            sum(count > 0 for count in labels),
        )


def pass_inputs(rows: Sequence[Row]) -> dict[str, Any]:
    """What one pass over packed rows is given: all of them behind each other, as one row."""
    labels_T = torch.cat([row.labels_T for row in rows])
    return {
        "input_ids": torch.cat([row.ids_T for row in rows])[None],
        "labels": labels_T[None],
        "label_places": label_places(labels_T),
        **pack_lengths([length for row in rows for length in row.lengths]),
    }


def contrast_inputs(rows: Sequence[Row]) -> dict[str, Any]:
    """The same, and which segment of which example each label belongs to."""
    inputs = pass_inputs(rows)
    lengths = [length for row in rows for length in row.lengths]
    return inputs | contrast_slots(inputs["label_places"], lengths, [size for row in rows for size in row.sizes])


def step_counts(rows: Sequence[Row]) -> dict[str, int]:
    """What a loss over packed rows is divided by: their labels, and their examples that have any."""
    return {"count": sum(row.labels for row in rows), "examples": sum(row.learned for row in rows)}


class _OverPackedRows:
    """Mixin before a Trainer class whose rows are packed."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with attention that stays within an example."""
        trainer: Any = self
        dtype = torch.bfloat16 if trainer.args.bf16 else None
        with packed_attention(without_adapters(trainer.model), dtype):
            return super().train(*args, **kwargs)  # type: ignore[misc]


class _Trainer(StopsAtBadStep, StepInPasses, _OverPackedRows, SFTTrainer):
    """SFTTrainer that cuts a step into passes that fit, and never takes a step from a NaN."""

    unit, field = "packed rows", "finetune.max_length"

    def cut(self, rows: Sequence[Row], size: int) -> list[Any]:
        """Passes of `size` packed rows."""
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def pass_loss(self, model: Any, part: Any, step: Mapping[str, Any]) -> torch.Tensor:
        """Nats of the pass's labels, over those of the step."""
        inputs = to_device(pass_inputs(part), self.args.device)
        logprobs_L, _ = label_logprobs(without_adapters(model), inputs)
        return -logprobs_L.sum() / step["count"]


class _ContrastiveTrainer(AddsContrast, _Trainer):
    """The same with the contrastive term."""

    def pass_loss(self, model: Any, part: Any, step: Mapping[str, Any]) -> torch.Tensor:
        """Nats of the pass's own labels, over those of the step, and the weighed term."""
        inputs = to_device(contrast_inputs(part), self.args.device)
        slot_L, present_RJ = inputs.pop("slot_L"), inputs.pop("present_RJ")
        logprobs_L, _ = label_logprobs(without_adapters(model), inputs)
        return self.contrast_loss(logprobs_L, slot_L, present_RJ, step["count"], step["examples"])


class _LaunchedTrainer(StopsAtBadStep, _OverPackedRows, SFTTrainer):
    """The same in a launched training, where passes accumulate as the Trainer does it, so that ranks stay together."""


class _LaunchedContrastiveTrainer(AccumulatesContrast, _LaunchedTrainer):
    """The same with the contrastive term."""


def finetune(
    policy: Model,
    rows: pa.Table,
    space: DirectionSpace,
    out: Path,
    work: Path,
    config: FinetuneConfig,
    seed: int,
    label: str = "finetune",
    held_out: pa.Table | None = None,
) -> FinetuneResult:
    """Finetune `policy` on rows (select shard columns) and save the new policy at `out`, whole or not at all.

    `work` keeps checkpoints and `log.jsonl`; the same call resumes from the newest complete checkpoint and ends where
    an uninterrupted one would. A response that is empty, or that does not fit `config.max_length` (or the model's
    context) with its prompt, is rejected. `label` names the work in messages,
    `held_out` are rows that listening is measured on.

    Raises what `models.policy_training.train_policy` raises.
    """

    def encode(
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> tuple[list[Example], list[Reject]]:
        others = None
        if config.contrastive:
            others = negative_directions(rows, space, config.contrastive_negatives, seed)
        examples, rejects = encode_examples(rows, model, tokenizer, space, longest, others, config.max_length)
        crowded = sum(map(bool, others or ())) - sum(bool(example.negatives) for example in examples) - len(rejects)
        if crowded > 0:
            _log.warning(
                "%s: at least %d of %d rows and their negatives do not fit finetune.max_length (%d tokens) together, "
                "and are not contrasted; raise it to %d times the longest row.",
                *(label, crowded, len(rows), config.max_length, config.contrastive_negatives + 1),
            )
        order = np.random.default_rng(seed).permutation(len(examples))
        return [examples[place] for place in order], rejects

    def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> SFTTrainer:
        return build_trainer(model, tokenizer, examples, work, config, seed)

    done = train_policy(policy, space, out, work, config, seed, encode, build, label, held_out)
    return FinetuneResult(
        training_tokens=round(done.tokens * config.epochs),
        steps=done.steps,
        losses=done.logged("loss"),
        rejects=done.rejects,
        listening=done.listening,
        listening_tokens=done.listening_tokens,
        padding_share=1 - done.tokens / (done.rows * config.max_length),
    )


def encode_examples(
    rows: pa.Table,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    space: DirectionSpace,
    longest: int,
    others: Sequence[Sequence[Sequence[float]]] | None = None,
    room: int = 0,
) -> tuple[list[Example], list[Reject]]:
    """Token ids of each row (select shard columns), or the reason why it cannot be trained on.

    The prompt is what the sampler shows; the response follows as its own tokens, then the token that ends a turn,
    unless the column `complete` says that the response was cut at a limit. `others`: directions each row is
    contrasted with; as many of them are kept as fit, with the row itself, into `room` tokens.
    """
    encoder = RowEncoder(model, tokenizer, space, longest)
    examples, rejects = [], []
    columns = ("candidate_id", "messages", "direction", "response")
    texts = zip(*(rows[name].to_pylist() for name in columns), completeness(rows), strict=True)
    for row, (identity, messages, direction, response, complete) in enumerate(texts):
        encoded = encoder.encode(messages, direction, [response], [complete])
        if isinstance(encoded, str):
            rejects.append(Reject(identity, encoded))
        else:
            prompt, (completion,) = encoded
            example = Example([*prompt, *completion], len(prompt))
            for other in others[row] if others is not None else ():
                elsewhere = encoder.encode(messages, other, [response], [complete])
                if isinstance(elsewhere, str):
                    break
                contrasted = Example(example.ids, len(prompt), (*example.negatives, elsewhere[0]))
                if contrasted.tokens > room:
                    break
                example = contrasted
            examples.append(example)
    return examples, rejects


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of the examples in each packed row: every example goes, in the order given, where it fits best.

    Unlike TRL's best-fit decreasing, which sorts by length first and so fills a row with examples of like length, this
    keeps the order's mixture in every row. With sorted rows a step is mostly short or mostly long, and
    P(end | full stop) came out 0.33 to 0.35 where the data said 0.30; with mixed ones 0.29 to 0.32. The space lost is
    a few percent, and costs nothing since rows are not padded.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (space left, row), of the newest OPEN_ROWS
    for place, length in enumerate(lengths):
        fitting = [entry for entry in open_rows if entry[0] >= length]
        space, row = min(fitting, default=(capacity, len(rows)))
        if row == len(rows):
            rows.append([])
            open_rows = open_rows[-OPEN_ROWS + 1 :]
        else:
            open_rows.remove((space, row))
        rows[row].append(place)
        open_rows.append((space - length, row))
    return rows


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    work: Path,
    config: FinetuneConfig,
    seed: int,
) -> SFTTrainer:
    """The SFTTrainer over the packed examples, checkpoints in `work`. Raises ConfigError."""
    in_passes = ranks() == 1 and has_plain_head(model)
    together = 1 if config.rows_per_device == "auto" else config.rows_per_device
    accumulated = accumulation(
        "finetune.packed_rows_per_step", config.packed_rows_per_step, "rows_per_device", together
    )
    arguments = SFTConfig(
        **shared_arguments(config, work, seed),
        max_length=None,  # the rows are packed below
        per_device_train_batch_size=config.packed_rows_per_step if in_passes else together,
        gradient_accumulation_steps=1 if in_passes else accumulated,
        remove_unused_columns=False,
    )
    one_card(arguments)
    kind: type[SFTTrainer]
    if in_passes:
        kind, collate = _ContrastiveTrainer if config.contrastive else _Trainer, _step
    elif config.contrastive:
        kind, collate = _LaunchedContrastiveTrainer, _contrast_pass
    else:
        kind, collate = _LaunchedTrainer, _pass
    trainer: Any = kind(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),  # nothing is left to prepare
        processing_class=tokenizer,
        peft_config=adapters(config),
        optimizer_cls_and_kwargs=optimizer_class(config),
    )
    trainer.remove_callback(PrinterCallback)
    rows = [Row.of(row) for row in _packed(examples, config)]
    trainer.train_dataset, trainer.data_collator = rows, collate
    if config.contrastive:
        trainer.contrastive = config.contrastive
    if in_passes:
        longest = max(row.ids_T.numel() for row in rows)
        most = config.packed_rows_per_step if config.rows_per_device == "auto" else config.rows_per_device
        recompute = config.gradient_checkpointing
        first = first_plan(trainer.model, recompute, longest, min(most, len(rows)), "finetune", bool(arguments.bf16))
        cpu_auto = arguments.device.type == "cpu" and config.rows_per_device == "auto"  # one a pass is as fast there
        trainer.compile = config.compile
        trainer.pass_size = 1 if cpu_auto else first.units
        trainer.may_recompute = recompute is None and not first.recompute
        arguments.gradient_checkpointing = first.recompute
    return trainer


def _step(rows: list[Row]) -> dict[str, Any]:
    """The batch of an optimizer step."""
    return {**{name: max(1, count) for name, count in step_counts(rows).items()}, "rows": Uncut(rows)}


def _pass(rows: list[Row]) -> dict[str, Any]:
    """The batch of a pass."""
    return {name: value for name, value in pass_inputs(rows).items() if name != "label_places"}


def _contrast_pass(rows: list[Row]) -> dict[str, Any]:
    """The batch of a pass, contrasted."""
    return {**contrast_inputs(rows), **step_counts(rows)}


def _packed(examples: Sequence[Example], config: FinetuneConfig) -> list[list[Example]]:
    """The examples of each packed row. Several ranks get rows of a multiple of their number: what is lacking are rows
    without a token to learn, where the Trainer would train on some rows twice."""
    rows = [[examples[place] for place in row] for row in pack([e.tokens for e in examples], config.max_length)]
    if ranks() > 1:
        shortest = min(examples, key=lambda example: len(example.ids))
        nothing = Example(shortest.ids, prompt_tokens=len(shortest.ids))
        together = 1 if config.rows_per_device == "auto" else config.rows_per_device
        rows += [[nothing]] * (-len(rows) % (ranks() * together))
    return rows
