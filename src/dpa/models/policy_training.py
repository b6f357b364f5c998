"""What trainings of a policy share, learn they from winners (finetuning.py) or from pairs (preference_training.py).
Run its tests: pytest tests/test_finetuning.py tests/test_preference_training.py
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import pyarrow as pa
import torch
from accelerate import DistributedType
from datasets import Dataset
from jinja2 import TemplateError
from peft import LoraConfig, TaskType, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from dpa.core.config import FinetuneConfig, PreferenceConfig, of_results
from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, DataError, DpaError, TrainingError
from dpa.core.records import stable_hash
from dpa.core.reference import Model, ModelReference
from dpa.models.checkpoints import newest_checkpoint
from dpa.models.disk_refusals import disk_refusals
from dpa.models.files import folder_revision, resolve_model
from dpa.models.listening import PREFIX, HeldOut, Listening, MeasureListening, advice, held_out_rows
from dpa.models.optimizers import MuonWithAdamW
from dpa.models.policy import context_length, encode_prompt, load_policy, make_steerable, save_policy, turn_end_id
from dpa.models.quiet import quiet_libraries
from dpa.models.ranks import is_first, ranks, wait_for_all
from dpa.models.training import ShowProgress, StopWhenAsked, WriteLog, merge_adapters, trackers
from dpa.storage.run_folder import Reject, count_reasons
from dpa.storage.stopping import StopOnSignal
from dpa.storage.tables import read_json, write_json

TrainingConfig = FinetuneConfig | PreferenceConfig

_INPUTS_FILE = "inputs.json"

_log = logging.getLogger(__name__)


class Encoded(Protocol):
    """A training example as token ids. Its `repr` tells it from any other."""

    @property
    def tokens(self) -> int:
        """Tokens the policy reads when it trains on it."""
        ...


E = TypeVar("E", bound=Encoded)


@dataclass(frozen=True)
class Trained:
    """What a training did: `tokens` of one pass over `examples` of them, `rows` of the Trainer's data set, `log` its
    log history. `listening` was measured after the last step; all measurements read `listening_tokens`, forward only.
    """

    tokens: int
    examples: int
    rows: int
    steps: int
    log: tuple[dict[str, Any], ...]
    rejects: tuple[Reject, ...]
    listening: Listening | None = None
    listening_tokens: int = 0

    def logged(self, name: str) -> tuple[float, ...]:
        """The values of one number, one per optimizer step."""
        return tuple(entry[name] for entry in self.log if name in entry)


def train_policy(
    policy: Model,
    space: DirectionSpace,
    out: Path,
    work: Path,
    config: TrainingConfig,
    seed: int,
    encode: Callable[[PreTrainedModel, PreTrainedTokenizerBase, int], tuple[list[E], list[Reject]]],
    build: Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[E]], Trainer],
    label: str = "finetune",
    held_out: pa.Table | None = None,
) -> Trained:
    """Train `policy` and save the new one at `out`, whole or not at all.

    `encode(model, tokenizer, longest)` makes the examples, `build(model, tokenizer, examples)` the Trainer over them,
    with checkpoints in `work`. `work` keeps `log.jsonl` too; the same call resumes from the newest complete checkpoint
    and ends where an uninterrupted one would. `label` names the work in messages. In a launched training every rank
    calls this, and the first one writes. `held_out`: selected rows to measure listening on (models/listening.py).

    Raises DataError (no example left), ConfigError, TrainingError (NaN or infinite loss, or a policy that listens less
    than `config.min_listening`; earlier checkpoints are kept),
    Interrupted (on a signal, after a checkpoint), StorageError (disk full).
    """
    # Frozen weights need no more than bf16, which is what lets adapters of a 7B model train on one 24 GB card.
    dtype = torch.bfloat16 if config.lora is not None and _mixed(config) else torch.float32
    with quiet_libraries():
        model, tokenizer = load_policy(policy, dtype)
        make_steerable(tokenizer, space)
        examples, rejects = encode(model, tokenizer, min(config.max_length, context_length(model)))
        section = "dpo" if isinstance(config, PreferenceConfig) else "finetune"
        if not examples:
            raise DataError(f"{label}: none of {len(rejects)} rows can be trained on ({count_reasons(rejects)}).")
        if rejects and is_first():
            _log.warning("%s", _left_out(label, rejects, len(examples) + len(rejects), section, config.max_length))
        tokens = sum(example.tokens for example in examples)
        longest = min(config.max_length, context_length(model))
        rows = None
        if held_out is not None:
            rows = held_out_rows(held_out, space, seed, RowEncoder(model, tokenizer, space, longest).encode)
        with disk_refusals(work, "saving a checkpoint"):
            if is_first():
                base = folder_revision(resolve_model(policy).path)
                _prepare_work(work, stable_hash(examples, of_results(config), seed, base))
            wait_for_all()
            with StopOnSignal() as stop:
                trainer = build(model, tokenizer, examples)
                found = _train(trainer, work, label, tokens, stop, rows, config)
                if trainer.state.global_step < trainer.state.max_steps:
                    raise stop.interrupted(label, trainer.state.global_step, trainer.state.max_steps, "steps")
        if found is not None and found.share < (config.min_listening or 0):
            raise TrainingError(
                f"{_section(config)}.min_listening: {config.min_listening:g}, but {advice(found, _section(config))}"
            )
        trained = _whole_model(trainer, policy, config, dtype)
        provenance = {
            "from": str(policy),
            "remote_code_revision": ModelReference.of(policy).code_revision,
            "rows": len(examples),
            "seed": seed,
            _section(config): config.model_dump(),
        }
        if trained is not None:
            save_policy(trained, tokenizer, out, space, provenance)
        wait_for_all()
    return Trained(
        tokens=tokens,
        examples=len(examples),
        rows=len(cast(Dataset, trainer.train_dataset)),
        steps=trainer.state.global_step,
        log=tuple(trainer.state.log_history),
        rejects=tuple(rejects),
        listening=found,
        listening_tokens=0
        if rows is None
        else rows.tokens * sum(f"{PREFIX}share" in entry for entry in trainer.state.log_history),
    )


def _left_out(label: str, rejects: Sequence[Reject], total: int, section: str, max_length: int) -> str:
    """How many rows train nothing and why; what to change where they are too long."""
    too_long = any(reject.reason.endswith("tokens of an example") for reject in rejects)
    mend = f"; raise {section}.max_length ({max_length:,}), as far as the model's context goes" if too_long else ""
    return (
        f"{label}: LEFT OUT: {len(rejects):,} of {total:,} rows ({len(rejects) / total:.0%}) are not trained on "
        f"({count_reasons(rejects)}){mend}."
    )


def remove_checkpoints(work: Path) -> None:
    """Free what only an interrupted training needs: three times the model's size, or more."""
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


class RowEncoder:
    """Turns rows into token ids: the prompt as the sampler shows it, then a response as its own tokens, then the token
    that ends a turn, unless the response was cut at a limit."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, space: DirectionSpace, longest: int
    ) -> None:
        self._tokenizer, self._space, self._longest = tokenizer, space, longest
        self._end = turn_end_id(model, tokenizer)

    def encode(
        self, messages: str, direction: Sequence[float] | None, responses: Sequence[str], complete: Sequence[bool]
    ) -> tuple[list[int], list[list[int]]] | str:
        """Ids of the prompt (`messages`: JSON text) and of each response, or the reason why there are none.

        A response that is not `complete` gets no end token: it would teach the policy to stop in mid-sentence.
        """
        try:
            prompt = encode_prompt(self._tokenizer, self._space, json.loads(messages), direction)
            texts = [
                self._tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
                for response in responses
            ]
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            return f"cannot be written as tokens ({type(error).__name__})"
        if not all(texts):
            return "the response is empty"
        if len(prompt) + 1 >= self._longest:
            return f"the prompt fills the {self._longest} tokens of an example"
        if len(prompt) + max(map(len, texts)) + 1 > self._longest:
            return f"prompt and response exceed the {self._longest} tokens of an example"
        return prompt, [[*text, self._end] if whole else text for text, whole in zip(texts, complete, strict=True)]


def shared_arguments(config: TrainingConfig, work: Path, seed: int) -> dict[str, Any]:
    """The arguments that SFTConfig and DPOConfig have in common."""
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(work),
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.epochs,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "bf16": _mixed(config),
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
        "report_to": trackers(config.report_to, _section(config)),
        "seed": seed,
    }


def optimizer_class(config: TrainingConfig) -> tuple[Any, dict[str, Any]] | None:
    """A Trainer's `optimizer_cls_and_kwargs`; None for its own AdamW."""
    if config.optimizer == "adamw":
        return None
    # A Trainer calls the factory for a function of (model, **kwargs), once adapters are in place.
    return _muon_factory, {"lr": config.learning_rate, "weight_decay": config.weight_decay}


def adapters(config: TrainingConfig) -> LoraConfig | None:
    """The adapters to train, where the configuration asks for them."""
    if config.lora is None:
        return None
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules="all-linear",
    )


def accumulation(field: str, per_step: int, per_device_field: str, per_device: int) -> int:
    """Forward passes of one device in an optimizer step. Raises ConfigError."""
    together = per_device * ranks()
    if per_step % together:
        raise ConfigError(
            f"{field}: {per_step} is no multiple of {per_device_field} times devices ({together}); "
            f"take {together * math.ceil(per_step / together)}."
        )
    return per_step // together


def _whole_model(trainer: Trainer, policy: Model, config: TrainingConfig, dtype: torch.dtype) -> PreTrainedModel | None:
    """The trained model with all its weights, adapters merged, on the rank that saves it; None on the others."""
    accelerator = trainer.accelerator
    trained: Any = accelerator.unwrap_model(trainer.model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        weights = accelerator.get_state_dict(trainer.model)
    elif any(isinstance(parameter, DTensor) for parameter in trained.parameters()):  # FSDP2
        weights = {}
        for name, part in trained.state_dict().items():  # one at a time: every rank gives its part, the first keeps all
            whole = part.full_tensor() if isinstance(part, DTensor) else part
            if is_first():
                weights[name] = whole.detach().cpu().clone()
    else:
        weights = None
    if weights is not None and is_first():
        trained, _ = load_policy(policy, dtype, device="cpu")
        with_adapters = adapters(config)
        trained = trained if with_adapters is None else get_peft_model(trained, with_adapters)
        trained.load_state_dict(weights)
    if not is_first():
        return None
    return trained if config.lora is None else merge_adapters(trained, dtype)


def _train(
    trainer: Trainer,
    work: Path,
    label: str,
    tokens: int,
    stop: StopOnSignal,
    rows: HeldOut | None,
    config: TrainingConfig,
) -> Listening | None:
    """Train to the end, or to a signal; what is measured on the held-out rows at the end."""
    progress = ShowProgress(label, tokens)
    measuring = None if rows is None else MeasureListening(rows, config.listening_steps, trainer)
    for callback in (progress, WriteLog(work / "log.jsonl"), StopWhenAsked(stop)):
        if is_first() or isinstance(callback, StopWhenAsked):
            trainer.add_callback(callback)
    if measuring is not None:
        trainer.add_callback(measuring)  # on every rank: sharded weights answer together
    newest = newest_checkpoint(work)
    try:
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        if measuring is None or trainer.state.global_step < trainer.state.max_steps:
            return None
        return measuring.last()
    finally:
        progress.close()


def _section(config: TrainingConfig) -> str:
    return "dpo" if isinstance(config, PreferenceConfig) else "finetune"


def _mixed(config: TrainingConfig) -> bool:
    """Whether products are computed in bf16."""
    return config.bf16 or (torch.cuda.is_available() and torch.cuda.is_bf16_supported())


def _muon_factory() -> type[MuonWithAdamW]:
    return MuonWithAdamW


def _prepare_work(work: Path, identity: str) -> None:
    """Make the folder; checkpoints of other examples or settings than `identity` names are removed."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / _INPUTS_FILE
    with suppress(DpaError):  # a file that cannot be read names no inputs
        if file.exists() and read_json(file) == identity:
            return
    remove_checkpoints(work)
    write_json(file, identity)
