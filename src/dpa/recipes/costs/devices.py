"""Devices: what their makers publish of one by its name, or what this machine is measured to do in a second or two.
Run its tests: pytest tests/test_estimate.py

Peaks are dense bf16 products with fp32 accumulation (datasheets print twice as much, "with sparsity"), bandwidth that
of the card's own memory, memory in decimal gigabytes as it is sold. Sources, NVIDIA's unless another is named:

    a100-40g, a100-80g   A100 datasheet (SXM): 312 TFLOP/s; 1,555 and 2,039 GB/s
    h100, h100-pcie      H100 datasheet: SXM 989 TFLOP/s, 3.35 TB/s; PCIe 756 TFLOP/s, 2.0 TB/s
    h200                 H200 datasheet (SXM): 989 TFLOP/s, 4.8 TB/s, 141 GB
    b200                 DGX B200 datasheet, an eighth of it: 2,250 TFLOP/s, 8 TB/s, 180 GB
    l4, l40s             datasheets: 121 TFLOP/s, 300 GB/s; 362 TFLOP/s, 864 GB/s
    a10, a40             datasheets: 125 TFLOP/s, 600 GB/s; 149.7 TFLOP/s, 696 GB/s
    a6000                RTX A6000 datasheet (768 GB/s); 154.8 TFLOP/s dense by Microway's comparison of Ampere cards
    6000-ada             RTX 6000 Ada datasheet (960 GB/s); 364 TFLOP/s, a quarter of its 1,457 in fp8 with sparsity
    3090, 4090, 5090     white papers of GA102, AD102 and GB202: 71, 165.2 and 209.5 TFLOP/s; 936, 1,008, 1,792 GB/s
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dpa.core.lookup import look_up
from dpa.models.half_precision import computes_in_bf16
from dpa.models.policy import default_device
from dpa.storage.memory import free_memory_of_machine

REACHED_BY_PRODUCTS, REACHED_BY_COPIES = 0.68, 0.88
"""Shares of its published peak and bandwidth that an H200 reached in large products and copies (bench/README.md)."""


@dataclass(frozen=True)
class Device:
    """One card, or this machine's processor: peak FLOP/s of products, bytes/s and bytes of its memory. `mixed_peak`: of
    a processor the products in bf16, which one without them emulates slowly; of a card `peak` is in bf16."""

    name: str
    peak: float
    bandwidth: float
    memory: float
    card: bool = True
    source: str = "published"
    mixed_peak: float = 0

    def in_bf16(self, asked: bool | Literal["auto"]) -> bool:
        """Whether work is computed in bf16: on a card always, on a processor as it is asked for."""
        return self.card or computes_in_bf16(asked)


def _published(name: str, tera: float, gigabytes_a_second: float, gigabytes: float) -> Device:
    return Device(name, tera * 1e12, gigabytes_a_second * 1e9, gigabytes * 1e9)


DEVICES = {
    device.name: device
    for device in (
        _published("a100-40g", 312, 1555, 40),
        _published("a100-80g", 312, 2039, 80),
        _published("h100", 989, 3350, 80),
        _published("h100-pcie", 756, 2000, 80),
        _published("h200", 989, 4800, 141),
        _published("b200", 2250, 8000, 180),
        _published("l4", 121, 300, 24),
        _published("l40s", 362, 864, 48),
        _published("a10", 125, 600, 24),
        _published("a40", 149.7, 696, 48),
        _published("a6000", 154.8, 768, 48),
        _published("6000-ada", 364, 960, 48),
        _published("3090", 71, 936, 24),
        _published("4090", 165.2, 1008, 24),
        _published("5090", 209.5, 1792, 32),
    )
}


def device_named(name: str) -> Device:
    """The published device of that name; `rtx-4090`, `NVIDIA H200` are read as well. Raises ConfigError."""
    plain = "-".join(
        word for word in name.lower().replace("-", " ").split() if word not in {"nvidia", "rtx", "geforce"}
    )
    return look_up(DEVICES, {"a100": "a100-80g"}.get(plain, plain), "--device")


def this_device(mixed: bool = False) -> Device:
    """The device of this machine, measured. Peak and bandwidth of a card are stated as published ones are, above what
    products and copies reach; of a processor they are what was reached. `mixed`: some work is computed in bf16."""
    if default_device() == "cuda":
        about = torch.cuda.get_device_properties(0)
        peak, bandwidth = matrix_rate() / REACHED_BY_PRODUCTS, copy_rate() / REACHED_BY_COPIES
        return Device(about.name, peak, bandwidth, about.total_memory, source="measured here")
    in_bf16 = matrix_rate(0.2, torch.bfloat16) if mixed else 0.0
    peak, bandwidth = matrix_rate(0.3), copy_rate(0.2)
    return Device("this processor", peak, bandwidth, free_memory_of_machine(), False, "measured here", in_bf16)


def matrix_rate(seconds: float = 0.5, dtype: torch.dtype | None = None) -> float:
    """FLOP/s of square matrix products, as layers make them, on the default device: by itself bf16 on a card, fp32 on a
    CPU."""
    device = default_device()
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    size = 8192 if device == "cuda" else 1024 if dtype == torch.float32 else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 * _times_a_second(lambda: torch.nn.functional.linear(a, a), device, seconds)


def copy_rate(seconds: float = 0.3) -> float:
    """Bytes/s read and written by copies within the memory of the default device."""
    device = default_device()
    size = 2**31 if device == "cuda" else 2**27
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size * _times_a_second(lambda: target.copy_(source), device, seconds)


def _times_a_second(work: Callable[[], Any], device: str, seconds: float) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    work()
    wait()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        work()
        wait()
        count += 1
    return count / (time.perf_counter() - begun)
