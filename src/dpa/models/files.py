"""Safe model loading: what a model folder may contain, checked before any library opens it.
Run its tests: pytest tests/test_model_files.py
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpa.core.directions import DirectionSpace
from dpa.core.errors import ModelFileError
from dpa.storage.rows import has_hub_form

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Files that run code of their author when they are opened."""

CONVERT_HINT = "convert it where you trust it: AutoModel.from_pretrained(...).save_pretrained(...) writes safetensors"

EVALUATION_FILE = "dpa_evaluation.json"
"""Beside the weights: the record of stages.evaluate on held-out prompts, for the model card and the served page."""

SPACE_FILE = "dpa_config.json"
"""Beside the weights: `{"space": DirectionSpace.to_dict(), "provenance": {...}}`."""

_REVISION = re.compile(r"[0-9a-f]{40}")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 64_000_000  # the largest tokenizer.json in use are about 35 MB
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


def resolve_model(name_or_path: str | Path, remote_code_revision: str | None = None) -> SafeModel:
    """Check a model folder, or fetch and check a Hub model, and say how to load it.

    `remote_code_revision` opts in to the model's own Python code; for a Hub id it is the 40-hex commit that is fetched,
    for a local folder it only records that somebody looked. Only safetensors are ever loaded; a Hub id is downloaded
    without its pickle files. Raises ModelFileError.
    """
    if remote_code_revision is not None and not _REVISION.fullmatch(remote_code_revision):
        raise ModelFileError(
            f"remote_code_revision: {remote_code_revision!r} is not a 40-hex commit; pin the exact commit you reviewed."
        )
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if has_hub_form(name):
        folder = _fetch(name, remote_code_revision)
    check_model_folder(folder, allow_remote_code=remote_code_revision is not None)
    return SafeModel(str(folder), {"use_safetensors": True, "trust_remote_code": remote_code_revision is not None})


def check_model_folder(folder: Path, allow_remote_code: bool = False) -> None:
    """Refuse pickle weights, code that was not opted in to, and damaged safetensors, without opening any tensor.

    Reads the JSON files and the header of every safetensors file. Raises ModelFileError.
    """
    if folder.suffix in PICKLE_SUFFIXES:
        raise ModelFileError(f"model: {folder} is a pickle, which can run any code when opened; {CONVERT_HINT}.")
    if not folder.is_dir():
        raise ModelFileError(
            f"model: no folder at {folder}; give a Hugging Face model folder or a Hub id (owner/name)."
        )
    config = _read_json(folder, "config.json")
    if config is None:
        hint = (
            "merge the adapter first" if (folder / "adapter_config.json").exists() else "give a complete model folder"
        )
        raise ModelFileError(f"model: {folder} has no config.json; {hint}.")
    if (folder / "adapter_config.json").exists():
        raise ModelFileError(
            f"model: {folder} holds adapter_config.json, which names another model to load unchecked; merge it first."
        )
    if _read_json(folder, "config.json") is None:
        raise ModelFileError(f"model: {folder} has no config.json; give a complete model folder.")
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
    for file in weights:
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Parse the header only: sizes, offsets and their order must fit the file exactly. Raises ModelFileError.

    The format's own parser does the work: it maps the file, caps the header at 100 MB and allocates no tensor.
    """
    try:
        with safe_open(str(file), framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(
            f"model: {file} is damaged ({' '.join(str(error).split())}); download or save it again."
        ) from None


def load_space(folder: str | Path) -> DirectionSpace:
    """The direction space a policy was trained over. Raises ModelFileError (or DirectionError) when it is not there."""
    file = Path(folder) / SPACE_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"model: {folder} has no {SPACE_FILE}; give a policy that dpa trained.") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ModelFileError(f"model: {file} is not readable JSON ({reason}); save the policy again.") from None
    return DirectionSpace.from_dict(data.get("space") if isinstance(data, dict) else data)


def folder_revision(path: str | Path) -> str:
    """Name a model by its content: 16 hex digits of a sha256 over weights, configuration, tokenizer and code.

    What was measured of it (EVALUATION_FILE) is not part of it. Cached per process until a file's size or time changes.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelFileError(f"model: no folder at {folder}; give a Hugging Face model folder.")
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix in CONTENT_SUFFIXES and file.name != EVALUATION_FILE and file.is_file()
    )
    return _digest(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in files:
        with Path(name).open("rb") as stream:
            digest.update(f"{Path(name).name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


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
    if (folder / "model.safetensors").exists():
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


def _read_json(folder: Path, name: str) -> dict[str, Any] | None:
    file = folder / name
    if not file.is_file():
        return None
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise ModelFileError(f"model: {file} is larger than {_MAX_JSON_BYTES:,} bytes; it is no model configuration.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(
            f"model: {file} is not readable JSON ({' '.join(str(error).split())}); save the model again."
        ) from None
    if not isinstance(data, dict):
        raise ModelFileError(f"model: {file} must hold a JSON object; save the model again.")
    return data
