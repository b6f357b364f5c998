"""Reading prompts on a processor: packed, what they begin with once, against a padded batch; seconds, in one run.

    python bench/reading.py [--layers 4] [--repeats 3] [--threads 1]

Random weights of SmolLM2-135M's shape (which has 30 layers), fp32. `alike`: 8 questions of 255 tokens, each under 9
endings of 22 to 28 tokens. `apart`: 72 prompts of 150 to 350 tokens, longest first, that share nothing; the decoder
reads these padded, `packed` is what packing them would take. Ways take turns, medians count.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpa.models.shared_prefixes import families, tokens_read
from dpa.sampling.decoding import Decoder
from dpa.sampling.packed_prompts import read_packed

VOCABULARY = 49_152
Prompts = list[list[int]]


def build_model(layers: int) -> LlamaForCausalLM:
    """SmolLM2-135M's shape in so many layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def prompt_sets() -> dict[str, Prompts]:
    """`alike` and `apart`."""
    rng = np.random.default_rng(0)

    def ids(least: int, most: int) -> list[int]:
        return rng.integers(5, VOCABULARY, rng.integers(least, most + 1)).tolist()

    questions = [ids(255, 255) for _ in range(8)]
    alike = [question + ids(22, 28) for question in questions for _ in range(9)]
    return {"alike": alike, "apart": sorted((ids(150, 350) for _ in range(72)), key=len, reverse=True)}


@torch.inference_mode()
def read(decoder: Decoder, prompts: Prompts, packed: bool) -> float:
    """Seconds to read the prompts, as many at a time as the decoder would."""
    begun, budget = time.perf_counter(), decoder._cache.prefill_tokens
    if not packed:
        at_once = budget // max(map(len, prompts))
        for start in range(0, len(prompts), at_once):
            decoder._read_padded(prompts[start : start + at_once])
        return time.perf_counter() - begun
    part: Prompts = []
    for family in families(prompts, budget):
        members = [prompts[place] for place in family.places]
        if part and tokens_read([*part, *members], families([*part, *members], budget)) > budget:
            read_packed(decoder._forward, part, families(part, budget))
            part = []
        part += members
    read_packed(decoder._forward, part, families(part, budget))
    return time.perf_counter() - begun


def main() -> None:
    """A line for each set of prompts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    decoder = Decoder(build_model(args.layers))
    for name, prompts in prompt_sets().items():
        for packed in (False, True):
            read(decoder, prompts[:9], packed)
        pairs = [[read(decoder, prompts, packed) for packed in (False, True)] for _ in range(args.repeats)]
        padded, packed_s = map(statistics.median, zip(*pairs, strict=True))
        alone, once = sum(map(len, prompts)), tokens_read(prompts, families(prompts))
        print(
            f"{name}: {alone:6,d} tokens, {once:6,d} packed; padded {padded:6.2f} s, packed {packed_s:6.2f} s, "
            f"{padded / packed_s:.2f} times as fast ({', '.join(f'{a / b:.2f}' for a, b in pairs)})",
            flush=True,
        )


if __name__ == "__main__":
    main()
