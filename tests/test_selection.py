"""Selection against brute force, ties, and rows that may not win.
Run: pytest tests/test_selection.py
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dpa.core.measures import pareto_front
from dpa.core.records import SCALE
from dpa.core.selection import (
    of_largest_advantage,
    select,
    select_best_mean,
    select_pairs,
    select_random,
)
from dpa.core.utility import BEHIND, NAMED, Utility

SCORES = st.one_of(st.floats(0, 100), st.sampled_from([0.0, 50.0, 100.0]), st.sampled_from([np.nan, np.inf, -np.inf]))
WEIGHTS = st.floats(-1, 1)


def brute_force(scores_NK: np.ndarray, direction_K: np.ndarray, valid_N: np.ndarray) -> int:
    """The rule of `select`, one candidate after another, in plain Python."""
    best, winner = -np.inf, -1
    for n, scores_K in enumerate(scores_NK):
        if valid_N[n] and np.isfinite(scores_K).all():
            utility = 0.0
            for score, weight in zip(scores_K, direction_K, strict=True):
                utility += float(score) * float(weight)
            if utility > best:
                best, winner = utility, n
    return winner


@st.composite
def pools(draw):
    P, N, D, K = (draw(st.integers(low, high)) for low, high in ((0, 4), (0, 9), (0, 5), (2, 4)))
    scores = draw(hnp.arrays(np.float64, (P, N, K), elements=SCORES))
    own = draw(st.booleans())
    directions = draw(hnp.arrays(np.float64, (P, D, K) if own else (D, K), elements=WEIGHTS))
    return scores, directions, draw(hnp.arrays(np.bool_, (P, N)))


@given(pools())
@settings(max_examples=200)
def test_select_is_brute_force(case):
    scores, directions, valid = case
    winners = select(scores, directions, valid)
    for p in range(len(scores)):
        directions_DK = directions if directions.ndim == 2 else directions[p]
        assert winners[p].tolist() == [brute_force(scores[p], v, valid[p]) for v in directions_DK]


@st.composite
def asked_pools(draw):
    P, D, N, E, K = (draw(st.integers(low, high)) for low, high in ((0, 3), (1, 3), (1, 4), (0, 4), (2, 3)))
    scores = draw(hnp.arrays(np.float64, (P, D, N, K), elements=SCORES))
    directions = draw(hnp.arrays(np.float64, (P, E, K), elements=WEIGHTS))
    return scores, directions, draw(hnp.arrays(np.bool_, (P, D, N)))


@given(asked_pools())
@settings(max_examples=200)
def test_the_best_mean_and_its_advantage_are_brute_force(case):
    scores, directions, valid = case
    winners, advantages = select_best_mean(scores, directions, valid)
    for p, e in np.ndindex(winners.shape):
        means = {}
        for d in range(scores.shape[1]):
            own = [n for n in range(scores.shape[2]) if valid[p, d, n] and np.isfinite(scores[p, d, n]).all()]
            if own:
                means[d] = np.mean([scores[p, d, n] @ directions[p, e] for n in own])
        if not means:
            assert (winners[p, e], advantages[p, e]) == (-1, 0)
            continue
        d, n = divmod(int(winners[p, e]), scores.shape[2])
        assert means[d] == pytest.approx(max(means.values()), abs=1e-9)
        assert n == brute_force(scores[p, d], directions[p, e], valid[p, d])
        assert advantages[p, e] == pytest.approx(max(means.values()) - np.mean(list(means.values())), abs=1e-9)


def test_a_lucky_sample_wins_the_pool_and_not_the_best_mean():
    short, long = [[0.0, 10.0], [100.0, 10.0], [0.0, 10.0]], [[70.0, 60.0], [75.0, 60.0], [80.0, 60.0]]
    scores_PDNK, valid_PDN = np.array([[short, long]]), np.ones((1, 2, 3), bool)
    helpful, brief = [1.0, -0.1], [0.4, -0.9]
    assert select(scores_PDNK.reshape(1, 6, 2), np.array([helpful, brief])).tolist() == [[1, 1]]
    assert select_best_mean(scores_PDNK, np.array([[helpful, brief]]), valid_PDN)[0].tolist() == [[5, 1]]


@given(st.lists(st.tuples(st.integers(-1, 2), st.sampled_from([0.0, 1.0, 2.0, 5.0])), max_size=20), st.floats(0.01, 1))
def test_the_largest_advantages_of_each_cell_are_kept(rows, share):
    cells, advantages = np.array([row[0] for row in rows], dtype=int), np.array([row[1] for row in rows])
    kept = of_largest_advantage(advantages, cells, share)
    assert not kept[cells == -1].any()
    for cell in set(cells[cells >= 0].tolist()):
        own, keeps = advantages[cells == cell], kept[cells == cell]
        assert keeps.sum() == math.ceil(share * len(own))
        assert own[keeps].min() >= own[~keeps].max(initial=0.0)


@pytest.mark.parametrize("block", [1, 7, 40, 300])
def test_blocks_change_nothing(block):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (9, 11, 3)).astype(float)
    shared, own = rng.standard_normal((6, 3)), rng.standard_normal((9, 6, 3))
    for directions in (shared, own):
        assert np.array_equal(select(scores, directions, block=block), select(scores, directions))


@pytest.mark.parametrize("N", [2, 7, 33, 1001])
@pytest.mark.parametrize("K", [2, 3, 7])
def test_of_identical_candidates_the_first_wins_wherever_they_stand(N, K):
    rng = np.random.default_rng(N * K)
    directions = rng.standard_normal((50, K))
    same = np.tile(rng.uniform(0, 100, K), (3, N, 1))
    assert np.array_equal(select(same, directions), np.zeros((3, 50)))
    pool = rng.uniform(0, 100, (1, N, K))
    doubled = np.concatenate([pool, pool[:, ::-1]], axis=1)
    assert np.array_equal(select(doubled, directions), select(pool, directions))


def test_a_row_that_is_not_finite_never_wins():
    scores = np.array([[[np.inf, 0.0], [1.0, 1.0], [np.nan, 9.0]], [[np.nan, 1.0], [1.0, np.nan], [np.inf, np.inf]]])
    assert select(scores, np.array([[1.0, 0.0], [-1.0, 0.0]])).tolist() == [[1, 1], [-1, -1]]


def test_no_spread_in_an_objective_is_no_fault():
    scores = np.array([[[5.0, 1.0], [5.0, 3.0], [5.0, 2.0]]])
    assert select(scores, np.array([[1.0, 0.0], [0.9, 0.1], [0.9, -0.1]])).tolist() == [[0, 1, 0]]


def test_wrong_shapes_and_directions_are_refused():
    with pytest.raises(ValueError, match="shape"):
        select(np.zeros((2, 3, 2)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="shape"):
        select(np.zeros((2, 3, 2)), np.zeros((3, 4, 2)))
    with pytest.raises(ValueError, match="finite"):
        select(np.zeros((2, 3, 2)), np.full((1, 2), np.nan))


def test_the_winner_under_its_own_direction():
    rng = np.random.default_rng(2)
    scores, directions = rng.uniform(0, 100, (5, 4, 6, 3)), rng.standard_normal((5, 4, 3))
    valid = rng.random((5, 4, 6)) < 0.5
    winners = select(scores.reshape(20, 6, 3), directions.reshape(20, 1, 3), valid.reshape(20, 6)).reshape(5, 4)
    for p, d in np.ndindex(5, 4):
        assert winners[p, d] == brute_force(scores[p, d], directions[p, d], valid[p, d])


def test_a_random_candidate_is_valid_and_uniform():
    valid = np.array([[True, False, True, True], [False] * 4])
    winners = select_random(valid, 6_000, np.random.default_rng(0))
    assert np.bincount(winners[0], minlength=4) / 6_000 == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=0.03)
    assert set(winners[1]) == {-1}
    assert select_random(np.zeros((2, 0), dtype=bool), 3, np.random.default_rng(0)).tolist() == [[-1] * 3] * 2


# --- beyond the hull ------------------------------------------------------------------------------------------------

RAY, CHEBYSHEV = Utility("ray"), Utility("chebyshev")
NO_MIX = {"ray": Utility("ray", 0.0), "chebyshev": Utility("chebyshev", 0.0)}


def worth(scores_NK: np.ndarray, direction_K: np.ndarray, valid_N: np.ndarray, utility: Utility) -> list[float]:
    """A pool's utilities, one candidate and one objective after another, as the formulas stand in the docstring."""
    known = [n for n in range(len(scores_NK)) if valid_N[n] and np.isfinite(scores_NK[n]).all()]
    found = []
    for n in range(len(scores_NK)):
        if n not in known:
            found.append(-np.inf)
            continue
        gains = []
        for k, weight in enumerate(direction_K):
            values = [scores_NK[other, k] for other in known]
            best, start = (max(values), SCALE[0] - BEHIND) if weight > 0 else (min(values), SCALE[1] + BEHIND)
            if utility.kind == "chebyshev":
                gains.append(-abs(weight) * abs(best - scores_NK[n, k]))
            elif abs(weight) > NAMED:
                gains.append((scores_NK[n, k] - start) / weight)
        linear = sum(weight * score for weight, score in zip(direction_K, scores_NK[n], strict=True))
        found.append(min(gains, default=0.0) + utility.augmentation * linear)
    return found


@given(pools(), st.sampled_from([RAY, CHEBYSHEV, Utility("ray", 1.0), NO_MIX["ray"], NO_MIX["chebyshev"]]))
@settings(max_examples=100)
def test_ray_and_chebyshev_are_their_formulas(case, utility):
    scores, directions, valid = case
    winners = select(scores, directions, valid, utility)
    for p in range(len(scores)):
        for winner, v in zip(winners[p], directions if directions.ndim == 2 else directions[p], strict=True):
            expected = worth(scores[p], v, valid[p], utility)
            if max(expected, default=-np.inf) == -np.inf:
                assert winner == -1
            else:
                best = max(expected)
                assert expected[winner] == pytest.approx(best, rel=1e-6, abs=1e-6)  # by another order of sums


@st.composite
def whole_pools(draw):
    N, K = draw(st.integers(2, 12)), draw(st.integers(2, 5))
    scores_NK = draw(hnp.arrays(np.float64, (N, K), elements=st.integers(0, 20).map(float)))
    signs_K = draw(hnp.arrays(np.float64, K, elements=st.sampled_from([-1.0, 1.0])))
    return scores_NK, signs_K, draw(hnp.arrays(np.float64, K, elements=st.floats(0.05, 1)))


@given(whole_pools(), st.sampled_from([RAY, CHEBYSHEV, Utility("ray", 1.0)]))
@settings(max_examples=200)
def test_no_candidate_dominates_the_winner_in_the_signs_of_the_direction(case, utility):
    scores_NK, signs_K, weights_K = case
    winner = select(scores_NK[None], (signs_K * weights_K)[None], utility=utility)[0, 0]
    better_N = (signs_K * (scores_NK - scores_NK[winner]) >= 0).all(axis=1)
    assert (scores_NK[better_N] == scores_NK[winner]).all()


@given(whole_pools())
@settings(max_examples=200)
def test_every_candidate_of_the_front_wins_under_some_direction_hull_or_not(case):
    scores_NK, signs_K, _ = case
    signed_NK = signs_K * scores_NK
    start_K = np.where(signs_K > 0, SCALE[0] - BEHIND, -SCALE[1] - BEHIND)
    high_K = signed_NK.max(axis=0)
    for n in np.flatnonzero(pareto_front(signed_NK)):
        along_K = signed_NK[n] - start_K
        winner = select(scores_NK[None], (signs_K * along_K)[None], utility=NO_MIX["ray"])[0, 0]
        assert (scores_NK[winner] == scores_NK[n]).all()
        if (signed_NK[n] < high_K).all():  # else the ideal point is no distance away in an objective
            towards_K = signs_K / (high_K - signed_NK[n])
            winner = select(scores_NK[None], towards_K[None], utility=NO_MIX["chebyshev"])[0, 0]
            assert (scores_NK[winner] == scores_NK[n]).all()


def test_a_front_that_bends_inwards_is_walked_and_not_jumped():
    """On the inside of a circle: the linear utility keeps its two ends, the others what is between."""
    angle_N = np.linspace(0, np.pi / 2, 19)
    scores = np.stack([100 - 100 * np.sin(angle_N), 100 - 100 * np.cos(angle_N)], axis=1)[None]
    theta_D = np.radians(np.linspace(1, 89, 45))
    directions = np.stack([np.cos(theta_D), np.sin(theta_D)], axis=1)
    assert set(select(scores, directions)[0]) == {0, 18}
    for utility in (RAY, CHEBYSHEV):
        winners = select(scores, directions, utility=utility)[0]
        assert len(set(winners)) > 12
        assert (np.diff(winners) >= 0).all() or (np.diff(winners) <= 0).all()
        assert np.abs(np.diff(winners)).max() <= 2


@pytest.mark.parametrize("utility", [RAY, CHEBYSHEV])
def test_an_objective_that_is_not_named_does_not_matter_and_one_hardly_named_hardly(utility):
    rng = np.random.default_rng(4)
    scores = rng.uniform(0, 100, (200, 8, 3))
    scores[:, :, 2] = np.where(rng.random((200, 8)) < 0.7, 0.0, scores[:, :, 2])  # most have none of the third
    other = scores.copy()
    other[:, :, 2] = rng.uniform(0, 100, (200, 8))
    named = np.array([[0.8, -0.6, 0.0]])
    assert np.array_equal(select(scores, named, utility=utility), select(other, named, utility=utility))
    for weight in (1e-3, -1e-3):
        nearly = select(scores, np.array([[0.8, -0.6, weight]]), utility=utility)
        assert (nearly == select(scores, named, utility=utility)).mean() > 0.99


@pytest.mark.parametrize("utility", [RAY, CHEBYSHEV])
def test_a_constant_objective_ties_and_missing_scores_are_no_fault(utility):
    scores = np.array([[[5.0, 1.0], [5.0, 3.0], [5.0, 3.0], [np.nan, 9.0], [5.0, 9.0]]])
    valid = np.array([[True, True, True, True, False]])
    directions = np.array([[1.0, 0.0], [0.9, 0.1], [0.9, -0.1], [-1.0, 0.0]])
    assert select(scores, directions, valid, utility).tolist() == [[0, 1, 0, 0]]
    assert select(scores, directions, np.zeros_like(valid), utility).tolist() == [[-1] * 4]


@pytest.mark.parametrize("utility", [RAY, CHEBYSHEV])
def test_blocks_padding_and_place_change_nothing_beyond_the_hull(utility):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (9, 11, 3)).astype(float)
    directions = rng.standard_normal((9, 6, 3))
    winners = select(scores, directions, utility=utility)
    for block in (1, 40, 300):
        assert np.array_equal(select(scores, directions, utility=utility, block=block), winners)
    padded = np.concatenate([scores, rng.uniform(-900, 900, (9, 4, 3))], axis=1)
    valid = np.arange(15) < np.full((9, 1), 11)
    assert np.array_equal(select(padded, directions, valid, utility), winners)
    doubled = np.concatenate([scores, scores[:, ::-1]], axis=1)
    assert np.array_equal(select(doubled, directions, utility=utility), winners), "of equal ones the first"


@pytest.mark.parametrize("rejected", ["worst", "random", "other_direction"])
def test_pairs_are_judged_by_the_same_utility_as_winners(rejected):
    rng = np.random.default_rng(3)
    scores, directions = rng.uniform(0, 100, (6, 7, 3)), rng.standard_normal((6, 5, 3))
    valid = rng.random((6, 7)) < 0.9
    rngs = [np.random.default_rng(p) for p in range(6)]
    winners, losers = select_pairs(scores, directions, valid, rejected, rngs, RAY)
    best = select(scores, directions, valid, RAY)
    assert (winners >= 0).any() and np.array_equal(np.where(winners >= 0, best, -1), winners)
    for p, d in zip(*np.nonzero(losers >= 0), strict=True):
        utility = worth(scores[p], directions[p, d], valid[p], RAY)
        assert utility[winners[p, d]] > utility[losers[p, d]]
        if rejected == "worst":
            assert losers[p, d] == int(np.argmin(np.where(valid[p], utility, np.inf)))
