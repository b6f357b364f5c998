"""Measures against brute force and by hand, and the bootstrap's intervals.
Run: pytest tests/test_measures.py
"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dpa.core.directions import DirectionSpace
from dpa.core.measures import (
    all_measures,
    bootstrap_means,
    cone_hypervolume,
    edge_directions,
    end_coverage,
    expected_utility,
    hypervolume,
    interval,
    kendall_tau,
    largest_jump,
    measure,
    pairs_in_order,
    pareto_front,
    projection_regret,
    span,
)
from dpa.core.objective import Objective

TWO = DirectionSpace((Objective("helpfulness", {"h": 1}), Objective("verbosity", {"v": 1})), max_angle=60)
THREE = DirectionSpace(tuple(Objective(name, {name: 1}) for name in ("helpfulness", "verbosity", "warmth")))

LATTICE = hnp.arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(2, 3)), elements=st.integers(-1, 4))


def listening_policy(space: DirectionSpace, directions_DK: np.ndarray, prompts: int = 40, noise: float = 3.0, seed=0):
    """scores_DPK of a policy that moves 30 points along the direction asked, around 50."""
    rng = np.random.default_rng(seed)
    spread = noise * rng.standard_normal((len(directions_DK), prompts, space.K))
    return 50 + 30 * directions_DK[:, None, :] + spread


def test_a_hypervolume_of_many_objectives_is_not_waited_for() -> None:
    points = np.random.default_rng(0).uniform(0, 100, (225, 8))
    assert np.isnan(hypervolume(points, 0.0)) and hypervolume(points[:9, :7], 0.0) > 0


@given(LATTICE)
def test_hypervolume_counts_the_unit_cells_that_are_dominated(points):
    """On a lattice the volume above the reference 0 is the number of unit cells below some point."""
    cells = itertools.product(range(4), repeat=points.shape[1])
    expected = sum(any(np.all(point > cell) for point in points) for cell in map(np.array, cells))
    assert hypervolume(points.astype(float), 0.0) == expected


@given(LATTICE)
def test_the_front_is_what_nobody_dominates(points):
    expected = [
        not any(np.all(other >= point) and np.any(other > point) for other in points)
        and not any(np.array_equal(other, point) for other in points[:index])
        for index, point in enumerate(points)
    ]
    assert pareto_front(points.astype(float)).tolist() == expected


def test_points_that_are_not_finite_count_for_nothing():
    points = np.array([[np.nan, 5.0], [np.inf, 1.0], [2.0, 3.0]])
    assert pareto_front(points).tolist() == [False, False, True]
    assert hypervolume(points, 1.0) == 2.0
    assert hypervolume(points[:2], 0.0) == 0.0


def test_a_direction_without_a_mean_leaves_no_volume_of_the_others() -> None:
    means_DK, grid_DK = np.array([[60.0, 20.0], [np.nan, np.nan], [50.0, 70.0]]), TWO.grid(3)
    values = dict(all_measures(means_DK, TWO, grid_DK, 0.0))
    assert np.isnan(values["hypervolume", None]) and np.isnan(values["cone_hypervolume", None])


def test_the_cone_sees_the_terse_end_and_plain_hypervolume_does_not():
    wordy = np.array([[60.0, 50.0]])
    with_terse_end = np.array([[60.0, 50.0], [55.0, 5.0]])
    assert hypervolume(with_terse_end, 0.0) == hypervolume(wordy, 0.0)
    assert cone_hypervolume(with_terse_end, TWO, 0.0) > cone_hypervolume(wordy, TWO, 0.0)


def test_cone_hypervolume_by_hand():
    space = DirectionSpace(TWO.objectives, max_angle=45)
    edge = 0.5**0.5  # utilities (h - v, h + v) * edge above the worst of the box, (-100, 0) * edge
    assert cone_hypervolume(np.array([[30.0, 10.0]]), space, 0.0) == pytest.approx(edge * 120 * edge * 40)
    assert cone_hypervolume(np.array([[0.0, 100.0]]), space, 0.0) == pytest.approx(0.0)


@pytest.mark.parametrize(("objectives", "known"), [(2, True), (3, True), (4, True), (5, False)])
def test_the_cone_has_a_volume_up_to_four_objectives(objectives, known):
    space = DirectionSpace(tuple(Objective(name, {name: 1}) for name in "abcde"[:objectives]))
    volume = cone_hypervolume(np.full((1, objectives), 50.0), space, 0.0)
    assert np.isfinite(volume) == known
    assert not known or volume > 0


@pytest.mark.parametrize(("objectives", "known"), [(2, True), (3, True), (4, False)])
def test_off_the_axes_the_cone_has_a_volume_up_to_three_objectives(objectives, known):
    parts = tuple(Objective(name, {name: 1}) for name in "abcd"[:objectives])
    space = DirectionSpace(parts, center=[1.0] * objectives)
    assert len(edge_directions(space)) == (2 if objectives == 2 else 2 * objectives)
    assert np.isfinite(cone_hypervolume(np.full((1, objectives), 50.0), space, 0.0)) == known


@given(st.integers(2, 8), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_regret_and_utility_are_their_sums(D, K, seed):
    rng = np.random.default_rng(seed)
    means_DK, directions_DK = rng.uniform(0, 100, (D, K)), rng.standard_normal((D, K))
    utilities = [[sum(v[k] * s[k] for k in range(K)) for s in means_DK] for v in directions_DK]
    expected = [max(row) - row[d] for d, row in enumerate(utilities)]
    assert projection_regret(means_DK, directions_DK) == pytest.approx(expected, abs=1e-9)
    assert projection_regret(means_DK, directions_DK).min() >= 0
    own = [row[d] for d, row in enumerate(utilities)]
    assert expected_utility(means_DK, directions_DK) == pytest.approx(sum(own) / D)


def test_span_is_the_widest_difference_of_each_objective():
    assert span(np.array([[1.0, 9.0], [4.0, 7.0], [2.0, 8.0]])).tolist() == [3.0, 2.0]


@given(hnp.arrays(np.float64, 7, elements=st.integers(0, 4).map(float)))
def test_kendall_tau_counts_pairs_in_order(achieved):
    asked = np.linspace(-45, 45, 7)
    signs = [np.sign(achieved[j] - achieved[i]) for i, j in itertools.combinations(range(7), 2)]
    untied = sum(map(abs, signs))
    expected = sum(signs) / (untied * len(signs)) ** 0.5 if untied else 0.0
    assert kendall_tau(asked, achieved) == pytest.approx(expected)


def test_end_coverage_says_whether_the_ends_are_reached():
    asked = np.array([0.0, -45.0, 45.0])
    assert end_coverage(asked, np.array([5.0, 1.0, 9.0])) == 1.0
    assert end_coverage(asked, np.array([1.0, 5.0, 9.0])) == 0.5
    assert end_coverage(asked, np.array([5.0, 9.0, 1.0])) == -1.0
    assert end_coverage(asked, np.full(3, 2.0)) == 0.0


def test_the_largest_jump_is_between_neighbours_by_their_angle():
    asked = np.array([0.0, -45.0, 45.0])
    assert largest_jump(asked, np.array([5.0, 1.0, 9.0])) == 4.0
    assert largest_jump(asked, np.array([8.0, 1.0, 9.0])) == 7.0
    assert largest_jump(asked, np.full(3, 2.0)) == largest_jump(asked[:1], np.ones(1)) == 0.0


# --- bootstrap -----------------------------------------------------------------------------------------------------


def test_resampled_means_are_means_of_whole_prompts():
    scores = np.arange(12.0).reshape(2, 3, 2)  # direction, prompt and objective can be told from each value
    means = bootstrap_means(scores, 50, seed=1)
    assert means.shape == (50, 2, 2)
    drawn = np.round(means[:, 0, 0] * 3 / 2)  # sum of the three drawn prompts' numbers
    assert np.allclose(means, drawn[:, None, None] * 2 / 3 + np.array([[0.0, 1.0], [6.0, 7.0]]))
    assert np.array_equal(means, bootstrap_means(scores, 50, seed=1))
    assert not np.array_equal(means, bootstrap_means(scores, 50, seed=2))


def test_pairs_in_order_are_those_that_differ_by_more_than_chance() -> None:
    """However the directions are lined up; one asked for the same is no pair, one without a score in no order."""
    rng = np.random.default_rng(0)
    means_D, asked_D = np.array([10.0, 50.0, 50.1, 90.0, 20.0, np.nan]), np.array([-40.0, -20, 0, 20, 40, 40])
    means_RD = bootstrap_means((means_D[:, None] + rng.normal(0, 5, (6, 40)))[..., None], 200, seed=0)[..., 0]
    assert pairs_in_order(means_RD, asked_D) == (6, 3, 14)
    shuffled_D = rng.permutation(6)
    assert pairs_in_order(means_RD[:, shuffled_D], asked_D[shuffled_D]) == (6, 3, 14)
    assert pairs_in_order(means_RD, -asked_D) == (3, 6, 14)


def test_the_same_seed_draws_the_same_prompts_whatever_their_scores():
    scores = np.random.default_rng(0).uniform(0, 100, (2, 30, 1))
    np.testing.assert_allclose(bootstrap_means(scores + 7, 40, seed=5) - bootstrap_means(scores, 40, seed=5), 7.0)


def test_a_prompt_without_a_score_does_not_count():
    scores = np.array([[[10.0], [np.nan], [20.0]]])
    means = bootstrap_means(scores, 400, seed=0)[:, 0, 0]
    known = means[np.isfinite(means)]
    assert set(np.round(known, 6)) <= {10.0, 20.0, 15.0, round(40 / 3, 6), round(50 / 3, 6)}
    assert np.isnan(means).sum() == pytest.approx(400 / 27, abs=12)  # only the unscored prompt was drawn
    assert interval(15.0, means) == {"value": 15.0, "low": 10.0, "high": 20.0}


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        means = bootstrap_means(rng.normal(50, 10, (1, 60, 1)), 200, seed)[:, 0, 0]
        found = interval(50.0, means)
        covered += found["low"] <= 50 <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("space", [TWO, THREE], ids=["two", "three"])
def test_a_listening_policy_measures_as_one(space):
    grid_DK = space.grid(9)
    found = measure(listening_policy(space, grid_DK), space, grid_DK, reference=0.0, resamples=60, seed=0)
    means_DK = listening_policy(space, grid_DK).mean(axis=1)
    assert found["hypervolume"]["value"] == pytest.approx(hypervolume(means_DK, 0.0))
    assert found["expected_utility"]["value"] == pytest.approx((50 * grid_DK.sum(axis=1)).mean() + 30, abs=1)
    assert found["projection_regret"]["value"] < 1
    for name in space.arc_names:
        assert found["kendall_tau"][name]["value"] > 0.9
        assert found["end_coverage"][name]["value"] > 0.9
        expected = 60 * np.sin(np.radians(space.max_angle))
        assert found["span"][name]["value"] == pytest.approx(expected, abs=3)
    for estimate in _estimates(found):
        assert estimate["low"] <= estimate["value"] + 3 and estimate["value"] - 3 <= estimate["high"] * 1.02


def test_a_deaf_policy_measures_as_one():
    grid_DK = TWO.grid(9)
    same = np.repeat(np.random.default_rng(0).uniform(20, 80, (1, 30, 2)), 9, axis=0)
    found = measure(same, TWO, grid_DK, reference=0.0, resamples=30, seed=0)
    assert found["kendall_tau"]["verbosity"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["span"]["verbosity"]["value"] == found["end_coverage"]["verbosity"]["value"] == 0.0
    assert found["projection_regret"]["value"] == 0.0


def _estimates(found):
    for entry in found.values():
        yield from [entry] if "value" in entry else entry.values()
