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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoTokenizer, PreTrainedModel

from dpa.core.config_identity import of_results
from dpa.core.errors import TrainingError
from dpa.core.records import stable_hash
from dpa.core.reference import ModelReference
from dpa.core.sections.reward import RewardTrainConfig
from dpa.models.disk_refusals import disk_refusals
from dpa.models.files import folder_revision
from dpa.models.half_precision import computes_in_bf16
from dpa.models.memory import free_memory
from dpa.models.policy import context_length, default_device, ensure_pad_token
from dpa.models.quiet import quiet_libraries
from dpa.scoring.precision import PRECISION_ROWS, measure_precision, rows_to_compare, say_fp32, self_test
from dpa.scoring.reward_model import (
    BF16_TOLERANCE,
    PLAIN_CONVERSATION,
    Golden,
    Precision,
    RewardSpec,
    check_template,
    forward,
    load_classifier,
    write_spec,
)
from dpa.scoring.reward_quality import measure_quality
from dpa.scoring.reward_scorer import RewardModelScorer
from dpa.storage.tables import save_folder_atomically
from dpa.training.reward_head import Head, Unit
from dpa.training.reward_rows import EncodedRows, RatedExample, encode_rated
from dpa.training.reward_trainer import UNMARKED, run_trainer
from dpa.training.ridge import CONSTANT_PENALTIES, choose_constant, choose_penalties, fit_ridge
from dpa.training.trainers import CountSeconds, dropout_refusals, lora_adapters, merge_adapters

PROBE_ROWS = 2048
"""Rows whose features start the head of `full` and `lora`."""

GOLDEN_TOLERANCE = 0.05

QUICK_ROWS = 8
"""Held-out rows that the precisions are compared on before training and after its first step."""

_log = logging.getLogger(__name__)


@quiet_libraries()
def train_reward_model(
    examples: Sequence[RatedExample],
    attributes: Sequence[str],
    scales: Mapping[str, tuple[float, float]],
    config: RewardTrainConfig,
    out: Path,
    seed: int = 0,
    code_revision: str | None = None,
    seconds: CountSeconds | None = None,
) -> dict[str, Any]:
    """Train, measure on held-out prompts and save; return `quality`, `baselines` and `training` of dpa_reward.json.

    `out` becomes a plain Hugging Face folder that scores on 0-100 through `AutoModelForSequenceClassification`, as a
    whole or not at all. Checkpoints lie beside it in `NAME.training`, under a hash of rows and settings, and resume an
    interrupted run, also one that has only not been sealed yet (`remove_checkpoints` once it is); `seconds` keeps in
    them what that took. Raises DataError, ModelFileError, TrainingError (a loss or gradient that is not finite, before
    the step), Interrupted (on a signal, after a checkpoint), StorageError.
    """
    torch.manual_seed(seed)
    tokenizer, model, backbone = _load_backbone(config, attributes, code_revision)
    pad = tokenizer.pad_token_id
    template = config.template or (None if tokenizer.chat_template else PLAIN_CONVERSATION)
    if template is not None:
        check_template(template)
    max_length = min(config.max_length, context_length(model))
    rows = encode_rated(examples, attributes, tokenizer, template, max_length, config, seed)
    checkpoints = _checkpoints(out)

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
        content = folder_revision(backbone)
        inputs = stable_hash(rows.ids_N, rows.marks_NM.tolist(), rows.train, of_results(config), seed, content)
        model = _finetune(model, rows, config, pad, checkpoints / inputs, seed, check, seconds or CountSeconds())
    model.eval()
    spec = describe(model)
    _check_set_up(model, tokenizer, spec, config.backbone)
    if spec.precision is None:
        _log.warning(
            "reward model: memory did not hold %s in two precisions, so what bf16 costs it is not measured; scorers "
            "take bf16 on a card.",
            out,
        )
    elif not spec.precision.keeps_order:
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
    return facts


def remove_checkpoints(out: Path, config: RewardTrainConfig) -> None:
    """Free what only a training that is interrupted before the model at `out` is sealed needs."""
    checkpoints = _checkpoints(out)
    for leftover in checkpoints.glob("*/checkpoint-*") if config.report_to else [checkpoints]:
        shutil.rmtree(leftover, ignore_errors=True)  # what a tracker wrote beside the checkpoints stays


def _checkpoints(out: Path) -> Path:
    return out.with_name(f"{out.name}.training")


def _load_backbone(
    config: RewardTrainConfig, attributes: Sequence[str], code_revision: str | None
) -> tuple[Any, Any, Path]:
    """The tokenizer, with a pad token of its own, a classifier with a new head of one output per attribute, and the
    folder that they are from."""
    model, tokenizer, folder = load_classifier(
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
    return tokenizer, model.to(default_device()), folder


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
    seconds: CountSeconds,
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
        adapters = lora_adapters(config.lora, "SEQ_CLS", modules_to_save=[head.name])
        with dropout_refusals("reward.train.lora.dropout"):
            trained = get_peft_model(model, adapters)
        for parameter in trained.parameters():
            if parameter.requires_grad:  # steps in bf16 would be rounded away
                parameter.data = parameter.data.float()
    labels_NM = np.nan_to_num(labels_NM, nan=UNMARKED)
    data = [{"input_ids": rows.ids_N[row], "labels": labels_NM[row]} for row in rows.train]
    run_trainer(trained, data, config, pad, checkpoints, seed, check, seconds)
    free_memory()  # a Trainer is in a cycle, and holds AdamW's moments
    if config.method == "lora":
        rate = f"reward.train.learning_rate: {config.learning_rate:g}"
        trained = merge_adapters(trained, _backbone_dtype(config), head.name, rate).to(default_device())
    head = Head(trained, outputs)
    head.write(*unit.leave(*head.read()))
    return trained


def _backbone_dtype(config: RewardTrainConfig) -> torch.dtype:
    """Weights that stay frozen need no more than bf16; all weights are trained in fp32."""
    return torch.bfloat16 if config.method != "full" and computes_in_bf16(config.bf16) else torch.float32


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
        with disk_refusals(Path(folder), "saving the tokenizer"):
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
