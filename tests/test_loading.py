"""Folders that load as something else than what they hold: each is refused in one sentence, none is drawn at random.
pytest tests/test_loading.py
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SPACE, save_tiny_model, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from dpa.core.errors import ModelFileError
from dpa.models.files import resolve_model
from dpa.models.loading import load_model
from dpa.models.policy import check_policy, load_policy, load_prompting, save_policy
from dpa.sampling.samplers import SamplerSpec
from dpa.scoring.folding import bake_direction
from dpa.scoring.reward_model import load_classifier

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("made") / "llama")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A complete tiny Llama, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def configure(folder: Path, name: str = "config.json", **fields: object) -> None:
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**data, **fields}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = change(load_file(folder / WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def refused(folder: Path, match: str) -> None:
    """Both a policy and a reward backbone refuse the folder in one sentence, within seconds."""
    begun = time.monotonic()
    for load in (lambda: load_policy(folder), lambda: load_classifier(folder, torch.float32, num_labels=2)):
        with pytest.raises(ModelFileError, match=match) as error:
            load()
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert time.monotonic() - begun < 20


# --- 42: weights that are not those of the configuration ------------------------------------------------------------


def test_42_prefixed_names_are_refused(folder: Path) -> None:
    rewrite(folder, lambda weights: {f"_orig_mod.{name}": tensor for name, tensor in weights.items()})
    refused(folder, r"lacks 2\d weights \(.*drawn at random")
    with pytest.raises(ModelFileError, match=r"while it holds 21 weights \(_orig_mod\."):
        load_policy(folder)


def test_42_more_layers_than_stored_are_refused(folder: Path) -> None:
    configure(folder, num_hidden_layers=3)
    refused(folder, r"lacks 9 weights \(model\.layers\.2\.")


def test_42_fewer_layers_than_stored_are_refused(folder: Path) -> None:
    configure(folder, num_hidden_layers=1)
    refused(folder, r"holds 9 weights \(model\.layers\.1\..* no place")


def test_42_one_missing_tensor_is_refused_and_named(folder: Path) -> None:
    rewrite(folder, lambda weights: {n: t for n, t in weights.items() if n != "model.norm.weight"})
    refused(folder, r"lacks 1 weight \(model\.norm\.weight\)")


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "opt", "mixtral", "mistral", "mamba"])
def test_42_another_architecture_over_the_same_file_is_refused(folder: Path, model_type: str) -> None:
    configure(folder, model_type=model_type)
    refused(folder, "written by LlamaForCausalLM")
    configure(folder, architectures=None)
    if model_type != "mistral":  # whose tensors have the same names, shapes and meaning
        with pytest.raises(ModelFileError):
            load_policy(folder)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 64), ("vocab_size", 300), ("num_key_value_heads", 4)])
def test_42_another_shape_is_refused(folder: Path, field: str, value: int) -> None:
    configure(folder, **{field: value})
    refused(folder, r"in another shape .* instead of")


def test_42_a_classifier_is_no_policy(folder: Path) -> None:
    model, _, _ = load_classifier(folder, torch.float32, num_labels=3)
    model.save_pretrained(folder)
    with pytest.raises(ModelFileError, match=r"lm_head\.weight"):
        load_policy(folder)
    with pytest.raises(ModelFileError, match=r"score\.weight"):
        shutil.copy(save_tiny_model(folder.parent / "other") / WEIGHTS, folder)
        load_classifier(folder, torch.float32)


def test_42_whole_numbers_without_their_scales_are_refused(folder: Path) -> None:
    rewrite(folder, lambda weights: {n: (t * 100).to(torch.int8) for n, t in weights.items()})
    refused(folder, "whole numbers")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_are_read(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda weights: {n: t.to(dtype) for n, t in weights.items()})
    model, _ = load_policy(folder)
    assert model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight.to(dtype).float())


def test_tied_weights_and_a_new_head_are_not_missing(tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    model, _ = load_policy(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    classifier, _, _ = load_classifier(tmp_path, torch.float32, num_labels=3)
    assert classifier.score.out_features == 3


def test_an_encoder_with_another_head_is_a_backbone(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=261, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, pad_token_id=0
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    load_model(AutoModelForSequenceClassification, resolve_model(tmp_path), torch.float32, "m", True, num_labels=2)


def test_sharded_bf16_weights_are_a_start_model(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    tiny_model().to(torch.bfloat16).save_pretrained(folder, max_shard_size="20kB")
    assert len(list(folder.glob("model-0*.safetensors"))) > 2
    model, _ = load_policy(folder)
    assert model.dtype == torch.float32 and torch.isfinite(model(torch.tensor([[5, 6]])).logits).all()
    index = folder / f"{WEIGHTS}.index.json"
    first = sorted(folder.glob("model-0*.safetensors"))[0]
    first.rename(folder / "elsewhere.safetensors")
    refused(folder, f"lacks {first.name}, which its index names")
    (folder / "elsewhere.safetensors").rename(first)
    names = json.loads(index.read_text())
    del names["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(names))
    model, _ = load_policy(folder)  # the index is only how the files are found: the tensor itself is there
    assert torch.equal(model.model.norm.weight, tiny_model().model.norm.weight)


# --- 4: odd fields, odd files ---------------------------------------------------------------------------------------

ODD_FIELDS = {
    "return_dict": ({"return_dict": False}, "return_dict is false"),
    "dropout": ({"attention_dropout": 5}, "attention_dropout is 5, not a share"),
    "pad beyond": ({"pad_token_id": 9999}, "pad_token_id is 9999, beyond the 261 rows"),
    "pad text": ({"pad_token_id": "x"}, "pad_token_id"),
    "eos beyond": ({"eos_token_id": 9999}, "eos_token_id is 9999"),
    "eos list beyond": ({"eos_token_id": [1, 400]}, "eos_token_id is 400"),
    "dtype": ({"dtype": "float7"}, "dtype = 'float7'"),
    "torch_dtype": ({"torch_dtype": "float7"}, "torch_dtype = 'float7'"),
    "dtype of integers": ({"dtype": "int8"}, "dtype = 'int8'"),
    "dtype list": ({"dtype": ["float32"]}, "dtype"),
    "no positions": ({"max_position_embeddings": None}, "max_position_embeddings"),
    "positions as text": ({"max_position_embeddings": "512"}, "max_position_embeddings"),
    "no position at all": ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    "negative positions": ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
    "text_config": ({"text_config": {"a": 1}}, r"config\.json"),
    "text_config text": ({"text_config": "x"}, r"config\.json"),
    "no heads": ({"num_attention_heads": 0}, r"config\.json"),
    "odd heads": ({"num_attention_heads": 5}, "number of attention heads"),
    "activation": ({"hidden_act": "nope"}, "nope"),
    "model_type list": ({"model_type": ["llama"]}, r"config\.json"),
    "labels": ({"id2label": [1]}, r"config\.json"),
    "quantised": ({"quantization_config": {"a": 1}}, "quant_method"),
    "architectures": ({"architectures": "LlamaForCausalLM"}, "architectures"),
    "rope": ({"rope_parameters": []}, "rope_parameters"),
    **{
        f"{field} of 10^9": ({field: 10**9}, rf"{field} = 1000000000, but the weights are 21 tensors")
        for field in ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads")
    },
    "layers of 10^400": ({"num_hidden_layers": 10**400}, "num_hidden_layers = 1000"),
    "a thousand layers": ({"num_hidden_layers": 1000}, "num_hidden_layers = 1000, but"),
    "large but below": ({"hidden_size": 1_000_000, "intermediate_size": 9_000_000}, "another shape"),
}


@pytest.mark.parametrize("template", [3, True])
def test_50_a_chat_template_that_is_no_text_is_one_sentence(folder: Path, template: object) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    configure(folder, "tokenizer_config.json", chat_template=template)
    refused(folder, "chat_template is (int|bool), not text")


def test_50_chat_templates_without_a_default_are_one_sentence(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "tool_use", "template": "{{ messages }}"}]
    configure(folder, "tokenizer_config.json", chat_template=named)
    refused(folder, r"of its chat templates \(tool_use\) none is called default")


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages[9].content }}", "hello", "{{ raise_exception('no') }}"])
def test_50_a_template_that_does_not_work_is_found_before_any_stage(folder: Path, template: str) -> None:
    check_policy(folder, space=SPACE)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelFileError, match=r"its chat template .*; give the tokenizer a working one\."):
        check_policy(folder, space=SPACE)


@pytest.mark.parametrize("case", ODD_FIELDS)
def test_50_an_odd_field_of_config_json_is_one_sentence(folder: Path, case: str) -> None:
    fields, match = ODD_FIELDS[case]
    configure(folder, **fields)
    with pytest.raises(ModelFileError, match=match) as error:
        load_policy(folder)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "generation_config.json"])
def test_50_a_pipe_in_place_of_a_file_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, f"{name} is no regular file")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_50_twenty_thousand_brackets_are_one_sentence(folder: Path, name: str) -> None:
    (folder / name).write_text("[" * 20_000)
    refused(folder, "JSON" if name != "tokenizer.json" else "tokenizer")


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"model": 3}', "\x00\x01"])
def test_a_damaged_tokenizer_is_one_sentence(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    refused(folder, "tokenizer")


def test_a_truncated_tokenizer_is_one_sentence(folder: Path) -> None:
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    refused(folder, "tokenizer")
    with pytest.raises(ModelFileError, match="tokenizer"):
        load_prompting(resolve_model(folder))


def test_a_link_to_nothing_is_one_sentence(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "gone")
    refused(folder, "not there")


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_4_a_token_beyond_the_embedding_is_refused_before_anything_is_trained(folder: Path, token: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({token: "<|beyond|>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelFileError, match=rf"the {token} of .*'<\|beyond\|>', is token 261, beyond the 261 rows"):
        load_policy(folder)


# --- 4: what is saved loads -----------------------------------------------------------------------------------------


def test_4_a_policy_that_would_not_load_is_never_put_in_place(tmp_path: Path) -> None:
    out = tmp_path / "policy"
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.config.pad_token_id = 9999
    with pytest.raises(ModelFileError, match=r"policy .*policy: .*pad_token_id is 9999"):
        save_policy(model, tokenizer, out, SPACE, {})
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|beyond|>"})
    with pytest.raises(ModelFileError, match="pad_token"):
        save_policy(model, tokenizer, out, SPACE, {})
    model.config.num_hidden_layers = 3
    with pytest.raises(ModelFileError, match="lacks 9 weights"):
        save_policy(model, tiny_tokenizer(), out, SPACE, {})
    assert not out.exists() and not list(tmp_path.iterdir())


def test_42_samplers_and_baked_copies_refuse_too(folder: Path, tmp_path: Path) -> None:
    configure(folder, num_hidden_layers=3)
    with pytest.raises(ModelFileError, match="lacks 9 weights"):
        SamplerSpec(str(folder), SPACE, 8).build()
    with pytest.raises(ModelFileError, match="lacks 9 weights"):
        bake_direction(folder, SPACE, SPACE.direction({"helpfulness": 1.0}), tmp_path / "baked")
