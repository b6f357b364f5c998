"""A GGUF file as a start policy: dequantised once into a plain Hugging Face folder.
Run its tests: pytest tests/test_gguf.py

transformers turns the tensors and the vocabulary back; what it leaves at a class's default (end tokens, rounded
numbers) is mended from the file's own metadata, and what it cannot express is refused.
"""

import importlib.util
import math
import re
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from dpa.core.errors import ConfigError, ModelFileError
from dpa.models.disk_refusals import disk_refusals
from dpa.models.files import SafeModel
from dpa.models.loading import check_loadable, refusing
from dpa.models.quiet import quiet_libraries
from dpa.storage.tables import save_folder_atomically

try:
    from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
except ImportError:  # before 5.17: one loader, which goes by the architecture's own tokenizer
    GGUF_ARCHS, GGUF_PRE_TOKENIZER_SPLITS = {}, {}

_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r"}
"""`tokenizer.ggml.pre` of models that read each digit by itself, which transformers cuts as GPT-2 does."""

_AS_GPT2 = {
    "gpt-2",
    "phi-2",
    "mpt",
    "olmo",
    "jais",
    "trillion",
    "granite-docling",
    "gigachat",
    "a.x-4.0",
    "mellum",
    "modern-bert",
    "roberta-bpe",
    "jina-es",
    "jina-de",
    "jina-v1-en",
    "jina-v2-es",
    "jina-v2-de",
    "jina-v2-code",
}
"""... and of models that cut text as GPT-2 does (llama.cpp's llama-vocab.cpp), which is what transformers does with
every name that it does not know."""

END_TOKENS = ("eos", "eot", "eom")
"""Keys `tokenizer.ggml.*_token_id` of tokens that end an answer: end of text, of turn, of message."""


def dequantise(file: Path, folder: Path) -> str:
    """Write the model of a GGUF file as a Hugging Face folder; returns what was done, in one line.

    Matrices that were stored in 16 or 32 bits are kept in fp32, quantised ones become bf16. Raises ConfigError without
    the package `gguf`, ModelFileError for a file that transformers cannot read whole.
    """
    # Alone in a folder: of what lies beside a file transformers would take adapters, templates and code.
    with TemporaryDirectory() as alone, _reading(file) as (_, tensors):
        metadata, kinds = _read(file)
        _check_rope(metadata)
        _check_cutting(metadata)
        _check_kernels(metadata["general.architecture"])
        Path(alone, file.name).symlink_to(file.resolve())
        where: dict[str, Any] = {
            "pretrained_model_name_or_path": alone,
            "gguf_file": file.name,
            "trust_remote_code": False,
        }
        loaded: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        model, found = loaded
        if found["missing_keys"]:
            raise ValueError(f"it lacks {', '.join(sorted(found['missing_keys'])[:3])}")
        if left := _without_place(model, metadata["general.architecture"], tensors, found["unexpected_keys"]):
            raise ValueError(
                f"transformers has no place for {len(left)} of its tensors ({left[0]}); take the model's safetensors"
            )
        tokenizer = AutoTokenizer.from_pretrained(**where)
        _mend_tokenizer(tokenizer, metadata)
        model.config = _mended_config(model.config, metadata)
        ends = [metadata[key] for end in END_TOKENS if (key := f"tokenizer.ggml.{end}_token_id") in metadata]
        model.generation_config = GenerationConfig(
            bos_token_id=model.config.bos_token_id,
            eos_token_id=list(dict.fromkeys(ends)) or model.config.eos_token_id,
            pad_token_id=model.config.pad_token_id,
        )
        model.hf_quantizer = None  # nothing is quantised any more
        quantised = sorted(kinds - {"F32", "F16", "F64"})
        dtype = torch.bfloat16 if quantised else torch.float32
        model = model.to(dtype)
    with quiet_libraries(), save_folder_atomically(folder) as unfinished, disk_refusals(folder, "saving the model"):
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        check_loadable(unfinished, AutoModelForCausalLM, f"policy {file}")
    name = "bf16" if quantised else "fp32"
    return f"policy: {file} ({', '.join(quantised) or 'not quantised'}) dequantised to {name}, once, at {folder}"


_SHAPE = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
}
"""Field of a config.json -> key of a GGUF's metadata, behind its architecture's name (ggml's docs/gguf.md)."""


def shape_of(file: Path) -> tuple[dict[str, Any], int]:
    """What a config.json would say of the model's shape, and how many numbers its tensors hold: from the header alone,
    since gguf's own reader takes seconds for a vocabulary. Raises as `dequantise` does."""
    with _reading(file) as (metadata, tensors):
        of = metadata["general.architecture"]
        known = {field: metadata[key] for field, name in _SHAPE.items() if (key := f"{of}.{name}") in metadata}
        tied = "output.weight" not in tensors
        vocabulary = metadata.get("tokenizer.ggml.tokens")
    return {"vocab_size": vocabulary, "tie_word_embeddings": tied, **known}, sum(tensors.values())


@contextmanager
def _reading(file: Path) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    """Its header; what is wrong with the file, here or in the block, ends in one sentence."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"policy: {file} is a GGUF file, which takes the package `gguf`; pip install 'dpa[gguf]'.")
    if not file.is_file():
        raise ModelFileError(f"policy: no file at {file}; give a GGUF file or a Hugging Face model folder.")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelFileError(f"policy: {file} is no GGUF file, whatever its name says; download it again.")
    source = SafeModel(str(file), {"use_safetensors": True, "trust_remote_code": False})
    with quiet_libraries(), refusing(source, "policy"):
        yield read_header(file)


_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""How `struct` reads a value, by its type's number in the file; texts and arrays aside."""
_TEXT, _ARRAY = 8, 9


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The metadata by key, of an array how long it is, and by name how many numbers each tensor holds.

    Raises ValueError for a length that the file has no room for: gguf's own reader would go on beyond the end for ever.
    """
    total = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(4)
        order = "<" if struct.unpack("<I", stream.read(4))[0] % 65_536 else ">"

        def number(form: str) -> Any:
            (value,) = struct.unpack(order + form, stream.read(struct.calcsize(form)))
            return value

        def count(bytes_each: int, form: str = "Q") -> int:
            found = int(number(form))
            if found * bytes_each > total - stream.tell():
                raise ValueError("a length in it is beyond its end; it is damaged")
            return found

        def text() -> str:
            return stream.read(count(1)).decode("utf-8", "replace")

        def value(kind: int) -> Any:
            if kind == _TEXT:
                return text()
            if kind != _ARRAY:
                return number(_form(kind))
            of = number("I")
            if of == _TEXT:
                length = count(8)
                for _ in range(length):
                    stream.seek(count(1), 1)
            else:
                each = struct.calcsize(_form(of))
                length = count(each)
                stream.seek(length * each, 1)
            return length

        try:
            tensors = count(24)  # a name's length, a number of dimensions, a type, a place
            metadata = {text(): value(number("I")) for _ in range(count(13))}
            sizes: dict[str, int] = {}
            for _ in range(tensors):
                name = text()
                sizes[name] = math.prod(number("Q") for _ in range(count(8, "I")))
                stream.seek(12, 1)  # its type and place
        except struct.error:
            raise ValueError("it ends in the middle of its metadata") from None
    return metadata, sizes


def _form(kind: int) -> str:
    if kind not in _FORMS:
        raise ValueError(f"a value in it is of type {kind}, which is none, or a list of lists")
    return _FORMS[kind]


def _read(file: Path) -> tuple[dict[str, Any], set[str]]:
    """Metadata by key (arrays of more than a vocabulary's tokens aside), and the number types of its matrices."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    if any(tensor.name.startswith(("rope_freqs", "rope_factors")) for tensor in reader.tensors):
        metadata.setdefault("rope_freqs", True)
    return metadata, kinds


def _check_rope(metadata: dict[str, Any]) -> None:
    """Stretched positions are read by transformers for one architecture only; elsewhere they would be left out."""
    architecture = metadata["general.architecture"]
    stretched = metadata.get(f"{architecture}.rope.scaling.type", "none") != "none" or "rope_freqs" in metadata
    if stretched and architecture != "gpt-oss":
        raise ValueError(
            "its positions are stretched (rope scaling), which transformers does not read from a GGUF; take the "
            "model's safetensors"
        )


def _check_cutting(metadata: dict[str, Any]) -> None:
    """How text is cut before it is merged into tokens; what transformers does not know it would cut as GPT-2 does."""
    pre = metadata.get("tokenizer.ggml.pre", "default")  # llama.cpp's word for none known
    if not GGUF_PRE_TOKENIZER_SPLITS:
        return
    if metadata.get("tokenizer.ggml.model") != "gpt2" or pre in {*GGUF_PRE_TOKENIZER_SPLITS, *_DIGITS_APART, *_AS_GPT2}:
        return
    if pre != "default" or metadata["general.architecture"] != "gpt2":
        raise ValueError(
            f"its tokenizer cuts text by a rule (tokenizer.ggml.pre: {pre!a:.40}) that transformers does not know; "
            "take the model's safetensors"
        )


def _check_kernels(architecture: str) -> None:
    """For these transformers would fetch compiled kernels from the Hub, and run them, wherever it can."""
    if architecture in GGUF_ARCHS and importlib.util.find_spec("kernels") is not None:
        raise ValueError(
            f"for {architecture} transformers would run code from the Hub, since the package `kernels` is installed; "
            "uninstall it, or take the model's safetensors"
        )


def _without_place(model: Any, architecture: str, tensors: Collection[str], unexpected: Collection[str]) -> list[str]:
    """Tensors of the file that transformers left out without a word: by the map it goes by, or by what it says itself
    of the architectures that it reads in its newer way."""
    if architecture in GGUF_ARCHS:
        left = sorted(unexpected)
    else:
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
        known = get_gguf_hf_weights_map(model, processor)
        left = [
            name for name in tensors if not {name, name.removesuffix(".weight")} & known.keys()
        ]  # experts' have none
    block = re.compile(r"(?:blk|layers)\.(\d+)\.")
    # Blocks that only guess further tokens.
    ahead = {found[1] for name in tensors if ".nextn." in name and (found := block.search(name))}
    return [
        name
        for name in left
        if not name.startswith(("rope_freqs", "rope_factors"))  # see _check_rope
        and not ((found := block.search(name)) and found[1] in ahead)
        and not (architecture == "gpt2" and name == "output.weight")  # placed by itself
    ]


def _mended_config(config: PreTrainedConfig, metadata: dict[str, Any]) -> PreTrainedConfig:
    """The configuration with every field that the metadata says otherwise."""
    architecture = metadata["general.architecture"]
    fields: dict[str, Any] = config.to_dict()
    for field in ("quantization_config", "_name_or_path"):
        fields.pop(field, None)
    for name, value in list(fields.items()):
        fields[name] = _rounded(value)
    names: dict[str, Any] = dict(GGUF_CONFIG_MAPPING.get(architecture, {}))  # type: ignore[call-overload]
    for key, name in names.items():
        told = metadata.get(f"{architecture}.{key}")
        if name in fields and isinstance(told, int | float) and not isinstance(told, bool):
            fields[name] = _rounded(told)
    rope, base = fields.get("rope_parameters"), metadata.get(f"{architecture}.rope.freq_base")
    if isinstance(rope, dict) and "rope_theta" in rope and base is not None:
        rope["rope_theta"] = _rounded(base)
    for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        told = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if told is not None:
            fields[f"{token}_token_id"] = int(told)
    return type(config)(**{name: value for name, value in fields.items() if name not in ("model_type",)})


def _mend_tokenizer(tokenizer: Any, metadata: dict[str, Any]) -> None:
    before = tokenizer.backend_tokenizer.pre_tokenizer
    if metadata.get("tokenizer.ggml.pre") in _DIGITS_APART and isinstance(before, ByteLevel):
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), before])
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            setattr(tokenizer, name, tokens[number])
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        tokenizer.chat_template = template


def _rounded(value: Any) -> Any:
    """The shortest number that is the same in 32 bits, in which GGUF keeps it: 1e-05, not 9.999999747378752e-06."""
    if isinstance(value, float) and math.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value
