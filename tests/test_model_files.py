"""Model folders that must be refused before a library opens them, and those that must load.
pytest tests/test_model_files.py
"""

import json
import pickle
import struct
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from forks import python
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dpa.core.errors import ModelFileError
from dpa.core.reference import ModelReference
from dpa.models.files import PICKLE_SUFFIXES, check_safetensors, count_parameters, folder_revision, resolve_model

REVISION = "a" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model folder without a real model in it."""
    path = tmp_path / "model ü"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"w": np.arange(6, dtype=np.float32)}, path / "model.safetensors")
    return path


def header(tensors: dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_a_good_folder_loads(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    safe = resolve_model(tmp_path)
    assert safe.kwargs == {"use_safetensors": True, "trust_remote_code": False}
    LlamaForCausalLM.from_pretrained(safe.path, **safe.kwargs)


def test_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"^model: no folder at .*nowhere; give a .*\.$"):
        resolve_model(tmp_path / "nowhere")


def test_file_instead_of_folder(folder: Path) -> None:
    with pytest.raises(ModelFileError, match="no folder"):
        resolve_model(folder / "config.json")


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "model.pkl"])
def test_pickle_weights_are_refused_and_never_run(folder: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    for offered in (folder, folder / name):
        with pytest.raises(ModelFileError, match=r"pickle.*save_pretrained"):
            resolve_model(offered)
    assert not canary.exists()
    pickle.loads((folder / name).read_bytes())
    assert canary.exists(), "the canary itself works"


def test_pickle_beside_safetensors_is_ignored(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"never opened")
    assert resolve_model(folder).kwargs["use_safetensors"]


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"]
)
def test_remote_code_needs_a_pinned_opt_in(folder: Path, name: str) -> None:
    (folder / name).write_text(json.dumps({"auto_map": {"AutoModel": ["modeling_mine.Mine", None]}}))
    with pytest.raises(ModelFileError, match="remote_code_revision"):
        resolve_model(folder)
    assert resolve_model(ModelReference(str(folder), REVISION)).kwargs["trust_remote_code"] is True
    with pytest.raises(ModelFileError, match="40-hex"):
        resolve_model(ModelReference(str(folder), "main"))


def test_a_model_of_the_hub_is_fetched_at_its_pin_without_pickles_and_unasked_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **how: Any) -> str:
        asked.append(how)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    resolve_model("me/pol-7b")
    resolve_model(ModelReference("me/pol-7b", REVISION))
    assert [how["revision"] for how in asked] == [None, REVISION]
    files = ["model.safetensors", "modeling_x.py", *(f"weights{suffix}" for suffix in PICKLE_SUFFIXES)]
    taken = [[file for file in files if any(fnmatch(file, own) for own in how["allow_patterns"])] for how in asked]
    assert taken == [files[:1], files[:2]]


def test_code_of_another_repository_is_refused_even_when_opted_in(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "else/where--modeling.Mine"}}))
    with pytest.raises(ModelFileError, match="another repository"):
        resolve_model(ModelReference(str(folder), REVISION))


def test_adapter_folder_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFileError, match="merge"):
        resolve_model(folder)


F32 = {"dtype": "F32", "shape": [2]}
DAMAGED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header of 2^60 bytes": header({}, length=2**60),
    "header over the format's limit": header({}, length=100_000_001),
    "header past the end": header({"w": {**F32, "data_offsets": [0, 8]}}, b"12345678", length=10_000),
    "data cut short": header({"w": {**F32, "data_offsets": [0, 8]}}, b"1234"),
    "trailing data": header({"w": {**F32, "data_offsets": [0, 8]}}, b"1" * 16),
    "overlapping tensors": header(
        {"a": {**F32, "data_offsets": [0, 8]}, "b": {**F32, "data_offsets": [4, 12]}}, b"1" * 12
    ),
    "offsets that disagree with the shape": header({"w": {**F32, "data_offsets": [0, 4]}}, b"1234"),
    "shape of 2^62 elements": header(
        {"w": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 8]}}, b"1" * 8
    ),
    "negative offset": header({"w": {**F32, "data_offsets": [-8, 0]}}, b""),
    "not JSON": struct.pack("<Q", 4) + b"{{{{",
    "deep nesting": struct.pack("<Q", 200_000) + b"[" * 200_000,
}


@pytest.mark.parametrize("case", DAMAGED)
def test_fault_29_damaged_safetensors_are_refused(folder: Path, case: str) -> None:
    (folder / "model.safetensors").write_bytes(DAMAGED[case])
    with pytest.raises(ModelFileError, match=r"model\.safetensors is damaged .*again\.$"):
        resolve_model(folder)


def test_fault_29_a_lying_header_allocates_nothing(folder: Path) -> None:
    """In a process with 1 GB of address space to spare, a header that claims 2^60 bytes is only a sentence."""
    (folder / "model.safetensors").write_bytes(header({}, length=2**60))
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from dpa.models.files import check_safetensors\n"
        "from dpa.core.errors import ModelFileError\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))\n"
        "try: check_safetensors(Path(sys.argv[1]))\n"
        "except ModelFileError: print('refused')\n"
    )
    assert python("-c", code, folder / "model.safetensors").stdout.strip() == "refused"


def test_sharded_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    resolve_model(folder)
    for name, reason in (("../w.safetensors", "own folder"), ("model-2.safetensors", "lacks"), ("w.bin", "own folder")):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(ModelFileError, match=reason):
            resolve_model(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_broken_config_is_one_sentence(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"config\.json"):
        resolve_model(folder)


def test_revision_names_the_content(folder: Path, tmp_path: Path) -> None:
    first = folder_revision(folder)
    (folder / "README.md").write_text("words about the model do not change it")
    assert folder_revision(folder) == first
    save_file({"w": np.arange(1, 7, dtype=np.float32)}, folder / "model.safetensors")
    assert folder_revision(folder) != first
    save_file({"w": np.arange(6, dtype=np.float32)}, folder / "model.safetensors")
    moved = folder.rename(tmp_path / "elsewhere")
    assert folder_revision(moved) == first


def test_parameters_are_counted_from_the_headers_of_all_shards(tmp_path: Path) -> None:
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for (name, file), shape in zip(shards.items(), ((3, 4), (5,)), strict=True):
        save_file({name: np.zeros(shape, np.float32)}, tmp_path / file)
    assert count_parameters(tmp_path) == 0, "no model.safetensors, no index"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert count_parameters(tmp_path) == 17


def test_check_safetensors_accepts_an_empty_tensor(tmp_path: Path) -> None:
    save_file({"w": np.zeros((0, 4), dtype=np.float32)}, tmp_path / "w.safetensors")
    check_safetensors(tmp_path / "w.safetensors")
