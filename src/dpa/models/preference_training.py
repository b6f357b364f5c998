"""Finetuning a policy on (direction, prompt, chosen, rejected) through TRL's DPOTrainer: the one adapter over it.
Run its tests: pytest tests/test_preference_training.py

Direct preference optimisation (arXiv 2305.18290): with the policy pi that is trained and the one it starts from, ref,

    loss = -log sigmoid(beta * (log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected)))

log-probabilities being sums over the tokens of a response and of its end token, given prompt and direction. Averaged
over the pairs of an optimizer step, however it is cut into passes. With `sft_weight` w > 0, w times the mean loss per
token of the chosen responses is added (arXiv 2404.19733 adds it per response): it keeps the chosen ones likely, which
the difference alone does not.

The reference is held beside the policy (with adapters: the policy with its adapters switched off). It is the policy
training starts from, also when an interrupted training goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import DPOConfig, DPOTrainer

from dpa.core.config import PreferenceConfig
from dpa.core.directions import DirectionSpace
from dpa.core.reference import Model
from dpa.models.listening import Listening
from dpa.models.passes import first_plan, one_card
from dpa.models.policy import load_policy
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


@dataclass(frozen=True)
class PreferenceResult:
    """What a finetuning on pairs did.

    `training_tokens` were read by the policy, prompts included, once for each response of a pair; the reference read
    them as well, forward only. One number per optimizer step: `losses` (nats); `margins`, the mean of
    beta * (log-ratio of chosen - log-ratio of rejected), 0 at the start; `accuracies`, the share of pairs with a
    positive margin.
    """

    training_tokens: int
    steps: int
    losses: tuple[float, ...]
    margins: tuple[float, ...]
    accuracies: tuple[float, ...]
    rejects: tuple[Reject, ...]
    listening: Listening | None = None
    listening_tokens: int = 0


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and of two responses to it, each with its end token unless it was cut at a limit."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """Of both examples: the prompt is read twice."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


class _Trainer(StopsAtBadStep, DPOTrainer):
    """DPOTrainer that never takes a step from a NaN."""


def preference_finetune(
    policy: Model,
    rows: pa.Table,
    space: DirectionSpace,
    out: Path,
    work: Path,
    config: PreferenceConfig,
    seed: int,
    label: str = "finetune",
    held_out: pa.Table | None = None,
) -> PreferenceResult:
    """Finetune `policy` on pairs and save the new policy at `out`, whole or not at all.

    `rows` have the columns `prompt_id, messages, direction (a list, or null: no preference is stated), chosen,
    rejected`, and may have `chosen_complete, rejected_complete` (else all are). `work` keeps checkpoints and
    `log.jsonl`; the same call resumes from the newest complete checkpoint and ends where an uninterrupted one would. A
    pair with an empty response, or one that does not fit `config.max_length` (or the model's context) with its prompt,
    is rejected. `label` names the work in messages, `held_out` are rows that listening is measured on.

    Raises what `models.policy_training.train_policy` raises.
    """

    def encode(
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> tuple[list[Pair], list[Reject]]:
        return encode_pairs(rows, model, tokenizer, space, longest)

    def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]) -> DPOTrainer:
        reference = None if config.lora is not None else load_policy(policy)[0]
        return build_preference_trainer(model, reference, tokenizer, pairs, work, config, seed)

    done = train_policy(policy, space, out, work, config, seed, encode, build, label, held_out)
    return PreferenceResult(
        training_tokens=round(done.tokens * config.epochs),
        steps=done.steps,
        losses=done.logged("loss"),
        margins=done.logged("rewards/margins"),
        accuracies=done.logged("rewards/accuracies"),
        rejects=done.rejects,
        listening=done.listening,
        listening_tokens=done.listening_tokens,
    )


def encode_pairs(
    rows: pa.Table, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, space: DirectionSpace, longest: int
) -> tuple[list[Pair], list[Reject]]:
    """Token ids of each pair, or the reason why it cannot be trained on. The prompt is what the sampler shows."""
    encoder = RowEncoder(model, tokenizer, space, longest)
    pairs, rejects = [], []
    columns = ("prompt_id", "messages", "direction", "chosen", "rejected")
    ends = zip(completeness(rows, "chosen_complete"), completeness(rows, "rejected_complete"), strict=True)
    texts = zip(*(rows[name].to_pylist() for name in columns), ends, strict=True)
    for identity, messages, direction, chosen_text, rejected_text, complete in texts:
        encoded = encoder.encode(messages, direction, [chosen_text, rejected_text], complete)
        if isinstance(encoded, str):
            rejects.append(Reject(identity, encoded))
        else:
            prompt, (chosen, rejected) = encoded
            pairs.append(Pair(prompt, chosen, rejected))
    return pairs, rejects


def build_preference_trainer(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    work: Path,
    config: PreferenceConfig,
    seed: int,
) -> DPOTrainer:
    """The DPOTrainer over the pairs, checkpoints in `work`. Raises ConfigError.

    Given text, TRL tokenizes prompt and response together, and where tokens merge across the border the prompt is no
    longer what the sampler shows. So it is given one row of text to prepare, and then our tokens, in the columns its
    collator documents.
    """
    shared = shared_arguments(config, work, seed)
    if config.pairs_per_device == "auto":
        longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
        most = max(1, config.pairs_per_step // ranks())
        recompute, lora = config.gradient_checkpointing, config.lora is not None
        first = first_plan(model, recompute, 2 * longest, most, "dpo", shared["bf16"], adapters=lora)
        together = min(first.units, most if torch.cuda.is_available() else 4)
        while most % together:  # passes of a step are alike
            together -= 1
        shared["gradient_checkpointing"] = first.recompute
    else:
        together = config.pairs_per_device
    losses, weights = ["sigmoid"], [1.0]
    if config.sft_weight:
        losses, weights = [*losses, "sft"], [*weights, config.sft_weight]
    arguments = DPOConfig(
        **shared,
        beta=config.beta,
        loss_type=losses,
        loss_weights=weights,
        max_length=None,  # what is too long was rejected
        per_device_train_batch_size=together,
        gradient_accumulation_steps=accumulation(
            "dpo.pairs_per_step", config.pairs_per_step, "pairs_per_device", together
        ),
    )
    one_card(arguments)
    trainer = _Trainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
        peft_config=adapters(config),
    )
    trainer.optimizer_cls_and_kwargs = optimizer_class(config)  # unlike SFTTrainer, it does not take it as an argument
    trainer.train_dataset = Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt for pair in pairs],
            "chosen_ids": [pair.chosen for pair in pairs],
            "rejected_ids": [pair.rejected for pair in pairs],
        }
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
