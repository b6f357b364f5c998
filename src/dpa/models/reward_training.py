"""Training of the reward model: one linear output per attribute, masked least squares; full, LoRA or ridge.
Run its tests: pytest tests/test_reward_training.py

    r(x, y) in R^M;   loss = mean over the marks that are there of (r_m(x, y) - mark_m)^2        (arXiv 2402.18571)

The paper gives the architecture, the loss and the 0-100 scale. Ours: optimiser settings; marks in units of each
attribute's own spread while training, so that no attribute dominates; the start of `full` and `lora` from a ridge head
(linear probing before finetuning, arXiv 2202.10054); the split by prompt; the golden example.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dpa.core.config import RewardTrainConfig, of_results
from dpa.core.errors import DataError, ModelFileError, TrainingError
from dpa.core.records import Messages, stable_hash
from dpa.core.reference import ModelReference
from dpa.models.attention import best_way, pack_inputs, packed_attention, padded_attention, to_device
from dpa.models.checkpoints import newest_checkpoint
from dpa.models.cutting import ANY_LENGTH, cut_prompt
from dpa.models.disk_refusals import disk_refusals
from dpa.models.passes import StepInPasses, Uncut, first_plan, one_card, without_adapters
from dpa.models.policy import context_length, default_device, ensure_pad_token
from dpa.models.precision import PRECISION_ROWS, measure_precision, rows_to_compare, say_fp32, self_test
from dpa.models.quiet import quiet_libraries
from dpa.models.reward_model import (
    BF16_TOLERANCE,
    PLAIN_TEMPLATE,
    Golden,
    Precision,
    RewardSpec,
    batches,
    check_template,
    encode,
    find_head,
    forward,
    last_token_logits,
    load_classifier,
    pad_batch,
    pools_last_token,
    write_spec,
)
from dpa.models.reward_quality import measure_quality
from dpa.models.ridge import CONSTANT_PENALTIES, choose_constant, choose_penalties, fit_ridge
from dpa.models.scorers import RewardModelScorer
from dpa.models.training import (
    ShowProgress,
    StopsAtBadStep,
    StopWhenAsked,
    merge_adapters,
    trackers,
)
from dpa.storage.stopping import StopOnSignal
from dpa.storage.tables import save_folder_atomically

MISSING = -100.0
"""Label of a mark that is not there. The Trainer itself counts the labels that are not -100, over the whole step."""

PROBE_ROWS = 2048
"""Rows whose features start the head of `full` and `lora`."""

CPU_PASS, GPU_PASS = 2048, 65_536
"""Tokens of one forward and backward pass, to begin with."""

WARMUP = 0.05
SAVE_STEPS = 200
GOLDEN_TOLERANCE = 0.05

QUICK_ROWS = 8
"""Held-out rows that the precisions are compared on before training and after its first step."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RatedExample:
    """A response and its M marks on 0-100, NaN where it was not rated."""

    prompt_id: str
    messages: Messages
    response: str
    marks: tuple[float, ...]


@dataclass(frozen=True)
class EncodedRows:
    """Rated rows that fit, as the model sees them: token ids and marks_NM (NaN: missing), and their split.

    `left_out` and `cut` count the rows that were too long; `limit` is the longest that fits.
    """

    examples: list[RatedExample]
    ids_N: list[list[int]]
    marks_NM: np.ndarray
    train: list[int]
    held_out: list[int]
    limit: int
    left_out: int
    cut: int

    @property
    def prompt_ids(self) -> list[str]:
        """Of each row."""
        return [example.prompt_id for example in self.examples]

    def ids(self, rows: Sequence[int]) -> list[list[int]]:
        """Token ids of some rows."""
        return [self.ids_N[row] for row in rows]


@quiet_libraries()
def train_reward_model(
    examples: Sequence[RatedExample],
    attributes: Sequence[str],
    scales: Mapping[str, tuple[float, float]],
    config: RewardTrainConfig,
    out: Path,
    seed: int = 0,
    code_revision: str | None = None,
) -> dict[str, Any]:
    """Train, measure on held-out prompts and save; return `quality`, `baselines` and `training` of dpa_reward.json.

    `out` becomes a plain Hugging Face folder that scores on 0-100 through `AutoModelForSequenceClassification`, as a
    whole or not at all. Checkpoints lie beside it in `NAME.training`, under a hash of rows and settings, and resume an
    interrupted run. Raises DataError, ModelFileError, TrainingError (a loss or gradient that is not finite, before the
    optimizer step), Interrupted (on a signal, after a checkpoint), StorageError.
    """
    torch.manual_seed(seed)
    tokenizer, model = _load_backbone(config, attributes, code_revision)
    pad = tokenizer.pad_token_id
    template = config.template or (None if tokenizer.chat_template else PLAIN_TEMPLATE)
    if template is not None:
        check_template(template)
    max_length = min(config.max_length, context_length(model))
    rows = _encode(examples, attributes, tokenizer, template, max_length, config, seed)
    checkpoints = out.with_name(f"{out.name}.training")

    def describe(model: Any, least: int = PRECISION_ROWS) -> RewardSpec:
        golden, precision = _golden(model, rows, pad, least)
        return RewardSpec(tuple(attributes), dict(scales), template, max_length, golden, precision)

    def check(model: Any) -> None:
        """A set-up that cannot pass its self-test is found in seconds."""
        _check_set_up(model, tokenizer, describe(model, QUICK_ROWS), config.backbone)

    check(model)
    penalties: list[float] = []
    if config.method == "ridge":
        model, penalties = _fit_ridge_head(model, rows, config, pad)
    else:
        inputs = stable_hash(rows.ids_N, rows.marks_NM.tolist(), rows.train, of_results(config), seed)
        model = _finetune(model, rows, config, pad, checkpoints / inputs, seed, check)
    model.eval()
    spec = describe(model)
    _check_set_up(model, tokenizer, spec, config.backbone)
    if spec.precision is not None and not spec.precision.keeps_order:
        say_fp32(out, f"in bf16 Kendall's tau within prompts is {spec.precision.kendall:.3f} of what it is in fp32")
    facts = {
        **_quality(model, rows, attributes, pad),
        "training": {
            "backbone": config.backbone,
            "remote_code_revision": code_revision,
            "method": config.method,
            "seed": seed,
            "epochs": 0 if config.method == "ridge" else config.epochs,
            "train_rows": len(rows.train),
            "train_tokens": sum(map(len, rows.ids(rows.train))),
            "held_out_rows": len(rows.held_out),
            "held_out_prompts": len({rows.prompt_ids[row] for row in rows.held_out}),
            "rejected_rows": len(examples) - len(rows.examples),
            "max_length": rows.limit,
            "left_out_rows": rows.left_out,
            "cut_rows": rows.cut,
            # null: the mean alone, since no penalty did better in cross-validation
            "ridge_penalty": {
                name: penalty if np.isfinite(penalty) else None
                for name, penalty in zip(attributes, penalties, strict=False)
            },
        },
    }
    with save_folder_atomically(out) as folder, disk_refusals(out, "saving the model"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_spec(folder, spec, facts)
        model.cpu()  # a card that holds one of them need not hold two
        RewardModelScorer(ModelReference(str(folder), code_revision))  # what was saved must pass its self-test
    for leftover in checkpoints.glob("*/checkpoint-*") if config.report_to else [checkpoints]:
        shutil.rmtree(leftover, ignore_errors=True)  # what a tracker wrote beside the checkpoints stays
    return facts


def split_by_prompt(prompt_ids: Sequence[str], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to hold out: a share of the PROMPTS, at least one, with all their rows.

    Which prompts depends on their ids and the seed alone. Raises DataError when there are fewer than two prompts.
    """
    prompts = sorted(set(prompt_ids), key=lambda prompt_id: stable_hash("held-out", seed, prompt_id))
    if len(prompts) < 2:
        raise DataError(f"ratings: {len(prompts)} usable prompts are too few to hold some out; rate at least two.")
    chosen = set(prompts[: min(len(prompts) - 1, max(1, round(held_out * len(prompts))))])
    train = [row for row, prompt_id in enumerate(prompt_ids) if prompt_id not in chosen]
    return train, [row for row, prompt_id in enumerate(prompt_ids) if prompt_id in chosen]


def masked_mse(logits_BM: torch.Tensor, labels_BM: torch.Tensor, count: torch.Tensor | int | None) -> torch.Tensor:
    """Squared error summed over the labels that are not MISSING, divided by `count` of them (None: of this batch).

    The Trainer gives the count over all micro-batches of an optimizer step, so accumulation does not change the loss.
    """
    present = labels_BM != MISSING
    errors = torch.where(present, logits_BM.float() - labels_BM, 0.0)
    return errors.square().sum() / (present.sum().clamp(min=1) if count is None else count)


class Head:
    """The last linear layer of a sequence classifier, whatever the architecture calls it."""

    def __init__(self, model: PreTrainedModel, outputs: int) -> None:
        found = find_head(model, outputs)
        if found is None:
            raise ModelFileError(
                f"reward.train.backbone: {type(model).__name__} ends in no linear layer; take another."
            )
        self.model = model
        self.name, self.linear = found

    @property
    def has_bias(self) -> bool:
        """Llama, Mistral and Qwen classifiers have none."""
        return self.linear.bias is not None

    def features(self, ids_N: Sequence[Sequence[int]], pad_token_id: int) -> np.ndarray:
        """What the layer is given, features_NH, pooled as the architecture itself does: it is an identity meanwhile."""
        training = self.model.training
        self.model.eval().set_submodule(self.name, nn.Identity())
        try:
            features_NH = forward(self.model, ids_N, pad_token_id)
        finally:
            self.model.set_submodule(self.name, self.linear)
            self.model.train(training)
        if not np.isfinite(features_NH).all():
            raise ModelFileError("reward.train.backbone: its features are not finite; are its weights damaged?")
        return features_NH

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """weight_MH and bias_M (zero where the layer has none)."""
        weight_MH = self.linear.weight.detach().double().cpu().numpy()
        bias = self.linear.bias
        return weight_MH, np.zeros(len(weight_MH)) if bias is None else bias.detach().double().cpu().numpy()

    def write(self, weight_MH: np.ndarray, bias_M: np.ndarray) -> None:
        """Set the layer; a bias is only accepted where it has one."""
        assert self.has_bias or not bias_M.any(), f"{self.name} has no bias"
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(weight_MH))
            if self.has_bias:
                self.linear.bias.copy_(torch.from_numpy(bias_M))


@dataclass(frozen=True)
class Unit:
    """The unit marks are in while training: label = (mark - mean) / std of each attribute.

    A layer without bias cannot undo a mean, so there the mean is 0 and only the scale changes.
    """

    mean_M: np.ndarray
    std_M: np.ndarray

    @classmethod
    def of(cls, marks_NM: np.ndarray, has_bias: bool) -> "Unit":
        """The unit of these marks (NaN: missing)."""
        std_M = np.nanstd(marks_NM, axis=0)
        return cls(
            np.nanmean(marks_NM, axis=0) if has_bias else np.zeros(marks_NM.shape[1]), np.where(std_M > 0, std_M, 1.0)
        )

    def enter(self, marks_NM: np.ndarray) -> np.ndarray:
        """Marks as labels."""
        return (marks_NM - self.mean_M) / self.std_M

    def leave(self, weight_MH: np.ndarray, bias_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same linear layer, its output on 0-100 again: exact, by linearity."""
        return weight_MH * self.std_M[:, None], bias_M * self.std_M + self.mean_M


def _load_backbone(config: RewardTrainConfig, attributes: Sequence[str], code_revision: str | None) -> tuple[Any, Any]:
    """The tokenizer, with a pad token of its own, and a classifier with a new head of one output per attribute."""
    model, tokenizer, _ = load_classifier(
        ModelReference(config.backbone, code_revision),
        _backbone_dtype(config),
        num_labels=len(attributes),
        problem_type="regression",
        id2label=dict(enumerate(attributes)),
        label2id={name: index for index, name in enumerate(attributes)},
    )
    ensure_pad_token(tokenizer)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # its vector is never attended to
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer, model.to(default_device())


def _encode(
    examples: Sequence[RatedExample],
    attributes: Sequence[str],
    tokenizer: Any,
    template: str | None,
    max_length: int,
    config: RewardTrainConfig,
    seed: int,
) -> EncodedRows:
    """Encode and split; rows without a mark or too long are left out.

    Raises DataError when more than `config.max_left_out` are, or an attribute has no mark left.
    """
    rated = [example for example in examples if not np.isnan(example.marks).all()]
    ids_N = encode(tokenizer, template, max_length, [e.messages for e in rated], [e.response for e in rated])
    cut = 0
    if config.too_long == "cut_prompt":
        for row, example in enumerate(rated):
            if ids_N[row] is None:
                fitting = cut_prompt(tokenizer, template, max_length, example.messages, example.response)
                if fitting is not None:
                    rated[row], ids_N[row] = replace(example, messages=fitting[0]), fitting[1]
                    cut += 1
    kept = [(example, ids) for example, ids in zip(rated, ids_N, strict=True) if ids is not None]
    left_out = [example for example, ids in zip(rated, ids_N, strict=True) if ids is None]
    if left_out:
        sentence = _left_out(left_out, len(rated), tokenizer, template, max_length, config)
        if len(left_out) > config.max_left_out * len(rated):
            raise DataError(f"{sentence}, or raise reward.train.max_left_out ({config.max_left_out:g}).")
        _log.warning("%s.", sentence)
    marks_NM = np.array([example.marks for example, _ in kept], dtype=np.float64).reshape(len(kept), len(attributes))
    train, hold = split_by_prompt([example.prompt_id for example, _ in kept], config.held_out, seed)
    for name, marks_N in zip(attributes, marks_NM[train].T, strict=True):
        if np.isnan(marks_N).all():
            raise DataError(f"ratings: no row that fits max_length {max_length} has a mark on {name}; leave it out.")
    examples_kept, ids_kept = [example for example, _ in kept], [ids for _, ids in kept]
    return EncodedRows(examples_kept, ids_kept, marks_NM, train, hold, max_length, len(left_out), cut)


def _left_out(
    examples: Sequence[RatedExample],
    total: int,
    tokenizer: Any,
    template: str | None,
    max_length: int,
    config: RewardTrainConfig,
) -> str:
    """How many rated rows do not fit, how long they are, and what to do about it."""
    messages, responses = [example.messages for example in examples], [example.response for example in examples]
    lengths = [len(ids) for ids in encode(tokenizer, template, ANY_LENGTH, messages, responses) if ids]
    refused = f" ({len(examples) - len(lengths)} are refused by the template)" if len(lengths) < len(examples) else ""
    longest = f", up to {max(lengths):,}" if lengths else ""
    mend = f"raise reward.train.max_length ({config.max_length:,})"
    if max_length < config.max_length:
        mend = f"take a backbone with a longer context than {max_length:,}"
    if config.too_long == "leave_out":
        mend += ", or set reward.train.too_long: cut_prompt"
    return (
        f"reward model: LEFT OUT: {len(examples):,} of {total:,} rated rows ({len(examples) / total:.0%}) are longer "
        f"than {max_length:,} tokens{longest}{refused}, and train nothing; {mend}"
    )


def _fit_ridge_head(
    model: PreTrainedModel, rows: EncodedRows, config: RewardTrainConfig, pad: int
) -> tuple[PreTrainedModel, list[float]]:
    """The model with its head, and the penalty of each output."""
    head = Head(model, rows.marks_NM.shape[1])
    features_NH, marks_NM = head.features(rows.ids(rows.train), pad), rows.marks_NM[rows.train]
    constant = CONSTANT_PENALTIES[0]
    if config.ridge_penalty == "auto":
        prompt_ids = [rows.prompt_ids[row] for row in rows.train]
        if not head.has_bias:
            constant = choose_constant(features_NH, prompt_ids)
        penalties = choose_penalties(features_NH, marks_NM, prompt_ids, head.has_bias, constant)
    else:
        penalties = [config.ridge_penalty] * marks_NM.shape[1]
    head.write(*fit_ridge(features_NH, marks_NM, penalties, head.has_bias, constant=constant))
    return model, penalties


def _finetune(
    model: PreTrainedModel,
    rows: EncodedRows,
    config: RewardTrainConfig,
    pad: int,
    checkpoints: Path,
    seed: int,
    check: Callable[[Any], None],
) -> PreTrainedModel:
    outputs = rows.marks_NM.shape[1]
    head = Head(model, outputs)
    unit = Unit.of(rows.marks_NM[rows.train], head.has_bias)
    labels_NM = unit.enter(rows.marks_NM)
    probe = np.random.default_rng(seed).permutation(rows.train)[:PROBE_ROWS].tolist()
    features_NH = head.features(rows.ids(probe), pad)
    # As large a penalty as there are rows, and on size: the start needs a direction, not the features' noise, and a
    # large weight on a feature that hardly varies would be shaken by the first steps.
    head.write(*fit_ridge(features_NH, labels_NM[probe], float(len(probe)), head.has_bias, penalise="size"))
    trained: Any = model
    if config.method == "lora":
        adapters = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules="all-linear",
            modules_to_save=[head.name],
        )
        trained = get_peft_model(model, adapters)
        for parameter in trained.parameters():
            if parameter.requires_grad:  # steps in bf16 would be rounded away
                parameter.data = parameter.data.float()
    labels_NM = np.nan_to_num(labels_NM, nan=MISSING)
    data = [{"input_ids": rows.ids_N[row], "labels": labels_NM[row]} for row in rows.train]
    _run_trainer(trained, data, config, pad, checkpoints, seed, check)
    if config.method == "lora":
        trained = merge_adapters(trained, _backbone_dtype(config), exact=head.name).to(default_device())
    head = Head(trained, outputs)
    head.write(*unit.leave(*head.read()))
    return trained


class _Trainer(StopsAtBadStep, StepInPasses, Trainer):
    """A Trainer of a classifier that cuts a step into passes that fit, and stops before a bad step."""

    unit, field = "tokens", "reward.train.max_length"
    packed: bool
    """Whether rows lie behind each other, where a padded batch would be longer."""
    pad: int

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with attention that stays within a row."""
        dtype = torch.bfloat16 if self.args.bf16 else None
        with packed_attention(without_adapters(self.model), dtype) if self.packed else nullcontext():
            return super().train(*args, **kwargs)

    def cut(self, rows: Sequence[dict[str, Any]], size: int) -> list[Any]:
        """Passes of rows of like length, of at most `size` tokens together, padding included."""
        lengths = [len(row["input_ids"]) for row in rows]
        return [[rows[place] for place in part] for part in batches(lengths, size, self.packed)]

    def pass_loss(self, model: Any, part: Any, step: Mapping[str, Any]) -> torch.Tensor:
        """Squared errors of the pass's marks, over the number of the step's."""
        ids_B, device = [row["input_ids"] for row in part], self.args.device
        labels_BM = torch.from_numpy(np.stack([row["labels"] for row in part])).float()
        if self.packed:
            inputs = to_device({**pack_inputs(ids_B), "labels": labels_BM}, device)
            labels_BM = inputs.pop("labels")
            logits_BM = last_token_logits(without_adapters(model), inputs)
        else:
            inputs = to_device({**pad_batch(ids_B, self.pad), "labels": labels_BM}, device)
            labels_BM = inputs.pop("labels")
            logits_BM = model(**inputs).logits
        return masked_mse(logits_BM, labels_BM, step["count"])


def build_trainer(
    model: Any, data: list[dict[str, Any]], config: RewardTrainConfig, pad: int, checkpoints: Path, seed: int
) -> Trainer:
    """The Trainer of a classifier over `input_ids` and `labels` (M; MISSING: no mark): AdamW on the masked loss."""
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        bf16=_mixed(config),
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
        count = sum(int((row["labels"] != MISSING).sum()) for row in rows)
        return {"count": max(1, count), "rows": Uncut(rows)}

    trainer = _Trainer(model, arguments, data_collator=collate, train_dataset=data)
    base = without_adapters(model)
    trainer.packed = pools_last_token(base) and best_way(base, torch.bfloat16 if arguments.bf16 else None) is not None
    longest = max(len(row["input_ids"]) for row in data)
    most = max(1, (GPU_PASS if cuda else CPU_PASS) // longest)
    first = first_plan(model, config.gradient_checkpointing, longest, most, "reward.train", arguments.bf16)
    trainer.compile = config.compile
    trainer.pad, trainer.pass_size = pad, first.units * longest
    trainer.may_recompute = config.gradient_checkpointing is None and not first.recompute
    arguments.gradient_checkpointing = first.recompute
    arguments.gradient_checkpointing_kwargs = {"use_reentrant": False}  # else, frozen inputs would stop gradients
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


def _run_trainer(
    model: Any,
    data: list[dict[str, Any]],
    config: RewardTrainConfig,
    pad: int,
    checkpoints: Path,
    seed: int,
    check: Callable[[Any], None],
) -> None:
    """Train from the newest checkpoint where there is one."""
    progress = ShowProgress("reward model", sum(len(row["input_ids"]) for row in data))
    with StopOnSignal() as stop:
        trainer = build_trainer(model, data, config, pad, checkpoints, seed)
        trainer.add_callback(StopWhenAsked(stop))
        trainer.add_callback(progress)
        trainer.add_callback(_AfterTheFirstStep(check))
        newest = newest_checkpoint(checkpoints)
        try:
            with disk_refusals(checkpoints, "saving a checkpoint"):
                trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        finally:
            progress.close()
        # Mixed precision wraps `forward` for good; scores are measured as a scorer will compute them.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if trainer.state.global_step < trainer.state.max_steps:
            raise stop.interrupted("reward model", trainer.state.global_step, trainer.state.max_steps, "steps")


def _mixed(config: RewardTrainConfig) -> bool:
    """Whether products are computed in bf16."""
    return config.bf16 or (torch.cuda.is_available() and torch.cuda.is_bf16_supported())


def _backbone_dtype(config: RewardTrainConfig) -> torch.dtype:
    """Weights that stay frozen need no more than bf16; all weights are trained in fp32."""
    return torch.bfloat16 if config.method != "full" and _mixed(config) else torch.float32


def _golden(model: Any, rows: EncodedRows, pad: int, least: int) -> tuple[Golden, Precision | None]:
    """The held-out row of median length and its scores in fp32; and what is lost in the precision of scorers."""
    middle = sorted(rows.held_out, key=lambda row: (len(rows.ids_N[row]), row))[len(rows.held_out) // 2]
    example, ids = rows.examples[middle], rows.ids_N[middle]
    others = [row for row in rows.held_out if row != middle]
    compared = [middle, *rows_to_compare(others, [rows.prompt_ids[row] for row in others], least)]
    measured = measure_precision(model, rows.ids(compared), [rows.prompt_ids[row] for row in compared], pad)
    scores_M, tolerance = (
        (forward(model, [ids], pad)[0], BF16_TOLERANCE) if measured is None else (measured[1][0], GOLDEN_TOLERANCE)
    )
    if not np.isfinite(scores_M).all():
        raise TrainingError("reward training: the trained model's scores are not finite; lower its learning_rate.")
    golden = Golden(example.messages, example.response, tuple(scores_M.tolist()), tuple(ids), tolerance)
    return golden, None if measured is None else measured[0]


def _check_set_up(model: Any, tokenizer: Any, spec: RewardSpec, name: str) -> None:
    """The self-test of a scorer, on the model in memory and on a tokenizer that was saved. Raises ModelFileError."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        self_test(model, AutoTokenizer.from_pretrained(folder), spec, name)


def _quality(model: PreTrainedModel, rows: EncodedRows, attributes: Sequence[str], pad: int) -> dict[str, Any]:
    """Held-out agreement of the model, of always saying the mean, and of a ridge on the response's length alone."""
    marks_NM = rows.marks_NM[rows.held_out]
    prompt_ids = [rows.prompt_ids[row] for row in rows.held_out]
    lengths_N = np.array([len(example.response) for example in rows.examples], dtype=np.float64)
    features_NH = np.stack([lengths_N, np.log1p(lengths_N)], axis=1)
    weight_MH, bias_M = fit_ridge(features_NH[rows.train], rows.marks_NM[rows.train], penalty=1.0)
    means_M = np.nanmean(rows.marks_NM[rows.train], axis=0)
    predictions = {
        "quality": forward(model, rows.ids(rows.held_out), pad),
        "mean": np.broadcast_to(means_M, marks_NM.shape),
        "length": features_NH[rows.held_out] @ weight_MH.T + bias_M,
    }
    measured = {
        name: measure_quality(predicted_NM, marks_NM, prompt_ids, attributes)
        for name, predicted_NM in predictions.items()
    }
    return {"quality": measured.pop("quality"), "baselines": measured}
