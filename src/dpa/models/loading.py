"""Loading a checked folder: configuration, tokenizer and weights, each whole or refused in one sentence.
Run its tests: pytest tests/test_loading.py

transformers draws weights that a file lacks at random and only logs it. Here they are compared by name and shape
first, on the meta device, where nothing is allocated: a folder that does not fit its configuration costs no memory.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto import modeling_auto

from dpa.core.errors import DpaError, ModelFileError
from dpa.core.reference import Model
from dpa.models.files import SafeModel, integer_tensors, resolve_model
from dpa.models.quiet import quiet_libraries

_SHARE = re.compile(r"(dropout|pdrop)(_prob|_rate)?$")
_SHOWN = 3
"""Tensor names in a refusal."""


def load_model_config(safe: SafeModel, what: str = "model") -> PreTrainedConfig:
    """The configuration of a checked folder, its odd fields refused by name. `what` opens the sentences.

    Raises ModelFileError.
    """
    with refusing(safe, what, "config.json: "):
        config = AutoConfig.from_pretrained(safe.path, **safe.tokenizer_kwargs)
        text = config.get_text_config()
        if not isinstance(text, PreTrainedConfig):
            raise ValueError("its text_config is no configuration of a known model_type")
        positions = getattr(text, "max_position_embeddings", 1)
        if not _is_count(positions) or positions < 1:
            raise ValueError(f"max_position_embeddings is {positions!r}, not a number of tokens")
        for field, value in (*vars(config).items(), *vars(text).items()):
            if _SHARE.search(field) and isinstance(value, int | float) and not 0 <= value <= 1:
                raise ValueError(f"{field} is {value!r}, not a share from 0 to 1")
        if not config.return_dict:
            raise ValueError("return_dict is false, and a model is asked for named outputs; take the field out")
        rows = getattr(text, "vocab_size", None)
        for field in ("pad_token_id", "eos_token_id"):
            for token in _as_list(getattr(text, field, None)):
                if not _is_count(token) or (rows is not None and not -rows <= token < rows):
                    raise ValueError(f"{field} is {token!r}, beyond the {rows} rows of the embedding")
        _check_architecture(config)
    return config


def load_tokenizer(safe: SafeModel, what: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer of a checked folder; it writes a plain word. Raises ModelFileError."""
    with refusing(safe, what, "its tokenizer: "):
        tokenizer = AutoTokenizer.from_pretrained(safe.path, **safe.tokenizer_kwargs)
        if not tokenizer("a word", add_special_tokens=False)["input_ids"]:
            raise ValueError("it makes no token of a word")
        template = tokenizer.chat_template
        templates = template.values() if isinstance(template, dict) else [template or ""]
        if not all(isinstance(text, str) for text in templates):
            raise ValueError(f"chat_template is {type(template).__name__}, not text")
        if isinstance(template, dict) and "default" not in template:
            raise ValueError(f"of its chat templates ({', '.join(sorted(template))}) none is called default")
    return tokenizer


def load_generation(safe: SafeModel, what: str = "model") -> GenerationConfig | None:
    """generation_config.json of a checked folder, where it has one. Raises ModelFileError."""
    if not Path(safe.path, "generation_config.json").is_file():
        return None
    with refusing(safe, what, "generation_config.json: "):
        generation = GenerationConfig.from_pretrained(safe.path)
        for token in _as_list(generation.eos_token_id):
            if not _is_count(token):
                raise ValueError(f"eos_token_id is {token!r}, no token's number")
    return generation


def load_model(
    kind: Any, safe: SafeModel, dtype: torch.dtype, what: str = "model", new_head: bool = False, **fields: Any
) -> PreTrainedModel:
    """The model of a checked folder by a class of transformers' `AutoModelFor...`; `fields` go to its configuration.

    Every weight comes from the files, tied ones aside; with `new_head` what stands above the backbone may be new, or be
    left over from another head. Raises ModelFileError.
    """
    load_model_config(safe, what)
    load_generation(safe, what)
    check_weights(kind, safe, what, new_head, **fields)
    with refusing(safe, what):
        return kind.from_pretrained(safe.path, dtype=dtype, ignore_mismatched_sizes=new_head, **safe.kwargs, **fields)


def check_weights(kind: Any, safe: SafeModel, what: str = "model", new_head: bool = False, **fields: Any) -> None:
    """Compare what the configuration asks for with what the files hold, by name and shape, reading headers only.

    Raises ModelFileError.
    """
    if is_deepspeed_zero3_enabled():
        return  # it spreads tensors as they are made, and the same folder was compared before the launch
    with refusing(safe, what):
        model, found = kind.from_pretrained(
            safe.path,
            dtype=torch.float32,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **safe.kwargs,
            **fields,
        )
    # Read back as tied although the file holds both, each its own: transformers then ties none, as is right.
    own = {name: shapes for name, *shapes in found["mismatched_keys"]}
    missing, unexpected = set(found["missing_keys"]), set(found["unexpected_keys"])
    if new_head:
        backbone = f"{model.base_model_prefix}."
        own = {name: shapes for name, shapes in own.items() if name.startswith(backbone)}
        missing = {name for name in missing if name.startswith(backbone) and ".pooler." not in name}
        unexpected = {name for name in unexpected if name.startswith(backbone)}
    if missing:
        but = f", while it holds {_listed(unexpected)} that it does not name" if unexpected else ""
        raise ModelFileError(
            f"{what}: {safe.path} lacks {_listed(missing)}, which its config.json asks for; they would be drawn at "
            f"random{but}. Give the complete folder whose config.json and weights belong together."
        )
    if own:
        name, (stored, asked) = next(iter(sorted(own.items())))
        raise ModelFileError(
            f"{what}: {safe.path} holds {_listed(set(own))} in another shape than its config.json asks for "
            f"({name}: {list(stored)} instead of {list(asked)}). Give the config.json that belongs to the weights."
        )
    if unexpected:
        raise ModelFileError(
            f"{what}: {safe.path} holds {_listed(unexpected)}, for which its config.json has no place; they would be "
            "left out. Give the config.json that belongs to the weights."
        )
    whole = integer_tensors(Path(safe.path)) & {name for name, _ in model.named_parameters()}
    if whole and getattr(model.config, "quantization_config", None) is None:
        raise ModelFileError(
            f"{what}: {safe.path} holds {_listed(whole)} as whole numbers and no quantization_config that says what "
            "they stand for. Save it again in float32 or bfloat16."
        )


def check_loadable(model: Model, kind: Any, what: str = "model") -> None:
    """Open what was just saved as a stranger would: configuration, every tensor by name and shape, the tokenizer.

    Raises ModelFileError.
    """
    safe = resolve_model(model)
    with quiet_libraries():
        load_model_config(safe, what)
        check_weights(kind, safe, what)
        check_tokens(load_tokenizer(safe, what), embedding_rows(safe), safe.path, what)


def check_tokens(tokenizer: PreTrainedTokenizerBase, rows: int | None, name: Model, what: str = "model") -> None:
    """Every token that the tokenizer writes by itself lies within the embedding's rows. Raises ModelFileError."""
    for field in ("pad_token", "eos_token"):
        number = getattr(tokenizer, f"{field}_id")
        if number is not None and rows is not None and number >= rows:
            raise ModelFileError(
                f"{what}: the {field} of {name}, {getattr(tokenizer, field)!r}, is token {number}, beyond the {rows} "
                f"rows of the embedding; set {field} in tokenizer_config.json to a token below {rows}."
            )
    if rows is not None and max(tokenizer("a word")["input_ids"], default=0) >= rows:
        raise ModelFileError(
            f"{what}: the tokenizer of {name} writes tokens beyond the {rows} rows of the embedding; it belongs to "
            "another model."
        )


def embedding_rows(source: SafeModel | PreTrainedModel) -> int | None:
    """Tokens the model knows: rows of its embedding, or the vocab_size of a folder whose weights are not loaded."""
    if isinstance(source, SafeModel):
        return getattr(load_model_config(source).get_text_config(), "vocab_size", None)
    embedding: Any = source.get_input_embeddings()
    return int(embedding.weight.shape[0])


@contextmanager
def refusing(safe: SafeModel, what: str, where: str = "") -> Iterator[None]:
    """Whatever a library says of a stranger's folder is a reason; it has dozens of classes for it, a plain Exception
    and a Rust panic among them."""
    try:
        yield
    except DpaError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, KeyError | AssertionError | AttributeError | IndexError | TypeError):
            reason = f"{type(error).__name__}: {reason}"
        purpose = "classifier" if what == "reward model" else "causal language model"
        raise ModelFileError(f"{what}: {safe.path} does not load as a {purpose} ({where}{reason}); check it.") from None


def _check_architecture(config: PreTrainedConfig) -> None:
    """`architectures` names the class that wrote the weights; one of another model_type cannot read them."""
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"architectures is {str(named)[:80]!r}, not a list of class names")
    known = {name: kinds for name in named if (kinds := _model_types(name))}
    if known and not any(config.model_type in kinds for kinds in known.values()):
        name, kinds = next(iter(known.items()))
        raise ValueError(
            f"its model_type is {config.model_type!r} but its weights were written by {name}, "
            f"of model_type {' or '.join(sorted(kinds))}"
        )


def _model_types(class_name: str) -> set[str]:
    """The model types whose class has this name, in any of transformers' tables."""
    tables = (table for name, table in vars(modeling_auto).items() if name.endswith("MAPPING_NAMES"))
    return {kind for table in tables for kind, value in table.items() if class_name in _as_list(value)}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(names: set[str]) -> str:
    """`3 weights (a, b, ...)`, the numbers of layers in their order."""
    first = sorted(names, key=lambda name: [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", name)])
    shown = ", ".join(first[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} ({shown})"
