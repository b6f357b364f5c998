"""How well a policy keeps a value is measured as it is defined.
Run: pytest tests/test_target_measures.py
"""

from dataclasses import replace

import numpy as np
import pytest
from test_targets import THREE, TWO

from dpa.core.target_measures import ASKED, control_errors, target_grid
from dpa.core.targets import read_target


def test_every_objective_but_the_main_one_is_held_at_each_value() -> None:
    assert [str(target) for target in target_grid(TWO)] == [f"helpfulness*100; verbosity={value}" for value in ASKED]
    assert len(target_grid(THREE)) == 10


@pytest.mark.parametrize(("step", "asked"), [(4, (8, 32, 48, 72, 88)), (25, (0, 25, 50, 75, 100)), (50, (0, 50, 100))])
def test_what_is_asked_is_what_the_policy_reads(step: int, asked: tuple[int, ...]) -> None:
    grid = target_grid(replace(TWO, target_step=step))
    assert [target.values["verbosity"] for target in grid] == list(asked)
    assert [read_target(replace(TWO, target_step=step), str(target)) for target in grid] == grid


def test_errors_are_medians_over_answers_and_over_targets() -> None:
    asked = np.array([10.0, 50.0, 90.0])
    achieved = np.array([[[10.0], [20.0]], [[40.0], [60.0]], [[70.0], [np.nan]]])
    found = control_errors(asked, achieved, 50, 0)
    assert found["per_response"]["value"] == 10  # of 0, 10, 10, 10, 20
    assert found["per_target"]["value"] == 5  # of 5, 0, 20
    assert found["per_target"]["low"] <= 5 <= found["per_target"]["high"]
    assert control_errors(asked, achieved, 50, 0) == found


def test_without_scores_there_is_no_error() -> None:
    found = control_errors(np.array([10.0]), np.full((1, 3, 2), np.nan), 5, 0)
    assert found["per_response"]["value"] is None


def test_an_obedient_policy_errs_by_its_noise_only() -> None:
    rng = np.random.default_rng(0)
    asked = np.array(ASKED, float)
    achieved = asked[:, None, None] + rng.normal(0, 3, (5, 200, 1))
    found = control_errors(asked, achieved, 100, 0)
    assert found["per_response"]["value"] == pytest.approx(2, abs=0.3) and found["per_target"]["value"] < 1
