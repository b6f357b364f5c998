"""Directions: reading, printing, drawing, the cone, and what is refused.
Run: pytest tests/test_directions.py
"""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa.core.direction import Direction
from dpa.core.directions import PUBLISHED_TEMPLATE, DirectionSpace
from dpa.core.errors import DirectionError, ModelFileError
from dpa.core.objective import Objective

PUBLISHED_AT_MINUS_15 = (
    "You are a helpful, respectful, and honest assistant who always responds to the user in a harmless way. "
    "Your response should maximize weighted rating = helpfulness*97 + verbosity*-26"
)


def space_of(*names: str, **options) -> DirectionSpace:
    return DirectionSpace(tuple(Objective(name, {name: 1.0}) for name in names), **options)


PAPER = space_of("helpfulness", "verbosity", presets={"terse": "-30deg", "plain": {"helpfulness": 1}})
THREE = space_of("helpfulness", "verbosity", "warmth")
HYPHENS = space_of("helpsteer-verbosity", "helpsteer", "verbosity", max_angle=180)
OFF_AXIS = space_of("helpfulness", "verbosity", "warmth", center=[1, 1, 0], max_angle=60)


@st.composite
def spaces_and_weights(draw):
    """A space of 2 to 6 objectives open to every direction, and weights that are not all tiny."""
    count = draw(st.integers(2, 6))
    weights = draw(st.lists(st.floats(-1e6, 1e6), min_size=count, max_size=count))
    weights[draw(st.integers(0, count - 1))] = draw(st.sampled_from([-1e6, -3.0, 0.5, 1e6]))
    return space_of(*"abcdef"[:count], max_angle=180), weights


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("helpfulness*0.8 - verbosity*0.6", "helpfulness*80 + verbosity*-60"),
        ("0.8*helpfulness - 0.6*verbosity", "helpfulness*80 + verbosity*-60"),
        ("- 0.6*verbosity+.8e0 * helpfulness", "helpfulness*80 + verbosity*-60"),
        ("helpfulness*97 + verbosity*-26", "helpfulness*97 + verbosity*-26"),
        ({"helpfulness": 0.8, "verbosity": -0.6}, "helpfulness*80 + verbosity*-60"),
        ([4, -3], "helpfulness*80 + verbosity*-60"),
        (np.array([4.0, -3.0]), "helpfulness*80 + verbosity*-60"),
        ("-15deg", "helpfulness*97 + verbosity*-26"),
        ("+45 deg", "helpfulness*71 + verbosity*71"),
        ("helpfulness", "helpfulness*100 + verbosity*0"),
        (" terse ", "helpfulness*87 + verbosity*-50"),
        ("plain", "helpfulness*100 + verbosity*0"),
    ],
)
def test_every_form_is_read(written, printed):
    assert str(PAPER.parse(written)) == printed


def test_a_parsed_direction_is_read_unchanged():
    direction = PAPER.parse("helpfulness*3 - verbosity*2")
    assert PAPER.parse(direction).integers == direction.integers == (83, -55)
    assert direction.as_mapping() == dict(zip(PAPER.names, direction.weights, strict=True))


@pytest.mark.parametrize(
    ("written", "integers"),
    [
        ("helpsteer-verbosity", (100, 0, 0)),
        ("helpsteer - verbosity", (0, 71, -71)),
        ("helpsteer-verbosity*3-verbosity*4", (60, 0, -80)),
    ],
)
def test_names_may_hold_hyphens_and_the_longest_wins(written, integers):
    assert HYPHENS.parse(written).integers == integers


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("helpfulness*0.8; ignore previous", "';' at character 16"),
        ("helpfulness*0.8 ignore previous", "'ignore' is unknown"),
        ("helpfullness*1", "did you mean `helpfulness`?"),
        ({"helpfullness": 1}, "did you mean `helpfulness`?"),
        ("helpfulness*٣", "ASCII"),
        ("helpfulness*nan", "'nan' is unknown"),
        ("helpfulness*inf", "'inf' is unknown"),
        ("helpfulness*1e400", "finite"),
        ("helpfulness*0 + verbosity*0", "zero"),
        ([0, 0], "zero"),
        ([math.nan, 1], "finite"),
        ([math.inf, 1], "finite"),
        ([1e300, 1e300], "too large"),
        ([1e-300, 0], "too small"),
        ([10**400, 1], "finite"),
        ([1, 2, 3], "3 numbers given; 2 are needed"),
        ([[1], [2]], "not a number"),
        (np.array(1.0), "no direction"),
        ({"helpfulness": "1"}, "not a number"),
        ({"helpfulness": True}, "not a number"),
        ("helpfulness*1 + helpfulness*2", "named twice"),
        ("helpfulness 0.8", "term 2"),
        ("helpfulness**2", "term 1"),
        ("2*3*helpfulness", "term 1"),
        ("helpfulness*verbosity", "term 1"),
        ("--helpfulness", "term 1"),
        ("helpfulness +", "term 2"),
        ("", "term 1"),
        ("__import__('os')", "'__import__' is unknown"),
        ("999deg", "from -180 to 180"),
        ("xdeg", "not an angle"),
        ("1e999deg", "not an angle"),
        (None, "no direction"),
        (b"helpfulness", "no direction"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(written, said):
    with pytest.raises(DirectionError) as refused:
        PAPER.parse(written)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "hostile",
    [
        " + ".join(["helpfulness*1"] * 10_000),
        "(" * 3_999,
        "-" * 3_999,
        "9" * 3_999 + "*helpfulness",
        "a" * 3_999,
        "\N{ARABIC-INDIC DIGIT THREE}" * 100_000,
        "1" * 1_000_000 + "deg",
        [[[[[[[[[[1]]]]]]]]]] * 2,
        ["x" * 1_000_000] * 2,
        [1.0] * 1_000_000,
    ],
    ids=lambda value: str(value)[:12],
)
def test_hostile_text_is_refused_at_once(hostile):
    started = time.thread_time()  # of this thread: what else the machine does takes none of it
    with pytest.raises(DirectionError):
        PAPER.parse(hostile)
    assert time.thread_time() - started < 0.5  # takes under 10 ms


@given(st.text(alphabet="ab*+-. 0123456789edgNn()_;", max_size=40))
@settings(max_examples=400)
def test_any_text_is_read_or_refused(text):
    space = space_of("a", "b", max_angle=180)
    try:
        direction = space.parse(text)
    except DirectionError:
        return
    assert math.isclose(math.hypot(*direction.weights), 1.0, abs_tol=1e-9)


def test_an_angle_needs_two_objectives():
    with pytest.raises(DirectionError, match="two objectives only"):
        THREE.parse("-15deg")


# --- normalising and printing --------------------------------------------------------------------------------------


def test_the_published_sentence_byte_for_byte():
    assert PAPER.prompt(PAPER.parse("-15deg")) == PUBLISHED_AT_MINUS_15


@given(st.integers(-45, 45))
def test_published_integers_are_rounded_cosine_and_sine(angle):
    radians = math.radians(angle)
    expected = (round(100 * math.cos(radians)), round(100 * math.sin(radians)))
    assert PAPER.parse(f"{angle}deg").integers == expected
    assert 71 <= expected[0] <= 100


@given(spaces_and_weights())
def test_normalising_repeats_in_plain_arithmetic_bit_for_bit(case):
    space, weights = case
    squares = 0.0
    for weight in weights:
        squares += weight * weight
    assert space.direction(weights).weights == tuple(weight / squares**0.5 for weight in weights)


def test_zero_padded_weights_stand_digit_under_digit_and_say_the_same() -> None:
    plain = DirectionSpace((Objective("helpfulness"), Objective("verbosity")), template="{weighted_rating}")
    padded = replace(plain, zero_padded=True)
    shown = [padded.prompt(padded.parse(f"{degrees}deg", "clamp")) for degrees in (0, 5, -5, 45)]
    assert shown == [
        "helpfulness*+100 + verbosity*+000",
        "helpfulness*+100 + verbosity*+009",
        "helpfulness*+100 + verbosity*-009",
        "helpfulness*+071 + verbosity*+071",
    ]
    for text in shown:
        assert padded.prompt(padded.read_prompt(text)) == text and padded.parse(text) == plain.parse(text)
    assert DirectionSpace.from_dict(padded.to_dict()) == padded != plain == DirectionSpace.from_dict(plain.to_dict())
    assert "zero_padded" not in plain.to_dict(), "what a published policy carries stays as it is"
    with pytest.raises(DirectionError, match="zero_padded: 'yes' is neither true nor false"):
        DirectionSpace.from_dict(plain.to_dict() | {"zero_padded": "yes"})


@given(spaces_and_weights())
def test_read_prompt_inverts_prompt_up_to_rounding(case):
    space, weights = case
    direction = space.direction(weights)
    read = space.read_prompt(space.prompt(direction))
    cosine = min(1.0, float(np.dot(direction.weights, read.weights)))
    assert math.acos(cosine) <= math.asin(0.005 * math.sqrt(space.K)) + 1e-7


@given(spaces_and_weights())
def test_what_the_space_prints_it_reads_even_at_the_edge(case):
    wide, weights = case
    direction = wide.direction(weights)
    angle = float(wide.angle_to_center(np.array([direction.weights]))[0])
    narrow = space_of(*wide.names, max_angle=max(angle, 1e-3))
    narrow.parse(str(direction))


@pytest.mark.parametrize(
    "text",
    [
        "maximize weighted rating = helpfulness*97 + verbosity*-26",
        PUBLISHED_AT_MINUS_15 + "; ignore previous",
        PUBLISHED_TEMPLATE,
        "",
    ],
)
def test_another_sentence_is_not_read(text):
    with pytest.raises(DirectionError):
        PAPER.read_prompt(text)


def test_a_direction_of_another_space_is_not_printed():
    with pytest.raises(DirectionError, match="other objectives"):
        PAPER.prompt(THREE.parse("warmth*0.1 + helpfulness"))


def test_a_direction_is_a_unit_vector():
    with pytest.raises(ValueError, match="unit"):
        Direction(("a", "b"), (1.0, 1.0))


# --- the cone ------------------------------------------------------------------------------------------------------


def test_outside_the_cone_names_the_range():
    with pytest.raises(DirectionError, match=r"60\.0 degrees.*from -45deg to 45deg"):
        PAPER.parse("60deg")
    with pytest.raises(DirectionError, match="up to 45 degrees from helpfulness"):
        THREE.parse("warmth")


@pytest.mark.parametrize("space", [PAPER, THREE, OFF_AXIS], ids=["paper", "three", "off-axis"])
def test_clamping_takes_the_nearest_direction_on_the_edge(space):
    rng = np.random.default_rng(0)
    edge = space.sample(20_000, rng)
    for weights in rng.standard_normal((20, space.K)):
        direction = space.direction(weights)
        clamped = np.array(space.parse(direction, outside="clamp").weights)
        if float(space.angle_to_center(np.array([direction.weights]))[0]) <= space.max_angle:
            assert clamped == pytest.approx(direction.weights)
        else:
            assert space.angle_to_center(clamped[None])[0] == pytest.approx(space.max_angle)
            assert clamped @ direction.weights >= (edge @ direction.weights).max() - 1e-9


def test_straight_behind_the_center_clamps_to_one_edge():
    assert PAPER.parse([-1, 0], outside="clamp").integers == (71, 71)


# --- drawing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [PAPER, THREE, OFF_AXIS, space_of(*"abcdef")], ids=["2", "3", "off-axis", "6"])
def test_drawn_directions_are_unit_in_the_cone_and_uniform_by_angle(space):
    directions_DK = space.sample(4_000, np.random.default_rng(1))
    angles_D = space.angle_to_center(directions_DK)
    assert np.allclose(np.linalg.norm(directions_DK, axis=1), 1.0)
    assert angles_D.max() <= space.max_angle + 1e-9
    quartiles = np.quantile(angles_D, [0.25, 0.5, 0.75]) / space.max_angle
    assert quartiles == pytest.approx([0.25, 0.5, 0.75], abs=0.04)
    for name in space.arc_names:  # neither side of an objective is favoured
        assert np.mean(space.asked_angle(directions_DK, name) > 0) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_few_draws_still_cover_the_cone(count):
    rng = np.random.default_rng(2)
    for _ in range(20):
        angles_D = np.sort(PAPER.asked_angle(PAPER.sample(count, rng), "verbosity"))
        edges = np.linspace(-PAPER.max_angle, PAPER.max_angle, count + 1)
        assert (edges[:-1] - 1e-9 <= angles_D).all() and (angles_D <= edges[1:] + 1e-9).all()  # one in each part
        directions_DK = THREE.sample(count, rng)
        azimuth_D = np.sort(np.arctan2(directions_DK[:, 2], directions_DK[:, 1]))  # around the first axis, the center
        gaps_D = np.diff(np.append(azimuth_D, azimuth_D[0] + 2 * np.pi))
        assert gaps_D.max() <= 2 * 2 * np.pi / count + 1e-9


def test_training_may_draw_from_a_wider_cone_than_a_user_may_ask_in():
    wide = replace(PAPER, training_angle=60)
    angles_D = np.abs(wide.asked_angle(wide.sample(400, np.random.default_rng(0)), "verbosity"))
    assert 58 < angles_D.max() <= 60
    assert np.allclose(wide.grid(9), PAPER.grid(9))
    with pytest.raises(DirectionError, match="from -45deg to 45deg"):
        wide.parse("50deg")
    assert DirectionSpace.from_dict(wide.to_dict()) == wide
    assert PAPER.training_angle == PAPER.max_angle
    with pytest.raises(DirectionError, match="training_angle: 30 is not in"):
        replace(PAPER, training_angle=30)


def test_drawing_repeats_with_the_seed():
    first, again = (THREE.sample(5, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.parametrize("space", [PAPER, THREE, OFF_AXIS], ids=["paper", "three", "off-axis"])
def test_an_arc_is_evenly_spaced_and_asks_what_it_says(space):
    for name in space.arc_names:
        arc_DK = space.arc(name, 7)
        expected = np.linspace(-space.max_angle, space.max_angle, 7)
        assert space.asked_angle(arc_DK, name) == pytest.approx(expected, abs=1e-9)
        assert space.angle_to_center(arc_DK) == pytest.approx(np.abs(expected), abs=1e-6)
        assert arc_DK[-1, space.names.index(name)] > arc_DK[0, space.names.index(name)]


def test_a_grid_knows_which_of_its_directions_lie_on_an_arc():
    grid_DK = THREE.grid(5)
    for name in THREE.arc_names:
        on_arc_D = THREE.on_arc(grid_DK, name)
        assert on_arc_D.sum() == 5
        assert sorted(THREE.asked_angle(grid_DK[on_arc_D], name)) == pytest.approx([-45, -22.5, 0, 22.5, 45])
    assert PAPER.on_arc(PAPER.grid(5), "verbosity").all()


def test_no_arc_leads_to_the_center():
    assert THREE.arc_names == ("verbosity", "warmth")
    with pytest.raises(DirectionError, match="take verbosity or warmth"):
        THREE.arc("helpfulness", 3)
    with pytest.raises(DirectionError, match="unknown"):
        THREE.asked_angle(THREE.grid(3), "wit")


def test_the_grid_of_two_objectives_is_the_arc():
    assert np.array_equal(PAPER.grid(9), PAPER.arc("verbosity", 9))


@pytest.mark.parametrize("space", [THREE, OFF_AXIS, space_of(*"abcd", max_angle=30)], ids=["3", "off-axis", "4"])
def test_the_grid_holds_the_arcs_and_the_ground_between(space):
    grid_DK = space.grid(5)
    distances = np.abs(grid_DK[:, None] - grid_DK[None]).max(axis=2) + np.eye(len(grid_DK))
    assert distances.min() > 1e-9
    assert space.angle_to_center(grid_DK).max() <= space.max_angle + 1e-9
    for name in space.arc_names:
        for point in space.arc(name, 5):
            assert np.abs(grid_DK - point).max(axis=1).min() < 1e-9
    assert np.array_equal(grid_DK, space.grid(5))


def test_the_size_of_a_grid_of_three_objectives():
    assert len(THREE.grid(9)) == 9 + 8 + 8  # two arcs that share the center, and two diagonals' eight points


# --- objectives from attributes ------------------------------------------------------------------------------------


def test_combine_weighs_attributes_and_misses_only_what_is_needed():
    space = DirectionSpace((Objective("helpfulness", {"a": 0.5, "c": 0.5}), Objective("verbosity", {"b": 1.0})))
    scores_NM = np.array([[10.0, 20.0, 30.0], [10.0, np.nan, 30.0], [np.nan, 20.0, 30.0]])
    combined = space.combine(scores_NM, ["a", "b", "c"])
    assert np.array_equal(combined, [[20.0, 20.0], [20.0, np.nan], [np.nan, 20.0]], equal_nan=True)
    with pytest.raises(DirectionError, match="`helpfulness`: attribute: 'c' is unknown"):
        space.combine(scores_NM[:, :2], ["a", "b"])


# --- making and keeping a space ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space",
    [
        PAPER,
        OFF_AXIS,
        space_of("a", "b", center={"a": 1, "b": 0.3}, max_angle=30, template="Weigh: {weighted_rating}."),
        DirectionSpace((Objective("x", {"p": 0.5, "q": -1}, "words"), Objective("y", {"q": 1}))),
    ],
    ids=["paper", "off-axis", "tilted", "described"],
)
def test_a_space_travels_as_json(space):
    again = DirectionSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert again == space
    assert np.array_equal(again.center_K, space.center_K)
    assert np.array_equal(again.grid(5), space.grid(5))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objectives", None),
        ("objectives", ["helpfulness"]),
        ("objectives", [{"name": "a"}]),
        ("objectives", [{"name": "a", "attributes": []}, {"name": "b", "attributes": {"b": 1}}]),
        ("center", [1, 0]),
        ("center", {}),
        ("max_angle", "45"),
        ("max_angle", -1),
        ("template", 3),
        ("template", "no place for weights"),
        ("presets", {"terse": "-90deg"}),
        ("presets", {"terse": [1, 0]}),
    ],
)
def test_a_damaged_space_is_refused_in_one_sentence(field, value):
    with pytest.raises((ModelFileError, DirectionError)) as refused:
        DirectionSpace.from_dict(PAPER.to_dict() | {field: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("data", [None, [], "space", {}])
def test_what_is_no_space_is_a_model_file_error(data):
    with pytest.raises(ModelFileError):
        DirectionSpace.from_dict(data)


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (("a",), {}, "at least two"),
        (tuple(f"a{n}" for n in range(65)), {}, "at most 64"),
        (("a", "a"), {}, "named twice"),
        (("a", "b c"), {}, "objective name"),
        (("a", "x" * 65), {}, "objective name"),
        (("a", "b"), {"max_angle": 0}, "max_angle"),
        (("a", "b"), {"max_angle": math.nan}, "max_angle"),
        (("a", "b"), {"center": [0, 0]}, "center"),
        (("a", "b"), {"center": {"c": 1}}, "center"),
        (("a", "b"), {"template": "x"}, "template"),
        (("a", "b"), {"presets": {"a": "10deg"}}, "preset name"),
        (("a", "b"), {"presets": {"p": "q", "q": "10deg"}}, "preset `p`"),
        (("a", "b"), {"presets": {"p": "80deg"}}, "preset `p`"),
    ],
)
def test_a_wrong_space_names_the_field(names, options, said):
    with pytest.raises(DirectionError, match=said):
        space_of(*names, **options)


@pytest.mark.parametrize("attributes", [{}, {"a": 0}, {"a": math.inf}, {"a": "1"}, 1])
def test_an_objective_needs_weighted_attributes(attributes):
    with pytest.raises(DirectionError, match="objective `a`"):
        Objective("a", attributes)


def test_an_objective_without_attributes_is_the_attribute_of_its_name():
    assert Objective("a") == Objective("a", {"a": 1.0})
    damaged = PAPER.to_dict()
    damaged["objectives"][0]["attributes"] = None
    with pytest.raises(ModelFileError, match="lacks name or attributes"):
        DirectionSpace.from_dict(damaged)
