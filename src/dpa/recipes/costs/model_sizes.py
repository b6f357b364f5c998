"""How large a model is: read from its files, or known by its name.
Run its tests: pytest tests/test_estimate.py

Shapes of the table are those of the models' config.json on the Hub; their parameters follow from them (`counted`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpa.core.errors import ConfigError, ModelFileError
from dpa.models.files import GGUF_SUFFIX, check_safetensors

MOST_OF_A_WIDTH = 10**9
"""A larger one in a config.json is not believed."""


@dataclass(frozen=True)
class Size:
    """A decoder with gated layers; widths are named as in config.json. `source`: how it is known."""

    parameters: float
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    source: str

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token: numbers, of two bytes each on a card."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    @property
    def head(self) -> float:
        """Weights that make logits."""
        return self.vocab_size * self.hidden_size

    @property
    def body(self) -> float:
        """Weights that multiply every token: all but embeddings and head."""
        return max(0.0, self.parameters - self.head * (1 if self.tied else 2))

    def adapters(self, rank: int) -> float:
        """Weights of low-rank adapters on every linear layer but the head."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        ends = 2 * (self.hidden_size + queries) + 2 * (self.hidden_size + keys)
        return rank * self.num_hidden_layers * (ends + 3 * (self.hidden_size + self.intermediate_size))


def _shape(layers: int, hidden: int, inner: int, heads: int, groups: int, width: int, vocab: int, tied: bool) -> Size:
    return counted(Size(0, layers, hidden, inner, heads, groups, width, vocab, tied, "known by its name"))


def counted(size: Size) -> Size:
    """The same with the parameters that its shape has: matrices and norms; biases, a ten-thousandth, are left out."""
    queries, keys = size.num_attention_heads * size.head_dim, size.num_key_value_heads * size.head_dim
    layer = size.hidden_size * (2 * queries + 2 * keys + 3 * size.intermediate_size + 2)
    embeddings = size.head * (1 if size.tied else 2)
    return replace(size, parameters=size.num_hidden_layers * layer + embeddings + size.hidden_size)


MISTRAL_7B = _shape(32, 4096, 14336, 32, 8, 128, 32_000, False)
LLAMA_3_8B = _shape(32, 4096, 14336, 32, 8, 128, 128_256, False)
LLAMA_3_70B = _shape(80, 8192, 28672, 64, 8, 128, 128_256, False)

KNOWN = {
    "smollm2-135m": _shape(30, 576, 1536, 9, 3, 64, 49_152, True),
    "smollm2-360m": _shape(32, 960, 2560, 15, 5, 64, 49_152, True),
    "smollm2-1.7b": _shape(24, 2048, 8192, 32, 32, 64, 49_152, True),
    "qwen2.5-0.5b": _shape(24, 896, 4864, 14, 2, 64, 151_936, True),
    "qwen2.5-1.5b": _shape(28, 1536, 8960, 12, 2, 128, 151_936, True),
    "qwen2.5-3b": _shape(36, 2048, 11008, 16, 2, 128, 151_936, True),
    "qwen2.5-7b": _shape(28, 3584, 18944, 28, 4, 128, 152_064, False),
    "qwen2.5-14b": _shape(48, 5120, 13824, 40, 8, 128, 152_064, False),
    "qwen2.5-32b": _shape(64, 5120, 27648, 40, 8, 128, 152_064, False),
    "qwen2.5-72b": _shape(80, 8192, 29568, 64, 8, 128, 152_064, False),
    "qwen3-0.6b": _shape(28, 1024, 3072, 16, 8, 128, 151_936, True),
    "qwen3-1.7b": _shape(28, 2048, 6144, 16, 8, 128, 151_936, True),
    "qwen3-4b": _shape(36, 2560, 9728, 32, 8, 128, 151_936, True),
    "qwen3-8b": _shape(36, 4096, 12288, 32, 8, 128, 151_936, False),
    "qwen3-14b": _shape(40, 5120, 17408, 40, 8, 128, 151_936, False),
    "qwen3-32b": _shape(64, 5120, 25600, 64, 8, 128, 151_936, False),
    "llama-3.2-1b": _shape(16, 2048, 8192, 32, 8, 64, 128_256, True),
    "llama-3.2-3b": _shape(28, 3072, 8192, 24, 8, 128, 128_256, True),
    **dict.fromkeys(("llama-3-8b", "llama3-8b", "llama-3.1-8b", "llama3-sft", "fsfairx-llama3-rm"), LLAMA_3_8B),
    **dict.fromkeys(("llama-3-70b", "llama-3.1-70b", "llama-3.3-70b"), LLAMA_3_70B),
    "llama-2-7b": _shape(32, 4096, 11008, 32, 32, 128, 32_000, False),
    "llama-2-13b": _shape(40, 5120, 13824, 40, 40, 128, 32_000, False),
    "tinyllama": _shape(22, 2048, 5632, 32, 4, 64, 32_000, False),
    **dict.fromkeys(("mistral-7b", "zephyr-7b", "dpa-v1-mistral-7b", "rewardmodel-mistral-7b"), MISTRAL_7B),
    "gemma-2-2b": _shape(26, 2304, 9216, 8, 4, 256, 256_000, True),
    "gemma-2-9b": _shape(42, 3584, 14336, 16, 8, 256, 256_000, True),
    "gemma-2-27b": _shape(46, 4608, 36864, 32, 16, 128, 256_000, True),
    "gemma-3-270m": _shape(18, 640, 2048, 4, 1, 256, 262_144, True),
    "gemma-3-1b": _shape(26, 1152, 6912, 4, 1, 256, 262_144, True),
    "phi-3-mini": _shape(32, 3072, 8192, 32, 32, 96, 32_064, False),
}
"""Part of a name, in small letters -> size. A finetuned model is usually named after the one it began as."""


def size_of(model: str, parameters: float | None, where: str, fix: str) -> Size:
    """The size of a model folder, or of a model known by its name. Raises ModelFileError, and ConfigError, which says
    `where` and the `fix`.

    Read from config.json and the headers of the weights, or the header of a GGUF file; of a folder without weights the
    parameters are counted from its shape. `parameters`, where given, are believed; the widths are then those of the
    nearest model that is known.
    """
    folder = Path(model)
    about = folder / "config.json"
    named = [size for name, size in KNOWN.items() if name in folder.name.lower()]
    weights = 0.0
    if folder.suffix == GGUF_SUFFIX and folder.is_file():
        from dpa.models.gguf import shape_of  # transformers, which nothing else here takes

        try:
            shape, weights = shape_of(folder)
            size = _read(shape)
        except (ConfigError, ModelFileError):
            if parameters is None and not named:
                raise
            size = None
    else:
        size = _read(_config(about, where)) if about.is_file() else None
        weights = 0.0 if size is None else _weights(folder)
    if size is not None:
        size = replace(size, parameters=weights or size.parameters)
    elif named:
        size = named[-1]
    elif parameters is not None:
        count = parameters
        size = min(KNOWN.values(), key=lambda known: abs(math.log(known.parameters / count)))
    if parameters is not None and size is not None:
        return replace(size, parameters=parameters, source=fix.split()[0] or "given")
    if size is None:
        raise ConfigError(f"{where}: {model} is not on this machine and not known by name; give {fix}.")
    return size


def _config(file: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        return {**config}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{where}: {file} is no model's config.json; mend it, or name another model.") from None


def _read(config: Mapping[str, Any]) -> Size | None:
    """A config.json; None where it does not name its widths, as a model of another kind."""

    def width(name: str, otherwise: int = 0) -> int:
        value = config.get(name)
        return (
            value
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST_OF_A_WIDTH
            else otherwise
        )

    hidden, layers, heads = width("hidden_size"), width("num_hidden_layers"), width("num_attention_heads")
    if not (hidden and layers and heads):
        return None
    shape = (layers, hidden, width("intermediate_size", 4 * hidden), heads, width("num_key_value_heads", heads))
    tied = bool(config.get("tie_word_embeddings", str(config.get("model_type", "")).startswith("gemma")))
    ends = (width("head_dim", max(1, hidden // heads)), width("vocab_size", 32_000), tied)
    return counted(Size(0, *shape, *ends, source="read from its files"))


def _weights(folder: Path) -> float:
    """Numbers in a folder's safetensors, by their headers; 0 where there are none. Raises ModelFileError."""
    files = sorted(folder.glob("*.safetensors"))
    return sum(math.prod(shape) for file in files for shape in check_safetensors(file))
