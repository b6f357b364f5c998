"""A reward model survives its own test: rounding is told from damage, and bf16 that turns the order around is not used.
pytest tests/test_precision.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_reward_training import ATTRIBUTES, SCALES, config, examples
from tiny_models import save_tiny_model

from dpa.core.errors import ModelFileError
from dpa.scoring.precision import rows_to_compare
from dpa.scoring.reward_model import read_spec
from dpa.scoring.reward_quality import pairwise_agreement
from dpa.scoring.reward_scorer import RewardModelScorer
from dpa.storage.tables import read_json
from dpa.training.reward_training import train_reward_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    backbone = save_tiny_model(folder / "backbone")
    train_reward_model(examples(), ATTRIBUTES, SCALES, config(backbone, epochs=1), folder / "model")
    return folder / "model"


def changed(folder: Path, to: Path, **fields: object) -> Path:
    """A copy whose dpa_reward.json has other fields of `precision`; without any, no precision."""
    shutil.copytree(folder, to)
    record = read_json(to / "dpa_reward.json")
    record["precision"] = {**record["precision"], **fields} if fields else None
    (to / "dpa_reward.json").write_text(json.dumps(record))
    return to


def test_fault_51_what_bf16_costs_is_measured_and_kept(trained: Path) -> None:
    measured = read_spec(trained).precision
    assert measured is not None and measured.rows >= 8 and measured.dtype == "bfloat16"
    assert 0 < measured.largest_difference < 50 and measured.kendall is not None


def test_fault_51_scorers_in_bf16_pass_the_test_that_was_made_in_fp32(trained: Path, tmp_path: Path) -> None:
    folder = changed(trained, tmp_path / "model", kendall=1.0)
    scorer = RewardModelScorer(folder, dtype=torch.bfloat16)
    assert scorer.model.dtype == torch.bfloat16
    asked = [row.messages for row in examples()[:8]], [row.response for row in examples()[:8]]
    worst = np.abs(scorer.score(*asked) - RewardModelScorer(folder).score(*asked)).max()
    assert 0 < worst <= 2 * read_spec(folder).precision.largest_difference + 0.05


def test_fault_51_damage_is_told_from_rounding_in_either_precision(trained: Path, tmp_path: Path) -> None:
    folder = changed(trained, tmp_path / "model", kendall=1.0)
    record = read_json(folder / "dpa_reward.json")
    record["golden"]["scores"][0] += 3 * record["precision"]["largest_difference"] + 1
    (folder / "dpa_reward.json").write_text(json.dumps(record))
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ModelFileError, match="further off than rounding is"):
            RewardModelScorer(folder, dtype=dtype)


def test_where_bf16_turns_the_order_around_scorers_stay_in_fp32_and_say_so_once(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed(trained, tmp_path / "model", kendall=0.9)
    scorers = [RewardModelScorer(folder, dtype=torch.bfloat16) for _ in range(2)]
    assert all(scorer.model.dtype == torch.float32 for scorer in scorers)
    assert caplog.text.count("scores in fp32: in bf16 Kendall's tau within prompts is 0.900") == 1


def test_an_older_model_whose_bf16_is_further_off_than_was_thought_scores_in_fp32(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its record says nothing of bf16, whose scores are off by more than BF16_TOLERANCE; it is not damaged."""
    folder = changed(trained, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    record = read_json(folder / "dpa_reward.json")
    factor = 20 / max(read_spec(trained).precision.largest_difference, 1e-3)
    tensors["score.weight"] *= factor
    record["golden"]["scores"] = [score * factor for score in record["golden"]["scores"]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "dpa_reward.json").write_text(json.dumps(record))
    scorer = RewardModelScorer(folder, dtype=torch.bfloat16)
    assert scorer.model.dtype == torch.float32
    assert "further from its golden scores than rounding should be" in caplog.text


def test_rows_are_compared_by_whole_prompts() -> None:
    prompt_ids = ["a", "b", "b", "c", "b", "c"]
    assert rows_to_compare(range(6), prompt_ids, least=4) == [1, 2, 4, 3, 5]
    assert rows_to_compare(range(6), prompt_ids, least=99) == [1, 2, 4, 3, 5, 0]


def test_agreement_counts_the_pairs_of_a_prompt() -> None:
    fp32 = np.array([1.0, 2.0, 3.0, 5.0, 4.0])
    prompt_ids = ["a", "a", "a", "b", "b"]
    assert pairwise_agreement(fp32, fp32, prompt_ids) == 1
    assert pairwise_agreement(np.array([1.0, 3.0, 2.0, 5.0, 4.0]), fp32, prompt_ids) == pytest.approx(0.5)
    assert pairwise_agreement(fp32, fp32, ["a", "b", "c", "d", "e"]) == 1, "one row a prompt: all rows together"
    assert pairwise_agreement(fp32[:1], fp32[:1], ["a"]) is None
