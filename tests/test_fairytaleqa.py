"""The FairytaleQA recipe: its two true rewards, the rated rows made from experts' answers, and the loop at toy size.

pytest tests/test_fairytaleqa.py
"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from forks import python
from tiny_models import save_tiny_model

from dpa.core.config import load_config
from dpa.core.records import Sample
from dpa.recipes.dpa import Loop

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
DATA = ROOT / "../shared/data/fairytaleqa"


def load(name: str) -> ModuleType:
    """A file of recipes/ as a module."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reward, rows = load("fairytaleqa_reward"), load("fairytaleqa_rows")


def question(story: int, number: int) -> dict:
    """A made-up question whose section holds the answer in its second sentence."""
    gift = f"In winter he gave {number} golden apples, and nobody saw the {story} birds."
    section = f"Once there was a king. {gift} Then he slept."
    return {
        "id": f"story-{story}-{number}",
        "prompt": f"Read this part of a story.\n\n{section}\n\nQuestion: What did king {story} give?",
        "answers": [f"{number} golden apples", "some fruit"],
        "story": f"story-{story}",
    }


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of made-up questions about 30 stories, each with a line separator of Unicode's in its row."""
    folder = tmp_path / "data"
    folder.mkdir()
    asked = [{**question(story, number), "note": "a\u2028b"} for story in range(30) for number in (2, 7)]
    lines = [json.dumps(row, ensure_ascii=False) for row in asked]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setenv("FAIRYTALEQA", str(folder))
    return folder


def test_helpfulness_is_the_share_of_the_best_held_answer_without_articles_and_case() -> None:
    experts = ["the Strongest wood, banded with iron", "oak"]
    assert reward.share_held(experts, "A box of strongest WOOD banded with iron.") == 100
    assert reward.share_held(experts, "strongest strongest wood") == pytest.approx(40), "a word counts once"
    assert reward.share_held(experts, "It was oak") == 100
    assert reward.share_held(experts, "the with") == pytest.approx(20), "articles are no content"
    assert reward.share_held(["the"], "the") == 0, "an answer of articles alone holds nothing"
    assert reward.share_held(experts, "") == 0


def test_verbosity_counts_words_on_a_log_scale_that_ends_at_100() -> None:
    found = [reward.verbosity([], " ".join(["word"] * count)) for count in (0, 1, 5, 20, 100, 500)]
    assert [round(score) for score in found] == [15, 15, 39, 66, 100, 100], "silence gains nothing over a word"


def test_the_answers_of_a_question_that_stands_twice_are_joined(data: Path) -> None:
    twice = {**question(1, 2), "answers": ["apples"]}
    with (data / "train.jsonl").open("a") as file:
        file.write(json.dumps(twice) + "\n")
    assert reward.answers(twice["prompt"]) == ["2 golden apples", "some fruit", "apples"]


def test_a_pool_holds_what_is_true_from_one_word_to_a_passage() -> None:
    pool = dict(rows.true_answers(question(3, 7), with_experts=True))
    assert pool["word"] in ("golden", "apples")
    assert pool["clause"] == "In winter he gave 7 golden apples,"
    assert pool["sentence"].startswith("In winter") and pool["sentence"].endswith("birds.")
    assert pool["passage"].startswith("Once there") and pool["passage"].endswith("slept.")
    assert pool["quoted"].startswith("7 golden apples. In winter")
    without = dict(rows.true_answers(question(3, 7), with_experts=False))
    assert without.keys() == {"word", "clause", "sentence", "passage"}


def test_development_stories_are_never_trained_on_and_the_split_does_not_depend_on_order() -> None:
    everything = [question(story, number) for story in range(60) for number in (2, 7)]
    training, development = rows.split(everything)
    assert not {row["story"] for row in training} & {row["story"] for row in development}
    assert len({row["story"] for row in development}) == rows.DEVELOPMENT_STORIES
    assert {row["id"] for row in rows.split(everything[::-1])[1]} == {row["id"] for row in development}


def test_the_start_policy_answers_without_a_direction_and_empty_answers_are_left_out() -> None:
    class Sampler:
        revision = "fake"

        def sample(self, requests: list) -> list[list[Sample]]:
            assert all(request.direction is None for request in requests)
            return [[Sample(" golden ", 2, "stop"), Sample("  ", 1, "stop")] for _ in requests]

    asked = [question(0, 2), question(1, 7)]
    assert rows.start_answers(Sampler(), asked, samples=2, seed=0) == [["golden"], ["golden"]]


def test_the_start_policy_answers_a_share_of_the_questions_always_the_same_ones(data: Path, tmp_path: Path) -> None:
    policy = save_tiny_model(tmp_path / "policy", context=512)
    asked = []
    for share in (0.0, 0.4):
        made = tmp_path / f"made_{share}"
        command = [RECIPES / "fairytaleqa_rows.py", "--policy", policy, "--out", made, "--data", data]
        done = python(*command, "--questions", 12, "--sampled", share)
        assert done.returncode == 0, done.stderr
        rated = [json.loads(line) for line in (made / "rated.jsonl").read_text().splitlines()]
        asked.append({row["prompt"] for row in rated if row["source"] == "start"})
        assert len({row["prompt"] for row in rated}) == 12
    every = map(json.loads, (data / "train.jsonl").read_text(encoding="utf-8").strip().split("\n"))
    drawn = {row["prompt"] for row in every if rows.chance("sampled", row) < 0.4}
    assert not asked[0] and 0 < len(asked[1]) < 12 and asked[1] <= drawn


@pytest.mark.parametrize("recipe", ["fairytaleqa", "fairytaleqa-card"])
def test_the_recipe_runs_from_made_rows_to_a_measured_policy(recipe: str, data: Path, tmp_path: Path) -> None:
    policy, made = save_tiny_model(tmp_path / "policy", context=512), tmp_path / "made"
    command = [RECIPES / "fairytaleqa_rows.py", "--policy", policy, "--out", made]
    done = python(*command, "--data", data, "--questions", 4, "--samples", 1)
    assert done.returncode == 0, done.stderr
    rated = [json.loads(line) for line in (made / "rated.jsonl").read_text().splitlines()]
    assert {"word", "clause", "sentence", "passage", "start"} <= {row["source"] for row in rated}
    functions = {name: f"{RECIPES / 'fairytaleqa_reward.py'}:{name}" for name in ("helpfulness", "verbosity")}
    flags = {
        "out": str(tmp_path / "run"),
        "policy": str(policy),
        "iterations": "1",
        "ratings": json.dumps([{"path": str(made / "rated.jsonl"), "scales": {key: [0, 100] for key in functions}}]),
        "reward.functions": json.dumps(functions),
        "prompts": json.dumps({"path": str(made / "prompts.jsonl"), "count": 4}),
        "rollout": json.dumps({"directions": 2, "samples": 2, "max_new_tokens": 12, "prompts_per_shard": 4}),
        "evaluate.prompts": json.dumps({"path": str(made / "development.jsonl"), "count": 4}),
        "evaluate.directions": "3",
        "evaluate.resamples": "20",
        "finetune.max_length": "512",
        "finetune.compile": "false",  # for minutes of training (tests/test_compiling.py)
    }
    with Loop(load_config(RECIPES / f"{recipe}.yaml", flags)) as loop:
        page = loop.run()
    results = json.loads(page.with_name("results.json").read_text())
    assert [policy["name"] for policy in results["policies"]] == ["t = 0", "t = 1"]


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared is not here")
def test_the_pools_of_the_real_questions_are_graded_by_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRYTALEQA", str(DATA))
    asked = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()[:300]]
    found: dict[str, list[tuple[float, int]]] = {}
    for row in asked:
        for source, text in rows.true_answers(row, with_experts=True):
            found.setdefault(source, []).append((reward.share_held(row["answers"], text), len(text.split())))
    means = {
        source: [sum(column) / len(pairs) for column in zip(*pairs, strict=True)] for source, pairs in found.items()
    }
    kinds = ("word", "clause", "sentence", "passage")
    assert [means[kind][1] for kind in kinds] == sorted(means[kind][1] for kind in kinds)
    assert [means[kind][0] for kind in kinds] == sorted(means[kind][0] for kind in kinds)
    assert means["expert"][0] == 100
