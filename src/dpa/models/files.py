"""Safe model loading: what a model folder may contain, checked before any library opens it.
Run its tests: pytest tests/test_model_files.py
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpa.core.directions import DirectionSpace
from dpa.core.errors import ModelFileError
from dpa.core.reference import Model, ModelReference
from dpa.storage.rows import has_hub_form
from dpa.storage.tables import disk_error, known_digest

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Files that run code of their author when they are opened."""

CONVERT_HINT = "convert it where you trust it: AutoModel.from_pretrained(...).save_pretrained(...) writes safetensors"

EVALUATION_FILE = "dpa_evaluation.json"
"""Beside the weights: the record of stages.evaluate on held-out prompts, for the model card and the served page."""

SPACE_FILE = "dpa_config.json"
"""Beside the weights: `{"space": DirectionSpace.to_dict(), "provenance": {...}}`."""

REWARD_FILE = "dpa_reward.json"
"""Beside the weights of a reward model: what it rates and how it is asked (scoring/reward_model.py)."""

GGUF_SUFFIX = ".gguf"
GGUF_HINT = "as `policy:` of a run it is dequantised once, into RUN/start_policy/policy; give that folder here"

_ORIGINS = {SPACE_FILE: "provenance", REWARD_FILE: "training"}
"""Field of our own records that says where a model came from."""

_REVISION = re.compile(r"[0-9a-f]{40}")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 64_000_000  # the largest tokenizer.json in use are about 35 MB
_SMALL_JSON_BYTES = 1_000_000
_FLOAT = re.compile(r"B?F\d")  # F32, BF16, F8_E4M3; not I8, U8, BOOL
_DTYPE = re.compile(r"(torch\.)?(bfloat16|float(16|32|64)|half|float|double|float8_\w+|auto)")
_NO_SIZE = re.compile(r"position|token|theta|length|ctx|window|seed|limit|version")
"""Whole numbers of config.json that no tensor need be as large as."""
_REPEATED = re.compile(r"^(num|n)_\w*(layer|expert|block|stage)s?|(layers|experts|blocks|stages|depth)$|^n_layer$")
"""... and those that count modules, each with a tensor or more."""
_MOST_SIZE, _MOST_REPEATS = 10_000_000, 128  # what is below costs nothing to build
CONTENT_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}
"""Files that make a model what it is; README.md is not one of them."""


@dataclass(frozen=True)
class SafeModel:
    """A checked folder. `kwargs` go to a model's `from_pretrained`, `tokenizer_kwargs` to a tokenizer's."""

    path: str
    kwargs: dict[str, Any]

    @property
    def tokenizer_kwargs(self) -> dict[str, Any]:
        """Without `use_safetensors`, which a tokenizer would save among its own settings."""
        return {"trust_remote_code": self.kwargs["trust_remote_code"]}


def resolve_model(model: Model) -> SafeModel:
    """Check a model folder, or fetch and check a Hub model, and say how to load it.

    `code_revision` of a reference opts in to the model's own Python code; for a Hub id it is the 40-hex commit that is
    fetched, for a local folder it only records that somebody looked. Only safetensors are ever loaded; a Hub id is
    downloaded without its pickle files. Raises ModelFileError.
    """
    reference = ModelReference.of(model)
    revision = reference.code_revision
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ModelFileError(
            f"remote_code_revision: {revision!r} is not a 40-hex commit; pin the exact commit you reviewed."
        )
    folder = Path(reference.name).expanduser()
    if has_hub_form(reference.name):
        folder = _fetch(reference.name, revision)
    check_model_folder(folder, allow_remote_code=revision is not None)
    return SafeModel(str(folder), {"use_safetensors": True, "trust_remote_code": revision is not None})


def check_model_folder(folder: Path, allow_remote_code: bool = False) -> None:
    """Refuse pickle weights, code that was not opted in to, and damaged safetensors, without opening any tensor.

    Reads the JSON files and the header of every safetensors file. Raises ModelFileError.
    """
    if folder.suffix in PICKLE_SUFFIXES:
        raise ModelFileError(f"model: {folder} is a pickle, which can run any code when opened; {CONVERT_HINT}.")
    if folder.suffix == GGUF_SUFFIX:
        raise ModelFileError(f"model: {folder} is a GGUF file; {GGUF_HINT}.")
    try:
        there = folder.is_dir()
    except (OSError, ValueError):  # a name too long, or with a NUL
        there = False
    if not there:
        shown = str(folder)[:300]
        raise ModelFileError(f"model: no folder at {shown}; give a Hugging Face model folder or a Hub id (owner/name).")
    _check_entries(folder)
    config = _read_json(folder, "config.json")
    if config is None and any(folder.glob(f"*{GGUF_SUFFIX}")):
        raise ModelFileError(f"model: {folder} holds a GGUF file and no config.json; {GGUF_HINT}.")
    if config is None:
        hint = (
            "merge the adapter first" if (folder / "adapter_config.json").exists() else "give a complete model folder"
        )
        raise ModelFileError(f"model: {folder} has no config.json; {hint}.")
    if (folder / "adapter_config.json").exists():
        raise ModelFileError(
            f"model: {folder} holds adapter_config.json, which names another model to load unchecked; merge it first."
        )
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        _check_code(folder, name, allow_remote_code)
    weights = _weight_files(folder)
    if not weights:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise ModelFileError(
                f"model: {folder} has only pickle weights ({pickles[0]}), which can run any code when opened; "
                f"{CONVERT_HINT}."
            )
        raise ModelFileError(f"model: {folder} has no *.safetensors weights; is the download or save complete?")
    shapes = [shape for file in weights for shape in check_safetensors(file)]
    _check_sizes(folder, config, len(shapes), sum(map(prod, shapes)))
    _check_dtypes(folder, config)


def check_safetensors(file: Path) -> list[list[int]]:
    """Parse the header only: sizes, offsets and their order must fit the file exactly. Raises ModelFileError.

    The format's own parser does the work: it maps the file, caps the header at 100 MB and allocates no tensor. Returns
    the tensors' shapes.
    """
    _check_regular(file)
    try:
        with safe_open(str(file), framework="numpy") as opened:
            names = opened.keys()
            return [opened.get_slice(name).get_shape() for name in names]
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(
            f"model: {file} is damaged ({' '.join(str(error).split())}); download or save it again."
        ) from None


def count_parameters(folder: Path) -> int:
    """Numbers in a folder's safetensors files, from their headers. Raises ModelFileError."""
    return sum(prod(shape) for file in _weight_files(folder) for shape in check_safetensors(file))


def integer_tensors(folder: Path) -> set[str]:
    """Names of the tensors of a checked folder that are stored as whole numbers or booleans."""
    names: set[str] = set()
    for file in _weight_files(folder):
        with safe_open(str(file), framework="numpy") as opened:
            stored = opened.keys()
            names |= {name for name in stored if not _FLOAT.match(opened.get_slice(name).get_dtype())}
    return names


def load_space(folder: str | Path) -> DirectionSpace:
    """The direction space a policy was trained over. Raises ModelFileError (or DirectionError) when it is not there."""
    file = Path(folder) / SPACE_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(
            f"model: {folder} has no {SPACE_FILE}; give a policy that dpa trained, or --space."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ModelFileError(f"model: {file} is not readable JSON ({reason}); save the policy again.") from None
    return DirectionSpace.from_dict(data.get("space") if isinstance(data, dict) else data)


def policy_name(model: str | Path) -> str:
    """A name clients and files can bear: the last part of a folder's or of a Hub id (as it was given: the folder it was
    fetched to bears a commit's); of a `policy` in a run folder, the run's and the iteration's number (`demo-3`)."""
    path = Path(model).resolve()
    if path.name == "policy" and path.parent.name.startswith("iter_"):
        return f"{path.parents[1].name}-{path.parent.name.removeprefix('iter_')}"
    return path.name


def folder_revision(path: str | Path) -> str:
    """Name a model by its content: 16 hex digits of a sha256 over weights, configuration, tokenizer and code.

    What was measured of it (EVALUATION_FILE) and where it came from (paths, say) are not part of it, so that the same
    run in another folder has the same revisions. Cached per process until a file's size or time changes.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelFileError(f"model: no folder at {folder}; give a Hugging Face model folder.")
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix in CONTENT_SUFFIXES and file.name != EVALUATION_FILE and file.is_file()
    )
    try:
        lines = [f"{file.name} {_content(file)}\n" for file in files]
    except OSError as error:
        raise disk_error(error, folder, "reading") from None
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _content(file: Path) -> str:
    """SHA-256 (hex) of a file; of our own records without what says where a model came from."""
    if file.name in _ORIGINS:
        try:
            record = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            record = None  # whoever loads it says so
        if isinstance(record, dict):
            kept = {name: value for name, value in record.items() if name != _ORIGINS[file.name]}
            return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return known_digest(file)


def _fetch(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_HUB_FILES, "*.py"] if revision else _HUB_FILES
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelFileError(
            f"model: {hub_id!r} is neither a folder here nor a Hub model that can be reached "
            f"({type(error).__name__}); check the name, or download it and give the folder."
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files `from_pretrained` would read; an index may only name files of the folder itself."""
    if os.path.lexists(folder / "model.safetensors"):
        return [folder / "model.safetensors"]
    index = _read_json(folder, _INDEX)
    if index is None:
        return []
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelFileError(f"model: {folder / _INDEX} has no weight_map of file names; save the model again.")
    for name in set(names.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelFileError(f"model: {folder / _INDEX} names {name!r}, not a safetensors file of its own folder.")
        if not (folder / name).is_file():
            raise ModelFileError(f"model: {folder} lacks {name}, which its index names; complete the download.")
    return sorted(folder / name for name in set(names.values()))


def _check_entries(folder: Path) -> None:
    """Nothing in the folder but files of sane size and folders: a pipe named tokenizer.json would be read for ever."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ModelFileError(f"model: {folder} cannot be read ({error.strerror}); check its permissions.") from None
    for file in entries:
        if file.suffix not in CONTENT_SUFFIXES:
            continue
        _check_regular(file)
        if file.suffix != ".safetensors" and file.stat().st_size > _MAX_JSON_BYTES:
            raise ModelFileError(f"model: {file} is larger than {_MAX_JSON_BYTES:,} bytes; no model's is.")
        if file.suffix == ".json" and not file.name.startswith("dpa_") and file.stat().st_size < _SMALL_JSON_BYTES:
            _read_json(
                folder, file.name, any_value=True
            )  # larger ones are vocabularies, dpa's have readers of their own


def _check_regular(file: Path) -> None:
    if not file.exists():
        raise ModelFileError(f"model: {file} is a link to a file that is not there; complete the download.")
    if not file.is_file():
        raise ModelFileError(f"model: {file} is no regular file; give a complete model folder.")


def _check_sizes(folder: Path, config: dict[str, Any], tensors: int, elements: int) -> None:
    """No size in config.json is beyond what the weights hold: building layer after layer would never end.

    Only the absurd is looked for; names and shapes are compared by models.loading. Raises ModelFileError.
    """
    for field, value in _numbers(config):
        name = field.rpartition(".")[2]
        most = max(_MOST_REPEATS, tensors) if _REPEATED.search(name) else max(_MOST_SIZE, elements)
        if abs(value) > most and not _NO_SIZE.search(name):
            raise ModelFileError(
                f"model: {folder / 'config.json'} says {field} = {str(value)[:20]}, but the weights are "
                f"{tensors} tensors of {elements:,} numbers in all; give the config.json that belongs to them."
            )


def _numbers(value: Any, field: str = "") -> Iterator[tuple[str, int]]:
    """Dotted name and value of every whole number."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{field}.{name}".strip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, field)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield field, value


def _check_dtypes(folder: Path, config: dict[str, Any]) -> None:
    sections = [config, *(section for section in config.values() if isinstance(section, dict))]
    for section in sections:
        for field in ("dtype", "torch_dtype"):
            value = section.get(field)
            for name in value.values() if isinstance(value, dict) else [value]:
                if name is not None and not (isinstance(name, str) and _DTYPE.fullmatch(name)):
                    raise ModelFileError(
                        f"model: {folder / 'config.json'} says {field} = {str(name)[:40]!r}, which is no type of "
                        "weights; write float32, bfloat16 or float16."
                    )


def _check_code(folder: Path, name: str, allowed: bool) -> None:
    references = list(_code_references((_read_json(folder, name) or {}).get("auto_map")))
    if references and not allowed:
        raise ModelFileError(
            f"model: {folder / name} asks to run its own code ({references[0]}); review it, then opt in with "
            "remote_code_revision set to the commit's 40 hex digits."
        )
    for reference in references:
        if "--" in reference:
            raise ModelFileError(
                f"model: {folder / name} takes code from another repository ({reference}), which the pinned revision "
                "does not cover; copy that code into the folder and review it."
            )


def _code_references(auto_map: Any) -> Iterator[str]:
    if isinstance(auto_map, str):
        yield auto_map
    elif isinstance(auto_map, dict):
        for value in auto_map.values():
            yield from _code_references(value)
    elif isinstance(auto_map, list | tuple):
        for value in auto_map:
            yield from _code_references(value)


def _read_json(folder: Path, name: str, any_value: bool = False) -> dict[str, Any] | None:
    file = folder / name
    if not file.exists():
        return None
    _check_regular(file)
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise ModelFileError(f"model: {file} is larger than {_MAX_JSON_BYTES:,} bytes; it is no model configuration.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(
            f"model: {file} is not readable JSON ({' '.join(str(error).split())}); save the model again."
        ) from None
    if not isinstance(data, dict) and not any_value:
        raise ModelFileError(f"model: {file} must hold a JSON object; save the model again.")
    return data
