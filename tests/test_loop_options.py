"""Each option of the loop does what its name says, and left alone changes nothing.
pytest tests/test_loop_options.py
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes import FakeSampler, FakeScorer, all_rows, prompts_of, run_config, space_of
from hypothesis import given
from hypothesis import strategies as st

from dpa.core.config import load_config
from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, DirectionError, RejectRateError
from dpa.core.records import Prompt, stable_hash
from dpa.core.sections.rollout import RolloutConfig
from dpa.core.sections.selection import SelectionConfig
from dpa.core.selection import select, select_pairs, standard_deviations
from dpa.recipes.dpa import Loop
from dpa.stages.finetune import with_replay
from dpa.stages.rollout import rollout
from dpa.stages.score import score
from dpa.stages.select import select_winners
from dpa.storage.run_folder import StageFolder
from dpa.world.demo import write_world

SPACE = space_of(max_angle=60)
ROLLOUT = RolloutConfig(directions=3, samples=4, prompts_per_shard=4)


def stages(path: Path, scorer: FakeScorer | None = None) -> tuple[StageFolder, StageFolder, list[Prompt]]:
    """A finished rollout of six prompts and its scores."""
    candidates, scores = StageFolder(path / "rollout", "iter_1/rollout"), StageFolder(path / "score", "iter_1/score")
    prompts = prompts_of(6)
    rollout(candidates, prompts, SPACE, [FakeSampler()], ROLLOUT, 0)
    score(scores, candidates, prompts, scorer or FakeScorer())
    return candidates, scores, prompts


def selected(path: Path, config: SelectionConfig, scorer: FakeScorer | None = None, **more: object) -> list[dict]:
    """Rows of a selection over `stages`."""
    candidates, scores, prompts = stages(path, scorer)
    stage = StageFolder(path / "select", "iter_1/select")
    select_winners(stage, candidates, scores, prompts, SPACE, config, 0, **more)
    return all_rows(stage)


def rounded(rows: list[dict]) -> list:
    """The rows' values, floats to nine digits (the last bits are the machine's own)."""
    return json.loads(json.dumps(rows), parse_float=lambda text: round(float(text), 9))


# --- left alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "digest"),
    [("pooled", "3d1a846d4be464c5"), ("per_direction", "c725d89c1749a528"), ("random", "831d8291532a513f")],
)
def test_left_alone_the_options_change_no_row(tmp_path: Path, method: str, digest: str) -> None:
    """The digests are those of the commit before the options came (c4e21fb), when rows did not say `complete` and
    `negative_direction` yet."""
    rows = selected(tmp_path, SelectionConfig(method=method, directions=5))
    assert all(row.pop("complete") and row.pop("negative_direction") != row["direction"] for row in rows)
    assert stable_hash(rounded(rows)) == digest
    assert stable_hash(rounded(all_rows(StageFolder(tmp_path / "rollout")))) == "3c1b6c636d0f7be9"


# --- directions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [SPACE, space_of("a", "b", "c", max_angle=60)], ids=["K2", "K3"])
def test_training_ends_moves_that_share_of_the_directions_to_the_outer_fifth(space: DirectionSpace) -> None:
    plain_DK = space.sample(20_000, np.random.default_rng(0))
    ends_DK = replace(space, training_ends=0.5).sample(20_000, np.random.default_rng(0))
    plain_D, ends_D = space.angle_to_center(plain_DK), space.angle_to_center(ends_DK)
    assert ends_D.max() <= 60 + 1e-9
    assert (plain_D >= 48).mean() == pytest.approx(0.2, abs=0.02)
    assert (ends_D >= 48).mean() == pytest.approx(0.5 + 0.5 * 0.2, abs=0.02)
    stayed_D = np.abs(plain_DK - ends_DK).max(axis=1) < 1e-12
    assert stayed_D.mean() == pytest.approx(0.5, abs=0.02), "the others are drawn as ever"
    across_DK = ends_DK - np.outer(ends_DK @ space.center_K, space.center_K)
    before_DK = plain_DK - np.outer(plain_DK @ space.center_K, space.center_K)
    assert (np.einsum("dk,dk->d", across_DK, before_DK) >= 0).all(), "each keeps its side"


def test_training_ends_are_those_of_the_training_cone_and_travel_with_the_model() -> None:
    space = replace(SPACE, training_angle=80, training_ends=1.0)
    angles = space.angle_to_center(space.sample(200, np.random.default_rng(0)))
    assert 64 - 1e-9 <= angles.min() < 66 and 78 < angles.max() <= 80 + 1e-9
    assert space.angle_to_center(space.grid(9)).max() == pytest.approx(60), "it is measured where it is advertised"
    assert DirectionSpace.from_dict(space.to_dict()) == space
    with pytest.raises(DirectionError, match=r"training_ends: 2 is not in \[0, 1\]"):
        replace(SPACE, training_ends=2.0)


def test_training_arcs_puts_that_share_of_the_directions_where_one_other_objective_weighs_anything() -> None:
    space = space_of("a", "b", "c", max_angle=60)
    plain_DK = space.sample(20_000, np.random.default_rng(0))
    arcs_DK = replace(space, training_arcs=0.5).sample(20_000, np.random.default_rng(0))
    moved_D = np.abs(arcs_DK - plain_DK).max(axis=1) > 1e-9
    assert moved_D.mean() == pytest.approx(0.5, abs=0.02), "the others are drawn as ever"
    assert (np.sum(arcs_DK[moved_D] == 0, axis=1) == 1).all(), "one objective weighs exactly nothing"
    assert not (plain_DK == 0).any(), "drawn freely, never"
    np.testing.assert_allclose(space.angle_to_center(arcs_DK), space.angle_to_center(plain_DK), atol=1e-6)
    for k in (1, 2):  # each is turned to the nearest arc: all four ways are as frequent
        for side in (-1, 1):
            own_D = moved_D & (arcs_DK[:, 3 - k] == 0) & (np.sign(arcs_DK[:, k]) == side)
            assert own_D.mean() == pytest.approx(0.125, abs=0.01)


@pytest.mark.parametrize("center", [{"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1}])
def test_training_arcs_stay_in_the_cone_whatever_its_center(center: dict[str, float]) -> None:
    space = replace(space_of("a", "b", "c", max_angle=30), center=center, training_arcs=1.0)
    drawn_DK = space.sample(500, np.random.default_rng(0))
    assert space.angle_to_center(drawn_DK).max() <= 30 + 1e-9
    assert np.any([space.on_arc(drawn_DK, name) for name in space.arc_names], axis=0).all()
    assert DirectionSpace.from_dict(space.to_dict()) == space


def test_before_ends_until_an_iteration_draws_from_the_ends_and_later_ones_as_ever(tmp_path: Path) -> None:
    def degrees(t: int, until: int) -> np.ndarray:
        config = run_config(tmp_path / f"{t}-{until}", selection={"ends_until": until})
        with Loop(config) as loop:
            space = loop.drawn_from(t)
            assert t < until or space is loop.space
            assert replace(space, training_ends=0.0) == loop.space, "nothing else of the space changes"
            return space.angle_to_center(space.sample(100, np.random.default_rng(0))) / space.training_angle

    assert degrees(0, 1).min() >= 0.8 - 1e-9 and degrees(1, 2).min() >= 0.8 - 1e-9
    assert degrees(1, 1).min() < 0.1 and degrees(0, 0).min() < 0.1


def test_two_directions_of_a_prompt_lie_on_either_side(tmp_path: Path) -> None:
    """So that many questions with two directions each still have winners to tell apart."""
    drawn = [SPACE.asked_angle(SPACE.sample(2, np.random.default_rng(seed)), SPACE.arc_names[0]) for seed in range(50)]
    assert all(angles.min() < 0 < angles.max() for angles in drawn)


# --- standardised ---------------------------------------------------------------------------------------------------


class Narrow(FakeScorer):
    """Helpfulness varies a hundredth as much as it did."""

    def score(self, prompts, responses):  # type: ignore[no-untyped-def]
        return super().score(prompts, responses) * [0.01, 1.0]


class Constant(FakeScorer):
    """Helpfulness never varies."""

    def score(self, prompts, responses):  # type: ignore[no-untyped-def]
        return super().score(prompts, responses) * [0.0, 1.0] + [50.0, 0.0]


def test_standardised_selection_does_not_depend_on_an_objectives_scale(tmp_path: Path) -> None:
    for standardise, same in ((True, True), (False, False)):
        config = SelectionConfig(directions=8, standardise=standardise)
        wide = selected(tmp_path / f"wide-{standardise}", config)
        narrow = selected(tmp_path / f"narrow-{standardise}", config, Narrow())
        winners = [[row["candidate_id"] for row in rows] for rows in (wide, narrow)]
        assert (winners[0] == winners[1]) is same
        assert all(0 <= row["helpfulness"] < 1.01 for row in narrow), "the columns keep the scorer's own scale"


def test_standardised_utilities_are_weighed_by_the_spread_over_the_whole_stage(tmp_path: Path) -> None:
    rows = selected(tmp_path, SelectionConfig(directions=8, standardise=True))
    scores = StageFolder(tmp_path / "score")
    assert scores.shards > 1
    scale = np.array([[row["helpfulness"], row["verbosity"]] for row in all_rows(scores)]).std(axis=0)
    for row in rows:
        weighed = np.array([row["helpfulness"], row["verbosity"]]) / scale
        assert row["utility"] == pytest.approx(np.dot(row["direction"], weighed))


def test_fault_15_an_objective_without_variance_is_not_divided_by_zero(tmp_path: Path) -> None:
    rows = selected(tmp_path, SelectionConfig(directions=8, standardise=True), Constant())
    assert len(rows) == 48
    assert all(np.isfinite(row["utility"]) for row in rows)
    assert standard_deviations(np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, 9.0]])).tolist() == [1.0, 1.0]
    assert standard_deviations(np.full((5, 2), 0.1)).tolist() == [1.0, 1.0], "rounding is no variance"
    assert standard_deviations(np.empty((0, 3))).tolist() == [1.0, 1.0, 1.0]


# --- replay ---------------------------------------------------------------------------------------------------------


def test_replay_adds_that_share_of_earlier_rows_once_each() -> None:
    now, before = (
        pa.table({"id": range(100)}),
        [pa.table({"id": range(1000, 1060)}), pa.table({"id": range(2000, 2040)})],
    )
    assert with_replay(now, before, 0.0, 1) is now
    assert with_replay(now, [], 0.5, 1) is now
    ids = with_replay(now, before, 0.25, 1)["id"].to_pylist()
    assert ids[:100] == list(range(100))
    assert len(ids) == 125 == len(set(ids))
    assert {identity // 1000 for identity in ids[100:]} == {1, 2}
    assert ids != with_replay(now, before, 0.25, 2)["id"].to_pylist(), "drawn anew for each iteration"
    assert ids == with_replay(now, before, 0.25, 1)["id"].to_pylist()
    assert len(with_replay(now, before, 3.0, 1)) == 200, "no more than there are"
    newer = now.append_column("negative_direction", pa.array([[1.0, 0.0]] * 100))
    assert with_replay(newer, before, 0.25, 1)["negative_direction"].null_count == 25, "an earlier version had no such"


# --- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pooled", "per_direction"])
@pytest.mark.parametrize("rejected", ["worst", "random"])
def test_a_pair_is_the_best_of_the_pool_and_a_worse_one(tmp_path: Path, method: str, rejected: str) -> None:
    config = SelectionConfig(method=method, directions=5, rejected=rejected)
    winners = selected(tmp_path / "winners", config)
    pairs = selected(tmp_path / "pairs", config, pairs=True)
    assert [(row["prompt_id"], row["direction"], row["chosen_id"]) for row in pairs] == [
        (row["prompt_id"], row["direction"], row["candidate_id"]) for row in winners
    ]
    candidates = {row["candidate_id"]: row for row in all_rows(StageFolder(tmp_path / "pairs" / "rollout"))}
    scores = {row["candidate_id"]: row for row in all_rows(StageFolder(tmp_path / "pairs" / "score"))}
    at_the_bottom = 0
    for row in pairs:
        pool = [
            identity
            for identity, candidate in candidates.items()
            if candidate["prompt_id"] == row["prompt_id"]
            and (method == "pooled" or candidate["direction"] == row["direction"])
        ]
        utility = {
            identity: np.dot(row["direction"], [scores[identity]["helpfulness"], scores[identity]["verbosity"]])
            for identity in pool
        }
        assert row["utility_chosen"] == pytest.approx(max(utility.values()))
        assert row["utility_rejected"] == pytest.approx(utility[row["rejected_id"]])
        assert row["utility_chosen"] > row["utility_rejected"]
        assert row["rejected"] == candidates[row["rejected_id"]]["response"]
        at_the_bottom += utility[row["rejected_id"]] == min(utility.values())
    assert bool(at_the_bottom == len(pairs)) is (rejected == "worst")


def test_fault_15_equal_candidates_make_no_pair_and_are_counted(tmp_path: Path) -> None:
    class Same(FakeScorer):
        def score(self, prompts, responses):  # type: ignore[no-untyped-def]
            rows = super().score(prompts, responses)
            same = [messages[-1]["content"] == "question2" for messages in prompts]
            return np.where(np.array(same)[:, None], 50.0, rows)

    rows = selected(tmp_path, SelectionConfig(directions=5), Same(), pairs=True)
    assert {row["prompt_id"] for row in rows} == {"p0", "p1", "p3", "p4", "p5"}
    rejects = (tmp_path / "select" / "rejects.jsonl").read_text()
    assert json.loads(rejects) == {
        "id": "p2",
        "stage": "iter_1/select",
        "reason": "no candidate is better than another under any direction",
    }


def test_fault_14_a_candidate_without_a_score_is_neither_chosen_nor_rejected() -> None:
    scores_PNK = np.array([[[1.0, 1.0], [np.nan, 9.0], [3.0, 3.0], [-np.inf, 0.0], [0.0, 0.0]]])
    valid_PN = np.array([[True, True, True, True, False]])
    directions_PDK = np.array([[[1.0, 0.0], [-1.0, 0.0]]])
    rngs = [np.random.default_rng(0)]
    for rejected in ("worst", "random"):
        winners_PD, losers_PD = select_pairs(scores_PNK, directions_PDK, valid_PN, rejected, rngs)
        assert winners_PD.tolist() == [[2, 0]]
        assert losers_PD.tolist() == [[0, 2]]
    winners_PD, losers_PD = select_pairs(scores_PNK, directions_PDK, np.zeros((1, 5), dtype=bool))
    assert winners_PD.tolist() == losers_PD.tolist() == [[-1, -1]]


def test_no_pair_at_all_stops_the_run(tmp_path: Path) -> None:
    class Same(FakeScorer):
        def score(self, prompts, responses):  # type: ignore[no-untyped-def]
            return np.full((len(responses), 2), 50.0)

    with pytest.raises(RejectRateError, match="no candidate is better than another"):
        selected(tmp_path, SelectionConfig(directions=5), Same(), pairs=True)


@pytest.mark.parametrize("method", ["random", "best_mean"])
def test_some_winners_have_no_losers(tmp_path: Path, method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} keeps winners and no pairs; take pooled or per_direction"):
        Loop(run_config(tmp_path, learner="dpo", selection={"method": method}))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"selection": {"rejected": "other_direction", "directions": 1}}, "needs two directions of a pool"),
        ({"selection": {"method": "per_direction"}, "rollout": {"samples": 1}}, "a pair needs two answers"),
        ({"rollout": {"directions": 1, "samples": 1}}, "a pair needs two answers"),
    ],
)
def test_pairs_that_nothing_could_make_are_refused_before_hours_are_spent(
    tmp_path: Path, changes: dict, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Loop(run_config(tmp_path, learner="dpo", **changes))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"selection": {"advantage_share": 0.25}}, "advantage_share 0.25: method pooled has no advantages"),
        (
            {"selection": {"method": "best_mean", "advantage_share": 0.25}, "rollout": {"directions": 1}},
            r"advantage_share 0.25 needs candidates of 2 directions .* raise rollout.directions \(1\)",
        ),
    ],
)
def test_advantages_are_those_of_several_directions(tmp_path: Path, changes: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run_config(tmp_path, **changes)


# --- the loop -------------------------------------------------------------------------------------------------------


def small_loop(path: Path, settings: dict[str, str]) -> Loop:
    """A loop of the demo world that takes seconds."""
    small = {
        "prompts.count": "6",
        "rollout.directions": "2",
        "rollout.samples": "2",
        "rollout.max_new_tokens": "30",
        "rollout.workers": "1",
        "evaluate.directions": "3",
        "evaluate.prompts.count": "2",
        "evaluate.resamples": "20",
        "reward.train.method": "ridge",
        "reward.train.allow_worse_than_mean": "true",  # three held-out prompts tell nothing
    }
    recipe = write_world(path / "world", path / "run", seed=3, rated_questions=15, prompts=20)
    return Loop(load_config(recipe, small | settings))


def test_the_loop_serves_more_directions_online_and_keeps_the_winners_that_matter(tmp_path: Path) -> None:
    settings = {
        "iterations": "1",
        "selection": "{method: best_mean, directions: 1, online_directions: 8, advantage_share: 0.5}",
    }
    with small_loop(tmp_path, settings) as loop:
        loop.run()
        offline, online = all_rows(loop.stage(0, "select")), all_rows(loop.stage(1, "select"))
    assert len(offline) == len({row["prompt_id"] for row in offline}), "one direction each"
    assert 24 <= len(online) < 48, "half of 6 x 8, rounded up around each direction of the grid"


def test_the_loop_learns_from_pairs_with_every_option_on(tmp_path: Path) -> None:
    settings = {
        "iterations": "2",
        "learner": "dpo",
        "finetune.optimizer": "adamw",
        "dpo": "{learning_rate: 1.0e-4, optimizer: muon, pairs_per_step: 8, pairs_per_device: 8, replay: 0.5}",
        "space.training_angle": "55",
        "space.training_ends": "0.3",
        "space.training_arcs": "0.3",
        "selection": "{directions: 3, standardise: true}",
    }
    with small_loop(tmp_path, settings) as loop:
        loop.run()
    policies = json.loads((tmp_path / "run" / "results.json").read_text())["policies"]
    assert [policy["name"] for policy in policies] == ["t = 0", "t = 1", "t = 2"]
    winners = StageFolder(tmp_path / "run/iter_0/select").table(0).column_names
    pairs = StageFolder(tmp_path / "run/iter_1/select").table(0).column_names
    assert "response" in winners and {"chosen", "rejected", "utility_chosen", "utility_rejected"} <= set(pairs)
    ledgers = [policy["ledger"]["finetune"] for policy in policies]
    assert "reference_tokens" not in ledgers[0]["extra"]
    assert ledgers[1]["extra"]["reference_tokens"] == ledgers[1]["training_tokens"] > 0
    assert ledgers[1]["extra"]["replayed"] == 0, "winners of t = 0 are no pairs"
    assert ledgers[2]["extra"]["replayed"] == 9 == ledgers[2]["rows"] - policies[2]["ledger"]["select"]["rows"]
    logged = (tmp_path / "run/iter_2/finetune/log.jsonl").read_text().splitlines()
    assert "rewards/margins" in json.loads(logged[0])
    provenance = json.loads((tmp_path / "run/iter_2/policy/dpa_config.json").read_text())
    assert (provenance["space"]["max_angle"], provenance["space"]["training_angle"]) == (45, 55)
    assert provenance["provenance"]["dpo"]["beta"] == 0.1


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(2, 3), st.integers(0, 8), st.booleans())
def test_winners_of_two_directions_are_paired_in_both_orders(N: int, D: int, K: int, seed: int, coarse: bool) -> None:
    """As many directions are paired as can be, each rejects another's winner, and no response is better in itself."""
    N = 1 + N % 8
    rng = np.random.default_rng([N, D, K, seed])
    scores_PNK, directions_PDK = rng.normal(size=(4, N, K)), rng.normal(size=(4, D, K))
    if coarse:
        scores_PNK = scores_PNK.round()  # many ties
    valid_PN = rng.random((4, N)) < 0.8
    rngs = [np.random.default_rng(p) for p in range(4)]
    winners_PD, losers_PD = select_pairs(scores_PNK, directions_PDK, valid_PN, "other_direction", rngs)
    assert ((winners_PD < 0) == (losers_PD < 0)).all()
    best_PD = select(scores_PNK, directions_PDK, valid_PN)
    for p in range(4):
        paired = np.flatnonzero(winners_PD[p] >= 0)
        assert (winners_PD[p, paired] == best_PD[p, paired]).all()
        assert set(losers_PD[p, paired]) <= set(winners_PD[p, paired])
        orders = [(winners_PD[p, d], losers_PD[p, d]) for d in paired]
        assert sorted(orders) == sorted((rejected, chosen) for chosen, rejected in orders)
        chosen_K, rejected_K = scores_PNK[p, winners_PD[p, paired]], scores_PNK[p, losers_PD[p, paired]]
        assert (np.einsum("dk,dk->d", chosen_K - rejected_K, directions_PDK[p, paired]) > 0).all()
        if not coarse and (best_PD[p] >= 0).all():
            most = max(np.bincount(best_PD[p]))
            assert len(paired) == 2 * min(D // 2, D - most)


def test_pairs_of_other_directions_go_through_the_stage(tmp_path: Path) -> None:
    rows = selected(tmp_path, SelectionConfig(directions=6, rejected="other_direction"), pairs=True)
    assert rows and all(row["utility_chosen"] > row["utility_rejected"] for row in rows)
    orders = [(row["prompt_id"], row["chosen_id"], row["rejected_id"]) for row in rows]
    assert sorted(orders) == sorted((prompt, rejected, chosen) for prompt, chosen, rejected in orders)
    with pytest.raises(ConfigError, match="other_direction takes winners of one pool; take method pooled"):
        run_config(tmp_path, selection={"rejected": "other_direction", "method": "per_direction"})
