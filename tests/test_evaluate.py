"""The record of one policy: a listening one, a deaf one, missing scores, and answers side by side.
Run: pytest tests/test_evaluate.py
"""

import json

import numpy as np
import pyarrow as pa
import pytest

from dpa.core.directions import DirectionSpace
from dpa.core.errors import DataError, DirectionError
from dpa.core.objective import Objective
from dpa.core.sections.evaluate import EvaluateConfig
from dpa.core.target_measures import target_grid
from dpa.stages.evaluate import evaluate, evaluate_targets, scores_by_prompt, side_by_side, typical_question

TWO = DirectionSpace((Objective("helpfulness", {"help": 1}), Objective("verbosity", {"words": 1})), max_angle=60)
THREE = DirectionSpace(
    (Objective("helpfulness", {"help": 1}), Objective("verbosity", {"words": 1}), Objective("warmth", {"warm": 1}))
)
CONFIG = EvaluateConfig(prompts={"path": "held_out.jsonl"}, directions=5, samples=2, resamples=40)


def policy_tables(space: DirectionSpace, follow: float, prompts: int = 12, seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """Rollout and scores of a policy that moves `follow` points along the direction asked, and words with verbosity."""
    rng = np.random.default_rng(seed)
    rows, scores = [], []
    for direction_K in space.grid(CONFIG.directions):
        for p in range(prompts):
            for k in range(CONFIG.samples):
                row_id = f"{len(rows)}"
                scores_K = 50 + follow * direction_K + rng.standard_normal(space.K)
                words = max(1, round(scores_K[1] / 2))
                rows.append(
                    {
                        "candidate_id": row_id,
                        "prompt_id": f"p{p}",
                        "direction": direction_K.tolist(),
                        "k": k,
                        "response": " ".join(["word"] * words),
                        "tokens": words + 1,
                    }
                )
                attributes = {
                    attribute: float(score)
                    for objective, score in zip(space.objectives, scores_K, strict=True)
                    for attribute in objective.attributes
                }
                scores.append({"candidate_id": row_id, "prompt_id": f"p{p}", **attributes, "valid": True})
    return pa.Table.from_pylist(rows), pa.Table.from_pylist(scores)


def replaced(table: pa.Table, name: str, values: list) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


@pytest.mark.parametrize("space", [TWO, THREE], ids=["two", "three"])
def test_a_listening_policy(space):
    rollout, scores = policy_tables(space, follow=30)
    record = evaluate(rollout, {"model": scores, "gold": scores}, space, CONFIG, seed=0)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["prompts"] == 12
    assert record["answers"] == rollout.num_rows
    assert record["unscored"] == {"model": 0, "gold": 0}
    assert record["listens"]["verdict"] is True
    assert record["listens"]["by"] == "gold"
    grid_DK = space.grid(CONFIG.directions)
    for direction, weights_K in zip(record["directions"], grid_DK, strict=True):
        assert direction["weights"] == weights_K.tolist()
        assert direction["tokens"]["value"] == pytest.approx(direction["words"]["value"] + 1)
        for name, weight in zip(space.names, weights_K, strict=True):
            found = direction["objectives"]["gold"][name]
            assert found["value"] == pytest.approx(50 + 30 * weight, abs=1)
            assert found["low"] <= found["value"] <= found["high"]
    for arc in space.arc_names:
        assert record["measures"]["model"]["kendall_tau"][arc]["value"] == pytest.approx(1.0)
        asked = [direction["angles"][arc] for direction in record["directions"] if arc in direction["angles"]]
        assert sorted(asked) == pytest.approx(np.linspace(-space.max_angle, space.max_angle, 5).tolist())


def test_means_are_over_prompts_of_means_over_samples():
    """A prompt with many answers weighs no more than one with few."""
    rollout, scores = policy_tables(TWO, follow=0, prompts=2)
    rollout, scores = (
        pa.concat_tables([t, t.filter(pa.compute.equal(t["prompt_id"], "p0"))]) for t in (rollout, scores)
    )
    scores = replaced(scores, "help", [10.0 if p == "p0" else 40.0 for p in scores["prompt_id"].to_pylist()])
    record = evaluate(rollout, {"model": scores}, TWO, CONFIG, seed=0)
    assert [d["objectives"]["model"]["helpfulness"]["value"] for d in record["directions"]] == pytest.approx([25.0] * 5)


@pytest.mark.parametrize("follow", [0.0, -30.0], ids=["deaf", "reversed"])
def test_a_policy_that_does_not_listen_is_called_out(follow):
    rollout, scores = policy_tables(TWO, follow)
    if follow == 0.0:
        scores = replaced(scores, "words", [50.0] * len(scores))
    listens = evaluate(rollout, {"model": scores}, TWO, CONFIG, seed=0)["listens"]
    assert listens["verdict"] is False
    assert listens["by"] == "model"
    assert "DOES NOT FOLLOW" in listens["sentence"]


def test_an_order_that_may_be_chance_is_called_out():
    """Means in order, answers so noisy that on other prompts they would not be."""
    rollout, scores = policy_tables(TWO, follow=0.0, prompts=12)
    asked_N = TWO.asked_angle(np.array(rollout["direction"].to_pylist()), "verbosity")
    noise_N = np.random.default_rng(0).normal(0, 30, len(scores))
    for asked in np.unique(asked_N):
        noise_N[asked_N == asked] += 0.02 * asked - noise_N[asked_N == asked].mean()
    noisy = replaced(scores, "words", (50 + noise_N).tolist())
    listens = evaluate(rollout, {"model": noisy}, TWO, CONFIG, seed=0)["listens"]
    assert listens["tau"]["verbosity"] == pytest.approx(1.0) and listens["verdict"] is False
    assert "MAY NOT FOLLOW" in listens["sentence"] and "more prompts" in listens["sentence"]


def test_the_terse_half_is_on_the_front_of_what_may_be_wished():
    """Less verbosity is a wish of the cone: what loses a little help for many words is dominated by nothing."""
    rollout, scores = policy_tables(TWO, follow=30)
    record = evaluate(rollout, {"model": scores}, TWO, CONFIG, seed=0)
    asked = [direction["angles"]["verbosity"] for direction in record["directions"]]
    tersest = record["directions"][asked.index(min(asked))]
    assert tersest["front"]["model"] is True


def test_directions_that_get_the_same_answer_are_in_an_order_of_chance_and_condemn_nobody():
    """Ends far apart, between them differences within the error, the wrong way round."""
    rollout, scores = policy_tables(TWO, follow=0.0, prompts=12)
    grid_DK, rng = TWO.grid(CONFIG.directions), np.random.default_rng(0)
    asked_N = TWO.asked_angle(np.array(rollout["direction"].to_pylist()), "verbosity")
    asked_D = np.sort(TWO.asked_angle(grid_DK, "verbosity"))
    words_N = np.zeros(len(scores))
    for asked, mean in zip(asked_D, (20.0, 51.0, 50.0, 49.0, 80.0), strict=True):
        own_N = np.isclose(asked_N, asked)
        noise = rng.normal(0, 10, own_N.sum())
        words_N[own_N] = mean + noise - noise.mean()
    listens = evaluate(rollout, {"model": replaced(scores, "words", words_N.tolist())}, TWO, CONFIG, seed=0)["listens"]
    assert listens["tau"]["verbosity"] == pytest.approx(0.4) and listens["verdict"] is True
    assert (
        "where its answers differ by more than chance (verbosity 7 of 10 pairs of directions in order, 0 reversed)"
        in (listens["sentence"])
    )


def test_answers_without_a_score_are_left_out_and_counted():
    rollout, scores = policy_tables(TWO, follow=30)
    spoilt = np.zeros(len(scores), dtype=bool)
    spoilt[[0, 7]] = True
    bad = replaced(scores, "help", np.where(spoilt, 1e9, scores["help"].to_numpy()).tolist())
    bad = replaced(bad, "valid", (~spoilt).tolist())
    record = evaluate(rollout, {"model": bad}, TWO, CONFIG, seed=0)
    assert record["unscored"] == {"model": 2}
    assert record["directions"][0]["objectives"]["model"]["helpfulness"]["value"] < 100


def test_a_direction_without_any_score_is_null_and_not_a_crash():
    rollout, scores = policy_tables(TWO, follow=30)
    first = rollout["direction"].to_pylist()[0]
    bad = replaced(scores, "valid", [direction != first for direction in rollout["direction"].to_pylist()])
    record = evaluate(rollout, {"model": bad}, TWO, CONFIG, seed=0)
    assert record["directions"][0]["objectives"]["model"]["verbosity"] == {"value": None, "low": None, "high": None}
    assert record["directions"][0]["front"]["model"] is False
    json.dumps(record, allow_nan=False)


def test_attributes_with_the_names_of_objectives_are_weighed_all_the_same():
    """The gold reward scores the objectives themselves, by their names."""
    weighed = {"helpfulness": 1.0, "verbosity": -0.5}
    space = DirectionSpace((Objective("helpfulness", weighed), Objective("verbosity", {"verbosity": 1.0})))
    rollout, scores = policy_tables(space, follow=0, prompts=2)
    for name, mark in {"helpfulness": 80.0, "verbosity": 40.0}.items():
        scores = replaced(scores, name, [mark] * len(scores))
    both = {"model": scores, "gold": scores}
    objectives = evaluate(rollout, both, space, CONFIG, seed=0)["directions"][0]["objectives"]
    assert [objectives["model"][name]["value"] for name in space.names] == pytest.approx([60.0, 40.0])
    assert [objectives["gold"][name]["value"] for name in space.names] == pytest.approx([80.0, 40.0])
    asked = scores_by_prompt(rollout, both, space, space.grid(CONFIG.directions), ["p0", "p1"])
    assert asked["model"][0, 0].tolist() == pytest.approx([60.0, 40.0])


def test_scores_by_prompt_are_in_the_order_that_is_asked_for():
    rollout, scores = policy_tables(TWO, follow=30, prompts=2)
    grid_DK = TWO.grid(CONFIG.directions)
    as_asked = scores_by_prompt(rollout, {"model": scores}, TWO, grid_DK, ["p0", "p1"])["model"]
    turned = scores_by_prompt(rollout, {"model": scores}, TWO, grid_DK, ["p1", "p9", "p0"])["model"]
    np.testing.assert_array_equal(turned[:, [2, 0]], as_asked)
    assert np.isnan(turned[:, 1]).all(), "p9 was not answered"


def test_tables_that_do_not_belong_together_are_refused():
    rollout, scores = policy_tables(TWO, follow=30)
    with pytest.raises(DataError, match="no answers"):
        evaluate(rollout.slice(0, 0), {"model": scores.slice(0, 0)}, TWO, CONFIG, seed=0)
    with pytest.raises(DataError, match="other answers"):
        evaluate(rollout, {"model": scores.slice(1)}, TWO, CONFIG, seed=0)
    with pytest.raises(DataError, match="not in the grid"):
        evaluate(rollout, {"model": scores}, TWO, CONFIG.model_copy(update={"directions": 6}), seed=0)
    with pytest.raises(DataError, match="2 weights"):
        evaluate(rollout, {"model": scores}, THREE, CONFIG, seed=0)
    with pytest.raises(DirectionError, match="'words' is unknown"):
        evaluate(rollout, {"model": scores.drop_columns(["words"])}, TWO, CONFIG, seed=0)


@pytest.mark.parametrize(("space", "answers"), [(TWO, 3), (THREE, 5)], ids=["two", "three"])
def test_the_same_question_at_the_ends_and_the_center(space, answers):
    rollout, scores = policy_tables(space, follow=30)
    prompts = {f"p{p}": [{"role": "user", "content": f"question {p}"}] for p in range(12)}
    shown = side_by_side(rollout, {"gold": scores}, prompts, space, CONFIG, count=2)
    assert [question["prompt"] for question in shown] == ["question 0", "question 1"]
    for question in shown:
        assert len(question["answers"]) == answers
        words = [answer["words"] for answer in question["answers"] if "verbosity" in answer["angles"]]
        assert words == sorted(words)
        assert words[0] < words[-1]
        for answer in question["answers"]:
            assert answer["objectives"]["gold"].keys() == set(space.names)


def test_the_typical_question_is_the_one_in_the_middle_and_not_the_best() -> None:
    rollout, scores = policy_tables(TWO, follow=0, prompts=5)
    rise = {"p0": 90.0, "p1": -5.0, "p2": 20.0, "p3": 0.0, "p4": 10.0}
    weights = [direction[1] for direction in rollout["direction"].to_pylist()]
    top = max(weights)
    ids = rollout["prompt_id"].to_pylist()
    words = [rise[p] / 2 * weight / top for p, weight in zip(ids, weights, strict=True)]
    scores = replaced(scores, "words", words)
    prompts = {p: [{"role": "user", "content": f"question {p}"}] for p in rise}
    found = typical_question(rollout, {"model": scores}, prompts, TWO, CONFIG)
    assert found is not None
    assert (found["prompt_id"], found["arc"], found["by"], found["questions"]) == ("p4", "verbosity", "model", 5)
    assert found["difference"] == pytest.approx(10.0)
    assert [answer["angles"]["verbosity"] for answer in found["answers"]] == [-60, 0, 60]
    nothing = replaced(scores, "valid", [False] * len(scores))
    assert typical_question(rollout, {"model": nothing}, prompts, TWO, CONFIG) is None


# --- targets --------------------------------------------------------------------------------------------------------


def target_tables(space: DirectionSpace, prompts: int = 8, seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """Rollout and scores of a policy that keeps what is held, 3 points too high, and ignores all else."""
    rng = np.random.default_rng(seed)
    rows, scores = [], []
    for target in target_grid(space):
        for p, k in np.ndindex(prompts, CONFIG.samples):
            asked = {"direction": list(target.weights), "held": list(target.held)}
            rows.append({"candidate_id": f"{len(rows)}", "prompt_id": f"p{p}", **asked, "k": k, "response": "a word"})
            scored = [50.0 if value is None else value + 3.0 + rng.uniform(-1, 1) for value in target.held]
            names = [next(iter(objective.attributes)) for objective in space.objectives]
            own = dict(zip(names, scored, strict=True))
            scores.append({"candidate_id": rows[-1]["candidate_id"], "prompt_id": f"p{p}", **own, "valid": True})
    return pa.Table.from_pylist(rows), pa.Table.from_pylist(scores)


def test_targets_are_measured_by_what_is_asked_and_what_is_achieved():
    rollout, scores = target_tables(THREE)
    unscored = replaced(scores, "valid", [False, *[True] * (len(scores) - 1)])
    found = evaluate_targets(rollout, {"model": unscored, "gold": scores}, THREE, CONFIG, seed=0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [(t["objective"], t["asked"]) for t in found["targets"]] == [
        (name, asked) for name in ("verbosity", "warmth") for asked in (10, 30, 50, 70, 90)
    ]
    assert found["targets"][1]["target"] == "helpfulness*100 + warmth*0; verbosity=30"
    for target in found["targets"]:
        own = target["objectives"]["gold"][target["objective"]]
        assert own["low"] <= own["value"] <= own["high"] and own["value"] == pytest.approx(target["asked"] + 3, abs=0.6)
        assert target["error"]["gold"]["value"] == pytest.approx(3, abs=0.6)
        assert target["words"]["value"] == 2
    for errors in found["errors"].values():
        assert set(errors) == {"verbosity", "warmth"}
        for kinds in errors.values():
            assert kinds["per_response"]["value"] == pytest.approx(3, abs=0.3) == kinds["per_target"]["value"]
