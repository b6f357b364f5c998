"""Every recipe for real models runs for a few steps: tiny random models in the real architectures, LoRA included.
pytest tests/test_recipes.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from tiny_models import save_tiny_model

from dpa.core.config import load_config, parse_config
from dpa.core.config_identity import fingerprint
from dpa.core.errors import ConfigError
from dpa.core.presets import DPA_V1
from dpa.recipes.dpa import Loop
from dpa.scoring.reward_model import RELEASED_SPEC
from dpa.storage.tables import read_json

RECIPES = Path(__file__).parents[1] / "recipes"
REAL = ("mistral-7b-dpa", "mistral-7b-dpa-lora", "qwen2.5-0.5b", "three-objectives")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rated rows in the documented shapes of HelpSteer and UltraFeedback, and prompts; three of these are held out."""
    folder = tmp_path_factory.mktemp("data")
    marks = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    helpsteer = [
        {
            "prompt": f"What is {p}?",
            "response": f"It is {'very ' * r}{p}.",
            **{name: (p + r + i) % 5 for i, name in enumerate(marks)},
        }
        for p in range(6)
        for r in range(2)
    ]
    ultrafeedback = [
        {
            "source": "evol_instruct",
            "instruction": f"Why {p}?",
            "models": ["a", "b"],
            "completions": [
                {
                    "response": f"Because {'of ' * r}{p}.",
                    "overall_score": 1.0 + (p + r) % 9,
                    "critique": "Fine.",
                    "annotations": {
                        name: {"Rating": str(1 + (p + r + i) % 5), "Rationale": "So."}
                        for i, name in enumerate(("instruction_following", "truthfulness", "honesty", "helpfulness"))
                    },
                }
                for r in range(2)
            ],
        }
        for p in range(6)
    ]
    prompts = [{"prompt": f"Why {p}?"} for p in range(6, 12)]
    held_out = [{"prompt": "Why 0?"}, {"prompt": "Why 20?"}, {"prompt": "Why 21?"}]
    for name, rows in {
        "helpsteer": helpsteer,
        "ultrafeedback": ultrafeedback,
        "prompts": prompts,
        "held_out": held_out,
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def small(recipe: str, data: Path, out: Path, model: Path, **more: Any) -> dict[str, Any]:
    """The recipe as it stands, its models, data and sizes replaced by tiny ones."""
    fields = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    files = {"helpsteer": "helpsteer", "helpsteer2": "helpsteer", "ultrafeedback": "ultrafeedback"}
    fields |= {"out": str(out), "policy": str(model), "iterations": 1}
    for ratings in fields["ratings"]:
        ratings["path"] = str(data / f"{files[ratings['format']]}.jsonl")
    fields["reward"]["train"] |= {"backbone": str(model), "batch_size": 4, "max_length": 600, "held_out": 0.2}
    fields["reward"]["train"]["allow_worse_than_mean"] = True  # a random backbone predicts nothing
    fields["prompts"] = {"path": str(data / "prompts.jsonl"), "count": 3}
    fields["rollout"] |= {"directions": 2, "samples": 2, "max_new_tokens": 6, "batch_size": 16}
    fields["selection"]["directions"] = 2
    fields["finetune"] |= {"max_length": 600, "packed_rows_per_step": 2}
    fields["evaluate"] |= {"prompts": {"path": str(data / "held_out.jsonl")}, "directions": 3, "resamples": 5}
    for dotted, value in more.items():
        section, _, name = dotted.partition("__")
        fields[section][name] = value
    return fields


@pytest.mark.parametrize(
    ("recipe", "architecture", "more"),
    [
        ("mistral-7b-dpa", "mistral", {}),
        ("mistral-7b-dpa-lora", "mistral", {}),
        ("qwen2.5-0.5b", "qwen2", {}),
        ("qwen2.5-0.5b", "llama", {"finetune__lora": {"rank": 2, "alpha": 4}}),
        ("three-objectives", "qwen3", {"finetune__gradient_checkpointing": True}),
    ],
)
def test_a_recipe_runs_for_a_few_steps(
    recipe: str, architecture: str, more: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", architecture, context=1024)
    with Loop(parse_config(small(recipe, data, tmp_path / "run", model, **more))) as loop:
        loop.run()
        assert all("Why 0?" not in messages for messages in loop.read_ratings()["messages"].to_pylist())
    run = tmp_path / "run"
    results = read_json(run / "results.json")
    assert [policy["name"] for policy in results["policies"]] == ["t = 0", "t = 1"]
    assert results["policies"][1]["ledger"]["finetune"]["extra"]["steps"] >= 1
    config = read_json(run / "iter_1" / "policy" / "config.json")
    assert config["model_type"] == architecture
    assert read_json(run / "reward_model" / "dpa_reward.json")["quality"]


def test_lora_on_frozen_bf16_weights_is_saved_in_bf16_and_has_moved(data: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "mistral", context=1024)
    config = small("mistral-7b-dpa-lora", data, tmp_path / "run", model, finetune__learning_rate=1e-2)
    with Loop(parse_config(config)) as loop:
        loop.train_reward()
        loop.score(0)
        loop.select(0)
        loop.finetune(0)
    name = "model.layers.0.self_attn.q_proj.weight"
    with safe_open(str(model / "model.safetensors"), "pt") as old:
        before = old.get_tensor(name)
    with safe_open(str(tmp_path / "run/iter_0/policy/model.safetensors"), "pt") as new:
        assert new.get_tensor(name).dtype == torch.bfloat16
        assert (new.get_tensor(name).float() - before).abs().max() > 1e-3
    with safe_open(str(tmp_path / "run/reward_model/model.safetensors"), "pt") as reward:
        assert reward.get_tensor("score.weight").dtype == torch.float32
        assert reward.get_tensor(name).dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", ["mistral-7b-dpa", "mistral-7b-dpa-lora"])
def test_the_papers_recipe_names_the_published_choices(recipe: str) -> None:
    config = load_config(RECIPES / f"{recipe}.yaml")
    space, train = config.space.build(), config.reward.train
    assert (space.names, space.template, space.max_angle) == (DPA_V1.names, DPA_V1.template, DPA_V1.max_angle)
    assert train is not None
    assert tuple(train.attributes or ()) == RELEASED_SPEC.attributes
    assert train.template == RELEASED_SPEC.template
    assert config.iterations == 4
    assert [ratings.format for ratings in config.ratings] == ["helpsteer", "ultrafeedback"]


def test_every_recipe_of_a_real_model_says_whose_choice_it_is() -> None:
    for recipe in REAL:
        text = (RECIPES / f"{recipe}.yaml").read_text()
        assert "2402.18571" in text
        assert "dpa run" in text


def test_a_published_space_is_named_in_one_word(tmp_path: Path) -> None:
    fields = yaml.safe_load((RECIPES / "mistral-7b-dpa.yaml").read_text())
    assert parse_config({**fields, "space": "dpa-v1"}).space.build() == DPA_V1
    with pytest.raises(ConfigError, match="dpa-v1"):
        parse_config({**fields, "space": "dpa-v2"})


def test_an_unknown_or_missing_tracker_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "mistral", context=1024)
    for name, said in {"tensorbord": "no tracker", "dvclive": "not installed"}.items():
        config = small("mistral-7b-dpa", data, tmp_path / "run", model, reward__train=None)
        config["reward"] = {"functions": {"helpsteer-helpfulness": "os:getpid", "helpsteer-verbosity": "os:getpid"}}
        config["finetune"]["report_to"] = [name]
        with pytest.raises(ConfigError, match=said):
            Loop(parse_config(config))


def test_a_tracker_gets_the_losses_of_both_trainings(data: Path, tmp_path: Path) -> None:
    """Needs `pip install tensorboard`; changing trackers later changes no result and is no other run."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = save_tiny_model(tmp_path / "model", "mistral", context=1024)
    config = small("mistral-7b-dpa", data, tmp_path / "run", model)
    plain = parse_config(config)
    config["finetune"]["report_to"] = config["reward"]["train"]["report_to"] = ["tensorboard"]
    assert fingerprint(parse_config(config)) == fingerprint(plain)
    with Loop(parse_config(config)) as loop:
        loop.train_reward()
        loop.score(0)
        loop.select(0)
        loop.finetune(0)
    tags = set()
    for events in (tmp_path / "run").rglob("events.out.tfevents.*"):
        found = EventAccumulator(str(events)).Reload()
        tags |= {(events.relative_to(tmp_path / "run").parts[0], tag) for tag in found.Tags()["scalars"]}
    assert ("iter_0", "train/loss") in tags
    assert "reward_model.training" in {place for place, _ in tags}
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
