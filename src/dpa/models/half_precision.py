"""Where products are computed in bf16.
Run its tests: pytest tests/test_finetuning.py
"""

from typing import Literal

import torch


def computes_in_bf16(asked: bool | Literal["auto"], device: str | None = None) -> bool:
    """Whether products are computed in bf16: where it is asked for, and on a card that supports it. `auto` asks for it
    on a processor with units for it. `device`: default the card where there is one."""
    if torch.cuda.is_available() if device is None else device.startswith("cuda"):
        return asked is True or card_has_bf16()
    return processor_has_bf16() if asked == "auto" else asked


def card_has_bf16() -> bool:
    """Whether the card multiplies bf16 (Ampere and later). One before it emulates it, slower than fp32, and torch calls
    that supported too."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def processor_has_bf16() -> bool:
    """Whether the processor multiplies bf16 (AVX-512 BF16 or AMX); one that does not emulates it, many times slower."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
