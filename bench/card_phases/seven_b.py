"""A 7B-shaped model: finetuning, scoring and rollout, against plain TRL, padded batches and plain `generate`.

Random weights in Mistral-7B's shape, so nothing is downloaded. Everything is measured in one process, each pair in
turn: tokens per second of finetuning (packed rows, AdamW, fp32 weights with bf16 autocast, activation checkpointing;
recomputation is not counted as useful work) and of scoring as shares of the matrix rate; tokens per second of rollout;
peak memory. The figures say how many layers there were where fp32 AdamW does not fit the card with all.

What a part costs on a card of 141 GB by its arithmetic (7.2 G weights, 2 or 6 FLOP a weight and token, 300 TFLOP/s):
scoring 200,000 tokens each way, about 10 s each; rollout one batch of at most 256 steps each way, about 15 s each;
finetuning 8 s of steps behind four each way (common.steps_of), about 40 s each with building. About 3 minutes.
"""

import contextlib
import functools
import gc
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import SFTConfig, SFTTrainer

from card_phases.common import Card, Steps, multiplied, steps_of, timed
from dpa.core.errors import DpaError
from dpa.core.presets import SPACES
from dpa.core.sections.training import FinetuneConfig
from dpa.models.memory import available_memory, free_memory
from dpa.models.policy import default_device
from dpa.models.quiet import quiet_libraries
from dpa.sampling.decoding import Decoder, Decoding, decode
from dpa.scoring.reward_model import forward
from dpa.training.packing import Example
from dpa.training.sft import SFT

PAD, END = 0, 1
ATTRIBUTES = 10
FULL = {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
FULL |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096}
TINY = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


class Endings(MistralForCausalLM):
    """A random Mistral whose end token comes by chance, about once in `mean_answer` tokens."""

    mean_answer = 200.0

    @functools.wraps(MistralForCausalLM.forward)  # the decoder looks at what it takes
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., END] = output.logits.logsumexp(-1) - np.log(self.mean_answer)
        output.logits[..., PAD] = -1e9
        return output


class Bench:
    """Sizes of the run, and what was found."""

    def __init__(self, tiny: bool) -> None:
        self.tiny, self.device = tiny, default_device()
        self.shape: dict[str, int] = dict(TINY if tiny else FULL)
        self.row, self.steps = (128, 2) if tiny else (2048, 8)
        self.lengths = ((10, 30), (5, 40)) if tiny else ((100, 400), (50, 500))
        self.rng = np.random.default_rng(0)

    def config(self, **more: Any) -> MistralConfig:
        """Mistral-7B's, or a tiny one."""
        return MistralConfig(**self.shape, pad_token_id=PAD, eos_token_id=END, bos_token_id=None, **more)

    def build(self, kind: type, dtype: torch.dtype, **more: Any) -> Any:
        """Random weights, made on the device."""
        torch.manual_seed(0)
        with torch.device(self.device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                return kind(self.config(**more)).eval()
            finally:
                torch.set_default_dtype(before)

    def fitting_layers(self) -> int:
        """Layers whose weights, gradients and AdamW in fp32, and a copy in bf16, a card should hold beside the rest."""
        if self.device == "cpu":
            return self.shape["num_hidden_layers"]
        free_memory()  # of the parts before
        return max(1, int((0.9 * available_memory(torch.device(self.device)) - 10e9) / 4.2e9))

    def examples(self, count: int) -> list[Example]:
        """Random tokens: prompts and answers of mixed lengths."""
        prompts, answers = (self.rng.integers(*bounds, count) for bounds in self.lengths)
        vocabulary = self.shape["vocab_size"]
        return [
            Example(self.rng.integers(2, vocabulary, prompt + answer).tolist(), int(prompt))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """The trainers ask for one; no text is ever encoded."""
    words = {f"t{index}": index for index in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t2"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1", unk_token="t2")


def packed(bench: Bench, model: Any, examples: list[Example], folder: Path) -> SFTTrainer:
    """What `dpa` does: packed rows."""
    settings = FinetuneConfig(max_length=bench.row, packed_rows_per_step=8, save_steps=10**9)
    learner = SFT(settings, SPACES["dpa-v1"], 0)
    return learner.trainer(model, tokenizer_of(bench.shape["vocab_size"]), examples, folder)


def plain(bench: Bench, model: Any, examples: list[Example], folder: Path) -> SFTTrainer:
    """TRL as its documentation starts it: padded batches of eight, activation checkpointing, bf16."""
    cuda = bench.device == "cuda"
    settings = SFTConfig(
        output_dir=str(folder), max_length=None, per_device_train_batch_size=8, num_train_epochs=1, bf16=cuda,
        use_cpu=not cuda, gradient_checkpointing=True, save_strategy="no", disable_tqdm=True, report_to="none",
    )  # fmt: skip
    columns = {"input_ids": [e.ids for e in examples], "labels": [e.labels for e in examples]}
    data = Dataset.from_dict(columns)
    tokenizer = tokenizer_of(bench.shape["vocab_size"])
    return SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)


def finetuning(card: Card, bench: Bench) -> None:
    """Tokens per second, prompts included, padding not; both trainers are given the same examples."""
    mean = sum(sum(bounds) / 2 for bounds in bench.lengths)
    examples = bench.examples(int(bench.steps * 8 * bench.row / mean))
    found: dict[str, Steps] = {}
    flops: dict[str, float] = {}
    bench.shape["num_hidden_layers"] = min(bench.shape["num_hidden_layers"], bench.fitting_layers())
    for name, build in {"dpa": packed, "trl": plain}.items():
        while True:
            model = trainer = None
            gc.collect()
            with contextlib.suppress(torch.OutOfMemoryError, DpaError):  # ours says it in a sentence
                model = bench.build(MistralForCausalLM, torch.float32)
                with tempfile.TemporaryDirectory() as folder, quiet_libraries():
                    trainer = build(bench, model, examples, Path(folder))
                    trainer.remove_callback(PrinterCallback)
                    found[name] = steps_of(trainer)
                break
            bench.shape["num_hidden_layers"] -= 4
            card.say(f"finetuning, {name}: memory ran out; {bench.shape['num_hidden_layers']} layers now")
            if bench.shape["num_hidden_layers"] < 1:
                raise RuntimeError("not one layer fits")
        flops[name] = 6 * multiplied(model) * found[name].speed
        if name == "dpa":
            card.row("7B shape, finetuning", found[name].speed, "tokens/s", layers=bench.shape["num_hidden_layers"],
                     peak_bytes=found[name].peak_bytes, **card.share(flops[name], "matrix"))  # fmt: skip
    # Layers may have gone between the two: what compares is the arithmetic done in a second.
    card.row("7B shape, finetuning", found["dpa"].speed, "tokens/s", found["trl"].speed, "TRL",
             flops=flops, layers=bench.shape["num_hidden_layers"], peak_bytes=found["dpa"].peak_bytes,
             peer_peak_bytes=found["trl"].peak_bytes, **card.share(flops["dpa"], "matrix"))  # fmt: skip


def scoring(card: Card, bench: Bench) -> None:
    """Rows of mixed lengths through a 7B-shaped regressor: this package's batches, and padded ones of eight."""
    model = bench.build(MistralForSequenceClassification, torch.bfloat16, num_labels=ATTRIBUTES)
    parameters = multiplied(model.model)
    rows = [example.ids for example in bench.examples(16 if bench.tiny else 400)]
    tokens = sum(map(len, rows))

    def ours() -> float:
        forward(model, rows, PAD)
        return tokens

    @torch.inference_mode()
    def padded() -> float:
        for start in range(0, len(rows), 8):
            batch = rows[start : start + 8]
            width = max(map(len, batch))
            ids = torch.tensor([row + [PAD] * (width - len(row)) for row in batch], device=bench.device)
            model(input_ids=ids, attention_mask=(ids != PAD).long()).logits.float().cpu()
        return tokens

    forward(model, rows[:8], PAD)
    found = {"dpa": timed(ours)}
    card.row("7B shape, scoring", tokens / found["dpa"].seconds, "tokens/s")
    found["padded"] = timed(padded)
    speed, peer = (tokens / found[name].seconds for name in ("dpa", "padded"))
    card.row("7B shape, scoring", speed, "tokens/s", peer, "padded batches of 8", peak_bytes=found["dpa"].peak_bytes,
             peer_peak_bytes=found["padded"].peak_bytes, **card.share(2 * parameters * speed, "matrix"))  # fmt: skip


def rollout(card: Card, bench: Bench) -> None:
    """Tokens per second of sampling several answers to each prompt: this package's decoder, and plain `generate`."""
    model = bench.build(Endings, torch.float32 if bench.device == "cpu" else torch.bfloat16)
    model.mean_answer = 10.0 if bench.tiny else 200.0
    requests, samples, longest, batch = (4, 2, 20, 8) if bench.tiny else (32, 8, 256, 256)
    bounds = bench.lengths[0]
    prompts = sorted(
        (
            bench.rng.integers(2, bench.shape["vocab_size"], bench.rng.integers(*bounds)).tolist()
            for _ in range(requests)
        ),
        key=len,
    )
    how = Decoding(temperature=1.0, top_p=1.0, max_new_tokens=longest, end_ids=(END,))
    decoder = Decoder(model)

    def ours() -> float:
        tokens = 0
        for start in range(0, requests, batch // samples):
            asked = prompts[start : start + batch // samples]
            places = [place for place in range(len(asked)) for _ in range(samples)]
            seeds = [start * samples + row for row in range(len(places))]
            tokens += sum(map(len, decode(decoder, asked, places, seeds, [longest] * len(places), how)))
        return tokens

    @torch.inference_mode()
    def generate() -> float:
        tokens = 0
        for start in range(0, requests, batch // samples):
            asked = prompts[start : start + batch // samples]
            width = max(map(len, asked))
            ids = torch.tensor([[PAD] * (width - len(ids)) + ids for ids in asked], device=bench.device)
            output = model.generate(
                ids, attention_mask=(ids != PAD).long(), do_sample=True, top_k=0, max_new_tokens=longest,
                num_return_sequences=samples, pad_token_id=PAD,
            )  # fmt: skip
            tokens += int((output[:, width:] != PAD).sum())
        return tokens

    found = {"dpa": timed(ours)}
    card.row("7B shape, rollout", found["dpa"].result / found["dpa"].seconds, "tokens/s")
    found["generate"] = timed(generate)
    speed, peer = (found[name].result / found[name].seconds for name in ("dpa", "generate"))
    card.row("7B shape, rollout", speed, "tokens/s", peer, "generate", peak_bytes=found["dpa"].peak_bytes,
             peer_peak_bytes=found["generate"].peak_bytes)  # fmt: skip


def seven_b(card: Card) -> None:
    """The three, scoring first: it leaves the card emptiest."""
    bench = Bench(card.tiny)
    for part in (scoring, rollout, finetuning):
        part(card, bench)
