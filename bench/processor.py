"""A real policy on a processor, in fp32 and in bf16: training steps, one and two rows a pass, eager and compiled; then
sampling. Tokens a second, and how many times those of fp32, in one run.

    python bench/processor.py --policy models/smollm2-135m-instruct --prompts runs/fairytaleqa-data/prompts.jsonl

Each way of training takes the same steps of four packed rows of 1,024 tokens: questions of `--prompts`, each followed
by 5 to 50 random tokens as its response. The first two steps, in which layers are compiled, do not count. Sampling:
four answers of at most 48 tokens to each of 32 questions; its tokens are those read and those written.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback

from dpa.core.presets import SPACES
from dpa.core.records import SampleRequest
from dpa.core.sections.training import FinetuneConfig
from dpa.models.policy import load_policy
from dpa.models.quiet import quiet_libraries
from dpa.sampling.samplers import SamplerSpec
from dpa.training.packing import Example
from dpa.training.sft import SFT

ROW, ROWS, WARM = 1024, 4, 2
SPACE = SPACES["dpa-v1"]
TRAININGS: dict[str, dict[str, Any]] = {
    "fp32": {"bf16": False},
    "fp32, compiled": {"bf16": False, "compile": True},
    "bf16, a row a pass": {"bf16": True, "rows_per_device": 1},
    "bf16": {"bf16": True},
    "bf16, a row a pass, compiled": {"bf16": True, "rows_per_device": 1, "compile": True},
    "bf16, compiled": {"bf16": True, "compile": True},
}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with `prompt`")
    parser.add_argument("--steps", type=int, default=6, help="that count, of each way of training")
    parser.add_argument("--questions", type=int, default=32, help="answered four times each")
    parser.add_argument("--only", nargs="+", choices=list(TRAININGS), help="these ways of training, no sampling")
    args = parser.parse_args()
    questions = [json.loads(line)["prompt"] for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    names = args.only or TRAININGS
    table("training", ((name, training(args.policy, questions, args.steps, **TRAININGS[name])) for name in names))
    if args.only:
        return
    ways = {"fp32": False, "bf16": True}
    table("sampling", ((name, sampling(args.policy, questions[: args.questions], bf16)) for name, bf16 in ways.items()))


def table(title: str, speeds: Iterator[tuple[str, float]]) -> None:
    """Rows of a name, tokens a second and the ratio to the first."""
    first = 0.0
    for name, speed in speeds:
        first = first or speed
        print(f"{title}: {name:30s} {speed:6.0f} tokens/s  {speed / first:.2f}", flush=True)


def training(policy: str, questions: list[str], steps: int, **how: Any) -> float:
    """Tokens a second of the steps after the first."""
    config = FinetuneConfig(max_length=ROW, packed_rows_per_step=ROWS, save_steps=10**9, **how)
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        model, tokenizer = load_policy(policy)
        examples = list(examples_of(tokenizer, questions, (steps + WARM) * ROWS * ROW))
        trainer: Any = SFT(config, SPACE, 0).trainer(model, tokenizer, examples, Path(folder))
        trainer.remove_callback(PrinterCallback)
        trainer.args.max_steps = steps + WARM
        clock = Clock(trainer.training_step)
        trainer.training_step = clock
        trainer.train()
    return clock.tokens / clock.seconds


def examples_of(tokenizer: Any, questions: list[str], tokens: int) -> Iterator[Example]:
    """Of at least so many tokens together."""
    rng = np.random.default_rng(0)
    for question in questions:
        prompt = tokenizer(question)["input_ids"]
        response = rng.integers(1000, 40_000, rng.integers(5, 51)).tolist()
        yield Example([*prompt, *response], len(prompt))
        tokens -= len(prompt) + len(response)
        if tokens < -ROW:
            return


class Clock:
    """Times a trainer's steps and counts their tokens, but for the first WARM."""

    def __init__(self, step: Any) -> None:
        self.step, self.done, self.tokens, self.seconds = step, 0, 0, 0.0

    def __call__(self, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """One step."""
        begun = time.perf_counter()
        loss: torch.Tensor = self.step(model, inputs, *args)
        self.done += 1
        if self.done > WARM:
            self.seconds += time.perf_counter() - begun
            self.tokens += sum(row.ids_T.numel() for row in inputs["rows"].rows)
        return loss


def sampling(policy: str, questions: list[str], bf16: bool) -> float:
    """Tokens a second, of prompts and of answers."""
    with quiet_libraries():
        sampler = SamplerSpec(policy, SPACE, 48, bf16=bf16).build()
        requests = [
            SampleRequest([{"role": "user", "content": question}], None, tuple(range(4 * place, 4 * place + 4)))
            for place, question in enumerate(questions)
        ]
        sampler.sample(requests[:1])
        begun = time.perf_counter()
        answers = sampler.sample(requests)
        took = time.perf_counter() - begun
    read = sum(len(sampler.prompting.encode(request.messages, None, None)) for request in requests)
    return (read + sum(answer.tokens for found in answers for answer in found)) / took


if __name__ == "__main__":
    main()
