"""A step of Muon on a processor: torch's own in bf16 against ours in fp32, alternately, on the weights of a model.

python bench/optimizers.py [--policy DIR]      (default: the shapes of the demo's start policy)
"""

import argparse
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from dpa.training.optimizers import MuonInFloat32

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--policy", help="a model's folder; only its shapes are read")
parser.add_argument("--rounds", type=int, default=5)
arguments = parser.parse_args()
demo = LlamaConfig(hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4, vocab_size=512)
config = AutoConfig.from_pretrained(arguments.policy) if arguments.policy else demo
seconds: dict[str, list[float]] = {"torch.optim.Muon (bf16)": [], "MuonInFloat32": []}
optimizers = []
for kind in (torch.optim.Muon, MuonInFloat32):
    layers = AutoModelForCausalLM.from_config(config).model.layers
    weights = [weight for weight in layers.parameters() if weight.ndim == 2]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizers.append(kind(weights, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
for turn in range(arguments.rounds + 1):
    for name, optimizer in zip(seconds, optimizers, strict=True):
        begun = time.perf_counter()
        optimizer.step()
        if turn:  # the first warms up
            seconds[name].append(time.perf_counter() - begun)
for name, each in seconds.items():
    print(
        f"{name}: {statistics.median(each) * 1e3:.1f} ms a step (from {min(each) * 1e3:.1f} to {max(each) * 1e3:.1f})"
    )
old, new = seconds.values()
print(f"ratio {statistics.median(old) / statistics.median(new):.1f}")
