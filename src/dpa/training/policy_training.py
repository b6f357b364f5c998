"""What the trainings of a policy share, whatever the learner: checkpoints, log, listening, what is saved.
Run its tests: pytest tests/test_finetuning.py tests/test_preference_training.py
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import DistributedType
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PrinterCallback, Trainer
from transformers.integrations import unset_hf_deepspeed_config

from dpa.core.config_identity import of_results
from dpa.core.errors import ConfigError, DamageError, DataError, TrainingError
from dpa.core.records import stable_hash
from dpa.core.reference import Model, ModelReference
from dpa.core.sections.training import TrainingConfig
from dpa.models.disk_refusals import disk_refusals
from dpa.models.files import folder_revision, resolve_model
from dpa.models.half_precision import computes_in_bf16
from dpa.models.policy import context_length, load_policy, make_steerable, save_policy
from dpa.models.quiet import quiet_libraries
from dpa.storage.schemas import HELD
from dpa.storage.stage_records import Reject, count_reasons
from dpa.storage.stopping import StopOnSignal
from dpa.storage.tables import read_json, write_json
from dpa.training.checkpoints import newest_checkpoint, remove_checkpoints, train_on
from dpa.training.learner import E, Learner, RowEncoder, TrainingRecord
from dpa.training.listening import PREFIX, HeldOut, Listening, MeasureListening, advice, held_out_rows
from dpa.training.packing import may_share
from dpa.training.ranks import is_first, wait_for_all
from dpa.training.trainer_arguments import adapters
from dpa.training.trainers import CountSeconds, ShowProgress, StopWhenAsked, WriteLog, dropout_refusals, merge_adapters

_INPUTS_FILE = "inputs.json"

_log = logging.getLogger(__name__)


def train_policy(
    learner: Learner[E],
    policy: Model,
    rows: pa.Table,
    out: Path,
    work: Path,
    label: str = "finetune",
    held_out: pa.Table | None = None,
) -> TrainingRecord:
    """Train `policy` on the rows that the learner reads and save the new one at `out`, whole or not at all.

    `work` keeps checkpoints and `log.jsonl`; the same call resumes from the newest complete checkpoint and ends where
    an uninterrupted one would. `label` names the work in messages. In a launched training every rank calls this, and
    the first one writes. `held_out`: selected rows to measure listening on (training/listening.py).

    Raises DataError (no example left), ConfigError, TrainingError (NaN or infinite loss, or a policy that listens less
    than `config.min_listening`; earlier checkpoints are kept),
    Interrupted (on a signal, after a checkpoint), StorageError (disk full).
    """
    seconds = CountSeconds()
    config, section, space = learner.config, learner.section, learner.space
    if HELD.name not in rows.column_names:
        space = replace(space, target_template=None)  # what is saved with the policy says what it was trained on
    # Frozen weights need no more than bf16, which is what lets adapters of a 7B model train on one 24 GB card.
    dtype = torch.bfloat16 if config.lora is not None and computes_in_bf16(config.bf16) else torch.float32
    with quiet_libraries():
        model, tokenizer = load_policy(policy, dtype)
        make_steerable(tokenizer, space)
        longest = min(config.max_length, context_length(model))
        # Pairs and prompts are not laid behind what they share, so no kernel of a card is tried for them.
        shares = learner.reads == "winners" and may_share(model, config.bf16)
        encoder = RowEncoder(model, tokenizer, space, longest, shares)
        examples, rejects = learner.encode(rows, encoder)
        if not examples:
            raise DataError(f"{label}: none of {len(rejects)} rows can be trained on ({count_reasons(rejects)}).")
        if rejects and is_first():
            _log.warning("%s", _left_out(label, rejects, len(examples) + len(rejects), section, config.max_length))
        measured = held_out_rows(held_out, space, learner.seed, encoder.encode) if held_out else None
        if held_out is not None and measured is None and config.min_listening is not None:
            raise ConfigError(
                f"{section}.min_listening: nothing is held out of {len(rows)} selected rows to measure it on; raise "
                f"{section}.listening_rows, or leave min_listening out."
            )
        with disk_refusals(work, "saving a checkpoint"):
            if is_first():
                base = folder_revision(resolve_model(policy).path)
                identity = (examples, of_results(config), learner.seed, base, encoder.shares, *learner.identity)
                _prepare_work(work, stable_hash(*identity))
            wait_for_all()
            with StopOnSignal() as stop:
                with dropout_refusals(f"{section}.lora.dropout"):
                    trainer = learner.trainer(model, tokenizer, examples, work, lambda: load_policy(policy)[0])
                trainer.add_callback(seconds)
                tokens = learner.tokens(examples, trainer)
                found = _train(trainer, work, label, tokens, stop, measured, config)
                if trainer.state.global_step < trainer.state.max_steps:
                    raise stop.interrupted(label, trainer.state.global_step, trainer.state.max_steps, "steps")
        if found is not None and found.share < (config.min_listening or 0):
            raise TrainingError(
                f"{section}.min_listening: {config.min_listening:g}, but {advice(found, learner.advice)}"
            )
        trained = _whole_model(trainer, policy, config, dtype, section)
        provenance = {
            "from": str(policy),
            "remote_code_revision": ModelReference.of(policy).code_revision,
            "rows": len(examples),
            "seed": learner.seed,
            section: config.model_dump(),
        }
        if trained is not None:
            save_policy(trained, tokenizer, out, space, provenance)
        wait_for_all()
    log = tuple(trainer.state.log_history)
    return TrainingRecord(
        tokens=tokens,
        alone=sum(example.tokens for example in examples),
        examples=len(examples),
        steps=trainer.state.global_step,
        log=log,
        rejects=tuple(rejects),
        listening=found,
        listening_tokens=0 if measured is None else measured.tokens * sum(f"{PREFIX}share" in entry for entry in log),
        earlier_s=seconds.earlier,
    )


def _left_out(label: str, rejects: Sequence[Reject], total: int, section: str, max_length: int) -> str:
    """How many rows train nothing and why; what to change where they are too long."""
    too_long = any(reject.reason.endswith("tokens of an example") for reject in rejects)
    mend = f"; raise {section}.max_length ({max_length:,}), as far as the model's context goes" if too_long else ""
    return (
        f"{label}: LEFT OUT: {len(rejects):,} of {total:,} rows ({len(rejects) / total:.0%}) are not trained on "
        f"({count_reasons(rejects)}){mend}."
    )


def _whole_model(
    trainer: Trainer, policy: Model, config: TrainingConfig, dtype: torch.dtype, section: str
) -> PreTrainedModel | None:
    """The trained model with all its weights, adapters merged, on the rank that saves it; None on the others."""
    accelerator = trainer.accelerator
    trained: Any = accelerator.unwrap_model(trainer.model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        weights = accelerator.get_state_dict(trainer.model_wrapped)  # the engine, which knows its parts
        unset_hf_deepspeed_config()  # else the first rank would wait below for the others to take theirs
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
    rate = f"{section}.learning_rate: {config.learning_rate:g}"
    return trained if config.lora is None else merge_adapters(trained, dtype, rate=rate)


def _train(
    trainer: Trainer,
    work: Path,
    label: str,
    tokens: int,
    stop: StopOnSignal,
    rows: HeldOut | None,
    config: Any,
) -> Listening | None:
    """Train to the end, or to a signal; what is measured on the held-out rows at the end."""
    progress = ShowProgress(label, tokens)
    measuring = None if rows is None else MeasureListening(rows, config.listening_steps, trainer)
    trainer.remove_callback(PrinterCallback)  # the progress says it
    for callback in (progress, WriteLog(work / "log.jsonl"), StopWhenAsked(stop)):
        if is_first() or isinstance(callback, StopWhenAsked):
            trainer.add_callback(callback)
    if measuring is not None:
        trainer.add_callback(measuring)  # on every rank: sharded weights answer together
    try:
        train_on(trainer)
        if measuring is None or trainer.state.global_step < trainer.state.max_steps:
            return None
        return measuring.last()
    finally:
        progress.close()


def _prepare_work(work: Path, identity: str) -> None:
    """Make the folder; checkpoints of other examples or settings than `identity` names are removed."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / _INPUTS_FILE
    with suppress(DamageError):  # a damaged file names no inputs
        if file.exists() and read_json(file) == identity:
            return
    if newest_checkpoint(work) is not None:
        _log.warning(
            "%s: its checkpoints are of other rows or settings; they are removed, and training begins anew.", work
        )
    remove_checkpoints(work)
    write_json(file, identity)
