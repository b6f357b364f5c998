"""A 7B-shaped model on one H200-class card: finetuning, scoring and rollout, against plain TRL and plain `generate`.

    python bench/h200.py --out h200.json            one card of 141 GB, about ten minutes
    python bench/h200.py --tiny --out tiny.json     the same code on a CPU in seconds: no figure of use, tests run it

Random weights in Mistral-7B's shape, so nothing is downloaded. Everything is measured in one run, each pair in turn:
the bf16 matrix rate of the card; tokens per second of finetuning (packed rows, AdamW, fp32 weights with bf16 autocast,
activation checkpointing; recomputation is not counted as useful work) and of scoring as shares of it; tokens per second
of rollout; peak memory. Bars: finetuning >= 0.40 of the matrix rate, scoring >= 0.50. Where fp32 AdamW does not fit the
card, layers are taken off until it does, and the figures say how many were left.

NOT RUN on a card yet: none was lent when it was written.
"""

import argparse
import functools
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
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

from dpa.core.config import FinetuneConfig
from dpa.models.decoding import Decoding, decode
from dpa.models.finetuning import Example, build_trainer
from dpa.models.policy import default_device
from dpa.models.quiet import quiet_libraries
from dpa.models.reward_model import forward
from dpa.recipes.estimate import matrix_rate
from dpa.storage.memory import peak_memory

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
        self.row, self.steps = (128, 2) if tiny else (2048, 6)
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

    def examples(self, count: int) -> list[Example]:
        """Random tokens: prompts and answers of mixed lengths."""
        prompts, answers = (self.rng.integers(*bounds, count) for bounds in self.lengths)
        vocabulary = self.shape["vocab_size"]
        return [
            Example(self.rng.integers(2, vocabulary, prompt + answer).tolist(), int(prompt))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def timed(self, work: Callable[[], float]) -> tuple[float, int]:
        """(amount per second, peak bytes) of `work`, which returns the amount."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        begun = time.perf_counter()
        amount = work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        return amount / seconds, torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_memory()


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """The trainers ask for one; no text is ever encoded."""
    words = {f"t{index}": index for index in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t2"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1", unk_token="t2")


def packed(bench: Bench, model: Any, examples: list[Example], folder: Path) -> SFTTrainer:
    """What `dpa` does: packed rows."""
    settings = FinetuneConfig(max_length=bench.row, packed_rows_per_step=8, rows_per_device=1, save_steps=10**9)
    return build_trainer(model, tokenizer_of(bench.shape["vocab_size"]), examples, folder, settings, seed=0)


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


def finetuning(bench: Bench, rate: float) -> dict[str, Any]:
    """Tokens per second, prompts included, padding not; both trainers read the same examples once."""
    found: dict[str, Any] = {}
    mean = sum(sum(bounds) / 2 for bounds in bench.lengths)
    examples = bench.examples(int(bench.steps * 8 * bench.row / mean))
    tokens = sum(len(example.ids) for example in examples)
    for name, build in {"dpa": packed, "trl": plain}.items():
        while True:
            try:
                model = bench.build(MistralForCausalLM, torch.float32)
                with tempfile.TemporaryDirectory() as folder, quiet_libraries():
                    trainer = build(bench, model, examples, Path(folder))
                    trainer.remove_callback(PrinterCallback)
                    speed, memory = bench.timed(lambda trainer=trainer: float(bool(trainer.train())) * tokens)
                break
            except torch.OutOfMemoryError:
                model = trainer = None
                gc.collect()
                torch.cuda.empty_cache()
                bench.shape["num_hidden_layers"] -= 4
        parameters = sum(parameter.numel() for parameter in model.parameters())
        share = speed * 6 * parameters / rate
        found[name] = {"tokens_per_s": speed, "share_of_matrix_rate": share, "peak_bytes": memory}
        found[name] |= {"parameters": parameters, "layers": bench.shape["num_hidden_layers"], "tokens": tokens}
        model = trainer = None
    return found


def scoring(bench: Bench, rate: float) -> dict[str, Any]:
    """Rows of mixed lengths through a 7B-shaped regressor: this package's batches, and padded ones of eight."""
    model = bench.build(MistralForSequenceClassification, torch.bfloat16, num_labels=ATTRIBUTES)
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    rows = [example.ids for example in bench.examples(16 if bench.tiny else 512)]
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

    found = {}
    for name, work in {"dpa": ours, "padded": padded}.items():
        work()
        speed, memory = bench.timed(work)
        share = speed * 2 * parameters / rate
        found[name] = {"tokens_per_s": speed, "share_of_matrix_rate": share, "peak_bytes": memory}
    return found


def rollout(bench: Bench) -> dict[str, Any]:
    """Tokens per second of sampling several answers to each prompt: this package's decoder, and plain `generate`."""
    model = bench.build(Endings, torch.float32 if bench.device == "cpu" else torch.bfloat16)
    model.mean_answer = 10.0 if bench.tiny else 200.0
    requests, samples, longest, batch = (4, 2, 20, 8) if bench.tiny else (64, 8, 512, 256)
    bounds = bench.lengths[0]
    prompts = sorted(
        (
            bench.rng.integers(2, bench.shape["vocab_size"], bench.rng.integers(*bounds)).tolist()
            for _ in range(requests)
        ),
        key=len,
    )
    how = Decoding(temperature=1.0, top_p=1.0, max_new_tokens=longest, end_ids=(END,), pad_id=PAD)

    def ours() -> float:
        tokens = 0
        for start in range(0, requests, batch // samples):
            asked = prompts[start : start + batch // samples]
            places = [place for place in range(len(asked)) for _ in range(samples)]
            seeds = [start * samples + row for row in range(len(places))]
            tokens += sum(map(len, decode(model, asked, places, seeds, [longest] * len(places), how)))
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

    found = {}
    for name, work in {"dpa": ours, "generate": generate}.items():
        speed, memory = bench.timed(work)
        found[name] = {"tokens_per_s": speed, "peak_bytes": memory}
    return found


def main() -> None:
    """Measure all, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("h200.json"))
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    bench = Bench(args.tiny)
    if not args.tiny and bench.device == "cpu":
        parser.error("no card here; --tiny runs the same code on a CPU")
    rate = matrix_rate(0.1 if args.tiny else 3.0)
    found = {
        "device": torch.cuda.get_device_name() if bench.device == "cuda" else "cpu",
        "tiny": args.tiny,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        "matrix_flops": rate,
        "scoring": scoring(bench, rate),
        "rollout": rollout(bench),
        "finetuning": finetuning(bench, rate),
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['device']}: {rate / 1e12:.2f} TFLOP/s of matrix products")
    for part in ("finetuning", "scoring", "rollout"):
        for name, figures in found[part].items():
            share = f"{figures['share_of_matrix_rate']:6.1%} of it" if "share_of_matrix_rate" in figures else ""
            memory = figures["peak_bytes"] / 1e9
            print(f"{part:11s} {name:9s} {figures['tokens_per_s']:9.0f} tokens/s {share:13s} {memory:6.1f} GB")


if __name__ == "__main__":
    main()
