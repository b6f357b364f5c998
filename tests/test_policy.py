"""Policies on disk: what is saved loads anywhere, whole or not at all, and carries its direction space.
pytest tests/test_policy.py
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import CHAT_TEMPLATE, SPACE, save_tiny_model, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpa.core.errors import DirectionError, ModelFileError, RunFolderError, StorageError
from dpa.core.presets import SPACES
from dpa.models.chat_template import steerable_template
from dpa.models.files import SPACE_FILE, load_space
from dpa.models.policy import (
    encode_prompt,
    end_token_ids,
    ensure_pad_token,
    load_policy,
    make_steerable,
    save_policy,
    turn_end_id,
)
from dpa.world.start_model import build_tokenizer

QUESTION = [{"role": "user", "content": "Why?"}]
ASKED = {"helpfulness": 0.8, "verbosity": -0.6}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "a policy"
    save_policy(tiny_model(), tiny_tokenizer(), folder, SPACE, {"iteration": 1})
    return folder


def test_a_tokenizer_of_whole_words_is_told_no_zero_padded_weights() -> None:
    tokenizer, space = build_tokenizer(), SPACES["dpa-v1"]
    make_steerable(tokenizer, space)
    with pytest.raises(ModelFileError, match=r"zero_padded: .* no tokens for `helpfulness\*\+100 .* let it be false"):
        make_steerable(tokenizer, replace(space, zero_padded=True))


def test_a_saved_policy_is_a_plain_model_folder(saved: Path) -> None:
    """Stock transformers, which knows nothing of dpa, loads and steers it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True))
    text = tokenizer.apply_chat_template(QUESTION, preference=ASKED, tokenize=False, add_generation_prompt=True)
    assert text == f"<|system|>{SPACE.prompt(SPACE.direction(ASKED))}<|user|>Why?<|assistant|>"
    assert sorted(file.suffix for file in saved.iterdir() if file.suffix not in (".json", ".jinja")) == [".safetensors"]


def test_other_programs_generate_from_it_with_a_cache(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.use_cache = False  # as transformers' Trainer leaves it
    save_policy(model, tiny_tokenizer(), tmp_path / "policy", SPACE, {})
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["use_cache"] is True


def test_space_and_provenance_travel_with_it(saved: Path) -> None:
    assert load_space(saved) == SPACE
    assert json.loads((saved / SPACE_FILE).read_text())["provenance"] == {"iteration": 1}


def test_saving_again_replaces_the_whole_folder(saved: Path) -> None:
    (saved / "stranger").touch()
    model, tokenizer = load_policy(saved)
    save_policy(model, tokenizer, saved, SPACE, {"iteration": 2})
    assert not (saved / "stranger").exists()
    again, _ = load_policy(saved)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_failed_save_leaves_the_old_policy(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_policy(tiny_model(seed=1), tiny_tokenizer(), saved, SPACE, {"not": {"json": object()}})
    assert json.loads((saved / SPACE_FILE).read_text())["provenance"] == {"iteration": 1}
    (tmp_path / "file").touch()
    with pytest.raises((RunFolderError, StorageError), match="policy"):
        save_policy(tiny_model(), tiny_tokenizer(), tmp_path / "file" / "policy", SPACE, {})


def test_loaded_policies_pad_on_the_left_and_are_in_eval_mode(saved: Path) -> None:
    model, tokenizer = load_policy(saved)
    assert tokenizer.padding_side == "left"
    assert not model.training and model.dtype == torch.float32


@pytest.mark.parametrize(
    ("pad", "unknown", "expected"),
    [
        (None, None, "<|pad|>"),
        ("<|end|>", None, "<|pad|>"),
        ("<|user|>", None, "<|user|>"),
    ],
)
def test_pad_token_comes_from_the_vocabulary(pad: str | None, unknown: str | None, expected: str) -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.pad_token, tokenizer.unk_token = pad, unknown
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == expected and len(tokenizer) == size


def test_every_declared_end_token_ends_a_response() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert end_token_ids(model, tokenizer) == (1,)
    model.generation_config.eos_token_id = [7, 1, 9]
    assert end_token_ids(model, tokenizer) == (1, 7, 9)
    model.generation_config.eos_token_id = None
    assert end_token_ids(model, tokenizer) == (1,)


def test_a_turn_ends_as_the_template_ends_it() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert turn_end_id(model, tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    model.generation_config.eos_token_id = [1, 3]
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|user|>")  # token 3, as Gemma's <end_of_turn>
    assert turn_end_id(model, tokenizer) == 3
    tokenizer.chat_template = steerable_template(None, SPACE)
    assert turn_end_id(model, tokenizer) == tokenizer.eos_token_id


def test_encode_prompt_states_the_direction(saved: Path) -> None:
    _, tokenizer = load_policy(saved)
    ids = encode_prompt(tokenizer, SPACE, QUESTION, (0.8, -0.6))
    assert tokenizer.decode(ids) == f"<|system|>{SPACE.prompt(SPACE.direction(ASKED))}<|user|>Why?<|assistant|>"
    assert tokenizer.decode(encode_prompt(tokenizer, SPACE, QUESTION, None)) == "<|user|>Why?<|assistant|>"


def test_a_plain_model_without_a_template_is_steerable(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "plain", chat_template=None)
    model, tokenizer = load_policy(tmp_path / "plain")
    save_policy(model, tokenizer, tmp_path / "policy", SPACE, {})
    _, tokenizer = load_policy(tmp_path / "policy")
    ids = encode_prompt(tokenizer, SPACE, [{"role": "user", "content": "Once upon"}], (0.8, -0.6))
    assert tokenizer.decode(ids) == SPACE.prompt(SPACE.direction(ASKED)) + "\nOnce upon"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ModelFileError, "readable JSON"),
        ("[]", ModelFileError, "mapping"),
        ("{}", ModelFileError, "mapping"),
        ('{"space": {"objectives": []}}', ModelFileError, "center"),
    ],
)
def test_a_damaged_space_is_one_sentence(saved: Path, text: str, error: type, message: str) -> None:
    (saved / SPACE_FILE).write_text(text)
    with pytest.raises(error, match=message):
        load_space(saved)


def test_a_wrong_value_in_a_space_is_a_direction_error(saved: Path) -> None:
    data = json.loads((saved / SPACE_FILE).read_text())
    data["space"]["max_angle"] = 0
    (saved / SPACE_FILE).write_text(json.dumps(data))
    with pytest.raises(DirectionError, match="max_angle"):
        load_space(saved)


def test_folders_that_are_no_policy_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no folder"):
        load_policy(tmp_path / "missing")
    with pytest.raises(ModelFileError, match=r"dpa_config\.json"):
        load_space(save_tiny_model(tmp_path / "plain"))
    (tmp_path / "plain" / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelFileError, match="does not load"):
        load_policy(tmp_path / "plain")
