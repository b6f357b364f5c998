"""Selection against brute force, ties, and rows that may not win.
Run: pytest tests/test_selection.py
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dpa.core.selection import select, select_per_direction, select_random

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
    winners = select_per_direction(scores, directions, valid)
    for p, d in np.ndindex(5, 4):
        assert winners[p, d] == brute_force(scores[p, d], directions[p, d], valid[p, d])


def test_a_random_candidate_is_valid_and_uniform():
    valid = np.array([[True, False, True, True], [False] * 4])
    winners = select_random(valid, 6_000, np.random.default_rng(0))
    assert np.bincount(winners[0], minlength=4) / 6_000 == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=0.03)
    assert set(winners[1]) == {-1}
    assert select_random(np.zeros((2, 0), dtype=bool), 3, np.random.default_rng(0)).tolist() == [[-1] * 3] * 2
