"""Adopt: a folder trained elsewhere becomes a policy of dpa, whole weights or adapters; or one sentence why not.
Run its tests: pytest tests/test_elsewhere.py
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpa.core.directions import DirectionSpace
from dpa.core.errors import ModelFileError, StorageError
from dpa.core.reference import Model, ModelReference
from dpa.models.chat_template import ending_answers, steerable_template
from dpa.models.files import CONVERT_HINT, check_safetensors, folder_revision, policy_name, resolve_model
from dpa.models.loading import embedding_rows, load_model, load_model_config, load_tokenizer
from dpa.models.policy import check_end_token, ensure_pad_token, save_policy
from dpa.models.quiet import quiet_libraries
from dpa.storage.tables import file_digest, read_json
from dpa.training.trainers import merge_adapters

ADAPTERS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")
"""Ways to begin a LoRA that leave the weights below it as they are; pissa, olora and corda change them."""
_PLAIN_NAME = re.compile(r"(\.\*\\\.)?[\w.]+")
"""A name of modules, or of those that end with it, which PEFT writes for a mixture's experts: no pattern to try for
ever."""


def adopt(trained: Path, base: Model | None, space: DirectionSpace, out: Path, source: dict[str, Any]) -> list[str]:
    """Check a trained folder and save it at `out` as a policy over `space`, whole or not at all.

    `base`: the policy that it was trained from; adapters are merged into it, and the tokenizer is held against its.
    None: not known; then the folder must be complete. `source`: what is known of the data it learned from, kept with
    it in `dpa_config.json`.

    A chat template that does not read the space's `preference` is taught it; a tokenizer that was not saved is the
    base's. Returns what was found and mended, a sentence each. Raises ModelFileError: files that are not safe, weights
    that do not fit or are not finite, another vocabulary.
    """
    notes: list[str] = []
    with quiet_libraries():
        adapters = (trained / ADAPTER_CONFIG).is_file() and not (trained / "config.json").is_file()
        reference = ModelReference(str(trained), None if base is None else ModelReference.of(base).code_revision)
        if adapters:
            model, revision = _merged(trained, base), file_digest(trained / ADAPTERS)[:16]
            notes.append(f"its adapters were merged into {policy_name(str(base))}")
        else:
            model, revision = _weights(reference), folder_revision(trained)
        _check_finite(model, trained)
        tokenizer = _tokenizer(reference, base, adapters, space, notes)
        check_end_token(tokenizer, reference)
        ensure_pad_token(tokenizer)
        _check_rows(model, tokenizer, trained)
        facts = {"folder": str(trained), "revision": revision, "adapters": adapters, "data": source, "notes": notes}
        provenance: dict[str, Any] = {"from": None if base is None else str(base), "trained_elsewhere": facts}
        if reference.code_revision is not None:
            provenance["remote_code_revision"] = reference.code_revision
        save_policy(model, tokenizer, out, space, provenance)
    return notes


def _weights(model: Model) -> PreTrainedModel:
    """Of a checked folder, in the type they are stored in."""
    safe = resolve_model(model)
    dtype = load_model_config(safe).dtype
    return load_model(AutoModelForCausalLM, safe, dtype if isinstance(dtype, torch.dtype) else torch.float32)


def _merged(trained: Path, base: Model | None) -> PreTrainedModel:
    """`base` with the LoRA adapters of a folder added. The model that adapter_config.json names is never looked at."""
    if base is None:
        raise ModelFileError(
            f"model: {trained} holds adapters, and not what they belong to; give the run whose policy they were "
            "trained on, and -t."
        )
    file = trained / ADAPTERS
    if not file.is_file():
        raise ModelFileError(f"model: {trained} has no {ADAPTERS}; a pickle (*.bin) is not opened: {CONVERT_HINT}.")
    check_safetensors(file)
    try:
        said = read_json(trained / ADAPTER_CONFIG)
    except StorageError as error:
        raise ModelFileError(f"model: {str(error).split(';')[0]}; save the adapters again.") from None
    said = said if isinstance(said, dict) else {}
    kind, start = said.get("peft_type"), said.get("init_lora_weights", True)
    if kind != "LORA":
        raise ModelFileError(f"model: {trained} holds adapters of type {kind}; only LoRA is merged: merge it there.")
    if isinstance(start, str) and start not in _HARMLESS_STARTS:
        raise ModelFileError(
            f"model: {trained} holds adapters begun with init_lora_weights={start!r}, which changed the weights below "
            "them; merge them where they were trained."
        )
    weights = load_file(file)
    largest = _check_adapters(said, weights, trained)
    model = _weights(base)
    dtype = model.dtype
    try:
        config: Any = LoraConfig.from_pretrained(str(trained))
        config.init_lora_weights, config.inference_mode = True, True
        # What the weights belong to, they say themselves: a pattern of a stranger's may take years to match.
        of_lora = (name.removeprefix("base_model.model.").split(".lora_") for name in weights)
        modules = {module for module, *rest in of_lora if rest}
        named = config.target_parameters or ()  # single parameters, such as those of a mixture's experts
        config.target_modules = {module for module in modules if not any(_has(model, module, one) for one in named)}
        config.r = min(config.r, largest)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        adapted = get_peft_model(model, config)
        found: Any = set_peft_model_state_dict(adapted, weights)
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        OverflowError,
        re.error,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelFileError(
            f"model: the adapters of {trained} do not fit {base} ({reason}); give the run and the iteration they were "
            "trained for."
        ) from None
    missing = [name for name in found.missing_keys if "lora_" in name or "modules_to_save" in name]
    if missing or found.unexpected_keys:
        odd = [*missing, *found.unexpected_keys]
        raise ModelFileError(
            f"model: the adapters of {trained} do not fit {base} ({len(odd)} tensors, {odd[0]} first); give the run "
            "and the iteration they were trained for."
        )
    try:
        return merge_adapters(adapted, dtype)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelFileError(
            f"model: the adapters of {trained} cannot be merged here ({reason}); merge them where they were trained."
        ) from None


def _has(model: PreTrainedModel, module: str, parameter: str) -> bool:
    """Whether a module, as adapters lie around it, has the parameter of this name, or of a name that ends with it."""
    module, last = module.split(".base_layer")[0], parameter.rpartition(".")[2]
    return f".{module}.{last}".endswith(f".{parameter}") and hasattr(model.get_submodule(module), last)


def _check_adapters(said: dict[str, Any], weights: dict[str, torch.Tensor], trained: Path) -> int:
    """The largest rank of the weights: no part of an adapter_config.json is larger, or a pattern. Raises
    ModelFileError."""
    kinds = {"rank_pattern": dict, "alpha_pattern": dict, "modules_to_save": list, "target_parameters": list}
    for field, kind in kinds.items():
        names = said.get(field) or kind()
        if not isinstance(names, kind) or not all(
            isinstance(name, str) and _PLAIN_NAME.fullmatch(name) for name in names
        ):
            raise ModelFileError(
                f"model: {trained} holds adapters whose {field} is by pattern ({names!a:.100}); merge them where they "
                "were trained."
            )
    for name, alpha in {"lora_alpha": said.get("lora_alpha"), **(said.get("alpha_pattern") or {})}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1e9:
            raise ModelFileError(
                f"model: {trained / ADAPTER_CONFIG} has the alpha {alpha!a:.40} ({name}), which says how much adapters "
                "weigh; save them again."
            )
    if said.get("layer_replication"):
        raise ModelFileError(
            f"model: {trained} holds adapters over layers that are there several times (layer_replication); merge them "
            "where they were trained."
        )
    most = max((weight.shape[0] for name, weight in weights.items() if weight.ndim and "_A" in name), default=0)
    for name, rank in {"r": said.get("r"), **(said.get("rank_pattern") or {})}.items():
        bound = math.inf if name == "r" and said.get("rank_pattern") else most  # which may leave nothing to it
        if not isinstance(rank, int) or not 0 < rank <= bound:
            raise ModelFileError(
                f"model: {trained / ADAPTER_CONFIG} has the rank {rank!a:.40} ({name}), but the largest of its weights "
                f"has {most}; save the adapters again."
            )
    return most


def _check_finite(model: PreTrainedModel, trained: Path) -> None:
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ModelFileError(
                f"model: {trained} has weights that are no finite numbers ({name}); its training went wrong, take an "
                "earlier checkpoint."
            )


def _tokenizer(
    trained: Model, base: Model | None, adapters: bool, space: DirectionSpace, notes: list[str]
) -> PreTrainedTokenizerBase:
    """The folder's own tokenizer, held against the base's; the base's where it has none or holds adapters."""
    known = None if base is None else load_tokenizer(resolve_model(base))
    folder = Path(str(trained))
    if not adapters and any((folder / name).is_file() for name in _TOKENIZER_FILES):
        tokenizer = load_tokenizer(resolve_model(trained))
        if known is not None:
            _compare(tokenizer, known, f"the tokenizer of {trained}", str(base), notes)
        _note_template(tokenizer, known, space, notes)
        return tokenizer
    if known is None:
        raise ModelFileError(f"model: {trained} has no tokenizer; save it there with tokenizer.save_pretrained.")
    if not adapters:
        notes.append(f"no tokenizer was saved with it: that of {policy_name(str(base))} is used")
    return known


def _compare(
    tokenizer: PreTrainedTokenizerBase, known: PreTrainedTokenizerBase, what: str, base: str, notes: list[str]
) -> None:
    """Every token of the base is the same token now. A chat template that was not saved is the base's."""
    vocabulary, before = tokenizer.get_vocab(), known.get_vocab()
    moved = sorted(token for token, number in before.items() if vocabulary.get(token) != number)
    if moved:
        raise ModelFileError(
            f"model: {what} is not that of {base} ({len(moved):,} of {len(before):,} tokens differ, {moved[0]!r} for "
            "one); give the folder that was trained from it."
        )
    if added := sorted(vocabulary.keys() - before.keys()):
        notes.append(
            f"its tokenizer has {len(added)} more tokens than that of {policy_name(base)} ({', '.join(added[:3])})"
        )
    if not tokenizer.chat_template and known.chat_template:
        tokenizer.chat_template = known.chat_template
        notes.append(f"no chat template was saved with it: that of {policy_name(base)} is used")


def _note_template(
    tokenizer: PreTrainedTokenizerBase, known: PreTrainedTokenizerBase | None, space: DirectionSpace, notes: list[str]
) -> None:
    """What saving will do to the chat template, and whether it is the base's."""
    text, before = (
        str(one.get_chat_template()) if one is not None and one.chat_template else None for one in (tokenizer, known)
    )
    steerable = steerable_template(text, space)
    if text not in (steerable, before):
        notes.append(f"its chat template did not read `preference` over {', '.join(space.names)}: it was taught to")
    if known is not None and ending_answers(steerable_template(before, space)) != ending_answers(steerable):
        notes.append("its chat template is not the one it began with: prompts are written as its own writes them")


def _check_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained: Path) -> None:
    """Every token has a row of the embedding."""
    tokens, rows = len(tokenizer), embedding_rows(model)
    if rows is not None and max(tokenizer.get_vocab().values()) >= rows:
        raise ModelFileError(
            f"model: the tokenizer of {trained} has {tokens:,} tokens and its embedding {rows:,} rows; give the "
            "tokenizer it was trained with."
        )
