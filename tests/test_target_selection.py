"""A pool keeps for a target the candidate that a person would pick by hand, and only asks what it can serve.
Run: pytest tests/test_target_selection.py
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeSampler, FakeScorer, all_rows, prompts_of, space_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_targets import THREE, TWO

from dpa.core.directions import DirectionSpace
from dpa.core.sections.rollout import RolloutConfig
from dpa.core.sections.selection import SelectionConfig
from dpa.core.target_selection import SEVERAL, can_be_held, draw_targets, select_targets, serve_targets
from dpa.stages.rollout import rollout
from dpa.stages.score import score
from dpa.stages.select import select_winners
from dpa.storage.run_folder import StageFolder

NAN = np.nan


def by_hand(scores_NK, weighed_NK, weights_K, held_K, valid_N, tolerance) -> int:
    """The winner of one target, slowly."""
    best, key = -1, None
    for n in range(len(scores_NK)):
        if not valid_N[n] or not np.isfinite(scores_NK[n]).all():
            continue
        apart = max(abs(s - h) for s, h in zip(scores_NK[n], held_K, strict=True) if np.isfinite(h))
        utility = sum(w * s for w, s in zip(weights_K, weighed_NK[n], strict=True))
        own = (1, utility) if apart <= tolerance else (0, -apart)
        if key is None or own > key:
            best, key = n, own
    return best


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(0, 6), st.sampled_from([0.0, 5.0, 30.0]))
@settings(max_examples=150, deadline=None)
def test_the_winner_is_that_of_the_definition(seed: int, K: int, N: int, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    P, T = 3, 2
    scores = rng.integers(0, 11, (P, N, K)) * 10.0  # ties are frequent
    scores[rng.random(scores.shape) < 0.05] = NAN
    valid, weighed = rng.random((P, N)) < 0.8, scores / np.arange(1, K + 1)
    held = np.full((P, T, K), NAN)
    weights = np.zeros((P, T, K))
    weights[..., 0] = 1.0
    held[:, 0, K - 1], held[:, 1, 1:] = rng.integers(0, 101, P), rng.integers(0, 101, (P, K - 1))
    found = select_targets(scores, weights, held, valid, weighed, tolerance)
    for p, t in np.ndindex(P, T):
        assert found[p, t] == by_hand(scores[p], weighed[p], weights[p, t], held[p, t], valid[p], tolerance)
    assert (select_targets(scores, weights, held, valid, weighed, tolerance, block=1) == found).all()


def test_the_best_within_the_tolerance_wins_and_else_the_nearest() -> None:
    scores = np.array([[[90.0, 60.0], [50.0, 38.0], [70.0, 44.0], [70.0, 41.0]]])
    weights = np.array([[[1.0, 0.0], [1.0, 0.0]]])
    held = np.array([[[NAN, 40.0], [NAN, 100.0]]])
    assert select_targets(scores, weights, held).tolist() == [[2, 0]]  # of equal ones the first


def test_a_pool_asks_what_it_can_serve() -> None:
    rng = np.random.default_rng(3)
    scores = np.array([[50.0, 20.0, 0.0], [60.0, 60.0, 100.0]])
    weights, held = draw_targets(scores, 400, THREE, rng)
    known = np.isfinite(held)
    assert (held[known[:, 1], 1] >= 20).all() and (held[known[:, 1], 1] <= 60).all() and not known[:, 0].any()
    assert (weights[known] == 0).all()
    assert known.all(axis=1, where=[False, True, True]).mean() == pytest.approx(SEVERAL, abs=0.06)
    both = held[known.sum(axis=1) == 2, 1:]
    assert abs(np.corrcoef(both.T)[0, 1]) < 0.3, "values of one target are not tied to each other"
    assert can_be_held(THREE) == [(1,), (2,), (1, 2)] and can_be_held(TWO) == [(1,)]


def test_what_is_held_goes_round_the_objectives_from_a_random_one_on() -> None:
    scores, firsts = np.array([[50.0, 20.0, 0.0], [60.0, 60.0, 100.0]]), set()
    for seed in range(20):
        _, held = draw_targets(scores, 12, THREE, np.random.default_rng(seed))
        known = np.isfinite(held)
        alone = np.flatnonzero(known.sum(axis=1) == 1)
        (first,) = set((known[alone].argmax(axis=1) - 1 + alone) % 2)
        firsts.add(first)
    assert firsts == {0, 1}


def test_values_lie_one_in_each_equal_part_of_the_range_in_random_order() -> None:
    scores, orders = np.array([[50.0, 20.0], [60.0, 60.0]]), []
    for seed in range(2):
        _, held = draw_targets(scores, 50, TWO, np.random.default_rng(seed))
        orders.append(np.floor((held[:, 1] - 20) / 40 * 50).astype(int).tolist())
        assert sorted(orders[-1]) == list(range(50)) != orders[-1]
    assert orders[0] != orders[1]


def test_a_share_of_less_than_one_target_a_prompt_holds_on_average() -> None:
    rng, prompts = np.random.default_rng(0), 400
    scores, valid = rng.random((prompts, 6, 2)) * 100, np.ones((prompts, 6), bool)
    directions, winners = rng.standard_normal((prompts, 4, 2)), rng.integers(0, 6, (prompts, 4))
    rngs = [np.random.default_rng(p) for p in range(prompts)]
    _, held, _ = serve_targets(scores, scores, valid, directions, winners, 0.1, TWO, rngs)
    assert np.isfinite(held).any(axis=2).mean() == pytest.approx(0.1, abs=0.02)


def test_rows_before_the_targets_stay_what_they_are_and_labels_are_true() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((40, 6, 2)) * 120 - 10
    valid = np.ones((40, 6), bool)
    valid[7] = False
    directions, winners = rng.standard_normal((40, 4, 2)), rng.integers(0, 6, (40, 4))

    def serve(share: float) -> tuple[np.ndarray, ...]:
        rngs = [np.random.default_rng(p) for p in range(40)]
        return serve_targets(scores, scores, valid, directions, winners, share, TWO, rngs)

    changed, held, kept = serve(0.3)
    target = np.isfinite(held).any(axis=2)
    assert target.mean() == pytest.approx(0.3, abs=0.06) and not target[7].any()
    assert set(target.sum(axis=1)) <= {0, 1, 2}
    assert (changed[~target] == directions[~target]).all() and (kept[~target] == winners[~target]).all()
    own = np.take_along_axis(scores, kept[..., None], axis=1)[..., 1]
    assert (held[target][:, 1] == own[target].clip(0, 100).round()).all() and (changed[target] == [1.0, 0.0]).all()
    coarse = serve_targets(
        *(scores, scores, valid, directions, winners, 0.3, replace(TWO, target_step=10)),
        [np.random.default_rng(p) for p in range(40)],
    )[1]
    assert (coarse[target][:, 1] == (own[target].clip(0, 100) / 10).round() * 10).all()
    again = serve(0.3)
    assert all(np.array_equal(one, two, equal_nan=True) for one, two in zip(again, (changed, held, kept), strict=True))
    assert (np.isfinite(serve(1.0)[1]).any(axis=2).sum(axis=1) == np.where(np.arange(40) == 7, 0, 4)).all()


# --- in the stage ---------------------------------------------------------------------------------------------------


def selected(path: Path, space: DirectionSpace, **how: object) -> list[dict]:
    folders = {"rollout": "rollout", "score": "score", "select": f"select-{sorted(how.items())}"}
    stages = [StageFolder(path / folder, f"iter_1/{name}") for name, folder in folders.items()]
    prompts, config = prompts_of(6), RolloutConfig(directions=3, samples=4, prompts_per_shard=4)
    rollout(stages[0], prompts, space_of(), [FakeSampler()], config, seed=0)
    score(stages[1], stages[0], prompts, FakeScorer())
    select_winners(stages[2], stages[0], stages[1], prompts, space, SelectionConfig(directions=5, **how), 0)
    return all_rows(stages[2])


def test_rows_of_targets_stand_beside_those_of_directions(tmp_path: Path) -> None:
    plain, mixed = selected(tmp_path, space_of()), selected(tmp_path, TWO, targets=0.4)
    assert "held" not in plain[0] and len(plain) == len(mixed) == 30
    targets = [row for row in mixed if row["held"] is not None]
    assert len(targets) == 12
    for row in targets:
        assert row["direction"] == [1.0, 0.0] and row["held"] == [None, round(row["verbosity"])]
        assert row["utility"] == row["helpfulness"]
    as_before = [{**row, "held": None} for row in plain]
    assert [row for row in mixed if row["held"] is None] == [row for n, row in enumerate(as_before) if n % 5 < 3]


def test_a_target_states_the_scale_of_the_scorer_where_selection_is_standardised(tmp_path: Path) -> None:
    targets = [row for row in selected(tmp_path, TWO, targets=0.4, standardise=True) if row["held"] is not None]
    assert targets and all(row["held"] == [None, round(row["verbosity"])] for row in targets)


@pytest.mark.parametrize("method", ["per_direction", "best_mean", "random"])
def test_other_methods_mean_what_they_mean(tmp_path: Path, method: str) -> None:
    assert selected(tmp_path, space_of(), method=method, targets=0.4) == selected(tmp_path, space_of(), method=method)


def test_the_identity_of_a_selection_without_targets_is_as_it_was(tmp_path: Path) -> None:
    assert "targets" not in str(SelectionConfig()) and "targets" not in repr(SelectionConfig())
    assert selected(tmp_path, TWO, targets=0.4) != selected(tmp_path, TWO, targets=0.8)
