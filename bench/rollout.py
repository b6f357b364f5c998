"""Rollout speed: this package's sampler against plain `generate`, tokens per second, on one tiny Llama, in one run.

    python bench/rollout.py [--requests 128] [--samples 4] [--threads 1]

The model is random, 0.8 million parameters (width 128, 4 layers, 600 tokens); its end token is nudged so that answers
have 10 to 60 tokens, prompts 70 to 90. `generate` is given its best: sorted prompts, left padding, a cache,
num_return_sequences and the same batch size.
"""

import argparse
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from dpa.sampling.decoding import Decoder, Decoding, decode

END, PAD, VOCABULARY = 1, 0, 600


class EndsByChance(LlamaForCausalLM):
    """A random Llama whose end token has a set probability: 0 before 10 tokens of answer, then about 1 in 25."""

    def forward(self, *args: object, position_ids: torch.Tensor, starts: int = 100, **kwargs: object) -> object:
        output = super().forward(*args, position_ids=position_ids, **kwargs)
        logits = output.logits
        end = logits.logsumexp(-1) - np.log(25)
        logits[..., END] = end.masked_fill(position_ids[:, -1:] < starts, -1e9)
        logits[..., PAD] = -1e9
        return output


def build_model() -> EndsByChance:
    """0.8 million random parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )
    return EndsByChance(config).eval()


@torch.inference_mode()
def with_generate(model: EndsByChance, prompts: list[list[int]], samples: int, longest: int, batch_size: int) -> int:
    """Tokens generated, end tokens included."""
    tokens = 0
    for start in range(0, len(prompts), batch_size // samples):
        batch = prompts[start : start + batch_size // samples]
        width = max(map(len, batch))
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in batch])
        output = model.generate(
            ids,
            attention_mask=(ids != PAD).long(),
            do_sample=True,
            top_k=0,
            max_new_tokens=longest,
            num_return_sequences=samples,
            pad_token_id=PAD,
        )
        tokens += int((output[:, width:] != PAD).sum())
    return tokens


def with_sampler(model: EndsByChance, prompts: list[list[int]], samples: int, longest: int, batch_size: int) -> int:
    """Tokens generated, end tokens included."""
    how = Decoding(temperature=1.0, top_p=1.0, max_new_tokens=longest, end_ids=(END,))
    decoder, tokens = Decoder(model), 0
    for start in range(0, len(prompts), batch_size // samples):
        batch = prompts[start : start + batch_size // samples]
        places = [place for place in range(len(batch)) for _ in range(samples)]
        seeds = [start * samples + row for row in range(len(places))]
        tokens += sum(map(len, decode(decoder, batch, places, seeds, [longest] * len(places), how)))
    return tokens


def main() -> None:
    """Time both, twice each, the better counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    model, rng = build_model(), np.random.default_rng(0)
    prompts = sorted(
        (rng.integers(5, VOCABULARY, rng.integers(70, 91)).tolist() for _ in range(args.requests)), key=len
    )
    speeds = {}
    for name, run in {"generate": with_generate, "sampler": with_sampler}.items():
        run(model, prompts[:8], args.samples, 60, args.batch_size)
        best = 0.0
        for _ in range(2):
            begun = time.perf_counter()
            tokens = run(model, prompts, args.samples, 60, args.batch_size)
            best = max(best, tokens / (time.perf_counter() - begun))
        speeds[name] = best
        print(f"{name:10s} {best:8.0f} tokens/s   ({tokens} tokens, {args.requests} prompts x {args.samples} samples)")
    print(f"ratio      {speeds['sampler'] / speeds['generate']:8.2f}")


if __name__ == "__main__":
    main()
