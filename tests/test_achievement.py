"""The sentence of what a run achieved is true, also of runs that achieved nothing.
Run: pytest tests/test_achievement.py
"""

from typing import Any

import pytest

from dpa.core.directions import DirectionSpace
from dpa.core.objective import Objective
from dpa.pages.achievement import achievement
from dpa.pages.report_charts import asked_signs

TWO = DirectionSpace((Objective("quality"), Objective("verbosity")))
THREE = DirectionSpace((Objective("quality"), Objective("verbosity"), Objective("warmth")))
OBEYS = {"verbosity": [(20.0, 14.0), (50.0, 30.0), (80.0, 71.0)]}
"""Arc -> (score, words) of what was asked for least to most of it."""


def interval(value: float | None, within: float = 1.0) -> dict[str, Any]:
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - within, "high": value + within}


def policy(
    space: DirectionSpace,
    given: dict[str, list[tuple[float | None, float]]],
    tau: dict[str, float] | None = None,
    quality: tuple[float, float, float] = (80.0, 92.0, 60.0),
    utility: float = 80.0,
    name: str = "t = 1",
    by: str = "gold",
    within: float = 1.0,
) -> dict[str, Any]:
    """A record of a policy; every arc has three directions, and `tau` is 1 where none is given."""
    taus = {arc: (tau or {}).get(arc, 1.0) for arc in given}
    directions = []
    for arc, found in given.items():
        for angle, (score, words), height in zip((-45.0, 0.0, 45.0), found, quality, strict=True):
            means = {name: interval(50.0) for name in space.names} | {
                "quality": interval(height),
                arc: interval(score, within),
            }
            weights = space.arc(arc, 3)[int(angle / 45) + 1].tolist()
            asked = {"weights": weights, "angles": {arc: angle}, "words": interval(words)}
            directions.append({**asked, "objectives": {by: means}})
    measures = {
        "expected_utility": interval(utility),
        "kendall_tau": {arc: interval(value) for arc, value in taus.items()},
    }
    listens = {"by": by, "threshold": 0.5, "verdict": any(value >= 0.5 for value in taus.values())}
    return {
        "name": name,
        "evaluation": {"directions": directions, "measures": {by: measures}, "listens": listens},
    }


def said(*policies: dict[str, Any], space: DirectionSpace = TWO) -> tuple[str, str]:
    found = achievement(policies, space)
    return found.sentence, found.tone


def test_a_policy_that_obeys_is_said_to_in_its_own_figures() -> None:
    assert said(policy(TWO, OBEYS)) == (
        "By the true reward, asks for less or more verbosity are obeyed: 14 to 71 words (20 to 80 of 100); "
        "quality falls by up to 32 at the ends.",
        "good",
    )
    level = policy(TWO, OBEYS, quality=(91.5, 92.0, 92.0), by="model")
    assert said(level)[0].startswith("By the model reward, ")
    assert said(level)[0].endswith("; quality is held at the ends.")


def test_of_two_arcs_each_is_said_and_words_only_where_they_move() -> None:
    warmth = [(3.0, 30.0), (10.0, 31.0), (96.0, 44.0)]
    both = policy(THREE, {**OBEYS, "warmth": warmth})
    assert said(both, space=THREE)[0].startswith(
        "By the true reward, asks for less or more verbosity and warmth are obeyed: "
        "verbosity 14 to 71 words (20 to 80 of 100), warmth 3 to 96 of 100;"
    )
    one = policy(THREE, {**OBEYS, "warmth": [(42.0, 30.0), (43.0, 31.0), (43.0, 30.0)]}, {"warmth": 0.2})
    sentence, tone = said(one, space=THREE)
    assert tone == "plain"
    assert (
        "verbosity are obeyed: 14 to 71 words (20 to 80 of 100); asks for less or more warmth are ignored (42 to 43"
        in (sentence)
    )


def test_without_an_objective_of_length_no_words_are_said() -> None:
    sentence, _ = said(policy(TWO, {"verbosity": [(20.0, 30.0), (50.0, 30.0), (80.0, 31.0)]}))
    assert "obeyed: 20 to 80 of 100;" in sentence


@pytest.mark.parametrize(
    ("scores", "tau", "outcome"),
    [
        ((42.0, 43.0, 43.0), 0.1, "are ignored (42 to 43 of 100)"),
        ((60.0, 40.0, 20.0), -1.0, "are answered the wrong way round (60 to 20 of 100)"),
        ((20.0, 90.0, 60.0), 0.3, "are obeyed at the ends (20 to 60 of 100) but not in order between them"),
        ((None, 40.0, 50.0), 0.0, "is not known"),
    ],
)
def test_a_policy_that_does_not_listen_is_called_out_with_what_it_gave(scores: tuple, tau: float, outcome: str) -> None:
    sentence, tone = said(policy(TWO, {"verbosity": [(score, 30.0) for score in scores]}, {"verbosity": tau}))
    assert tone == "bad"
    assert sentence.startswith("THE POLICY DOES NOT FOLLOW ITS DIRECTION. ")
    assert outcome in sentence
    assert "quality" not in sentence, "what its ends cost says nothing where they are not obeyed"


def test_an_order_that_may_be_chance_is_not_called_deaf() -> None:
    noisy = policy(TWO, {"verbosity": [(48.0, 30.0), (49.0, 30.0), (50.0, 30.0)]}, within=5.0)
    noisy["evaluation"]["listens"]["verdict"] = False
    sentence, tone = said(noisy)
    assert tone == "bad" and sentence.startswith("THE POLICY MAY NOT FOLLOW ITS DIRECTION. ")


def test_in_order_but_within_the_error_is_unclear() -> None:
    sentence, tone = said(policy(TWO, {"verbosity": [(48.0, 30.0), (49.0, 30.0), (50.0, 30.0)]}, within=5.0))
    assert tone == "plain"
    assert (
        "whether asks for less or more verbosity are obeyed is unclear (48 to 50 of 100, within the error)" in sentence
    )


def test_scores_are_said_to_be_of_what_the_objective_can_be() -> None:
    def obeyed(**attributes: float) -> str:
        space = DirectionSpace((Objective("quality"), Objective("verbosity", attributes)))
        return said(policy(space, {"verbosity": [(102.0, 30.0), (130.0, 30.0), (158.0, 30.0)]}), space=space)[0]

    assert "obeyed: 102 to 158 of 200;" in obeyed(words=1.0, lists=1.0)
    assert "obeyed: 102 to 158;" in obeyed(words=2.0, lists=-1.0), "from -100 to 200"


def test_a_front_that_fell_or_did_not_rise_is_said() -> None:
    rose = [policy(TWO, OBEYS, utility=70.0, name="t = 0"), policy(TWO, OBEYS, utility=80.0)]
    assert said(*rose) == said(rose[-1])
    sentence, tone = said(*rose, policy(TWO, OBEYS, utility=75.0, name="t = 2"))
    assert sentence.endswith("; expected utility fell from t = 1 to t = 2, 80.0 to 75.0.") and tone == "plain"
    sentence, tone = said(rose[0], policy(TWO, OBEYS, utility=71.0))
    assert sentence.endswith("from t = 0 to t = 1 expected utility did not rise beyond the error (70.0 to 71.0).")
    assert tone == "plain"


def test_where_less_of_the_main_objective_is_wanted_losing_is_rising() -> None:
    harm = DirectionSpace((Objective("quality"), Objective("verbosity")), center={"quality": -1.0})
    sentence, _ = said(policy(harm, OBEYS, quality=(30.0, 10.0, 12.0)), space=harm)
    assert "quality rises by up to 20 at the ends" in sentence


def test_which_side_is_better_follows_from_what_is_asked() -> None:
    assert asked_signs([policy(TWO, OBEYS)], TWO.names) == {"quality": 1, "verbosity": 0}
    narrow = DirectionSpace(TWO.objectives, center={"quality": 1.0, "verbosity": -1.0}, max_angle=30)
    assert asked_signs([policy(narrow, OBEYS)], narrow.names) == {"quality": 1, "verbosity": -1}
