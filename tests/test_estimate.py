"""The estimate counts what the loop will do, by measured speeds where there are any, and by named arithmetic elsewhere.
Run: pytest tests/test_estimate.py
"""

import json
from pathlib import Path

import pytest
import yaml
from forks import python
from tiny_models import save_tiny_model, tiny_model

from dpa.core.config import load_config
from dpa.core.errors import ConfigError
from dpa.core.records import Ledger
from dpa.recipes.estimate import count_rows, estimate, matrix_rate, read_speeds, run_needs, size_of
from dpa.storage.run_folder import RunFolder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A configuration over a tiny model, 30 prompts and 40 rated rows."""
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(30)))
    (tmp_path / "rated.csv").write_text("prompt,response,a\n" + 'why,"two\nlines",1\n' * 40)
    config = {
        "out": str(tmp_path / "run"),
        "policy": str(model),
        "iterations": 2,
        "space": {"objectives": {"a": None, "b": None}},
        "ratings": [{"path": str(tmp_path / "rated.csv"), "scales": {"a": [0, 1]}}],
        "reward": {"functions": {"a": "m:f", "b": "m:f"}},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "count": 20},
        "rollout": {"directions": 2, "samples": 4, "max_new_tokens": 100},
        "selection": {"directions": 3},
        "finetune": {"epochs": 2},
        "evaluate": {"prompts": {"path": str(tmp_path / "prompts.jsonl")}, "directions": 3},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_amounts_are_those_of_the_loop(recipe: Path) -> None:
    stages = {stage.name: stage for stage in estimate(load_config(recipe))}
    names = [f"iter_{t}/{stage}" for t in (1, 2) for stage in ("rollout", "score", "finetune", "evaluate")]
    assert list(stages) == ["iter_0/score", "iter_0/finetune", "iter_0/evaluate", *names]
    assert stages["iter_0/score"].rows == 40
    assert stages["iter_1/rollout"].rows == stages["iter_2/score"].rows == 20 * 2 * 4
    assert stages["iter_1/rollout"].tokens == 20 * 2 * 4 * 50, "half of max_new_tokens"
    assert stages["iter_2/finetune"].rows == 20 * 3
    assert stages["iter_2/finetune"].tokens == 20 * 3 * 200 * 2
    grid = len(load_config(recipe).space.build().grid(3))
    assert stages["iter_1/evaluate"].rows == 30 * grid
    assert not any(stage.measured for stage in stages.values())
    seconds, memory, disk = run_needs(list(stages.values()))
    assert seconds == pytest.approx(sum(stage.seconds for stage in stages.values()))
    assert memory > 0 and disk > 0


def test_measured_speeds_replace_arithmetic(recipe: Path) -> None:
    config = load_config(recipe)
    with RunFolder(config.out).open(config) as run:
        run.stage(0, "finetune").finish(Ledger(training_tokens=9_000, rows=45, wall_s=3.0, peak_memory=7))
        run.stage(1, "rollout").finish(Ledger(tokens_generated=3_200, rows=160, wall_s=4.0, peak_memory=5))
        run.stage(1, "evaluate/rollout").finish(Ledger(tokens_generated=800, rows=40, wall_s=1.0))
        run.stage(1, "score").finish(Ledger(candidates_scored=160, rows=160, wall_s=2.0))
    stages = {stage.name: stage for stage in estimate(config)}
    rollout = stages["iter_2/rollout"]
    assert (rollout.tokens, rollout.seconds, rollout.memory) == (160 * 20, pytest.approx(4.0), 5)
    assert stages["iter_2/score"].seconds == pytest.approx(2.0)
    assert stages["iter_0/finetune"].rows == 45
    assert stages["iter_0/finetune"].seconds == pytest.approx(3.0), "what it took is what it is said to take"
    assert stages["iter_2/finetune"].tokens == 60 * 100 * 2, "100 tokens an example and epoch"
    assert {stage.measured for stage in stages.values()} == {"run"}
    elsewhere = load_config(recipe, {"out": "nowhere"})
    assert estimate(elsewhere, [Path(config.out)])[1].measured == "run"
    assert read_speeds([Path("nowhere")]).source == ""


def test_dpo_counts_both_responses_of_a_pair_and_the_reference(recipe: Path) -> None:
    winners = {stage.name: stage for stage in estimate(load_config(recipe))}
    config = load_config(recipe, {"learner": "dpo", "dpo.epochs": "3"})
    pairs = {stage.name: stage for stage in estimate(config)}
    assert pairs["iter_0/finetune"].tokens == winners["iter_0/finetune"].tokens, "t = 0 learns from winners"
    assert pairs["iter_1/finetune"].tokens == 2 * 20 * 3 * 200 * 3
    assert pairs["iter_1/finetune"].memory > winners["iter_1/finetune"].memory, "the reference's weights"
    with RunFolder(config.out).open(config) as run:
        run.stage(0, "finetune").finish(Ledger(training_tokens=9_000, rows=45, wall_s=3.0))
        run.stage(1, "finetune").finish(Ledger(training_tokens=36_000, rows=60, wall_s=6.0))
    measured = {stage.name: stage for stage in estimate(config)}
    assert measured["iter_2/finetune"].tokens == 2 * 20 * 3 * 100 * 3, "an example's length is that of a winner"
    assert measured["iter_2/finetune"].seconds == pytest.approx(6.0)


def test_grpo_counts_the_answers_it_makes_scores_and_reads_as_its_finetuning(recipe: Path) -> None:
    config = load_config(recipe, {"learner": "grpo", "grpo.epochs": "3"})
    stages = {stage.name: stage for stage in estimate(config)}
    assert [name for name in stages if name.startswith("iter_1/")] == ["iter_1/finetune", "iter_1/evaluate"]
    assert stages["iter_1/finetune"].rows == 20 * 2, "a prompt under each of its directions"
    assert stages["iter_1/finetune"].tokens == 20 * 2 * 4 * 200 * 3
    winners = {stage.name: stage for stage in estimate(load_config(recipe))}
    assert stages["iter_1/finetune"].seconds > winners["iter_1/finetune"].seconds
    with RunFolder(config.out).open(config) as run:
        run.stage(1, "rollout").finish(Ledger(rows=40))
        run.stage(1, "finetune").finish(Ledger(training_tokens=96_000, rows=40, wall_s=6.0))
    assert {stage.name: stage for stage in estimate(config)}["iter_2/finetune"].seconds == pytest.approx(6.0)


def test_sizes_are_read_from_headers(recipe: Path, tmp_path: Path) -> None:
    size = size_of(str(tmp_path / "model"), None, "policy", "")
    assert size.parameters == sum(parameter.numel() for parameter in tiny_model().parameters())
    assert size.cache_bytes == 2 * 2 * 2 * 8, "keys and values, layers, heads, width"
    assert count_rows(str(tmp_path / "rated.csv")) == 40, "a line break inside a field is no row"
    assert 1e8 < matrix_rate(0.02) < 1e16


def test_a_policy_that_is_not_here_needs_its_size(recipe: Path) -> None:
    config = load_config(recipe, {"policy": "mistralai/Mistral-7B-v0.1"})
    with pytest.raises(ConfigError, match=r"policy: mistralai/Mistral-7B-v0\.1 is not on this machine.*--parameters"):
        estimate(config)
    seven = {stage.name: stage for stage in estimate(config, parameters=7e9)}
    assert seven["iter_1/finetune"].memory == 16 * 7e9
    with pytest.raises(ConfigError, match=r"prompts\.path: none\.jsonl is not on this machine; give prompts\.count"):
        estimate(load_config(recipe, {"prompts.path": "none.jsonl", "prompts.count": "null"}))


def test_the_command_prints_a_table_and_starts_nothing(recipe: Path, tmp_path: Path) -> None:
    done = python("-m", "dpa", "estimate", recipe)
    assert done.returncode == 0, done.stderr
    assert "iter_2/evaluate" in done.stdout and "arithmetic" in done.stdout and "the run" in done.stdout
    assert not (tmp_path / "run").exists()
