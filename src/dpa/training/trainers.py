"""What trainings through a transformers Trainer share: they stop before a bad step or on a signal, and show progress.
Run its tests: pytest tests/test_finetuning.py tests/test_passes.py
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_callback import ExportableState

from dpa.core.errors import ConfigError, TrainingError
from dpa.core.sections.training import AdapterConfig
from dpa.storage.progress import ProgressBar
from dpa.storage.stopping import StopOnSignal
from dpa.training.ranks import any_of

LEAST_KEPT = 0.5
"""Share of an update that may be left after rounding without a word."""

_log = logging.getLogger(__name__)


class StopsAtBadStep:
    """Mixin before a Trainer class: a loss or a gradient that is NaN or infinite is logged and ends training before the
    optimizer step, and no step is taken after the last. Use it with `logging_nan_inf_filter=False`, whose default hides
    such a loss.

    The gradient's norm is the one that clipping has measured, and it is read together with the losses of the step's
    passes: the card is waited for once a step.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """Let clipping say the norm."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self._pass_losses: list[torch.Tensor] = []
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        clip = accelerator.clip_grad_norm_

        def clip_and_check(*args: Any, **kwargs: Any) -> Any:
            norm = clip(*args, **kwargs)
            self._check_step(norm)
            return norm

        accelerator.clip_grad_norm_ = clip_and_check

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one optimizer step; none where all steps are taken. A Trainer that goes on from the last
        checkpoint of a fractional number of epochs would take one more."""
        state: Any = self.state  # type: ignore[attr-defined]
        if 0 < state.max_steps <= state.global_step:
            return [], None
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._pass_losses.append(loss)
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Nobody reads the Trainer's count, which goes over all parameters in every pass."""
        return 0

    def _check_step(self, norm: Any) -> None:
        """Raises TrainingError."""
        if isinstance(norm, DTensor):  # sharded over ranks
            norm = norm.full_tensor()
        known = (
            [] if norm is None else [torch.as_tensor(norm, device=self._pass_losses[0].device)]
        )  # DeepSpeed says none
        *losses, norm = torch.stack([loss.float().reshape(()) for loss in (*self._pass_losses, *known)]).tolist()
        self._pass_losses.clear()
        if not known:
            losses, norm = [*losses, norm], 0.0
        bad = [loss for loss in losses if not math.isfinite(loss)]
        if bad:
            self.log({"loss": bad[0]})  # type: ignore[attr-defined]
        for what, values in (("loss", bad), ("gradient norm", [] if math.isfinite(norm) else [norm])):
            if values:
                raise bad_step(what, values[0], self.state, self.args)  # type: ignore[attr-defined]


class StopWhenAsked(TrainerCallback):
    """After a signal: the step in hand is finished, a checkpoint saved, and training stops."""

    def __init__(self, stop: StopOnSignal) -> None:
        self._stop = stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the Trainer's switches."""
        if any_of(self._stop.requested):  # all ranks stop after the same step
            self._stop.signal_name = self._stop.signal_name or "a signal to another rank"
            control.should_save = control.should_training_stop = True


class WriteLog(TrainerCallback):
    """Keeps `file` equal to the Trainer's log history, one JSON object a line; a number that is not finite is text."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start from what the checkpoint had logged: later lines of an interrupted run are written again."""
        self._file.write_text("".join(map(_line, state.log_history)), encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append the newest entry."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(_line(state.log_history[-1]))


class CountSeconds(TrainerCallback, ExportableState):
    """Keeps in each checkpoint the seconds that training has taken, over all the processes it took; `earlier` are those
    of the checkpoint that this process went on from. It counts from when it is made."""

    def __init__(self) -> None:
        self._begun, self.earlier = time.monotonic(), 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take over what the checkpoint says; one of an earlier version has no place for it yet."""
        kept: Any = state.stateful_callbacks
        saved = kept.setdefault(type(self).__name__, {"attributes": {"seconds": 0.0}})
        if state.global_step:  # else the Trainer has just asked this one
            self.earlier = saved["attributes"]["seconds"]

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint."""
        return {"args": {}, "attributes": {"seconds": self.earlier + time.monotonic() - self._begun}}


class ShowProgress(TrainerCallback):
    """A progress bar over optimizer steps, with tokens per second and the time left."""

    def __init__(self, label: str, tokens_per_epoch: int) -> None:
        self._label, self._tokens_per_epoch = label, tokens_per_epoch
        self._bar: ProgressBar | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the step training starts from."""
        self._tokens_per_step = self._tokens_per_epoch * args.num_train_epochs / state.max_steps
        self._seen = state.num_input_tokens_seen
        self._bar = ProgressBar(
            self._label, total=state.max_steps, unit="steps", amount_unit="tokens", done=state.global_step
        )
        self._bar.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count one step; its tokens are known to a Trainer that samples them."""
        assert self._bar is not None
        seen, self._seen = state.num_input_tokens_seen - self._seen, state.num_input_tokens_seen
        self._bar.advance(1, amount=seen or self._tokens_per_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show whether the policy reads its direction, once that is measured."""
        newest = state.log_history[-1]
        if self._bar is not None and "listening_share" in newest:
            share, gap = newest["listening_share"], newest["listening_gap_token"]
            self._bar.note = f"own direction likelier {share:.0%}, flip gap {gap:.4f}"

    def close(self) -> None:
        """Leave the terminal as it was, however training ended."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)


def lora_adapters(config: AdapterConfig, task: str, **more: Any) -> LoraConfig:
    """Adapters of every linear layer, as the configuration says."""
    return LoraConfig(
        task_type=task,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear",
        **more,
    )


@contextmanager
def dropout_refusals(field: str) -> Iterator[None]:
    """While adapters are put into a model: where they cannot have a dropout, ConfigError for `field` says so."""
    try:
        yield
    except ValueError as error:
        if "lora_dropout" not in str(error):
            raise
        raise ConfigError(
            f"{field}: this model has parameters that are no layers, such as a mixture's experts, and their adapters "
            "take no dropout; set it to 0."
        ) from None


def bad_step(what: str, value: float, state: TrainerState, args: TrainingArguments) -> TrainingError:
    """The error of a step that must not be taken."""
    return TrainingError(
        f"training: the {what} is {value} at step {state.global_step + 1}, so the step was not taken; lower "
        f"learning_rate ({args.learning_rate:g}); earlier checkpoints are kept in {args.output_dir}."
    )


def merge_adapters(model: Any, dtype: torch.dtype, exact: str | None = None, rate: str | None = None) -> Any:
    """The model with its adapters added to its weights, on the CPU, in `dtype` (fp32: the module named `exact`).

    They are added in fp32: in bf16 most of a small update would be rounded away. The sum's rounding does the same where
    the update is small beside the weights; `rate`, the field they were trained at and its value, is then warned of.
    """
    share = 1.0 if rate is None or dtype == torch.float32 else kept_share(model, dtype)
    if share < LEAST_KEPT:
        _log.warning(
            "%s, but only %.0f%% of what its adapters learned is left in the %s weights that are saved: smaller "
            "changes are rounded away; raise it.",
            *(rate, 100 * share, str(dtype).removeprefix("torch.")),
        )
    merged = model.to("cpu", torch.float32).merge_and_unload()
    for name, parameter in merged.named_parameters():
        if exact is None or not name.startswith(f"{exact}."):
            parameter.data = parameter.data.to(dtype)
    merged.config.dtype = dtype
    return merged


@torch.no_grad()
def kept_share(model: Any, dtype: torch.dtype) -> float:
    """How much of its adapters' update is left in weights of `dtype`: the projection, on it, of the rounded one."""
    kept, whole = 0.0, 0.0
    for module in model.modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            # Of a mixture's experts a whole parameter is adapted, which is not called weight.
            weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight")).float()
            update = sum(layer.get_delta_weight(name) for name in layer.active_adapters).float()
            rounded = (weight + update).to(dtype).float() - weight
            kept += float((rounded * update).sum())
            whole += float(update.square().sum())
    return kept / whole if whole else 1.0


def trackers(names: Sequence[str], section: str) -> list[str] | str:
    """`report_to` of a Trainer; ConfigError names a tracker that is unknown or not installed."""
    known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    here = integration_utils.get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise ConfigError(f"{section}.report_to: {name!r} is no tracker; known: {', '.join(known)}.")
        if name not in here:
            raise ConfigError(f"{section}.report_to: {name} is not installed; pip install {name}.")
    return list(names) or "none"


def _line(entry: dict[str, Any]) -> str:
    finite = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }
    return json.dumps(finite) + "\n"
