"""A real pretrained policy (260,032 parameters) through the loop, small; skips where ../shared is absent.

pytest tests/test_stories.py
"""

import json
from pathlib import Path

import pytest

from dpa.core.config import load_config
from dpa.recipes.dpa import Loop

ROOT = Path(__file__).parents[1]
FUNCTIONS = ROOT / "recipes" / "stories.py"
SMALL = {
    "policy": str(ROOT / "../shared/data/stories260k"),
    "iterations": "1",
    "prompts.path": str(ROOT / "../shared/data/stories/fairytaleqa_sentence_level_test.csv"),
    "prompts.count": "6",
    "reward.functions": f"{{dialogue: '{FUNCTIONS}:dialogue', length: '{FUNCTIONS}:length'}}",
    "rollout.max_new_tokens": "30",
    "rollout.samples": "2",
    "rollout.workers": "1",
    "evaluate.prompts.path": str(ROOT / "../shared/data/stories/fairytaleqa_sentence_level_val.csv"),
    "evaluate.prompts.count": "4",
    "evaluate.directions": "3",
    "evaluate.resamples": "20",
}


@pytest.mark.skipif(not (ROOT / "../shared/data/stories260k").is_dir(), reason="../shared is not here")
def test_the_recipe_runs_on_a_real_pretrained_model_without_rated_rows(tmp_path: Path) -> None:
    config = load_config(ROOT / "recipes" / "stories260k.yaml", {**SMALL, "out": str(tmp_path / "run")})
    with Loop(config) as loop:
        page = loop.run()
    results = json.loads(page.with_name("results.json").read_text())
    assert [policy["name"] for policy in results["policies"]] == ["t = 1"], "no rated rows: no t = 0"
    assert results["policies"][0]["ledger"]["rollout"]["rows"] == 6 * 2 * 2
    answers = (tmp_path / "run" / "iter_1" / "policy" / "chat_template.jinja").read_text()
    assert "preference" in answers
