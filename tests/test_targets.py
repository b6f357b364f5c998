"""A target is read, refused with a sentence, printed and drawn as a person would expect; directions stay as they were.
Run: pytest tests/test_targets.py
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import space_of
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa.core.direction import Direction
from dpa.core.directions import DirectionSpace
from dpa.core.errors import DirectionError, OutsideConeError
from dpa.core.sections.space import SpaceConfig
from dpa.core.sentences import target_template_of
from dpa.core.targets import (
    Target,
    draw_free,
    free_center,
    is_target,
    preference_of,
    read_target,
    read_wish,
    sentence,
    wish_of,
)


def knowing(space: DirectionSpace) -> DirectionSpace:
    return replace(space, target_template=target_template_of(space.template))


TWO = knowing(space_of("helpfulness", "verbosity"))
THREE = knowing(space_of("helpfulness", "verbosity", "warmth", max_angle=45))


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_target_is_read_and_printed() -> None:
    target = read_target(THREE, "helpfulness; verbosity=40")
    assert target == Target(THREE.names, (1.0, 0.0, 0.0), (None, 40, None))
    assert str(target) == "helpfulness*100 + warmth*0; verbosity=40"
    assert target.values == {"verbosity": 40}
    assert target.as_mapping() == {"helpfulness": 1.0, "verbosity": "=40", "warmth": 0.0}


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("helpfulness; verbosity = 40, warmth = 80", "helpfulness*100; verbosity=40, warmth=80"),
        ("helpfulness;verbosity=40;warmth=80", "helpfulness*100; verbosity=40, warmth=80"),
        ("helpfulness*0.8 + warmth*0.6; verbosity=0", "helpfulness*80 + warmth*60; verbosity=0"),
        ("2*helpfulness - warmth; verbosity=99.6", "helpfulness*89 + warmth*-45; verbosity=100"),
        ({"helpfulness": 3, "verbosity": "=40"}, "helpfulness*100 + warmth*0; verbosity=40"),
        ({"helpfulness": 3, "verbosity": "= 40.4"}, "helpfulness*100 + warmth*0; verbosity=40"),
    ],
)
def test_other_forms_are_read(text: Any, printed: str) -> None:
    assert str(read_wish(THREE, text)) == printed


@given(st.integers(0, 100), st.floats(-44, 44), st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_what_is_printed_is_read_back(value: int, degrees: float, held: int) -> None:
    angle = np.radians(degrees)
    weights, values = [np.cos(angle), 0.0, 0.0], [None] * 3
    weights[3 - held], values[held] = np.sin(angle), value
    target = wish_of(THREE, weights, values)
    again = read_wish(THREE, str(target))
    assert isinstance(again, Target) and again.held == target.held
    assert again.weights == pytest.approx(target.weights, abs=0.008)  # printed in whole hundredths
    assert str(read_wish(THREE, again)) == str(again) == str(read_wish(THREE, again.as_mapping()))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("helpfulness; kindness=40", "'kindness' is unknown"),
        ("helpfulness + verbosity; verbosity=40", "`verbosity` is both weighed and held"),
        ("helpfulness; verbosity=140", "`verbosity` is held at '140'; take a number from 0 to 100"),
        ("helpfulness; verbosity=-1", "take a number from 0 to 100"),
        ("helpfulness; verbosity=nan", "take a number from 0 to 100"),
        ("helpfulness; verbosity=", "take a number from 0 to 100"),
        ("helpfulness; verbosity=4=0", "take a number from 0 to 100"),
        ("; verbosity=40", "no objective is left free"),
        ("verbosity=40", "a value is held after a `;`"),
        ("helpfulness;", "nothing is held"),
        ("helpfulness; verbosity", "'verbosity' is not an objective and its value"),
        ("helpfulness; verbosity=40, verbosity=50", "`verbosity` is held twice"),
        ("helpfulness*0; verbosity=40", "all weights are zero"),
        ("verbosity; helpfulness=40", "leave `helpfulness` free"),
        ("helpfulness; verbosity=40" + " " * 4000, "at most 4000 characters"),
        ("hélpfulness; verbosity=40", "no plain text"),
        ({"helpfulness": 1, "verbosity": "40"}, "`verbosity` is neither a weight nor a value"),
        ({"helpfulness": 1, "kindness": "=40"}, "'kindness' is unknown"),
        ({"helpfulness": True, "verbosity": "=40"}, "not a number"),
    ],
)
def test_a_mistake_is_one_sentence(value: Any, said: str) -> None:
    with pytest.raises(DirectionError) as error:
        read_wish(THREE, value)
    assert said in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_policy_that_knows_no_targets_refuses_them() -> None:
    for value in ("helpfulness; verbosity=40", {"helpfulness": 1, "verbosity": "=40"}):
        with pytest.raises(DirectionError, match=r"trained on directions and knows no targets; ask a direction"):
            read_wish(space_of(), value)
    with pytest.raises(DirectionError, match="'direction' is unknown; known"):
        read_wish(space_of(), {"direction": "helpfulness*0.8 - verbosity*0.6"})


def test_the_free_direction_must_lie_in_what_is_free_of_the_cone() -> None:
    with pytest.raises(OutsideConeError, match=r"lies 71\.6 degrees from"):
        read_wish(THREE, "helpfulness + warmth*3; verbosity=40")
    clamped = read_wish(THREE, "helpfulness + warmth*3; verbosity=40", outside="clamp")
    assert str(clamped) == "helpfulness*71 + warmth*71; verbosity=40"
    with pytest.raises(OutsideConeError, match=r"180\.0 degrees"):
        read_wish(TWO, "-helpfulness; verbosity=40")
    assert str(read_wish(TWO, "-helpfulness; verbosity=40", outside="clamp")) == "helpfulness*100; verbosity=40"
    edge = "helpfulness*71 + warmth*71; verbosity=3"
    assert str(read_wish(THREE, edge)) == edge


# --- printing -------------------------------------------------------------------------------------------------------


def test_the_sentence_of_a_target_is_none_of_a_direction() -> None:
    told = sentence(THREE, read_wish(THREE, "helpfulness; verbosity=40, warmth=7"))
    assert told.endswith("maximize weighted rating = helpfulness*100 with verbosity = 40, warmth = 7")
    with pytest.raises(DirectionError):
        THREE.read_prompt(told)


def test_directions_stay_what_they_are() -> None:
    plain = space_of("helpfulness", "verbosity", "warmth")
    direction = THREE.parse("helpfulness*0.8 - verbosity*0.6")
    assert read_wish(THREE, "helpfulness*0.8 - verbosity*0.6") == direction == wish_of(plain, direction.weights)
    assert sentence(THREE, direction) == plain.prompt(direction)
    assert isinstance(THREE.read_prompt(THREE.prompt(direction)), Direction)
    assert preference_of(THREE.names, direction.weights) == direction.as_mapping()
    assert "target_template" not in plain.to_dict()
    assert not any(map(is_target, ("helpfulness", "-15deg", {"helpfulness": 1}, [1, 0, 0], direction, None)))


def test_a_space_that_knows_targets_travels_with_its_model() -> None:
    assert DirectionSpace.from_dict(THREE.to_dict()) == THREE
    assert DirectionSpace.from_dict(replace(THREE, target_step=20).to_dict()).target_step == 20
    by_hand = DirectionSpace.from_dict({**THREE.to_dict(), "target_step": 5.0})
    assert str(read_wish(by_hand, "helpfulness; verbosity=41")).endswith("; verbosity=40")
    with pytest.raises(
        DirectionError, match="target_step: 30 is no step of 100; take one of 1, 2, 4, 5, 10, 20, 25, 50"
    ):
        replace(THREE, target_step=30)
    for template in ("no place for anything", "{weighted_rating}", "{values}", 7):
        with pytest.raises(DirectionError, match="target_template: it must contain"):
            replace(THREE, target_template=template)
    empty = SpaceConfig(objectives={"helpfulness": None, "verbosity": None}, target_template="")
    with pytest.raises(DirectionError, match="target_template: it must contain"):
        empty.build()  # whether or not they are trained


# --- drawing --------------------------------------------------------------------------------------------------------


def test_draws_lie_in_what_is_free_of_the_training_cone() -> None:
    space = replace(THREE, training_angle=55.0, training_arcs=0.5, training_ends=0.4)
    rng = np.random.default_rng(0)
    drawn = np.array([draw_free(space, (None, 40, None), rng) for _ in range(400)])
    assert np.allclose(np.linalg.norm(drawn, axis=1), 1) and (drawn[:, 1] == 0).all()
    angles = np.degrees(np.arctan2(drawn[:, 2], drawn[:, 0]))
    assert np.abs(angles).max() <= 55 + 1e-9 and angles.min() < -40 and angles.max() > 40
    assert 0.4 < (angles == 0).mean() < 0.6


def test_nothing_of_the_center_may_be_left() -> None:
    assert free_center(THREE, (1, None, None)) is None
    tilted = replace(THREE, center={"helpfulness": 1, "warmth": 1})
    center_K = free_center(tilted, (40, None, None))
    assert center_K is not None and center_K.tolist() == [0, 0, 1]
    assert str(read_wish(tilted, "warmth; helpfulness=40")) == "verbosity*0 + warmth*100; helpfulness=40"


def test_a_target_that_is_none_cannot_be_made() -> None:
    for weights, held in (((1.0, 0.0), (None, None)), ((0.6, 0.8), (None, 40)), ((1.0, 0.0), (None, 101))):
        with pytest.raises(ValueError):
            Target(TWO.names, weights, held)
