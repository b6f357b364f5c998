"""An optimizer step in as many passes as memory needs: the batch of a step is cut, and cut smaller when it did not fit.
Run its tests: pytest tests/test_passes.py

A loss that is a sum over the step's tokens or marks, divided by their number, has the same gradient however the step is
cut. So the size of a pass changes no result: it begins as large as memory should allow, and when memory runs out the
step's gradients are dropped, the size is halved and the step is done again, with the same numbers up to rounding.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from peft import PeftModel
from transformers import TrainingArguments

from dpa.core.errors import TrainingError
from dpa.models.attention import packed_attention
from dpa.models.compiling import TRAINING_STEPS, Choice, CompiledLayers, worth_compiling
from dpa.models.memory import Plan, TrainingMemory, available_memory, plan
from dpa.models.policy import is_out_of_memory
from dpa.storage.memory import give_back_heap_where_scarce

PASS_TOKENS = 65_536
"""Most tokens of a pass on a card."""

_CPU_TOKENS = 2048
"""Tokens of a pass on a processor that multiplies bf16: weights are turned to bf16 once a pass."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Uncut:
    """The rows of a step, which loaders carry along as they are."""

    rows: Sequence[Any]


def without_adapters(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper; its layers keep their adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def one_card(arguments: TrainingArguments) -> None:
    """Let one process train on one card, where a Trainer would spread a batch over all it sees (nn.DataParallel)."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


def first_plan(
    model: Any, recompute: bool | None, longest: int, most: int, section: str, mixed: bool, adapters: bool = False
) -> Plan:
    """Where a training of `model`, on its device, begins: see `memory.plan`. On a card at most PASS_TOKENS go into a
    pass; more are not faster. `adapters`: they alone will be trained. Raises ConfigError."""
    model = without_adapters(model)
    device = next(model.parameters()).device
    cpu = device.type == "cpu"
    most = most if cpu else max(1, min(most, PASS_TOKENS // longest))
    available = round(available_memory(device) * (0.8 if cpu else 0.9))  # the rest: buffers, fragments
    return plan(TrainingMemory.of(model, mixed, adapters), available, longest, most, recompute, section, sure=cpu)


def units_on_cpu(longest: int, mixed: bool) -> int:
    """Units of `longest` tokens that are best put into a pass on a processor: in fp32 more are no faster."""
    return max(1, _CPU_TOKENS // longest) if mixed else 1


class OverPackedRows:
    """Mixin before a Trainer class whose rows lie behind each other, unless `packed` says otherwise."""

    packed: bool = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with attention that stays within a sequence."""
        trainer: Any = self
        dtype = torch.bfloat16 if trainer.args.bf16 else None
        with packed_attention(without_adapters(trainer.model), dtype) if self.packed else nullcontext():
            return super().train(*args, **kwargs)  # type: ignore[misc]


class StepInPasses:
    """Mixin before a Trainer class with one batch an optimizer step (`gradient_accumulation_steps=1`).

    The class says how a batch is cut and what a pass costs. `pass_size`: how much goes into one pass, in the class's
    `unit`; `may_recompute`: activations may be computed twice where one pass of the least size does not fit; `compile`:
    whether the layers are compiled while it trains (models/compiling.py).
    """

    unit: ClassVar[str]
    field: ClassVar[str]
    pass_size: int
    may_recompute: bool = False
    compile: Choice = False
    compile_backend: Any = "inductor"
    compiled: CompiledLayers | None = None

    def begin_with(self, size: int, recomputed: bool, asked: bool | None) -> None:
        """Passes of `size` at first. Activations that are not `recomputed` may be later, unless it was `asked` for not
        to."""
        self.pass_size, self.may_recompute = size, asked is None and not recomputed
        if recomputed:
            self._recompute()

    def _recompute(self) -> None:
        # The model's own switch: transformers 5.24 reads its argument under another name, and only when it is made.
        trainer: Any = self
        without_adapters(trainer.model).gradient_checkpointing_enable({"use_reentrant": False})

    def cut(self, rows: Sequence[Any], size: int) -> list[Any]:
        """The passes of a step's rows, each of at most `size`, or of the least there can be."""
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def pass_loss(self, model: Any, part: Any, step: Mapping[str, Any]) -> torch.Tensor:
        """The loss of one pass; `step` is the batch of the whole step, with what it counted."""
        raise NotImplementedError

    def begin(self) -> None:
        """The passes of a step begin, or begin again: what a class sums over them starts at nothing."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, with compiled layers where the training is long enough for them."""
        trainer: Any = self
        settings, rows = trainer.args, len(trainer.train_dataset)
        steps = settings.max_steps
        if steps <= 0:
            steps = math.ceil(rows / settings.per_device_train_batch_size) * settings.num_train_epochs
        if worth_compiling(self.compile, settings.device, steps, TRAINING_STEPS):
            self.compiled = CompiledLayers(trainer.model, True, self.compile_backend)
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self.compiled is not None:
                self.compiled.stop()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """All passes of one optimizer step, forward and backward; the step's loss. Raises TrainingError.

        `inputs`: `rows` (Uncut), and what the class divides by, such as the number of their labels. It is counted where
        rows are made: to count on a card is to wait for it.
        """
        model.train()
        while True:
            try:
                loss = self._try(model, inputs)
            except Exception as error:  # a backward pass is compiled when it is first run
                if self.compiled is None or not self.compiled.give_up(error):
                    raise
                model.zero_grad()
                continue
            if loss is not None:
                return loss
            model.zero_grad()  # nothing of the step is kept
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if (smaller := self._smaller(inputs["rows"].rows)) is not None:
                self.pass_size = smaller
                _log.warning("training: memory ran out; goes on with %s %s a pass.", f"{self.pass_size:,}", self.unit)
            elif self.may_recompute:
                self.may_recompute = False
                self._recompute()
                _log.warning("training: memory ran out; activations are computed twice from here on.")
            else:
                raise TrainingError(
                    f"training: the least pass does not fit in memory; lower {self.field}, or train lora."
                )

    def _smaller(self, rows: Sequence[Any]) -> int | None:
        """The size of a pass, halved until it makes more passes of these rows; None where they are the least there are.
        A step may have fewer rows than a pass may hold."""
        passes, size = len(self.cut(rows, self.pass_size)), self.pass_size
        while size > 1:
            size //= 2
            if len(self.cut(rows, size)) > passes:
                return size
        return None

    def _try(self, model: Any, batch: dict[str, Any]) -> torch.Tensor | None:
        """The step's loss, or None when memory ran out."""
        trainer: Any = self
        self.begin()
        parts = self.cut(batch["rows"].rows, self.pass_size)
        total = torch.zeros((), device=trainer.args.device)
        try:
            for part in parts:
                with trainer.accelerator.autocast():
                    loss = self.pass_loss(model, part, batch)
                trainer.accelerator.backward(loss)
                total += loss.detach()
                if total.device.type == "cpu":
                    give_back_heap_where_scarce()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return total


class WeighsFigures(StepInPasses):
    """The same before a Trainer of TRL, which keeps figures of every pass in `_metrics` and logs their plain mean:
    those of a step are weighed by what its passes hold, and those of a try that did not fit are dropped, its tokens
    too."""

    def weight(self, part: Any, step: Mapping[str, Any]) -> float:
        """What the figures of a pass are means over: its rows."""
        return len(part)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """All passes of one optimizer step, and its figures."""
        trainer: Any = self
        figures = trainer._metrics["train"]
        self._before = {name: list(values) for name, values in figures.items()}
        self._tokens_before = trainer._total_train_tokens
        loss = super().training_step(model, inputs, num_items_in_batch)
        parts = self.cut(inputs["rows"].rows, self.pass_size)
        weights = [self.weight(part, inputs) for part in parts]
        for name, values in figures.items():
            first = len(self._before.get(name, ()))
            if len(values) - first == len(parts) > 1:
                values[first:] = [float(np.average(values[first:], weights=weights))]
        return loss

    def begin(self) -> None:
        """As it was before the step."""
        trainer: Any = self
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update({name: list(values) for name, values in self._before.items()})
        trainer._total_train_tokens = self._tokens_before
