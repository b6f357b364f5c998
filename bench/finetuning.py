"""Finetuning: packed rows against plain padded batches, share of padding and tokens per second, in one run.

    python bench/finetuning.py [--examples 600] [--threads 1]

A random Llama of 0.8 million parameters (width 128, 4 layers, 600 tokens); prompts of 70 to 90 tokens, responses of 10
to 60. Both go through TRL's SFTTrainer, read the same examples once and take about the same number of them per step.
Speed counts real tokens only, prompts included; each is timed twice in turn, and the better counts.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from rollout import PAD, VOCABULARY, build_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig, SFTTrainer

from dpa.core.presets import SPACES
from dpa.core.sections.training import FinetuneConfig
from dpa.models.quiet import quiet_libraries
from dpa.training.packing import Example
from dpa.training.sft import SFT

ROW = 256


def make_examples(count: int) -> list[Example]:
    """Random tokens of the lengths above."""
    rng = np.random.default_rng(0)
    prompts, responses = rng.integers(70, 91, count), rng.integers(10, 61, count)
    return [
        Example(rng.integers(5, VOCABULARY, prompt + response).tolist(), int(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The trainers ask for one; no text is ever encoded."""
    vocabulary = {f"t{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t2"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=f"t{PAD}", eos_token="t1", unk_token="t2")


def padded_trainer(examples: list[Example], folder: Path) -> SFTTrainer:
    """Batches of eight shuffled examples, padded to the longest; 4 batches in a step."""
    config = SFTConfig(
        output_dir=str(folder),
        max_length=None,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
        num_train_epochs=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    columns = {"input_ids": [e.ids for e in examples], "labels": [e.labels for e in examples]}
    return SFTTrainer(
        build_model(), config, train_dataset=Dataset.from_dict(columns), processing_class=build_tokenizer()
    )


def packed_trainer(examples: list[Example], folder: Path) -> SFTTrainer:
    """One packed row a pass, 16 in a step: what `dpa` does."""
    config = FinetuneConfig(learning_rate=1e-3, max_length=ROW, packed_rows_per_step=16, save_steps=10**9)
    return SFT(config, SPACES["dpa-v1"], 0).trainer(build_model(), build_tokenizer(), examples, folder)


def main() -> None:
    """Time both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    examples = make_examples(args.examples)
    tokens = sum(len(example.ids) for example in examples)
    builders, speeds, padding = {"padded": padded_trainer, "packed": packed_trainer}, {}, {}
    for name in [*builders] * 2:
        with tempfile.TemporaryDirectory() as folder, quiet_libraries():
            trainer = builders[name](examples, Path(folder))
            trainer.remove_callback(PrinterCallback)
            batches = list(trainer.get_train_dataloader())
            read = sum(batch["input_ids"].numel() for batch in batches) if name == "padded" else tokens
            padding[name] = 1 - tokens / read
            begun = time.perf_counter()
            trainer.train()
            speeds[name] = max(speeds.get(name, 0.0), tokens / (time.perf_counter() - begun))
    for name in builders:
        print(f"{name:8s} padding {padding[name]:6.1%}   {speeds[name]:8.0f} tokens/s   ({tokens} tokens)")
    print(f"ratio    {speeds['packed'] / speeds['padded']:.2f}")


if __name__ == "__main__":
    main()
