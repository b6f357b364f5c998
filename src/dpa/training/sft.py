"""The learner of winners: (direction, prompt, response) through TRL's SFTTrainer.
Run its tests: pytest tests/test_finetuning.py

The loss is on the response and its end token only, summed over the tokens of an optimizer step and divided by their
number (over all devices and accumulated rows), so that a token counts the same in a short response and a long one.
Examples are packed whole into rows of at most `max_length`, long and short ones together (packing.py); positions start
again with each example, which keeps them from attending to each other. `finetune.contrastive` adds a term
(contrastive.py).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from dpa.core.config import RunConfig
from dpa.core.sections.training import FinetuneConfig
from dpa.models.attention import to_device
from dpa.models.memory import keys_share
from dpa.storage.schemas import completeness, held_values
from dpa.storage.stage_records import Reject
from dpa.training.contrastive import AccumulatesContrast, AddsContrast
from dpa.training.label_logprobs import has_plain_head, label_logprobs
from dpa.training.learner import Learner, RowEncoder
from dpa.training.packing import (
    Example,
    FillersLast,
    Row,
    Siblings,
    contrast_inputs,
    may_share,
    packed_rows,
    pass_inputs,
    siblings,
    step_counts,
)
from dpa.training.passes import (
    OverPackedRows,
    StepInPasses,
    Uncut,
    first_plan,
    one_card,
    units_on_cpu,
    without_adapters,
)
from dpa.training.ranks import in_one_process
from dpa.training.target_negatives import Stated, negatives
from dpa.training.trainer_arguments import WITHOUT_BALANCING, accumulation, adapters, optimizer_class, shared_arguments
from dpa.training.trainers import StopsAtBadStep

_log = logging.getLogger(__name__)


class _Trainer(StopsAtBadStep, StepInPasses, OverPackedRows, SFTTrainer):
    """SFTTrainer that cuts a step into passes that fit, and never takes a step from a NaN."""

    unit, field = "packed rows", "finetune.max_length"

    def pass_loss(self, model: Any, part: Any, step: Mapping[str, Any]) -> torch.Tensor:
        """Nats of the pass's labels, over those of the step."""
        inputs = to_device(pass_inputs(part), self.args.device)
        logprobs_L = label_logprobs(without_adapters(model), inputs)
        return -logprobs_L.sum() / step["count"]


class _ContrastiveTrainer(AddsContrast, _Trainer):
    """The same with the contrastive term."""

    def pass_loss(self, model: Any, part: Any, step: Mapping[str, Any]) -> torch.Tensor:
        """Nats of the pass's own labels, over those of the step, and the weighed term."""
        inputs = to_device(contrast_inputs(part), self.args.device)
        slot_L, present_RJ = inputs.pop("slot_L"), inputs.pop("present_RJ")
        logprobs_L = label_logprobs(without_adapters(model), inputs)
        return self.contrast_loss(logprobs_L, slot_L, present_RJ, step["count"], step["examples"])


class _LaunchedTrainer(StopsAtBadStep, OverPackedRows, SFTTrainer):
    """The same in a launched training, where passes accumulate as the Trainer does it, so that ranks stay together."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = train_dataset or self.train_dataset
        return FillersLast([row.learned for row in rows], self.args.seed)


class _LaunchedContrastiveTrainer(AccumulatesContrast, _LaunchedTrainer):
    """The same with the contrastive term."""


class SFT(Learner[Example]):
    """Learns to give each direction its winner (columns of a select shard)."""

    advice = "raise finetune.contrastive"

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Rows divide among the processes: known now, and not after the hours before the first training."""
        super().check(run)
        _accumulation(run.finetune, run.cluster.processes)

    def encode(self, rows: pa.Table, encoder: RowEncoder) -> tuple[list[Example], list[Reject]]:
        """An example for each row, in an order drawn from the seed.

        A response that is empty, or that does not fit an example with its prompt, is rejected.
        """
        config, others = self.config, None
        if config.contrastive:
            others = negatives(rows, self.space, config.contrastive_negatives, self.seed)
        examples, rejects = encode_examples(rows, encoder, others, config.max_length)
        crowded = sum(map(bool, others or ())) - sum(bool(example.negatives) for example in examples) - len(rejects)
        if crowded > 0:
            _log.warning(
                "finetune.contrastive: at least %d of %d rows and their negatives do not fit finetune.max_length "
                "(%d tokens) together, and are not contrasted; raise it to %d times the longest row.",
                *(crowded, len(rows), config.max_length, config.contrastive_negatives + 1),
            )
        order = np.random.default_rng(self.seed).permutation(len(examples))
        return [examples[place] for place in order], rejects

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        work: Path,
        start: Callable[[], PreTrainedModel] | None = None,
    ) -> SFTTrainer:
        """The SFTTrainer over the packed examples, checkpoints in `work`. Raises ConfigError."""
        config = self.config
        in_passes = in_one_process() and has_plain_head(model)
        together = 1 if config.rows_per_device == "auto" else config.rows_per_device
        accumulated = _accumulation(config)
        arguments = SFTConfig(
            **shared_arguments(self, work),
            **WITHOUT_BALANCING,
            max_length=None,  # the rows are packed below
            per_device_train_batch_size=config.packed_rows_per_step if in_passes else together,
            gradient_accumulation_steps=1 if in_passes else accumulated,
            remove_unused_columns=False,
        )
        one_card(arguments)
        text_config, coefficient = model.config.get_text_config(), "router_aux_loss_coef"
        kept = getattr(text_config, coefficient, None)
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
        if kept is not None:  # TRL writes its own there, and the policy is saved with it
            setattr(text_config, coefficient, kept)
        rows = packed_rows(examples, config.max_length, together, may_share(model, config.bf16))
        trainer.train_dataset, trainer.data_collator = rows, collate
        if config.contrastive:
            trainer.contrastive = config.contrastive
        if in_passes:
            share = keys_share(model)
            longest = max(row.ids_T.numel() + round(share * (row.seen - row.ids_T.numel())) for row in rows)
            most = config.packed_rows_per_step if config.rows_per_device == "auto" else config.rows_per_device
            recompute = config.gradient_checkpointing
            mixed, most = bool(arguments.bf16), min(most, len(rows))
            if arguments.device.type == "cpu" and config.rows_per_device == "auto":
                most = min(most, units_on_cpu(longest, mixed))
            first = first_plan(trainer.model, recompute, longest, most, self.section, mixed)
            trainer.compile = config.compile
            trainer.begin_with(first.units, first.recompute, recompute)
        return trainer

    def tokens(self, examples: Sequence[Example], trainer: Any) -> int:
        """Those of the packed rows, where what prompts share is read once."""
        return sum(row.ids_T.numel() for row in trainer.train_dataset if row.learned)


def _accumulation(config: FinetuneConfig, devices: int | None = None) -> int:
    per_step, per_device = config.packed_rows_per_step, config.rows_per_device
    return accumulation("finetune.packed_rows_per_step", per_step, "rows_per_device", per_device, devices)


def encode_examples(
    rows: pa.Table,
    encoder: RowEncoder,
    others: Sequence[Sequence[Stated]] | None = None,
    room: int = 0,
) -> tuple[list[Example], list[Reject]]:
    """Token ids of each row (select shard columns), or the reason why it cannot be trained on.

    The prompt is what the sampler shows; the response follows as its own tokens, then the token that ends a turn,
    unless the column `complete` says that the response was cut at a limit. `others`: what each row is
    contrasted with; as many of them are kept as fit, with the row itself, into `room` tokens.
    """
    examples, rejects = [], []
    columns = ("candidate_id", "messages", "direction", "response")
    texts = zip(*(rows[name].to_pylist() for name in columns), completeness(rows), held_values(rows), strict=True)
    for row, (identity, messages, direction, response, complete, held) in enumerate(texts):
        encoded = encoder.encode(messages, direction, [response], [complete], held)
        if isinstance(encoded, str):
            rejects.append(Reject(identity, encoded))
        else:
            prompt, (completion,) = encoded
            example = Example([*prompt, *completion], len(prompt))
            for other in others[row] if others is not None else ():
                elsewhere = encoder.encode(messages, other.direction, [response], [complete], other.held)
                if isinstance(elsewhere, str):
                    break
                contrasted = Example(example.ids, len(prompt), (*example.negatives, elsewhere[0]))
                (alone,) = siblings([contrasted], room) if encoder.shares else [Siblings([contrasted])]
                if alone.tokens > room:
                    break
                example = contrasted
            examples.append(example)
    return examples, rejects


def _step(rows: list[Row]) -> dict[str, Any]:
    """The batch of an optimizer step."""
    return {**{name: max(1, count) for name, count in step_counts(rows).items()}, "rows": Uncut(rows)}


def _pass(rows: list[Row]) -> dict[str, Any]:
    """The batch of a pass."""
    return {name: value for name, value in pass_inputs(rows).items() if name != "label_places"}


def _contrast_pass(rows: list[Row]) -> dict[str, Any]:
    """The batch of a pass, contrasted."""
    return {**contrast_inputs(rows), **step_counts(rows)}
