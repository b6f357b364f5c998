"""Memory: what a training, a rollout and a scoring need of one device at the least, and what to change where it is not
there. The arithmetic of a pass is models/memory.py's.
Run its tests: pytest tests/test_estimate.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa.core.errors import ConfigError
from dpa.core.sections.cluster import ClusterConfig
from dpa.core.sections.rollout import RolloutConfig
from dpa.core.sections.training import AdapterConfig
from dpa.core.yaml_text import parse_yaml
from dpa.models.memory import TrainingMemory
from dpa.recipes.costs.devices import Device
from dpa.recipes.costs.model_sizes import Size
from dpa.sampling.samplers import PROCESSOR_ROWS
from dpa.training.passes import PASS_TOKENS

LOGIT_BYTES = 10
"""Bytes a logit takes where TRL's trainers make all of a pass: in bf16, in fp32, and its gradient."""
VLLM_ROWS = 256
"""Sequences vLLM decodes together (`max_num_seqs`), where rollout.engine.vllm.arguments does not say otherwise."""
SHARED_OUT = ("FSDP", "DEEPSPEED")


@dataclass(frozen=True)
class TrainingNeed:
    """`memory`: the least bytes of one device; `units` fit into a pass, whose activations may be computed twice
    (`recompute`). `misfit`: what to change where the least does not fit; empty where it does."""

    memory: float
    units: int
    recompute: bool
    misfit: str


def training_need(
    size: Size,
    device: Device,
    section: str,
    *,
    longest: float,
    most: float,
    mixed: bool,
    lora: AdapterConfig | None = None,
    optimizer: str = "adamw",
    checkpointing: bool | None = None,
    references: int = 0,
    logits: bool = False,
    shards: int = 1,
    sampled: float = 0,
) -> TrainingNeed:
    """Of a training whose passes hold at most `most` units of `longest` tokens. `references`: models held beside it in
    fp32; `logits`: all of a pass are made at once; `shards`: devices that share weights and optimizer; `sampled`: bytes
    of keys and values where it samples between its passes."""
    trained = size.adapters(lora.rank) if lora else size.parameters
    frozen = size.parameters if lora else 0.0
    weights = 4 * trained + (2 if mixed else 4) * frozen + 4 * references * size.parameters
    memory = TrainingMemory.of_widths(size, trained, trained if mixed else 0, mixed)
    fixed = memory.fixed - (4 * size.body if optimizer == "muon" and not lora else 0)
    held = (weights + fixed) / shards
    each = LOGIT_BYTES * size.vocab_size if logits else 0
    room = (0.9 if device.card else 0.8) * device.memory - held
    for twice in (False, True) if checkpointing is None else (checkpointing,):
        units = int(max(0.0, room) // (longest * (each + (memory.recomputed if twice else memory.kept))))
        if units:
            break
    least = held + max(sampled, longest * (each + (memory.recomputed if twice else memory.kept)))
    misfit = ""
    if least > device.memory:
        fewer = "" if lora else f"train {section.removesuffix('.train')} with {section}.lora"
        if section == "reward.train" and not lora:
            fewer = "take reward.train.method: lora"
        spread = "shard it over more cards (cluster.accelerate: recipes/accelerate/fsdp2.yaml, --devices)"
        shorter = f"lower {section}.max_length" if lora or held < device.memory else ""
        misfit = ", or ".join(filter(None, (fewer, shorter, "" if section == "reward.train" else spread)))
    limit = max(1.0, min(most, PASS_TOKENS // longest)) if device.card else most
    return TrainingNeed(least, max(1, min(units, int(limit))), twice, misfit)


@dataclass(frozen=True)
class RolloutNeed:
    """Of sampling: bytes of one device with the rows that are decoded `together`, by how many `copies` of the policy:
    those of an engine that is `continuous` share each shard and fill free places at once, others take whole shards."""

    memory: float
    together: float
    copies: float
    continuous: bool
    misfit: str


def rollout_need(
    size: Size, device: Device, config: RolloutConfig, prompt: float, shard: float, cards: int, ray_workers: int = 0
) -> RolloutNeed:
    """Of `shard` answers to prompts of `prompt` tokens, as the configured engine would sample them."""
    engine, wide = config.engine, 2 if device.in_bf16(config.bf16) else 4
    kind = engine.kind if engine.kind != "auto" or not device.card or ray_workers else "vllm"
    ways = engine.vllm.tensor_parallel if kind == "vllm" else 1
    weights = wide * size.parameters / ways
    longest = prompt + config.max_new_tokens
    row = longest * size.cache_bytes * wide / ways + 16 * size.vocab_size
    room = (engine.vllm.memory if kind == "vllm" else 0.8) * device.memory - weights
    fitting = max(1.0, room // row)
    if kind == "vllm":
        asked = engine.vllm.arguments.get("max_num_seqs", VLLM_ROWS)
        together = min(asked if isinstance(asked, int) else VLLM_ROWS, fitting)
    elif kind == "http":
        together = min(VLLM_ROWS, engine.http.in_flight * config.samples, fitting)
    elif config.batch_size == "auto":
        together = min(fitting, fitting if device.card else PROCESSOR_ROWS)
    else:
        together = min(config.batch_size, fitting)
    copies = {"http": len(engine.http.servers) or engine.http.replicas, "vllm": 0.8 * ways + 0.2}.get(kind, 1.0)
    if kind in ("transformers", "auto"):
        copies = ray_workers or (min(config.workers, cards) if device.card else 1)
    misfit = ""
    if weights + row > device.memory:
        misfit = "take a smaller policy, rollout.engine.vllm.tensor_parallel, or lower rollout.max_new_tokens"
    rows = min(together, shard / copies if kind == "http" else shard)  # a shard's requests go to all servers
    return RolloutNeed(weights + rows * row, max(1.0, rows), copies, kind in ("vllm", "http"), misfit)


def shards_of(cluster: ClusterConfig, cards: int) -> int:
    """Devices that share the weights of a training: all where cluster.accelerate shards them, else each has all."""
    if cluster.accelerate is None:
        return 1
    try:
        text = Path(cluster.accelerate).read_text(encoding="utf-8")
        about: Any = parse_yaml(text, f"cluster.accelerate: {cluster.accelerate}")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"cluster.accelerate: no file at {cluster.accelerate}; see recipes/accelerate/.") from None
    kind = str(about.get("distributed_type", "")).upper() if isinstance(about, dict) else ""
    return cards if kind in SHARED_OUT else 1
