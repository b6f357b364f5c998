"""The learner of pairs: (direction, prompt, chosen, rejected) through TRL's DPOTrainer.
Run its tests: pytest tests/test_preference_training.py

Direct preference optimisation (arXiv 2305.18290): with the policy pi that is trained and the one it starts from, ref,

    loss = -log sigmoid(beta * (log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected)))

log-probabilities being sums over the tokens of a response and of its end token, given prompt and direction. Averaged
over the pairs of an optimizer step, however it is cut into passes. With `sft_weight` w > 0, w times the mean loss per
token of the chosen responses is added (arXiv 2404.19733 adds it per response): it keeps the chosen ones likely, which
the difference alone does not.

A pair may carry a margin m, nats of its difference that something else accounts for: the loss is then
-log sigmoid(beta * (difference) - m), as multi-objective DPO has it (arXiv 2310.03708; recipes/baselines/modpo.py).

The reference is held beside the policy (with adapters: the policy with its adapters switched off). It is the policy
training starts from, also when an interrupted training goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from dpa.core.config import RunConfig
from dpa.core.errors import ConfigError
from dpa.core.records import Ledger
from dpa.core.sections.training import PreferenceConfig
from dpa.models.attention import to_device
from dpa.storage.schemas import completeness
from dpa.storage.stage_records import Reject
from dpa.training.learner import Learner, RowEncoder, TrainingRecord
from dpa.training.passes import Uncut, WeighsFigures, one_card
from dpa.training.ranks import in_one_process, ranks
from dpa.training.trainer_arguments import (
    WITHOUT_BALANCING,
    accumulation,
    adapters,
    first_passes,
    optimizer_class,
    shared_arguments,
)
from dpa.training.trainers import StopsAtBadStep


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a prompt and of two responses to it, each with its end token unless it was cut at a limit."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0

    @property
    def tokens(self) -> int:
        """Of both examples: the prompt is read twice."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)

    def __repr__(self) -> str:
        """What names the examples beside a checkpoint (policy_training.py); an earlier version called them so."""
        margin = f", margin={self.margin}" if self.margin else ""
        return f"Pair(prompt={self.prompt}, chosen={self.chosen}, rejected={self.rejected}{margin})"


class _Weighing(DPOTrainer):
    """DPOTrainer that weighs a pass by its share of the step.

    TRL's losses are means over a pass, and the step's would be the mean over its passes: a pair of a short pass, and a
    token of a pass of few, would weigh more.
    """

    _of_step: torch.Tensor
    """What a pass is a share of, counted as `_counts` does."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The share of this pass in the loss of its step."""
        config: Any = self.args
        shares = _counts(inputs) / self._of_step
        self.loss_weights = [weight * share for weight, share in zip(config.loss_weights, shares, strict=False)]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def with_margins(self, columns: dict[str, list[Any]], margins: Sequence[float], together: int) -> None:
        """Take a margin from beta * (difference) of each pair: its reference prefers the chosen one by margin / beta
        more than it does. The reference reads the pairs now, `together` at a time, and not again."""
        chosen, rejected = [], []
        for first in range(0, len(margins), together):
            part = range(first, min(first + together, len(margins)))
            batch = self.data_collator([{name: values[place] for name, values in columns.items()} for place in part])
            of_chosen, of_rejected = self.compute_ref_log_probs(
                self.ref_model or self.model, to_device(batch, self.args.device)
            )
            chosen += of_chosen.tolist()
            rejected += of_rejected.tolist()
        moved = [logp + margin / self.beta for logp, margin in zip(chosen, margins, strict=True)]
        self.train_dataset = Dataset.from_dict({**columns, "ref_chosen_logps": moved, "ref_rejected_logps": rejected})
        self.precompute_ref_logps = True


class _Trainer(StopsAtBadStep, WeighsFigures, _Weighing):
    """The same, with a step cut into passes that fit, and none taken from a NaN."""

    unit, field = "pairs", "dpo.max_length"
    collate: Callable[[list[Any]], dict[str, Any]]

    def pass_loss(self, model: Any, part: Any, step: Mapping[str, Any]) -> torch.Tensor:
        """The share of the pass's pairs in the loss of the step."""
        self._of_step = step["counts"].to(self.args.device)
        return self.compute_loss(model, to_device(self.collate(part), self.args.device))


class _LaunchedTrainer(StopsAtBadStep, _Weighing):
    """The same in a launched training, where passes accumulate as the Trainer does it, so that ranks stay together."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one optimizer step; what a pass has of them on average, over all ranks, is counted."""
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        counts = sum(map(_counts, batches), torch.zeros(2, device=self.accelerator.device))
        passes = max(1, len(batches)) * self.accelerator.num_processes
        self._of_step = self.accelerator.reduce(counts, "sum") / passes
        return batches, tokens


def _counts(batch: dict[str, Any]) -> torch.Tensor:
    """Pairs of a batch, and tokens of the chosen responses: what its losses, in that order, are means over."""
    chosen_BT, _ = batch["completion_mask"][:, 1:].chunk(2)
    return torch.stack([chosen_BT.new_tensor(len(chosen_BT)), chosen_BT.sum()]).float()


def _step(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch of an optimizer step, with `_counts` of the whole."""
    tokens = sum(len(row["chosen_ids"]) for row in rows)
    return {"counts": torch.tensor([float(len(rows)), float(tokens)]), "rows": Uncut(rows)}


def _accumulation(config: PreferenceConfig, together: int | str, devices: int | None = None) -> int:
    return accumulation("dpo.pairs_per_step", config.pairs_per_step, "pairs_per_device", together, devices)


class DPO(Learner[EncodedPair]):
    """Learns to prefer what was chosen to what was rejected.

    Rows have the columns `prompt_id, messages, direction (a list, or null: no preference is stated), chosen, rejected`,
    and may have `chosen_complete, rejected_complete` (else all are) and `margin` (else 0). The log has, for each
    optimizer step, `loss` (nats), `rewards/margins`, the mean of what the sigmoid is of, beta * (log-ratio of chosen -
    log-ratio of rejected) - margin, its first part 0 at the start, and `rewards/accuracies`, the share of pairs where
    it is positive.
    """

    reads = "pairs"
    section = "dpo"
    advice = "lower dpo.beta, or raise dpo.sft_weight or dpo.learning_rate"

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Pairs have an order, and divide among the processes."""
        super().check(run)
        if run.cluster.processes > 1:
            _accumulation(run.dpo, run.dpo.pairs_per_device, run.cluster.processes)
        if run.selection.method in ("random", "best_mean"):
            raise ConfigError(
                f"selection.method: {run.selection.method} keeps winners and no pairs; take pooled or per_direction, "
                "or learner: sft."
            )
        if run.selection.rejected == "other_direction" and run.selection.of_iteration(1).directions < 2:
            raise ConfigError(
                "selection.rejected: other_direction needs two directions of a pool; raise selection.directions."
            )
        answers = run.rollout.samples * (1 if run.selection.method == "per_direction" else run.rollout.directions)
        if answers < 2:
            raise ConfigError("rollout.samples: a pair needs two answers to choose from; take 2 or more.")

    def encode(self, rows: pa.Table, encoder: RowEncoder) -> tuple[list[EncodedPair], list[Reject]]:
        """A pair for each row. One with an empty response, or one that does not fit an example, is rejected."""
        pairs, rejects = [], []
        columns = ("prompt_id", "messages", "direction", "chosen", "rejected")
        ends = zip(completeness(rows, "chosen_complete"), completeness(rows, "rejected_complete"), strict=True)
        margins = rows["margin"].to_pylist() if "margin" in rows.column_names else [0.0] * len(rows)
        texts = zip(*(rows[name].to_pylist() for name in columns), ends, margins, strict=True)
        for identity, messages, direction, chosen_text, rejected_text, complete, margin in texts:
            encoded = encoder.encode(messages, direction, [chosen_text, rejected_text], complete)
            if isinstance(encoded, str):
                rejects.append(Reject(identity, encoded))
            else:
                prompt, (chosen, rejected) = encoded
                pairs.append(EncodedPair(prompt, chosen, rejected, margin))
        return pairs, rejects

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[EncodedPair],
        work: Path,
        start: Callable[[], PreTrainedModel],
    ) -> DPOTrainer:
        """The DPOTrainer over the pairs, checkpoints in `work`. Raises ConfigError.

        Given text, TRL tokenizes prompt and response together, and where tokens merge across the border the prompt is
        no longer what the sampler shows. So it is given one row of text to prepare, and then our tokens, in the columns
        its collator documents.
        """
        config, pairs = self.config, examples
        reference = None if config.lora is not None else start()
        shared = shared_arguments(self, work)
        longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
        most = max(1, config.pairs_per_step // ranks())
        first = first_passes(self, config.pairs_per_device, model, 2 * longest, most, shared)
        in_passes = in_one_process()
        accumulated = 1
        if not in_passes:
            accumulated = _accumulation(config, first.units)
        losses, weights = ["sigmoid"], [1.0]
        if config.sft_weight:
            losses, weights = [*losses, "sft"], [*weights, config.sft_weight]
        arguments = DPOConfig(
            **shared,
            **WITHOUT_BALANCING,
            beta=config.beta,
            loss_type=losses,
            loss_weights=weights,
            max_length=None,  # what is too long was rejected
            per_device_train_batch_size=config.pairs_per_step if in_passes else first.units,
            gradient_accumulation_steps=accumulated,
        )
        one_card(arguments)
        trainer: Any = (_Trainer if in_passes else _LaunchedTrainer)(
            model=model,
            ref_model=reference,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=tokenizer,
            peft_config=adapters(config),
        )
        trainer.optimizer_cls_and_kwargs = optimizer_class(config)  # unlike SFTTrainer, it takes no such argument
        columns = {
            "prompt_ids": [pair.prompt for pair in pairs],
            "chosen_ids": [pair.chosen for pair in pairs],
            "rejected_ids": [pair.rejected for pair in pairs],
        }
        if any(pair.margin for pair in pairs):
            trainer.with_margins(columns, [pair.margin for pair in pairs], first.units)
        else:
            trainer.train_dataset = Dataset.from_dict(columns)
        if in_passes:
            trainer.collate, trainer.data_collator = trainer.data_collator, _step
            trainer.begin_with(first.units, first.recompute, config.gradient_checkpointing)
        return trainer

    def cost(self, done: TrainingRecord) -> Ledger:
        """A prompt is read once for each response of a pair; the reference reads the same, forward only."""
        ledger = super().cost(done)
        ledger.extra["reference_tokens"] = ledger.training_tokens
        return ledger
