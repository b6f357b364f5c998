"""Reward training, scoring and finetuning, each against the plain libraries on the same rows.

What a part costs on one card with SmolLM2-135M: trainings are measured for 8 s of steps behind four (`steps_of`), so
each takes 15 to 25 s with loading and, where layers are compiled, compiling, whatever its speed. `finetune` and
`reward` have the peer's and ours with eager layers, with compiled ones as `compile: auto` takes them for 200 steps and
more, and with larger steps; `reward` a whole training of 2,000 rows besides. `scoring` scores 4,000 rows of
about 200 tokens and stops its peer after PEER_S: about 40 s, most of it the ridge model it makes and tokenising.
"""

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PrinterCallback

from card_phases.common import ATTRIBUTE, Card, Steps, Timed, multiplied, parameters_of, steps_of, timed
from dpa.core.sections.reward import RewardTrainConfig
from dpa.core.sections.training import FinetuneConfig
from dpa.models.policy import encode_prompt, load_policy, make_steerable
from dpa.models.quiet import quiet_libraries

SCALES = {ATTRIBUTE: (0.0, 100.0)}
PEER_S = 8.0
"""The peer of scoring is not asked for more after this."""


def reward(card: Card) -> None:
    """Tokens/s of the steps of a reward training against transformers' Trainer on padded batches of 64, and of a whole
    training of 2,000 rows (its linear start, its measurement and its self-test included)."""
    from dpa.training import reward_training

    config = RewardTrainConfig(
        backbone=card.inputs.policy, method="full", learning_rate=2e-5, batch_size=4 if card.tiny else 64,
        max_length=256 if card.tiny else 1024, held_out=0.2 if card.tiny else 0.05,
    )  # fmt: skip
    rows = card.rated(24 if card.tiny else 8000)
    data, pad = reward_rows(card, rows, config.max_length)

    def steps(build: Any) -> tuple[Steps, int]:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(card.inputs.policy, num_labels=1, dtype="float32")
        model.config.pad_token_id = pad
        with tempfile.TemporaryDirectory() as work, quiet_libraries():
            trainer = build(model, data, config, Path(work), pad)
            trainer.remove_callback(PrinterCallback)
            return steps_of(trainer), parameters_of(model)

    ours = functools.partial(our_reward_trainer, compile=False)
    eager = compare(card, "reward training", steps, ours, plain_reward_trainer, "transformers Trainer, padded")
    for batch in (config.batch_size, 4 * config.batch_size):
        larger = functools.partial(our_reward_trainer, compile=not card.tiny, batch_size=batch)
        beside(card, f"reward training, compiled layers, {batch} rows a step", steps, larger, eager)

    folder, few = card.folder / "reward_model", rows[: 24 if card.tiny else 2000]
    whole = timed(lambda: reward_training.train_reward_model(few, (ATTRIBUTE,), SCALES, config, folder))
    facts, quality = whole.result["training"], whole.result["quality"]
    parameters = parameters_of(AutoModelForSequenceClassification.from_pretrained(folder))
    speed = facts["train_tokens"] / whole.seconds
    card.row("reward training, all of it", speed, "tokens/s", peak_bytes=whole.peak_bytes, quality=quality, **facts,
             **card.share(6 * parameters * speed, "matrix"))  # fmt: skip


def compare(card: Card, what: str, steps: Any, ours: Any, plain: Any, peer_name: str) -> float:
    """The steps of two trainers, ours kept before the peer's are begun; the speed of ours. `steps(build)`: them and the
    parameters."""
    found, parameters = steps(ours)
    facts = facts_of(card, found, parameters)
    card.row(what, found.speed, "tokens/s", **facts)
    peer, _ = steps(plain)
    facts |= {"peer_peak_bytes": peer.peak_bytes, "peer_steps": peer.count}
    card.row(what, found.speed, "tokens/s", peer.speed, peer_name, **facts)
    return found.speed


def beside(card: Card, what: str, steps: Any, build: Any, eager: float) -> None:
    """The steps with compiled layers, beside the speed with eager ones."""
    found, parameters = steps(build)
    card.row(what, found.speed, "tokens/s", eager, "eager layers", **facts_of(card, found, parameters))


def facts_of(card: Card, found: Steps, parameters: int) -> dict[str, Any]:
    """What a row of steps says beside their speed."""
    return {
        "peak_bytes": found.peak_bytes, "steps": found.count, "ms_a_step": 1000 * found.seconds / found.count,
        **card.share(6 * parameters * found.speed, "matrix"),
    }  # fmt: skip


def reward_rows(card: Card, rows: list[Any], longest: int) -> tuple[list[dict[str, Any]], int]:
    """Token ids and marks in units of their spread, as a regressor is given them; and the pad token."""
    from dpa.scoring.reward_model import encode

    _, tokenizer = load_policy(card.inputs.policy, device="cpu")
    ids_N = encode(tokenizer, None, longest, [row.messages for row in rows], [row.response for row in rows])
    data = [
        {"input_ids": ids, "labels": np.array([row.marks[0] / 50 - 1], dtype=np.float32)}
        for ids, row in zip(ids_N, rows, strict=True)
        if ids is not None
    ]
    return data, tokenizer.pad_token_id


def our_reward_trainer(
    model: Any, data: list[Any], config: RewardTrainConfig, work: Path, pad: int, **changes: Any
) -> Any:
    """What `train_reward_model` trains with."""
    from dpa.training import reward_trainer

    return reward_trainer.build_trainer(model, data, config.model_copy(update=changes), pad, work, 0)


def plain_reward_trainer(model: Any, data: list[Any], config: RewardTrainConfig, work: Path, pad: int) -> Any:
    """transformers as its documentation starts a regression: shuffled batches, padded to their longest."""
    from transformers import Trainer, TrainingArguments

    cuda = torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=str(work), per_device_train_batch_size=config.batch_size, num_train_epochs=1, bf16=cuda,
        learning_rate=config.learning_rate, use_cpu=not cuda, save_strategy="no", disable_tqdm=True, report_to="none",
    )  # fmt: skip

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in rows])
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        seen = (torch.arange(width)[None] < lengths).long()
        return {"input_ids": ids, "attention_mask": seen, "labels": torch.tensor(np.stack([r["labels"] for r in rows]))}

    return Trainer(model, settings, train_dataset=data, data_collator=collate)


def scoring(card: Card) -> None:
    """Rows/s of texts of about 200 tokens, tokenising included: with eager layers against padded batches of 32 in the
    order they come, and with compiled ones, which `compile: auto` takes from 5,000 rows on."""
    from dpa.scoring.reward_model import encode
    from dpa.scoring.reward_scorer import RewardModelScorer

    scorer = RewardModelScorer(card.reward_model(), card.reward_spec(), compile=False)
    model, tokenizer = scorer.model, scorer.tokenizer
    rated = card.rated(24 if card.tiny else 9000)
    shown = encode(tokenizer, scorer.spec.template, scorer.spec.max_length,
                   [row.messages for row in rated], [row.response for row in rated])  # fmt: skip
    kept = [pair for pair in zip(rated, shown, strict=True) if card.tiny or 100 <= len(pair[1] or ()) <= 300][:4000]
    rows, ids_N = zip(*kept, strict=True)
    prompts, responses = [row.messages for row in rows], [row.response for row in rows]
    tokens = sum(len(ids) for ids in ids_N if ids is not None)
    device, pad = next(model.parameters()).device, tokenizer.pad_token_id
    parameters = multiplied(model.base_model)

    @torch.inference_mode()
    def padded() -> np.ndarray:
        scores, begun = [], time.perf_counter()
        for start in range(0, len(rows), 32):
            if time.perf_counter() - begun > PEER_S:
                break
            part = slice(start, start + 32)
            batch = encode(tokenizer, scorer.spec.template, scorer.spec.max_length, prompts[part], responses[part])
            kept = [ids or [pad] for ids in batch]
            width = max(map(len, kept))
            ids_BT = torch.tensor([ids + [pad] * (width - len(ids)) for ids in kept], device=device)
            scores.append(model(input_ids=ids_BT, attention_mask=(ids_BT != pad).long()).logits.float().cpu().numpy())
        return np.concatenate(scores)

    def scored(scorer: RewardModelScorer, warm: int) -> tuple[Timed, dict[str, Any]]:
        for _ in range(warm):
            scorer.score(prompts[few], responses[few])
        found = timed(lambda: scorer.score(prompts, responses))
        facts = {"tokens_per_row": tokens / len(rows), "peak_bytes": found.peak_bytes, "dtype": str(scorer.model.dtype)}
        return found, facts | card.share(2 * parameters * tokens / found.seconds, "matrix")

    few = slice(0, 8 if card.tiny else 256)
    ours, facts = scored(scorer, 1)
    card.row("scoring", len(rows) / ours.seconds, "rows/s", **facts)
    plain = timed(padded)
    done = len(plain.result)
    usable = np.array([ids is not None for ids in ids_N[:done]])
    facts["largest_difference"] = float(np.abs(ours.result[:done][usable] - plain.result[usable]).max())
    card.row("scoring", len(rows) / ours.seconds, "rows/s", done / plain.seconds, "padded batches of 32", **facts)
    # The second time kernels of any length are there.
    compiled, facts = scored(RewardModelScorer(card.reward_model(), card.reward_spec(), compile=not card.tiny), 2)
    facts["largest_difference"] = float(np.nanmax(np.abs(compiled.result - ours.result)))
    card.row("scoring, compiled layers", len(rows) / compiled.seconds, "rows/s", len(rows) / ours.seconds,
             "eager layers", **facts)  # fmt: skip


def finetune(card: Card) -> None:
    """Tokens/s of training, prompts included, padding not: packed rows against TRL's SFTTrainer on the same rows."""
    from dpa.training.packing import Example

    _, tokenizer = load_policy(card.inputs.policy, device="cpu")
    space, longest = card.space(), 256 if card.tiny else 2048
    make_steerable(tokenizer, space)
    directions = space.grid(5)
    examples = []
    for place, row in enumerate(card.rated(16 if card.tiny else 4000)):
        prompt = encode_prompt(tokenizer, space, row.messages, directions[place % len(directions)])
        answer = tokenizer(row.response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(prompt) + len(answer) <= longest:
            examples.append(Example(prompt + answer, len(prompt)))

    def steps(build: Any) -> tuple[Steps, int]:
        model = AutoModelForCausalLM.from_pretrained(card.inputs.policy, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as work, quiet_libraries():
            trainer = build(model, tokenizer, examples, Path(work), longest)
            trainer.remove_callback(PrinterCallback)
            return steps_of(trainer), parameters_of(model)

    eager = compare(card, "finetuning", steps, packed_trainer, trl_trainer, "TRL, padded batches of 8")
    for rows in (8, 16) if card.tiny else (8, 16, 32):
        larger = functools.partial(packed_trainer, compiled=not card.tiny, rows=rows)
        beside(card, f"finetuning, compiled layers, {rows} packed rows a step", steps, larger, eager)


def packed_trainer(
    model: Any, tokenizer: Any, examples: list[Any], work: Path, longest: int, compiled: bool = False, rows: int = 8
) -> Any:
    """What `dpa` does: packed rows."""
    from dpa.core.presets import SPACES
    from dpa.training.sft import SFT

    config = FinetuneConfig(max_length=longest, packed_rows_per_step=rows, save_steps=10**9, compile=compiled)
    return SFT(config, SPACES["dpa-v1"], 0).trainer(model, tokenizer, examples, work)


def trl_trainer(model: Any, tokenizer: Any, examples: list[Any], work: Path, longest: int) -> Any:
    """TRL as its documentation starts it: padded batches of eight, activation checkpointing, bf16."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    settings = SFTConfig(
        output_dir=str(work), max_length=None, per_device_train_batch_size=8, num_train_epochs=1, bf16=cuda,
        use_cpu=not cuda, gradient_checkpointing=True, save_strategy="no", disable_tqdm=True, report_to="none",
    )  # fmt: skip
    columns = {"input_ids": [e.ids for e in examples], "labels": [e.labels for e in examples]}
    return SFTTrainer(model, settings, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)
