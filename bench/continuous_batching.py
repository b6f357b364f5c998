"""Rollout speed: transformers' continuous batching (`generate_batch`) against this package's token loop, in one run.

    python bench/continuous_batching.py [--requests 64] [--samples 4] [--threads 1]

The model and the prompts are those of bench/rollout.py; an answer may end at any token, since continuous batching packs
all rows into one and keeps no position by which bench/rollout.py holds the end token back.

transformers 5.24, torch 2.13, one thread of a two-core machine that was not quiet, 64 requests x 4 samples, two rounds:
continuous batching 226 and 198 tokens/s (its own batch size), 506 and 180 (256 tokens); the sampler 3,673 and 1,288.
Best against best 7.3 times, and within a round 7.3 and 6.5: not adopted on a CPU.
"""

import argparse
import time

import numpy as np
import torch
from rollout import END, PAD, VOCABULARY, build_model, with_sampler
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM
from transformers.utils import logging


class EndsByChance(LlamaForCausalLM):
    """A random Llama whose end token has a probability of about 1 in 40 at every position."""

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        output.logits[..., END] = output.logits.logsumexp(-1) - np.log(40)
        output.logits[..., PAD] = -1e9
        return output


def with_continuous_batching(
    model, prompts: list[list[int]], samples: int, longest: int, batch_size: int | None
) -> int:
    """Tokens generated, end tokens included."""
    how = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=longest,
        eos_token_id=END,
        pad_token_id=PAD,
        num_return_sequences=samples,
    )
    answers = model.generate_batch(prompts, how, ContinuousBatchingConfig(max_batch_tokens=batch_size))
    assert len(answers) == len(prompts) * samples
    return sum(len(answer.generated_tokens) for answer in answers.values())


def main() -> None:
    """Time both, in turn, the better of two counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    model, rng = EndsByChance(build_model().config).eval(), np.random.default_rng(0)
    prompts = sorted(
        (rng.integers(5, VOCABULARY, rng.integers(70, 91)).tolist() for _ in range(args.requests)), key=len
    )
    ways = {
        "continuous, its own batch size": lambda: with_continuous_batching(model, prompts, args.samples, 60, None),
        "continuous, our batch size": lambda: with_continuous_batching(
            model, prompts, args.samples, 60, args.batch_size
        ),
        "sampler": lambda: with_sampler(model, prompts, args.samples, 60, args.batch_size),
    }
    best = dict.fromkeys(ways, 0.0)
    for _ in range(2):
        for name, run in ways.items():
            begun = time.perf_counter()
            tokens = run()
            speed = tokens / (time.perf_counter() - begun)
            best[name] = max(best[name], speed)
            print(f"{name:31s} {tokens:6d} tokens  {speed:8.0f} tokens/s")
    fastest = max(speed for name, speed in best.items() if name != "sampler")
    print(f"ratio, the sampler to the faster of the other two: {best['sampler'] / fastest:.2f}")


if __name__ == "__main__":
    main()
