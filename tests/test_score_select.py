"""Scores stand beside their candidates, and the winners are those a person would pick by hand.
Run: pytest tests/test_score_select.py
"""

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes import FakeSampler, FakeScorer, all_rows, prompts_of, space_of

from dpa.core.directions import DirectionSpace
from dpa.core.errors import DataError, DirectionError, EngineError, StorageError
from dpa.core.objective import Objective
from dpa.core.records import Prompt
from dpa.core.sections.rollout import RolloutConfig
from dpa.core.sections.selection import SelectionConfig
from dpa.stages.rollout import rollout
from dpa.stages.score import score, score_rows
from dpa.stages.select import CELLS, select_rated, select_winners
from dpa.storage.run_folder import StageFolder
from dpa.storage.schemas import completeness

SPACE = space_of(max_angle=80)
ROLLOUT = RolloutConfig(directions=3, samples=4, prompts_per_shard=4)
POOLED = SelectionConfig(method="pooled", directions=5)


class Loop:
    """Rollout, score and select with fakes, in one folder."""

    def __init__(
        self, path: Path, scorer: FakeScorer | None = None, prompts: int = 6, prompts_per_shard: int = 4
    ) -> None:
        self.path = path
        self.prompts: list[Prompt] = prompts_of(prompts)
        self.candidates, self.scores = self.stage("rollout"), self.stage("score")
        how = ROLLOUT.model_copy(update={"prompts_per_shard": prompts_per_shard})
        rollout(self.candidates, self.prompts, SPACE, [FakeSampler()], how, seed=0)
        score(self.scores, self.candidates, self.prompts, scorer or FakeScorer())

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.path / name, f"iter_1/{name}")

    def select(self, config: SelectionConfig, seed: int = 0, space: DirectionSpace = SPACE) -> list[dict]:
        stage = self.stage("select")
        select_winners(stage, self.candidates, self.scores, self.prompts, space, config, seed)
        return all_rows(stage)

    def pool(self, prompt_id: str) -> tuple[list[dict], np.ndarray]:
        """A prompt's candidates and their scores_NK."""
        rows = [row for row in all_rows(self.candidates) if row["prompt_id"] == prompt_id]
        scores = {row["candidate_id"]: (row["helpfulness"], row["verbosity"]) for row in all_rows(self.scores)}
        return rows, np.array([scores[row["candidate_id"]] for row in rows])


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    return Loop(tmp_path_factory.mktemp("loop"))


def test_scores_have_the_rollouts_shards_and_order(loop: Loop) -> None:
    assert loop.scores.shards == loop.candidates.shards == 2
    for candidates, scores in zip(loop.candidates.tables(), loop.scores.tables(), strict=True):
        assert scores.column_names == ["candidate_id", "prompt_id", "helpfulness", "verbosity", "valid"]
        assert scores["candidate_id"].equals(candidates["candidate_id"])
        assert scores["prompt_id"].equals(candidates["prompt_id"])
        words = [len(response.split()) for response in candidates["response"].to_pylist()]
        assert scores["verbosity"].to_pylist() == words
    assert loop.scores.ledger.candidates_scored == 6 * 12


def test_a_winner_says_whether_it_was_cut_at_the_limit(loop: Loop) -> None:
    reasons = {row["candidate_id"]: row["finish_reason"] for row in all_rows(loop.candidates)}
    rows = loop.select(POOLED)
    assert [row["complete"] for row in rows] == [reasons[row["candidate_id"]] == "stop" for row in rows]
    cut = (
        loop.candidates.table(0).drop_columns("finish_reason").append_column("finish_reason", pa.array(["length"] * 48))
    )
    assert completeness(cut) == [False] * 48
    assert completeness(cut.drop_columns("finish_reason")) == [True] * 48, "rated responses are whole"


def test_pooled_winners_are_the_best_of_the_whole_pool(loop: Loop) -> None:
    rows = loop.select(POOLED)
    assert [row["prompt_id"] for row in rows] == [f"p{n}" for n in range(6) for _ in range(5)]
    assert len({tuple(row["direction"]) for row in rows}) == 30
    for row in rows:
        candidates, scores_NK = loop.pool(row["prompt_id"])
        utility_N = scores_NK @ np.array(row["direction"])
        best = candidates[int(utility_N.argmax())]
        assert (row["candidate_id"], row["response"]) == (best["candidate_id"], best["response"])
        assert row["utility"] == pytest.approx(utility_N.max())
        assert row["utility"] == pytest.approx(
            row["direction"][0] * row["helpfulness"] + row["direction"][1] * row["verbosity"]
        )
        assert json.loads(row["messages"]) == [{"role": "user", "content": f"question{row['prompt_id'][1:]}"}]


@pytest.mark.parametrize("method", ["pooled", "best_mean"])
def test_a_winner_names_a_direction_for_which_its_pool_keeps_another_response(loop: Loop, method: str) -> None:
    rows = loop.select(SelectionConfig(method=method, directions=5))
    for row in rows:
        candidates, scores_NK = loop.pool(row["prompt_id"])

        def kept(weights: list[float], scores_NK: np.ndarray = scores_NK, candidates: list = candidates) -> str:
            utility_N = scores_NK @ np.array(weights)
            if method == "best_mean":
                means_D = utility_N.reshape(3, 4).mean(axis=1)
                utility_N[np.repeat(np.arange(3), 4) != means_D.argmax()] = -np.inf
            return candidates[int(utility_N.argmax())]["response"]

        if row["negative_direction"]:
            assert kept(row["negative_direction"]) != row["response"]
            assert SPACE.direction(row["negative_direction"]).integers != SPACE.direction(row["direction"]).integers
            assert SPACE.angle_to_center(np.array([row["negative_direction"]]))[0] <= SPACE.max_angle + 1e-6
        else:
            outermost = [kept(weights) for weights in SPACE.grid(5).tolist()]
            assert outermost.count(row["response"]) >= 4, "none of 16 directions found where another wins"
    assert len({tuple(row["negative_direction"]) for row in rows}) > 5 and rows == loop.select(
        SelectionConfig(method=method, directions=5)
    )
    assert {row["negative_direction"] for row in loop.select(SelectionConfig(method="random"))} == {None}


def test_best_mean_winners_were_made_under_the_direction_that_does_best_on_average(loop: Loop) -> None:
    rows = loop.select(SelectionConfig(method="best_mean", directions=5))
    assert [row["prompt_id"] for row in rows] == [f"p{n}" for n in range(6) for _ in range(5)]
    for row in rows:
        candidates, scores_NK = loop.pool(row["prompt_id"])
        utility_DN = (scores_NK @ np.array(row["direction"])).reshape(3, 4)
        asked = int(utility_DN.mean(axis=1).argmax())
        assert row["candidate_id"] == candidates[4 * asked + int(utility_DN[asked].argmax())]["candidate_id"]
    asked_first = [candidate["direction"] for candidate in loop.pool("p0")[0][::4]]
    assert [row["direction"] for row in rows[:3]] == asked_first, "those it was asked under come first"


def advantage_of(loop: Loop, row: dict) -> float:
    """How much it matters for a winner's direction under which of the asked ones an answer is made."""
    mean_D = (loop.pool(row["prompt_id"])[1] @ np.array(row["direction"])).reshape(3, 4).mean(axis=1)
    return mean_D.max() - mean_D.mean()


def test_winners_of_the_largest_advantage_around_each_direction_of_the_grid_are_kept(loop: Loop) -> None:
    every = loop.select(SelectionConfig(method="best_mean", directions=8))
    kept = loop.select(SelectionConfig(method="best_mean", directions=8, advantage_share=0.25))
    assert all(row in every for row in kept)
    cells: dict[int, list[dict]] = {}
    for row in every:
        cells.setdefault(int((SPACE.grid(CELLS) @ row["direction"]).argmax()), []).append(row)
    for rows in cells.values():
        largest = sorted((advantage_of(loop, row) for row in rows), reverse=True)
        own = [advantage_of(loop, row) for row in rows if row in kept]
        assert sorted(own, reverse=True) == pytest.approx(largest[: math.ceil(len(rows) / 4)])


def test_shards_change_nothing_of_what_is_kept(tmp_path: Path) -> None:
    config = SelectionConfig(method="best_mean", directions=8, advantage_share=0.25)
    small, large = Loop(tmp_path / "small", prompts_per_shard=2), Loop(tmp_path / "large", prompts_per_shard=6)
    assert small.candidates.shards == 3 > large.candidates.shards == 1
    assert small.select(config) == large.select(config)


def test_another_share_selects_again(loop: Loop) -> None:
    config = SelectionConfig(method="best_mean", directions=8, advantage_share=0.25)
    few, more = (loop.select(config.model_copy(update={"advantage_share": share})) for share in (0.25, 0.75))
    assert len(few) < len(more) and all(row in more for row in few)


def test_prompts_without_a_score_take_no_place_among_the_kept(tmp_path: Path) -> None:
    config = SelectionConfig(method="best_mean", directions=400, advantage_share=0.75)
    loop = Loop(tmp_path, FakeScorer(broken={f"question{n}#": np.nan for n in range(3)}))
    kept = loop.select(config)
    assert {row["prompt_id"] for row in kept} == {"p3", "p4", "p5"}
    assert 0.75 <= len(kept) / (3 * 400) < 0.8


def test_selection_resumes_at_its_shard_with_the_same_rows(tmp_path: Path) -> None:
    config = SelectionConfig(method="best_mean", directions=8, advantage_share=0.25)
    loop = Loop(tmp_path)
    rows = loop.select(config)
    for file in ("done.json", "shard-00001.json", "shard-00001.parquet"):
        (tmp_path / "select" / file).unlink()
    first = (tmp_path / "select" / "shard-00000.parquet").stat().st_mtime_ns
    assert loop.select(config) == rows
    assert (tmp_path / "select" / "shard-00000.parquet").stat().st_mtime_ns == first, "it was not selected again"


def test_per_direction_winners_are_the_best_of_those_made_under_it(loop: Loop) -> None:
    rows = loop.select(SelectionConfig(method="per_direction"))
    assert len(rows) == 6 * 3
    for row in rows:
        candidates, scores_NK = loop.pool(row["prompt_id"])
        own = [i for i, candidate in enumerate(candidates) if candidate["direction"] == row["direction"]]
        assert len(own) == 4
        best = max(own, key=lambda i: float(scores_NK[i] @ np.array(row["direction"])))
        assert row["candidate_id"] == candidates[best]["candidate_id"]


@pytest.mark.parametrize(
    "config",
    [SelectionConfig(method=method) for method in ("per_direction", "pooled", "random", "best_mean")]
    + [SelectionConfig(method="best_mean", directions=50, advantage_share=0.5)],
)
def test_a_shard_whose_prompts_were_all_rejected_selects_nothing(tmp_path: Path, config: SelectionConfig) -> None:
    prompts = prompts_of(5)
    stages = {name: StageFolder(tmp_path / name, f"iter_1/{name}") for name in ("rollout", "score", "select")}
    silent = FakeSampler(misbehave={prompts[4].messages[-1]["content"]: "empty"})
    rollout(stages["rollout"], prompts, SPACE, [silent], ROLLOUT.model_copy(update={"max_reject_rate": 1.0}), seed=0)
    assert [stages["rollout"].table(number).num_rows for number in range(2)] == [48, 0]
    score(stages["score"], stages["rollout"], prompts, FakeScorer())
    select_winners(stages["select"], stages["rollout"], stages["score"], prompts, SPACE, config, 0)
    assert {row["prompt_id"] for row in all_rows(stages["select"])} == {prompt.prompt_id for prompt in prompts[:4]}


def test_random_draws_the_pooled_directions_and_a_candidate_of_the_prompt(loop: Loop) -> None:
    pooled, drawn = loop.select(POOLED), loop.select(SelectionConfig(method="random", directions=5))
    assert [row["direction"] for row in drawn] == [row["direction"] for row in pooled]
    assert np.mean([row["utility"] for row in drawn]) < np.mean([row["utility"] for row in pooled])
    owner = {row["candidate_id"]: row["prompt_id"] for row in all_rows(loop.candidates)}
    assert all(owner[row["candidate_id"]] == row["prompt_id"] for row in drawn)
    assert len({row["candidate_id"] for row in drawn}) > 15


def test_directions_follow_the_seed(loop: Loop) -> None:
    assert [row["direction"] for row in loop.select(POOLED, seed=1)] != [
        row["direction"] for row in loop.select(POOLED)
    ]


def test_a_pool_serves_first_the_directions_it_was_asked_under_then_new_ones(loop: Loop) -> None:
    asked = list(dict.fromkeys(tuple(row["direction"]) for row in loop.pool("p0")[0]))
    few, many = (loop.select(SelectionConfig(directions=count)) for count in (2, len(asked) + 2))
    served = [tuple(row["direction"]) for row in many if row["prompt_id"] == "p0"]
    assert served[: len(asked)] == asked
    assert len(set(served)) == len(asked) + 2
    assert [tuple(row["direction"]) for row in few if row["prompt_id"] == "p0"] == asked[:2]


def test_objectives_are_combined_at_use(loop: Loop) -> None:
    space = DirectionSpace(
        (
            Objective("quality", {"helpfulness": 0.5, "verbosity": 0.5}),
            Objective("brevity", {"verbosity": -1.0}),
            Objective("helpfulness", {"helpfulness": 1.0}),
        )
    )
    for row in loop.select(POOLED, space=space):
        assert row["quality"] == pytest.approx((row["helpfulness"] - row["brevity"]) / 2)
        assert row["utility"] == pytest.approx(
            np.dot(row["direction"], [row["quality"], row["brevity"], row["helpfulness"]])
        )


def test_an_objective_nobody_scores_is_named(loop: Loop) -> None:
    with pytest.raises(DirectionError, match="honesty"):
        loop.select(POOLED, space=space_of("helpfulness", "honesty"))


def test_an_objective_named_like_a_column_is_refused(loop: Loop) -> None:
    space = DirectionSpace((Objective("utility", {"helpfulness": 1.0}), Objective("verbosity", {"verbosity": 1.0})))
    with pytest.raises(DataError, match="`utility` is the name of a column"):
        select_winners(loop.stage("clash"), loop.candidates, loop.scores, loop.prompts, space, POOLED, 0)


def test_a_second_scorer_scores_the_same_rollout(loop: Loop) -> None:
    gold = loop.stage("gold")
    score(gold, loop.candidates, loop.prompts, FakeScorer("gold"))
    assert all_rows(gold) == all_rows(loop.scores)


def test_another_scorer_in_the_same_stage_scores_again(tmp_path: Path) -> None:
    loop = Loop(tmp_path, prompts=2)
    first = FakeScorer()
    score(loop.scores, loop.candidates, loop.prompts, first)
    assert first.scored == [], "nothing is scored twice"
    other = FakeScorer("other")
    score(loop.scores, loop.candidates, loop.prompts, other)
    assert len(other.scored) == 24


def test_a_scorer_that_skips_rows_is_an_error(tmp_path: Path) -> None:
    class Skips(FakeScorer):
        def score(self, prompts, responses):  # type: ignore[no-untyped-def]
            return super().score(prompts, responses)[1:]

    with pytest.raises(EngineError, match="must score each row"):
        Loop(tmp_path, Skips(), prompts=2)


def test_scores_of_other_candidates_are_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path, prompts=2)
    other = StageFolder(tmp_path / "other", "iter_2/rollout")
    rollout(other, loop.prompts, SPACE, [FakeSampler()], ROLLOUT, seed=0)
    with pytest.raises(StorageError, match="scores other candidates"):
        select_winners(loop.stage("s"), other, loop.scores, loop.prompts, SPACE, POOLED, 0)


def rated_table() -> pa.Table:
    """Three prompts with pools of 3, 1 and 2 responses, their rows mixed."""
    rows = [
        ("r0", "a", "x"),
        ("r1", "b", "x y"),
        ("r2", "a", "x y z"),
        ("r3", "c", "x"),
        ("r4", "a", "q"),
        ("r5", "c", "z"),
    ]
    messages = [json.dumps([{"role": "user", "content": prompt}]) for _, prompt, _ in rows]
    ids, prompts, responses = zip(*rows, strict=True)
    marks = pa.array([None] * len(rows), pa.float64())
    return pa.table(
        {"row_id": ids, "prompt_id": prompts, "messages": messages, "response": responses, "source": ids, "mark": marks}
    )


@pytest.mark.parametrize("method", ["pooled", "per_direction", "best_mean"])
def test_t0_selects_among_the_rated_responses(tmp_path: Path, method: str) -> None:
    ratings, scores, stage = rated_table(), StageFolder(tmp_path / "score"), StageFolder(tmp_path / "select")
    score_rows(scores, ratings, FakeScorer())
    config = SelectionConfig(method=method, directions=7)
    ledger = select_rated(stage, ratings, scores, SPACE, config, seed=0)
    rows = all_rows(stage)
    assert ledger.rows == len(rows) == 21
    by_id = {row["candidate_id"]: np.array([row["helpfulness"], row["verbosity"]]) for row in all_rows(scores)}
    pools = {"a": ["r0", "r2", "r4"], "b": ["r1"], "c": ["r3", "r5"]}
    for row in rows:
        best = max(pools[row["prompt_id"]], key=lambda member: by_id[member] @ np.array(row["direction"]))
        assert row["candidate_id"] == best
        assert json.loads(row["messages"])[0]["content"] == row["prompt_id"]
    again = FakeScorer()
    score_rows(scores, ratings, again)
    assert again.scored == []


def test_t0_selects_anew_under_another_seed(tmp_path: Path) -> None:
    ratings, scores, stage = rated_table(), StageFolder(tmp_path / "score"), StageFolder(tmp_path / "select")
    score_rows(scores, ratings, FakeScorer())
    directions = []
    for seed in (0, 1):
        select_rated(stage, ratings, scores, SPACE, POOLED, seed)
        directions.append([row["direction"] for row in all_rows(stage)])
    assert directions[0] != directions[1]


def test_one_large_pool_does_not_cost_the_others_its_size(tmp_path: Path) -> None:
    """And the rows of a prompt stay at its place."""
    sizes = {f"p{place}": 2_000 if place == 1_000 else 1 + place % 3 for place in range(2_001)}
    rows = [(f"{prompt_id}-{n}", prompt_id) for prompt_id, size in sizes.items() for n in range(size)]
    ids, prompt_ids = zip(*rows, strict=True)
    words = ["a " * (n % 97) for n in range(len(rows))]
    ratings = pa.table({"row_id": ids, "prompt_id": prompt_ids, "messages": ["[]"] * len(rows), "response": words})
    scores, stage = StageFolder(tmp_path / "score"), StageFolder(tmp_path / "select")
    score_rows(scores, ratings, FakeScorer())
    tracemalloc.start()
    try:
        select_rated(stage, ratings, scores, SPACE, SelectionConfig(directions=1), seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000, "padded to the largest, the scores alone are 64 MB"
    assert [row["prompt_id"] for row in all_rows(stage)] == list(sizes)


def test_t0_scores_of_other_ratings_are_refused(tmp_path: Path) -> None:
    scores = StageFolder(tmp_path / "score")
    score_rows(scores, rated_table(), FakeScorer())
    with pytest.raises(StorageError, match="scores other rows"):
        select_rated(StageFolder(tmp_path / "s"), rated_table().slice(1), scores, SPACE, POOLED, 0)
