"""What memory there is, and what a pass over so many tokens needs: estimates that choose where to begin.
Run its tests: pytest tests/test_memory.py
"""

import gc
from dataclasses import dataclass
from typing import Any

import torch

from dpa.core.errors import ConfigError
from dpa.storage.memory import free_memory_of_machine, give_back_heap

LEAST_TOKENS = 1024
"""Tokens a pass without gradients may always have."""

TILES = 400_000_000
"""Bytes of the tiles that logits are made in (training/label_logprobs.py)."""


def free_memory() -> None:
    """Give back what models nobody holds any more took, on the card too."""
    gc.collect()
    give_back_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_memory_of_machine()


def scoring_tokens(config: Any, dtype: torch.dtype, device: torch.device, most: int) -> int:
    """Tokens of one forward pass without gradients that fit in half of the memory there is, at most `most`."""
    hidden, inner, _ = _widths(config)
    bytes_each = (8 * hidden + 3 * inner) * max(2, dtype.itemsize) + 4 * hidden
    return max(LEAST_TOKENS, min(most, available_memory(device) // 2 // bytes_each))


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes a training takes beside its weights: `fixed` (gradients, AdamW's moments, weights cast for products, tiles
    of logits) and, for each token of a pass, `kept` activations, or `recomputed` ones with gradient checkpointing."""

    fixed: int
    kept: int
    recomputed: int

    @classmethod
    def of(cls, model: Any, mixed: bool, adapters: bool = False) -> "TrainingMemory":
        """For a model of transformers; `mixed`: products in bf16 of fp32 weights; `adapters`: it stays frozen.

        Counted on a Llama, whose backward pass keeps 8 hidden, 4 inner and 2 key-value vectors a token and layer.
        """
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad and not adapters)
        cast = sum(weight.numel() for weight in model.parameters() if weight.dtype == torch.float32) if mixed else 0
        return cls.of_widths(model.config.get_text_config(), trained, cast, mixed)

    @classmethod
    def of_widths(cls, config: Any, trained: float, cast: float, mixed: bool) -> "TrainingMemory":
        """The same of a shape: `config` names the widths as transformers do; `trained` weights have gradients and
        moments, `cast` ones a copy in bf16."""
        hidden, inner, keys = _widths(config)
        layer = round((8 * hidden + 4 * inner + 2 * keys) * (2.75 if mixed else 4))
        layers = config.num_hidden_layers
        return cls(
            fixed=round(12 * trained + 2 * cast + TILES),
            kept=layer * layers + 16 * hidden,
            recomputed=4 * hidden * layers + 2 * layer + 16 * hidden,
        )

    def tokens(self, available: int, recompute: bool) -> int:
        """Tokens of a pass that fit in `available` bytes; 0: none."""
        return max(0, available - self.fixed) // (self.recomputed if recompute else self.kept)


@dataclass(frozen=True)
class Plan:
    """Where a training begins: how many units (rows, pairs) go into a pass, and whether activations are computed
    twice."""

    units: int
    recompute: bool


def plan(
    memory: TrainingMemory, available: int, longest: int, most: int, recompute: bool | None, section: str, sure: bool
) -> Plan:
    """The largest pass that fits, of at most `most` units of `longest` tokens; None: recompute only where one does not.

    `sure`: what the estimate says does not fit is refused (a CPU's process would be killed); else it is tried, unless
    it is twice as large as the memory. Raises ConfigError.
    """
    for twice in (False, True) if recompute is None else (recompute,):
        fitting = memory.tokens(available, twice) // longest
        if fitting:
            return Plan(min(most, fitting), twice)
    twice = recompute is not False
    needed = memory.fixed + longest * (memory.recomputed if twice else memory.kept)
    if needed > (available if sure else 2 * available):
        also = "" if twice else f", let {section}.gradient_checkpointing be true"
        fits = memory.tokens(available, twice)
        shorter = f"lower {section}.max_length to {fits:,}{also}" if fits >= 16 else f"train {section}.lora{also}"
        raise ConfigError(
            f"{section}.max_length: a pass over {longest:,} tokens needs about {_gb(needed)} beside the weights and "
            f"{_gb(available)} of memory are free; {shorter}, or take a larger machine."
        )
    return Plan(1, twice)


def keys_share(model: Any) -> float:
    """What of a token's kept activations its keys and values are: as much more is kept for each time that a sequence
    goes on from it (attention.py), repeated for every head of queries where a kernel needs them so."""
    config = model.config.get_text_config()
    hidden, inner, keys = _widths(config)
    return 2 * hidden / (8 * hidden + 4 * inner + 2 * keys)


def _widths(config: Any) -> tuple[int, int, int]:
    """Hidden, inner and key-value width of a layer."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    width = getattr(config, "head_dim", None) or hidden // heads
    return hidden, inner, width * (getattr(config, "num_key_value_heads", None) or heads)


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
