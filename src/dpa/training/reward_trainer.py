"""The Trainer of a reward model: masked least squares over passes that fit, checkpoints, a check after the first step.
Run its tests: pytest tests/test_reward_training.py tests/test_passes.py
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dpa.core.sections.reward import RewardTrainConfig
from dpa.models.attention import best_way, pack_inputs, padded_attention, to_device
from dpa.models.disk_refusals import disk_refusals
from dpa.models.half_precision import computes_in_bf16
from dpa.scoring.reward_model import last_token_logits, pools_last_token
from dpa.scoring.row_layouts import batches, pad_batch
from dpa.storage.stopping import StopOnSignal
from dpa.training.checkpoints import train_on
from dpa.training.passes import PASS_TOKENS, OverPackedRows, StepInPasses, Uncut, first_plan, one_card, without_adapters
from dpa.training.trainers import CountSeconds, ShowProgress, StopsAtBadStep, StopWhenAsked, trackers

UNMARKED = -100.0
"""Label of a mark that is not there. The Trainer itself counts the labels that are not -100, over the whole step."""

CPU_PASS = 2048
"""Tokens of one forward and backward pass on a CPU, to begin with."""

WARMUP = 0.05
SAVE_STEPS = 200


def masked_mse(logits_BM: torch.Tensor, labels_BM: torch.Tensor, count: torch.Tensor | int | None) -> torch.Tensor:
    """Squared error summed over the labels that are not UNMARKED, divided by `count` of them (None: of this batch).

    The Trainer gives the count over all micro-batches of an optimizer step, so accumulation does not change the loss.
    """
    present = labels_BM != UNMARKED
    errors = torch.where(present, logits_BM.float() - labels_BM, 0.0)
    return errors.square().sum() / (present.sum().clamp(min=1) if count is None else count)


class _Trainer(StopsAtBadStep, OverPackedRows, StepInPasses, Trainer):
    """A Trainer of a classifier that cuts a step into passes that fit, and stops before a bad step."""

    unit, field = "tokens", "reward.train.max_length"
    pad: int

    def cut(self, rows: Sequence[dict[str, Any]], size: int) -> list[Any]:
        """Passes of rows of like length, of at most `size` tokens together, padding included."""
        lengths = [len(row["input_ids"]) for row in rows]
        return [[rows[place] for place in part] for part in batches(lengths, size, self.packed)]

    def pass_loss(self, model: Any, part: Any, step: Mapping[str, Any]) -> torch.Tensor:
        """Squared errors of the pass's marks, over the number of the step's."""
        ids_B, device = [row["input_ids"] for row in part], self.args.device
        labels_BM = torch.from_numpy(np.stack([row["labels"] for row in part])).float()
        rows = pack_inputs(ids_B) if self.packed else pad_batch(ids_B, self.pad)
        inputs = to_device({**rows, "labels": labels_BM}, device)
        labels_BM = inputs.pop("labels")
        logits_BM = last_token_logits(without_adapters(model), inputs) if self.packed else model(**inputs).logits
        return masked_mse(logits_BM, labels_BM, step["count"])


def build_trainer(
    model: Any, data: list[dict[str, Any]], config: RewardTrainConfig, pad: int, checkpoints: Path, seed: int
) -> Trainer:
    """The Trainer of a classifier over `input_ids` and `labels` (M; UNMARKED: no mark): AdamW on the masked loss."""
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        bf16=computes_in_bf16(config.bf16),
        use_cpu=not cuda,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        logging_steps=10,
        logging_nan_inf_filter=False,  # the default hides a NaN from the log
        disable_tqdm=True,
        report_to=trackers(config.report_to, "reward.train"),
        remove_unused_columns=False,
        seed=seed,
    )
    one_card(arguments)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        count = sum(int((row["labels"] != UNMARKED).sum()) for row in rows)
        return {"count": max(1, count), "rows": Uncut(rows)}

    trainer = _Trainer(model, arguments, data_collator=collate, train_dataset=data)
    base = without_adapters(model)
    trainer.packed = pools_last_token(base) and best_way(base, torch.bfloat16 if arguments.bf16 else None) is not None
    longest = max(len(row["input_ids"]) for row in data)
    most = max(1, (PASS_TOKENS if cuda else CPU_PASS) // longest)
    first = first_plan(model, config.gradient_checkpointing, longest, most, "reward.train", arguments.bf16)
    trainer.compile = config.compile
    trainer.pad = pad
    trainer.begin_with(first.units * longest, first.recompute, config.gradient_checkpointing)
    trainer.remove_callback(PrinterCallback)
    return trainer


class _AfterTheFirstStep(TrainerCallback):
    """Calls `check` once, with the classifier."""

    def __init__(self, check: Callable[[Any], None]) -> None:
        self._check = check

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check it as scorers will see it."""
        if state.global_step == 1:
            model = without_adapters(kwargs["model"])
            model.eval()
            with padded_attention(model):
                self._check(model)
            model.train()


def run_trainer(
    model: Any,
    data: list[dict[str, Any]],
    config: RewardTrainConfig,
    pad: int,
    checkpoints: Path,
    seed: int,
    check: Callable[[Any], None],
    seconds: CountSeconds,
) -> None:
    """Train from the newest checkpoint where there is one."""
    progress = ShowProgress("reward model", sum(len(row["input_ids"]) for row in data))
    with StopOnSignal() as stop:
        trainer = build_trainer(model, data, config, pad, checkpoints, seed)
        trainer.add_callback(StopWhenAsked(stop))
        trainer.add_callback(progress)
        trainer.add_callback(seconds)
        trainer.add_callback(_AfterTheFirstStep(check))
        try:
            with disk_refusals(checkpoints, "saving a checkpoint"):
                train_on(trainer)
        finally:
            progress.close()
        # Mixed precision wraps `forward` for good; scores are measured as a scorer will compute them.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if trainer.state.global_step < trainer.state.max_steps:
            raise stop.interrupted("reward model", trainer.state.global_step, trainer.state.max_steps, "steps")
