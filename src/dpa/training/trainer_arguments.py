"""What the Trainers of every learner are told alike: arguments, optimizer, adapters, how a step is shared out.
Run its tests: pytest tests/test_finetuning.py tests/test_preference_training.py
"""

import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from dpa.core.errors import ConfigError
from dpa.core.sections.training import TrainingConfig
from dpa.models.half_precision import computes_in_bf16
from dpa.models.memory import Plan
from dpa.training.learner import Learner
from dpa.training.optimizers import MuonWithAdamW
from dpa.training.passes import first_plan
from dpa.training.ranks import any_of, in_one_process, least_of, ranks
from dpa.training.trainers import lora_adapters, trackers


def shared_arguments(learner: Learner[Any], work: Path) -> dict[str, Any]:
    """The arguments that SFTConfig, DPOConfig and GRPOConfig have in common."""
    config, cuda = learner.config, torch.cuda.is_available()
    return {
        "output_dir": str(work),
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.epochs,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "bf16": computes_in_bf16(config.bf16),
        "use_cpu": not cuda,
        # Undecided: what is trained in one process decides by what memory there is; a launch plays safe.
        "gradient_checkpointing": cuda and ranks() > 1
        if config.gradient_checkpointing is None
        else config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},  # else, frozen inputs would stop gradients
        "dataloader_pin_memory": cuda,
        "ddp_find_unused_parameters": False,  # all are used; looking for others costs a pass over the graph
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,  # the older one is deleted once the newer is written
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # the default replaces a NaN by the average of earlier losses
        "disable_tqdm": True,
        "report_to": trackers(config.report_to, learner.section),
        "seed": learner.seed,
    }


WITHOUT_BALANCING: dict[str, Any] = {"router_aux_loss_coef": 0.0}
"""For TRL's configurations: a mixture's balancing loss is not added, which would be once a pass."""


def optimizer_class(config: TrainingConfig) -> tuple[Any, dict[str, Any]] | None:
    """A Trainer's `optimizer_cls_and_kwargs`; None for its own AdamW."""
    if config.optimizer == "adamw":
        return None
    # A Trainer calls the factory for a function of (model, **kwargs), once adapters are in place.
    return lambda: MuonWithAdamW, {"lr": config.learning_rate, "weight_decay": config.weight_decay}


def adapters(config: TrainingConfig) -> LoraConfig | None:
    """The adapters to train, where the configuration asks for them."""
    return None if config.lora is None else lora_adapters(config.lora, "CAUSAL_LM")


def first_passes(
    learner: Learner[Any], asked: int | str, model: Any, longest: int, most: int, shared: dict[str, Any]
) -> Plan:
    """Units (pairs, answers) of `longest` tokens in a pass, to begin with: what is asked, or for `auto` what fits, 4 on
    a CPU. `shared` is told whether activations are computed twice for it. Ranks have other memory free each, and passes
    of one size, as many in a step of `most` units."""
    if asked != "auto":
        return Plan(int(asked), shared["gradient_checkpointing"])
    recompute, lora = learner.config.gradient_checkpointing, learner.config.lora is not None
    first = first_plan(model, recompute, longest, most, learner.section, shared["bf16"], adapters=lora)
    shared["gradient_checkpointing"] = any_of(first.recompute)
    units = min(least_of(first.units), most if torch.cuda.is_available() else 4)
    if not in_one_process():
        units = next(divisor for divisor in range(units, 0, -1) if most % divisor == 0)
    return Plan(units, shared["gradient_checkpointing"])


def accumulation(
    field: str, per_step: int, per_device_field: str, per_device: int | str, devices: int | None = None
) -> int:
    """Forward passes of one device in an optimizer step, of at least one (`auto`) or so many units each; `devices`: by
    default those of this launch. Raises ConfigError."""
    devices = ranks() if devices is None else devices
    together = devices * (1 if per_device == "auto" else int(per_device))
    if per_step % together:
        other = ", or another --processes, which goes on with the same run folder" if devices > 1 else ""
        raise ConfigError(
            f"{field}: {per_step} is no multiple of {per_device_field} times devices ({together}); "
            f"take {together * math.ceil(per_step / together)}{other}."
        )
    return per_step // together
