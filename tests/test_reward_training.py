"""The reward model: its loss, its ridge, its split, what is saved, and that the saved folder scores on 0-100 by itself.
pytest tests/test_reward_training.py
"""

import gc
import json
import time
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pyarrow as pa
import pytest
import torch
from forks import start
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from dpa.core.errors import ConfigError, DataError, TrainingError
from dpa.core.sections.reward import RewardTrainConfig
from dpa.scoring.reward_model import encode, forward, read_spec
from dpa.scoring.reward_quality import measure_quality
from dpa.stages.train_reward import print_quality, train_reward
from dpa.training import reward_training
from dpa.training.checkpoints import newest_checkpoint
from dpa.training.reward_head import Head, Unit
from dpa.training.reward_rows import RatedExample, split_by_prompt
from dpa.training.reward_trainer import UNMARKED, build_trainer, masked_mse
from dpa.training.reward_training import train_reward_model
from dpa.training.ridge import fit_ridge
from dpa.training.trainers import CountSeconds

NAN = float("nan")
ATTRIBUTES = ("long", "short")
SCALES = {"long": (0.0, 4.0), "short": (0.0, 4.0)}


def examples(prompts: int = 40, seed: int = 0) -> list[RatedExample]:
    """Four responses to each prompt, marked by their length; every other one lacks the second mark."""
    random = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        for place in range(4):
            words = int(random.integers(1, 20))
            marks = (4.0 * words + 10.0, NAN if place % 2 else 90.0 - 4.0 * words)
            messages = [{"role": "user", "content": f"question {prompt}"}]
            rows.append(RatedExample(f"p{prompt}", messages, "ab " * words, marks))
    return rows


def config(backbone: Path, **fields: Any) -> RewardTrainConfig:
    settings = {"learning_rate": 3e-3, "epochs": 3, "batch_size": 16, "max_length": 128, "held_out": 0.25, **fields}
    return RewardTrainConfig.model_validate({"backbone": str(backbone), **settings})


def save_tiny_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"vocab_size": 261, "max_position_embeddings": 256, "pad_token_id": 0, "initializer_range": 0.2}
    BertModel(BertConfig(**fields)).save_pretrained(folder)
    tiny_tokenizer(chat_template=None).save_pretrained(folder)
    return folder


def saved_scores(folder: Path, rows: list[RatedExample]) -> np.ndarray:
    """Scores through plain transformers, one row at a time, without this package's own reading of the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for row in rows:
        chat = [*row.messages, {"role": "assistant", "content": row.response}]
        inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            scores.append(model(**inputs).logits[0].tolist())
    return np.array(scores)


def test_activations_are_computed_twice_where_that_is_asked(tmp_path: Path) -> None:
    backbone = save_tiny_model(tmp_path / "backbone")
    data = [{"input_ids": list(range(5, 25)), "labels": np.zeros(2, np.float32)}] * 4
    counts = []
    for asked in (False, True):
        model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=2)
        settings = config(backbone, batch_size=4, epochs=1, gradient_checkpointing=asked)
        trainer = build_trainer(model, data, settings, 0, tmp_path / str(asked), 0)
        calls: list[int] = []
        model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        counts.append(len(calls))
    assert counts == [1, 2]


# The loss


def test_a_row_with_one_mark_trains_one_output() -> None:
    """The gradient of a masked row equals that of the same row in a model that has only that output."""
    torch.manual_seed(0)
    head, features_BH = torch.nn.Linear(8, 3), torch.randn(4, 8)
    labels_BM = torch.full((4, 3), UNMARKED)
    labels_BM[:, 1] = torch.randn(4)
    masked_mse(head(features_BH), labels_BM, None).backward()
    alone = torch.nn.Linear(8, 1)
    alone.load_state_dict({"weight": head.weight[1:2].detach(), "bias": head.bias[1:2].detach()})
    torch.nn.functional.mse_loss(alone(features_BH)[:, 0], labels_BM[:, 1]).backward()
    assert torch.allclose(head.weight.grad[1], alone.weight.grad[0])
    assert not head.weight.grad[[0, 2]].any()
    assert not head.bias.grad[[0, 2]].any()


@given(st.integers(0, 1000))
@settings(max_examples=30)
def test_masked_loss_is_the_mean_over_marks_and_does_not_depend_on_accumulation(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits, labels = random.normal(size=(2, 6, 3)).astype(np.float32)
    present = random.random((6, 3)) < 0.5
    present[0, 0] = True
    marked = torch.from_numpy(np.where(present, labels, UNMARKED).astype(np.float32))
    expected = ((logits - labels)[present] ** 2).mean()
    assert masked_mse(torch.from_numpy(logits), marked, None).item() == pytest.approx(expected, rel=1e-5)
    count = torch.tensor(present.sum())
    parts = [masked_mse(torch.from_numpy(logits[half]), marked[half], count) for half in (slice(0, 2), slice(2, 6))]
    assert sum(part.item() for part in parts) == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_any_mark_costs_nothing() -> None:
    assert masked_mse(torch.ones(2, 2), torch.full((2, 2), UNMARKED), None).item() == 0


# Ridge


@given(st.integers(0, 1000), st.floats(0.01, 100))
@settings(max_examples=25)
def test_ridge_equals_sklearn_on_each_outputs_own_rows(seed: int, penalty: float) -> None:
    random = np.random.default_rng(seed)
    features_NH = random.normal(size=(40, 6)) * random.uniform(0.1, 10, 6) + random.normal(size=6)
    labels_NM = features_NH @ random.normal(size=(6, 2)) + random.normal(size=(40, 2)) + 50
    labels_NM[random.random((40, 2)) < 0.3] = np.nan
    weight_MH, bias_M = fit_ridge(features_NH, labels_NM, penalty)
    for output in range(2):
        rows = ~np.isnan(labels_NM[:, output])
        scaler = StandardScaler().fit(features_NH[rows])
        model = Ridge(alpha=penalty).fit(scaler.transform(features_NH[rows]), labels_NM[rows, output])
        expected = model.predict(scaler.transform(features_NH))
        assert np.allclose(features_NH @ weight_MH[output] + bias_M[output], expected, atol=1e-6)


def test_ridge_without_intercept_still_shrinks_to_the_mean() -> None:
    random = np.random.default_rng(0)
    features_NH = np.concatenate([np.full((60, 1), 3.0), random.normal(size=(60, 4))], axis=1)
    labels_NM = (70 + features_NH[:, 1] * 5)[:, None]
    exact, bias_M = fit_ridge(features_NH, labels_NM, 1e-6, intercept=False)
    assert not bias_M.any()
    assert np.allclose(features_NH @ exact.T, labels_NM, atol=0.01)
    shrunk, _ = fit_ridge(features_NH, labels_NM, 1e9, intercept=False)
    assert np.allclose(features_NH @ shrunk.T, labels_NM.mean(), atol=0.1)


def test_ridge_survives_constant_features_and_missing_outputs() -> None:
    features_NH = np.concatenate([np.zeros((10, 1)), np.full((10, 1), 7.0), np.arange(10.0)[:, None]], axis=1)
    labels_NM = np.stack([np.arange(10.0), np.full(10, np.nan)], axis=1)
    for intercept in (True, False):
        weight_MH, bias_M = fit_ridge(features_NH, labels_NM, 1e-3, intercept)
        assert np.allclose(features_NH @ weight_MH[0] + bias_M[0], labels_NM[:, 0], atol=0.05)
        assert not weight_MH[1].any()
        assert bias_M[1] == 0


# Units, head, split


@pytest.mark.parametrize("has_bias", [True, False])
def test_leaving_the_unit_is_exact(has_bias: bool) -> None:
    random = np.random.default_rng(0)
    marks_NM = random.uniform(0, 100, (30, 3))
    marks_NM[::2, 1] = np.nan
    marks_NM[:, 2] = 40.0  # an attribute that never varies
    features_NH, weight_MH = random.normal(size=(30, 5)), random.normal(size=(3, 5))
    bias_M = random.normal(size=3) if has_bias else np.zeros(3)
    unit = Unit.of(marks_NM, has_bias)
    out_weight, out_bias = unit.leave(weight_MH, bias_M)
    inside = features_NH @ weight_MH.T + bias_M
    assert np.allclose(unit.enter(features_NH @ out_weight.T + out_bias), inside)
    assert has_bias or not out_bias.any()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gpt2", "bert"])
def test_head_of_its_features_is_the_models_output(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny_bert(tmp_path) if architecture == "bert" else save_tiny_model(tmp_path, architecture)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    head = Head(model, 3)
    assert head.has_bias is (architecture == "bert")
    ids_N = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    features_NH = head.features(ids_N, 0)
    weight_MH, bias_M = head.read()
    assert np.allclose(features_NH @ weight_MH.T + bias_M, forward(model, ids_N, 0), atol=1e-4)


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_keeps_prompts_whole(numbers: list[int], held_out: float, seed: int) -> None:
    prompt_ids = [f"p{number}" for number in numbers]
    if len(set(numbers)) < 2:
        with pytest.raises(DataError, match="at least two"):
            split_by_prompt(prompt_ids, held_out, seed)
        return
    train, hold = split_by_prompt(prompt_ids, held_out, seed)
    assert sorted([*train, *hold]) == list(range(len(numbers)))
    assert train
    assert hold
    assert not {prompt_ids[row] for row in train} & {prompt_ids[row] for row in hold}
    assert abs(len({prompt_ids[row] for row in hold}) - held_out * len(set(numbers))) <= 1


# Quality


@given(st.integers(0, 500))
@settings(max_examples=30)
def test_pairwise_accuracy_against_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    marks_NM = random.integers(0, 3, (20, 1)).astype(float)
    marks_NM[random.random((20, 1)) < 0.2] = np.nan
    predicted_NM = random.integers(0, 4, (20, 1)).astype(float)
    prompt_ids = [f"p{number}" for number in random.integers(0, 5, 20)]
    right = pairs = 0.0
    for i in range(20):
        for j in range(i):
            difference = marks_NM[i, 0] - marks_NM[j, 0]
            if prompt_ids[i] == prompt_ids[j] and difference and not np.isnan(difference):
                said = predicted_NM[i, 0] - predicted_NM[j, 0]
                pairs += 1
                right += 0.5 if said == 0 else float((said > 0) == (difference > 0))
    measured = measure_quality(predicted_NM, marks_NM, prompt_ids, ["a"])["a"]
    assert measured["pairs"] == pairs
    assert measured["pairwise_accuracy"] == (pytest.approx(right / pairs) if pairs else None)


def test_quality_of_a_perfect_an_inverted_and_a_constant_model() -> None:
    marks_NM = np.array([[10.0], [30.0], [50.0], [NAN]])
    ids = ["p", "p", "q", "q"]
    perfect = measure_quality(marks_NM, marks_NM, ids, ["a"])["a"]
    assert (perfect["mse"], perfect["pearson"], perfect["kendall"], perfect["n"]) == (0, pytest.approx(1), 1, 3)
    inverted = measure_quality(-marks_NM, marks_NM, ids, ["a"])["a"]
    assert (inverted["pearson"], inverted["pairwise_accuracy"]) == (pytest.approx(-1), 0)
    constant = measure_quality(np.full((4, 1), 30.0), marks_NM, ids, ["a"])["a"]
    assert (constant["pearson"], constant["kendall"], constant["pairwise_accuracy"]) == (None, None, 0.5)
    unscored = measure_quality(np.array([[NAN], [30.0], [50.0], [NAN]]), marks_NM, ids, ["a"])["a"]
    assert (unscored["n"], unscored["unscored"]) == (2, 1)


# Training, end to end


@pytest.mark.parametrize(
    ("method", "architecture"),
    [("full", "llama"), ("full", "bert"), ("lora", "mistral"), ("lora", "bert"), ("ridge", "llama"), ("ridge", "bert")],
)
def test_it_learns_and_the_folder_scores_by_itself(tmp_path: Path, method: str, architecture: str) -> None:
    backbone = tmp_path / "backbone"
    save_tiny_bert(backbone) if architecture == "bert" else save_tiny_model(backbone, architecture)
    rows = examples()
    out = tmp_path / "reward"
    facts = train_reward_model(rows, ATTRIBUTES, SCALES, config(backbone, method=method), out)
    for name in ATTRIBUTES:
        assert facts["quality"][name]["mse"] < 0.6 * facts["baselines"]["mean"][name]["mse"]
        assert facts["quality"][name]["pairwise_accuracy"] > 0.75
    assert facts["baselines"]["length"]["long"]["pearson"] > 0.99, "length explains these marks wholly"
    spec = read_spec(out)
    assert spec.attributes == ATTRIBUTES
    assert spec.scales == SCALES
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert model.config.id2label == dict(enumerate(ATTRIBUTES))
    assert model.config.problem_type == "regression"
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    if architecture != "bert":  # encoders have no chat template
        assert np.allclose(saved_scores(out, rows[:3]), _forward_folder(out, rows[:3]), atol=1e-3)
    marks = np.array([row.marks[0] for row in rows])
    assert np.corrcoef(_forward_folder(out, rows)[:, 0], marks)[0, 1] > 0.8


def _forward_folder(folder: Path, rows: list[RatedExample]) -> np.ndarray:
    tokenizer, spec = AutoTokenizer.from_pretrained(folder), read_spec(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    asked = [row.messages for row in rows]
    ids_N = encode(tokenizer, spec.template, spec.max_length, asked, [row.response for row in rows])
    return forward(model, [ids or [] for ids in ids_N], tokenizer.pad_token_id)


def test_what_bf16_costs_is_measured_when_the_optimizer_is_gone_or_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The moments take twice the memory of the copy that the measurement needs."""
    held: list[bool] = []

    def optimizers() -> list[torch.optim.AdamW]:
        return [each for each in gc.get_objects() if isinstance(each, torch.optim.AdamW)]

    def no_memory(*_: Any) -> None:
        held.append(any(each not in of_others for each in optimizers()))

    monkeypatch.setattr(reward_training, "measure_precision", no_memory)
    gc.collect()
    of_others = WeakSet(optimizers())  # what another test of this process may have left
    gc.disable()
    try:
        backbone = save_tiny_model(tmp_path / "backbone")
        train_reward_model(examples(8), ATTRIBUTES, SCALES, config(backbone, epochs=1), tmp_path / "reward")
    finally:
        gc.enable()
    assert held == [False, True, False], "before, after the first step, and after training"
    assert caplog.text.count("in two precisions, so what bf16 costs it is not measured") == 1


def test_a_trained_reward_model_is_a_backbone_for_other_attributes(tmp_path: Path) -> None:
    backbone = save_tiny_model(tmp_path / "backbone")
    train_reward_model(examples(), ATTRIBUTES, SCALES, config(backbone, method="ridge"), tmp_path / "two")
    one = [RatedExample(row.prompt_id, row.messages, row.response, row.marks[:1]) for row in examples()]
    train_reward_model(one, ["long"], {"long": (0, 4)}, config(tmp_path / "two", method="ridge"), tmp_path / "one")
    assert read_spec(tmp_path / "one").attributes == ("long",)


def test_a_tokenizer_that_pads_with_eos_gets_a_pad_token(tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    tiny_model().save_pretrained(backbone)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(backbone)
    train_reward_model(examples(), ATTRIBUTES, SCALES, config(backbone, method="ridge"), tmp_path / "reward")
    saved = AutoTokenizer.from_pretrained(tmp_path / "reward")
    assert saved.pad_token_id != saved.eos_token_id
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert model.config.pad_token_id == saved.pad_token_id


def test_training_twice_gives_the_same_weights(tmp_path: Path) -> None:
    backbone = save_tiny_model(tmp_path / "backbone")
    for name in ("a", "b"):
        train_reward_model(examples(), ATTRIBUTES, SCALES, config(backbone, epochs=1), tmp_path / name, seed=3)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_accumulation_gives_the_same_step() -> None:
    """Micro-batches with unequal numbers of marks add up to the gradient of the whole batch."""
    torch.manual_seed(0)
    head, features_BH = torch.nn.Linear(8, 2), torch.randn(8, 8)
    labels_BM = torch.randn(8, 2)
    labels_BM[:5, 1] = UNMARKED
    masked_mse(head(features_BH), labels_BM, None).backward()
    whole = head.weight.grad.clone()
    head.weight.grad = None
    for part in (slice(0, 4), slice(4, 8)):
        masked_mse(head(features_BH[part]), labels_BM[part], (labels_BM != UNMARKED).sum()).backward()
    assert torch.allclose(head.weight.grad, whole, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    backbone = save_tiny_model(tmp_path / "backbone")
    with pytest.raises(TrainingError, match="learning_rate"):
        train_reward_model(
            examples(), ATTRIBUTES, SCALES, config(backbone, learning_rate=1e30, epochs=4), tmp_path / "reward"
        )
    assert not (tmp_path / "reward").exists()


INTERRUPTED = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1])))
from test_reward_training import ATTRIBUTES, SCALES, config, examples
from dpa.training.reward_training import train_reward_model
backbone, out = Path(sys.argv[2]), Path(sys.argv[3])
train_reward_model(examples(), ATTRIBUTES, SCALES, config(backbone, batch_size=1, epochs=2.5), out)
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """kill -9 after a checkpoint, with an incomplete later one left behind, changes no bit of the weights."""
    backbone, out = save_tiny_model(tmp_path / "backbone"), tmp_path / "killed"
    process = start("-c", INTERRUPTED, Path(__file__).parent, backbone, out)
    training = tmp_path / "killed.training"
    deadline = time.monotonic() + 120
    while not (training.is_dir() and any(map(newest_checkpoint, training.iterdir()))):
        assert process.poll() is None, "it ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not out.exists()
    (checkpoints,) = training.iterdir()
    torn = checkpoints / "checkpoint-100000"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half of a")
    settings = config(backbone, batch_size=1, epochs=2.5)
    seconds = CountSeconds()
    train_reward_model(examples(), ATTRIBUTES, SCALES, settings, out, seconds=seconds)
    assert seconds.earlier > 0, "what the killed process took is not lost"
    train_reward_model(examples(), ATTRIBUTES, SCALES, settings, tmp_path / "whole")
    resumed, whole = ((folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "whole"))
    assert resumed == whole


def test_rows_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [*examples(), RatedExample("p0", [{"role": "user", "content": "q"}], "x" * 500, (50.0, 50.0))]
    backbone = save_tiny_model(tmp_path / "backbone")
    facts = train_reward_model(rows, ATTRIBUTES, SCALES, config(backbone, method="ridge"), tmp_path / "reward")
    assert facts["training"]["rejected_rows"] == 1


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    backbone = save_tiny_model(tmp_path / "backbone")
    unrated = [RatedExample(row.prompt_id, row.messages, row.response, (row.marks[0], NAN)) for row in examples()]
    with pytest.raises(DataError, match="has a mark on short"):
        train_reward_model(unrated, ATTRIBUTES, SCALES, config(backbone, method="ridge"), tmp_path / "reward")
    with pytest.raises(ConfigError, match=r"lacks \{response\}"):
        train_reward_model(
            examples(), ATTRIBUTES, SCALES, config(backbone, template="Rate: {prompt}"), tmp_path / "reward"
        )


# The stage


def test_stage_trains_once(tmp_path: Path) -> None:
    rows = examples(prompts=10)
    table = pa.table(
        {
            "prompt_id": [row.prompt_id for row in rows],
            "messages": [json.dumps(row.messages) for row in rows],
            "response": [row.response for row in rows],
            "long": [row.marks[0] for row in rows],
            "short": pa.array([None if np.isnan(row.marks[1]) else row.marks[1] for row in rows], pa.float64()),
        }
    )
    backbone, out = save_tiny_model(tmp_path / "backbone"), tmp_path / "reward"
    facts = train_reward(table, SCALES, config(backbone, method="ridge", attributes=["short"]), out)
    print_quality(facts)
    assert read_spec(out).attributes == ("short",)
    before = (out / "model.safetensors").stat().st_mtime_ns
    again = train_reward(table, SCALES, config(backbone, method="ridge", attributes=["short"]), out)
    assert again["quality"] == facts["quality"]
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"nobody rated 'warm'; rated are: long, short\."):
        train_reward(table, SCALES, config(backbone, attributes=["warm"]), tmp_path / "other")
