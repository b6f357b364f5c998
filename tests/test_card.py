"""The model card says what a policy is, how to steer it, what was measured; pushing refuses pickles, says why it fails.
pytest tests/test_card.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import space_of
from forks import python
from tiny_models import save_tiny_model

from dpa.core.directions import DirectionSpace
from dpa.core.errors import EngineError, ModelFileError
from dpa.core.objective import Objective
from dpa.core.sections.evaluate import EvaluateConfig
from dpa.core.sections.reward import RewardConfig
from dpa.models.files import EVALUATION_FILE, SPACE_FILE, folder_revision
from dpa.models.hub import REWARD_FILE, holds_rated_row, push_model
from dpa.pages.card import CARD, card
from dpa.scoring.scorers import scored_by
from dpa.storage.tables import write_bytes, write_if_new, write_json

SPACE = space_of("helpfulness", "verbosity", presets={"terse": "-40deg"})
DATA = ["nvidia/HelpSteer2", "data/own.jsonl"]


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1, "high": value + 1}


EVALUATION: dict[str, Any] = {
    "prompts": 40,
    "answers": 360,
    "listens": {"by": "gold", "sentence": "The policy follows its direction (tau 0.94)."},
    "directions": [
        {
            "direction": str(SPACE.direction(weights)),
            "objectives": {"gold": {"helpfulness": interval(60.0 + d), "verbosity": interval(20.0 * d)}},
            "words": interval(10.0 + 5 * d),
            "front": {"gold": d != 1},
        }
        for d, weights in enumerate(SPACE.grid(EvaluateConfig(prompts={"path": "x"}, directions=3).directions))
    ],
}
LEDGER = {
    "rollout": {"tokens_generated": 12_000, "candidates_scored": 0, "training_tokens": 0, "wall_s": 61.0},
    "finetune": {"tokens_generated": 0, "candidates_scored": 0, "training_tokens": 34_567, "wall_s": 5.0},
}


def test_the_card_has_metadata_space_snippets_front_and_ledger() -> None:
    text = card(
        "demo, t = 3", SPACE, "Qwen/Qwen2.5-0.5B-Instruct", DATA, "Scores came from a test.", EVALUATION, LEDGER
    )
    _, header, body = text.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert metadata["datasets"] == ["nvidia/HelpSteer2"]  # a local file is nobody else's
    assert metadata["library_name"] == "transformers"
    assert SPACE.template in body
    for words in ("helpfulness", "verbosity", "`terse`", "chat_template_kwargs", "LLM(", "OpenAI(", "45 degrees"):
        assert words in body
    assert "| `helpfulness*71 + verbosity*-71` | 60.0 [59.0, 61.0] | 0.0 [−1.0, 1.0] |" in body
    assert "the known true reward" in body
    assert "12,000" in body
    assert "34,567" in body
    assert "means on 0-100 with" in body
    weighed = DirectionSpace((Objective("helpfulness", {"a": 1.0, "b": 1.0}), SPACE.objectives[1]))
    assert "means with" in card("demo", weighed, "base", DATA, "", EVALUATION), "helpfulness goes to 200"


def test_the_hubs_own_parser_reads_the_header() -> None:
    from huggingface_hub import ModelCard

    read = ModelCard(card("demo", SPACE, "Qwen/Qwen2.5-0.5B-Instruct", DATA, "")).data
    assert read.base_model == "Qwen/Qwen2.5-0.5B-Instruct"
    assert "directional-preference-alignment" in (read.tags or [])


def test_the_snippets_preference_is_inside_the_cone() -> None:
    """What the card tells people to type works as it stands."""
    import json
    import re

    found = re.findall(r"preference=(\{[^}]*\})", card("demo", SPACE, "a/b", DATA, ""))
    assert found
    SPACE.parse(json.loads(found[0]))


def test_where_files_lie_on_a_machine_is_in_no_card() -> None:
    text = card("demo", SPACE, "/home/alice/models/start", ["/home/alice/clients/acme.jsonl", "nvidia/HelpSteer2"], "")
    assert "alice" not in text and "clients" not in text
    assert "Start policy: `start`" in text and "`acme.jsonl` and `nvidia/HelpSteer2`" in text


def test_a_card_does_not_change_what_the_policy_is(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    before = folder_revision(folder)
    text = card("demo", SPACE, "start", DATA, "", EVALUATION, LEDGER).encode()
    write_if_new(folder / CARD, text)
    assert "base_model" not in (folder / CARD).read_text().split("---")[1]
    assert folder_revision(folder) == before
    stamp = (folder / CARD).stat().st_mtime_ns
    write_if_new(folder / CARD, text)
    assert (folder / CARD).stat().st_mtime_ns == stamp


class FakeApi:
    """What push uses of huggingface_hub.HfApi."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._error = error

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create", {"repo_id": repo_id, **options}))
        if self._error:
            raise self._error
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, folder_path: str, **options: Any) -> None:
        self.calls.append(("upload", options))
        self.files = {file.name: file.read_bytes() for file in Path(folder_path).rglob("*") if file.is_file()}


def test_what_training_elsewhere_cost_is_not_said() -> None:
    about = {"revision": "0123", "data": {}, "notes": []}
    for elsewhere, there in ((None, True), (about, False)):
        text = card("demo", SPACE, "start", DATA, "", None, LEDGER, elsewhere)
        assert ("| finetune |" in text) is there and "| rollout |" in text


def test_a_checked_folder_is_pushed_private_with_its_card(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    write_bytes(folder / CARD, card("demo", SPACE, "start", DATA, "").encode())
    api = FakeApi()
    assert push_model(folder, "me/demo", api=api) == "https://huggingface.co/me/demo"
    (_, created), (_, uploaded) = api.calls
    assert created == {"repo_id": "me/demo", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/demo"
    for name in (CARD, "model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert api.files[name] == (folder / name).read_bytes()


def test_what_is_nobody_elses_stays_here(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    (folder / "checkpoint-1").mkdir()
    write_json(folder / "checkpoint-1" / "trainer_state.json", {})
    elsewhere = {"folder": str(tmp_path / "trained"), "revision": "0123", "notes": [f"of {tmp_path}"]}
    write_json(folder / SPACE_FILE, {"provenance": {"from": str(tmp_path / "start"), "trained_elsewhere": elsewhere}})
    write_json(folder / EVALUATION_FILE, {"prompts": 40, "examples": ["a held-out prompt"]})
    training, folded = {"backbone": str(tmp_path / "start")}, {"from": str(tmp_path / "reward")}
    write_json(folder / REWARD_FILE, {"training": training, "folded": folded, "golden": {"response": "So."}})
    api, before = FakeApi(), {file.name: file.read_bytes() for file in folder.glob("*.json")}
    push_model(folder, "me/demo", api=api)
    assert "trainer_state.json" not in api.files
    assert not any(str(tmp_path).encode() in text or b"held-out" in text for text in api.files.values())
    about = json.loads(api.files[SPACE_FILE])["provenance"]
    assert about == {"from": "start", "trained_elsewhere": {"revision": "0123"}}
    assert json.loads(api.files[REWARD_FILE])["folded"] == {"from": "reward"} and holds_rated_row(folder)
    assert {file.name: file.read_bytes() for file in folder.glob("*.json")} == before


def test_a_policy_with_its_own_code_is_pushed_with_it(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}})
    (folder / "modeling_own.py").write_text("raise SystemExit\n")
    api = FakeApi()
    push_model(folder, "me/demo", api=api)
    assert "modeling_own.py" in api.files


def test_a_pickle_is_not_pushed(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    write_bytes(folder / "optimizer.pt", b"\x80\x04.")
    api = FakeApi()
    with pytest.raises(ModelFileError, match=r"optimizer\.pt"):
        push_model(folder, "me/demo", api=api)
    assert api.calls == []


def test_failures_of_the_hub_are_one_sentence(tmp_path: Path) -> None:
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    folder = save_tiny_model(tmp_path / "model")
    for error, kind, said in (
        (OfflineModeIsEnabled("offline"), EngineError, "HF_HUB_OFFLINE"),
        (HFValidationError("bad name"), ModelFileError, "owner/name"),
        (ConnectionError("no route"), EngineError, "cannot be reached"),
    ):
        with pytest.raises(kind, match=said):
            push_model(folder, "me/demo", api=FakeApi(error))


def test_the_real_client_offline_says_so(tmp_path: Path) -> None:
    result = python("-m", "dpa", "push", save_tiny_model(tmp_path / "model"), "me/demo")
    assert result.returncode == 1
    assert "HF_HUB_OFFLINE" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_card_names_every_source_of_scores() -> None:
    sources = {
        "train": ({"backbone": "owner/backbone"}, "owner/backbone"),
        "folder": ("my/reward", "my/reward"),
        "http": ({"servers": ["http://gpu1:8000"], "folder": "served/reward"}, "served/reward"),
        "judge": ({"attributes": {"warmth": "0: cold; 100: warm"}, "model": "wise-70b"}, "wise-70b"),
        "functions": ({"warmth": "marks.py:warmth"}, "warmth"),
    }
    for field, (value, named) in sources.items():
        assert named in scored_by(RewardConfig.model_validate({field: value}))
    everything = scored_by(RewardConfig.model_validate({field: value for field, (value, _) in sources.items()}))
    assert all(named in everything for _, named in sources.values())
