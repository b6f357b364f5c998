"""Fault 28: a model that needs its own code is refused unless opted in with a pinned commit, which is recorded.
pytest tests/test_remote_code.py
"""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from tiny_models import SPACE, save_tiny_model
from toy_run import toy_config

from dpa.core.errors import ModelFileError
from dpa.core.reference import ModelReference
from dpa.core.sections.training import FinetuneConfig
from dpa.models.files import SPACE_FILE
from dpa.models.policy import load_policy
from dpa.recipes.baselines.lab import Lab
from dpa.recipes.dpa import Loop
from dpa.sampling.samplers import SamplerSpec
from dpa.scoring.reward_scorer import RewardModelScorer
from dpa.stages.adopt import adopt
from dpa.training.policy_training import train_policy
from dpa.training.sft import SFT

REVISION = "0123456789abcdef0123456789abcdef01234567"

CODE = '''"""A Llama by another name; leaves a mark where it is run."""
from pathlib import Path

from transformers import LlamaForCausalLM, LlamaForSequenceClassification

Path(__file__).with_name("ran").touch()
{mark}


class TinyForCausalLM(LlamaForCausalLM):
    pass


class TinyForScores(LlamaForSequenceClassification):
    pass
'''


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    """A model folder whose config.json asks for its own class; loading that leaves `canary` behind."""
    folder = save_tiny_model(tmp_path / "coded")
    (folder / "modeling_tiny.py").write_text(CODE.format(mark=f"Path({str(tmp_path / 'canary')!r}).touch()"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
        "AutoModelForSequenceClassification": "modeling_tiny.TinyForScores",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rows() -> pa.Table:
    return pa.table(
        {
            "candidate_id": [f"c{n}" for n in range(4)],
            "messages": [json.dumps([{"role": "user", "content": f"Why {n}?"}]) for n in range(4)],
            "direction": [[0.8, -0.6]] * 4,
            "response": ["So."] * 4,
        }
    )


def test_its_code_does_not_run_without_an_opt_in(coded: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="remote_code_revision"):
        load_policy(coded)
    with pytest.raises(ModelFileError, match="remote_code_revision"):
        SamplerSpec(str(coded), SPACE, 4).build()
    for vague in ("main", "0123456", REVISION.upper()):
        with pytest.raises(ModelFileError, match="40-hex"):
            load_policy(ModelReference(str(coded), vague))
    assert not (tmp_path / "canary").exists()


def test_opted_in_it_trains_and_the_pinned_commit_is_recorded(coded: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(max_length=64, packed_rows_per_step=2)
    out = tmp_path / "policy"
    train_policy(SFT(config, SPACE, 0), ModelReference(str(coded), REVISION), rows(), out, tmp_path / "work")
    assert (tmp_path / "canary").exists()
    provenance = json.loads((out / SPACE_FILE).read_text())["provenance"]
    assert provenance["remote_code_revision"] == REVISION
    # The trained policy needs the same code, carries it, and asks for the same opt-in.
    with pytest.raises(ModelFileError, match="remote_code_revision"):
        load_policy(out)
    model, _ = load_policy(ModelReference(str(out), REVISION))
    assert type(model).__name__ == "TinyForCausalLM"


def test_what_was_trained_elsewhere_with_its_own_code_is_taken_in(coded: Path, tmp_path: Path) -> None:
    adopt(coded, ModelReference(str(coded), REVISION), SPACE, tmp_path / "policy", {})
    provenance = json.loads((tmp_path / "policy" / SPACE_FILE).read_text())["provenance"]
    assert provenance["remote_code_revision"] == REVISION
    load_policy(ModelReference(str(tmp_path / "policy"), REVISION))


def test_a_model_without_code_records_that_there_was_no_opt_in(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "plain")
    config = FinetuneConfig(max_length=64, packed_rows_per_step=2)
    train_policy(SFT(config, SPACE, 0), folder, rows(), tmp_path / "policy", tmp_path / "work")
    provenance = json.loads((tmp_path / "policy" / SPACE_FILE).read_text())["provenance"]
    assert provenance["remote_code_revision"] is None


def test_opted_in_a_whole_run_scores_with_the_reward_model_it_trained_and_samples_its_own_policies(
    coded: Path, tmp_path: Path
) -> None:
    ratings = [
        {"prompt": f"Why {n}?", "response": "So. " * (k + 1), "helpfulness": 10 * k, "verbosity": 20 * k}
        for n in range(8)
        for k in range(4)
    ]
    (tmp_path / "ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ratings))
    marks = ["helpfulness", "verbosity"]
    config = toy_config(
        tmp_path / "inputs",
        tmp_path / "run",
        policy=str(coded),
        remote_code_revision=REVISION,
        ratings=[{"path": str(tmp_path / "ratings.jsonl"), "attributes": marks}],
        reward={"train": {"backbone": str(coded), "allow_worse_than_mean": True, "max_length": 64}},
    )
    with Loop(config) as loop:
        loop.run()
        assert type(loop.scorer.model).__name__ == "TinyForScores"
        assert loop.policy(1).code_revision == REVISION
    with pytest.raises(ModelFileError, match="remote_code_revision"):
        RewardModelScorer(tmp_path / "run" / "reward_model")
    lab = Lab(config, tmp_path / "run", tmp_path / "method", budget=1)
    assert type(lab.scorer.model).__name__ == "TinyForScores"
    assert type(lab.sampler(tmp_path / "run" / "iter_1" / "policy")._model).__name__ == "TinyForCausalLM"
