"""The maths of comparing fronts: heights at equal verbosity, leads, intervals over seeds, and the claims they support.

pytest tests/test_comparison.py
"""

from typing import Any

import numpy as np
import pytest
from fakes import space_of

from dpa.core.compare_config import CompareConfig
from dpa.core.comparison import Front, height_at, heights, lead, over_seeds
from dpa.core.sections.evaluate import EvaluateConfig
from dpa.pages.comparison import _chart
from dpa.recipes.baselines.methods import METHODS
from dpa.stages.compare import summarise

SEEDS, DRAWS = 3, 200


def front(x_D: list[float], y_D: list[float], noise: float = 0.0, shift_S: list[float] | None = None) -> Front:
    """A front that is the same in every seed but for `shift_S` upwards, its draws noisy."""
    rng = np.random.default_rng(len(x_D))
    x_SD = np.tile(np.array(x_D, dtype=float), (SEEDS, 1))
    y_SD = np.tile(np.array(y_D, dtype=float), (SEEDS, 1)) + np.array(shift_S or [0.0] * SEEDS)[:, None]
    draws = (SEEDS, DRAWS, len(x_D))
    return Front(x_SD, y_SD, np.broadcast_to(x_SD[:, None], draws), y_SD[:, None] + rng.normal(0, noise, draws))


def test_a_height_is_linear_interpolation_and_nothing_beyond_the_ends() -> None:
    x_ND, y_ND = np.array([[10.0, 20.0, 40.0]]), np.array([[80.0, 90.0, 70.0]])
    at_X = np.array([[9.9, 10.0, 15.0, 20.0, 30.0, 40.0, 40.1]])
    np.testing.assert_allclose(heights(x_ND, y_ND, at_X), [[np.nan, 80, 85, 90, 80, 70, np.nan]])
    inside = np.linspace(10, 40, 31)
    np.testing.assert_allclose(heights(x_ND, y_ND, inside[None])[0], np.interp(inside, x_ND[0], y_ND[0]))


def test_a_path_that_turns_back_counts_by_its_highest_passage() -> None:
    # asked in order, the policy overshoots to 30 and comes back to 20, lower
    assert heights(np.array([[10.0, 30.0, 20.0]]), np.array([[50.0, 70.0, 40.0]]), np.array([[25.0]])) == 65.0
    # a vertical step: the better of its ends
    assert heights(np.array([[10.0, 10.0]]), np.array([[50.0, 70.0]]), np.array([[10.0]])) == 70.0


def test_the_lead_is_found_where_it_is_least() -> None:
    ours, theirs = front([10, 50], [90, 90]), front([0, 30, 60], [80, 89, 60])
    found = lead(ours, theirs)
    assert found.at_X[0] == 10
    assert found.at_X[-1] == 50
    assert found.least is not None
    assert found.least_at == 30
    assert found.least["value"] == pytest.approx(1.0)
    assert found.mean is not None
    assert found.mean["value"] == pytest.approx(np.mean([each["value"] for each in found.lead_X]))


def test_fronts_that_share_no_range_in_some_seed_are_not_compared() -> None:
    ours, theirs = front([10, 20], [90, 90]), front([21, 30], [80, 80])
    assert lead(ours, theirs).least is None
    assert height_at(ours, 21.0) is None
    assert height_at(ours, 15.0)["value"] == 90  # type: ignore[index]


def test_a_method_without_directions_is_compared_where_it_stands() -> None:
    point = front([19, 21], [79, 81]).as_point()
    assert point.x_SD.shape == (SEEDS, 1)
    found = lead(front([10, 30], [80, 100]), point)
    assert found.at_X.tolist() == [20.0]
    assert found.least is not None
    assert found.least["value"] == pytest.approx(90 - 80)
    assert lead(front([30, 40], [80, 100]), point).least is None


def test_intervals_widen_with_seeds_that_disagree_and_match_prompts_alone_for_one_seed() -> None:
    rng = np.random.default_rng(0)
    draws_SR = rng.normal([[0.0], [0.0], [0.0]], 1.0, (3, 2000))
    agreeing = over_seeds(np.zeros(3), draws_SR)
    disagreeing = over_seeds(np.array([-5.0, 0.0, 5.0]), draws_SR + np.array([[-5.0], [0.0], [5.0]]))
    assert agreeing["low"] is not None
    assert disagreeing["low"] is not None
    assert disagreeing["low"] < agreeing["low"] - 3
    # prompts' noise alone: standard error 1 / sqrt(3), widened by sqrt(3 / 2)
    assert agreeing["low"] == pytest.approx(-1.96 / np.sqrt(2), abs=0.1)
    bounded = over_seeds(np.zeros(3), draws_SR, bounds=(-1.0, 0.5))
    assert (bounded["low"], bounded["high"]) == (-1.0, 0.5), "what it cannot be is in no interval"
    one = over_seeds(np.zeros(1), draws_SR[:1])
    assert one["low"] == pytest.approx(-1.96, abs=0.15)


def test_intervals_of_three_seeds_cover_the_truth_about_as_often_as_they_say() -> None:
    rng, hits = np.random.default_rng(1), 0
    for trial in range(200):
        value_S = rng.normal(0.0, 1.0, 3)  # seeds differ by 1, prompts within a seed by 1
        measured_S = value_S + rng.normal(0.0, 1.0, 3)
        draws_SR = measured_S[:, None] + rng.normal(0.0, 1.0, (3, 300))
        found = over_seeds(measured_S, draws_SR, trial)
        assert found["low"] is not None
        assert found["high"] is not None
        hits += found["low"] <= 0.0 <= found["high"]
    assert hits / 200 > 0.85


def test_intervals_of_seeds_that_ask_the_same_prompts_are_no_surer_of_prompts_for_there_being_more_seeds() -> None:
    rng, hits = np.random.default_rng(1), {True: 0, False: 0}
    draws_R = rng.normal(0.0, 1.0, 2000)  # what a draw of prompts shifts every seed by
    alike = over_seeds(np.zeros(3), np.stack([draws_R] * 3), same_prompts=True)
    assert (alike["low"], alike["high"]) == tuple(pytest.approx(np.percentile(draws_R, p)) for p in (2.5, 97.5))
    for trial in range(200):
        prompts = rng.normal(0.0, 1.0)  # one draw of prompts for all seeds
        measured_S = rng.normal(0.0, 0.5, 3) + prompts
        draws_SR = measured_S[:, None] + rng.normal(0.0, 1.0, 300)
        for same in hits:
            found = over_seeds(measured_S, draws_SR, trial, same_prompts=same)
            assert found["low"] is not None and found["high"] is not None
            hits[same] += found["low"] <= 0.0 <= found["high"]
    assert hits[True] / 200 > 0.92 > 0.9 > hits[False] / 200


# --- claims ----------------------------------------------------------------------------------------------------------


VERBOSITY = [20.0, 30.0, 40.0, 50.0, 60.0]

Scores = list[dict[str, np.ndarray]]
"""By seed, reward -> scores_DPK."""


def scores(
    rng: np.random.Generator,
    helpfulness: float | list[float],
    verbosity: float | list[float] = VERBOSITY,
    noise: float = 0.5,
) -> Scores:
    """Of a policy whose true rewards are these in five directions; the reward model sees none of its helpfulness."""
    true_DK = np.stack([np.broadcast_to(helpfulness, 5), np.broadcast_to(verbosity, 5)], axis=1)
    gold = [true_DK[:, None] + rng.normal(0, noise, (5, 40, 2)) for _ in range(SEEDS)]
    return [{"gold": gold_DPK, "model": gold_DPK * [0, 1]} for gold_DPK in gold]


def compared(
    policies: dict[str, Scores], spent: dict[str, list[tuple[int, int]]] | None = None, first: Scores | None = None
) -> dict[str, Any]:
    """A comparison of methods by the scores of their last policies, at a budget of 1,000 tokens. In each seed a method
    generates 400 and trains on 600, unless `spent` says otherwise. `first`: of a policy before the last of `pooled`."""
    settings = EvaluateConfig(prompts={"path": "x"}, directions=5, gold={"helpfulness": "a:b", "verbosity": "a:b"})  # type: ignore[call-arg, arg-type]
    config = CompareConfig(out="x", budget=1000, run={}, methods=list(policies), resamples=50)  # type: ignore[call-arg]
    evaluation = {"directions": [{"words": {"value": 10.0 * d}} for d in range(5)]}
    found = {
        method: [
            {
                "cost": {
                    "tokens_generated": generated,
                    "training_tokens": trained,
                    "candidates_scored": 10,
                    "wall_s": 1.0,
                },
                "policies": [{"name": name, "evaluation": evaluation} for name in ("first", "last")],
            }
            for generated, trained in (spent or {}).get(method, [(400, 600)] * SEEDS)
        ]
        for method in policies
    }
    before = {} if first is None else {("pooled", "first"): first}
    by_name = before | {(method, "last"): by_seed for method, by_seed in policies.items()}
    return summarise(METHODS, found, by_name, space_of("helpfulness", "verbosity"), settings, config)  # type: ignore[arg-type]


def summary(leads_by: float, literal: float | None = None) -> dict[str, Any]:
    """A comparison of two methods whose fronts are `leads_by` apart, of one point and, at a helpfulness of `literal`,
    of the literal loop with one that is to come as far with a third of its samples."""
    rng = np.random.default_rng(0)
    policies = {
        "pooled": scores(rng, 80 + leads_by),
        "steerlm": scores(rng, 80),
        "sft": scores(rng, 70, verbosity=40),
    }
    spent = {"sft": [(400, 100)] * SEEDS}
    if literal is not None:
        for method, generated in (("per_direction", 400), ("pooled_third", 100)):
            policies[method], spent[method] = scores(rng, literal), [(generated, 100)] * SEEDS
    return compared(policies, spent)


def test_the_report_says_which_claims_hold() -> None:
    claims = summary(leads_by=5.0)["claims"]
    assert [claim["holds"] for claim in claims] == [True, True, False]
    assert "IS above SteerLM by 2 points or more" in claims[0]["sentence"]
    assert "IS above SFT by 2 points or more in helpfulness at its verbosity of 40" in claims[1]["sentence"]
    assert "NOT every method spends within 10% of 1,000" in claims[2]["sentence"]
    assert "SFT" in claims[2]["sentence"]


def test_the_report_says_which_claims_do_not_hold() -> None:
    results = summary(leads_by=1.0)
    claim = results["claims"][0]
    assert not claim["holds"]
    assert "is NOT above SteerLM by 2 points or more" in claim["sentence"]
    assert "ahead on 100% of the range" in claim["sentence"]
    assert results["leads"]["verbosity"][0]["least"]["value"] == pytest.approx(1.0, abs=0.6)
    assert results["equal"]["verbosity"]["at"] == [25.0, 30.0, 35.0, 40.0, 45.0, 50.0, 55.0]


def test_volumes_of_nothing_are_not_compared() -> None:
    said = [claim for claim in summary(leads_by=5.0, literal=-500.0)["claims"] if "does NOT reach" in claim["sentence"]]
    assert [claim["holds"] for claim in said] == [False]
    assert "one of the two is 0, so that nothing can be said in per cent" in said[0]["sentence"]
    reached = [claim for claim in summary(leads_by=5.0, literal=70.0)["claims"] if "of the tokens" in claim["sentence"]]
    assert "% of difference" in reached[0]["sentence"]


def test_equal_fronts_leave_no_doubt() -> None:
    """Both are drawn with the same prompts, whose noise then cancels."""
    same = scores(np.random.default_rng(0), 80, noise=5)
    (found,) = compared({"pooled": same, "steerlm": same})["leads"]["verbosity"]
    assert found["least"] == found["mean"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_lead_on_average_that_is_too_small_somewhere_does_not_hold() -> None:
    rng = np.random.default_rng(0)
    policies = {"pooled": scores(rng, [90, 90, 81, 90, 90], noise=0), "steerlm": scores(rng, 80, noise=0)}
    (found,) = compared(policies)["leads"]["verbosity"]
    assert found["mean"]["value"] > 5 and found["least"]["value"] == pytest.approx(1)
    assert found["holds"] is False


def test_a_lead_within_its_doubt_holds_but_is_not_sure() -> None:
    rng = np.random.default_rng(3)
    policies = {"pooled": scores(rng, 86, noise=30), "sft": scores(rng, 80, noise=30)}
    (found,) = compared(policies)["leads"]["verbosity"]
    assert found["holds"] and found["least"]["low"] < 0
    assert not found["sure"] and "the interval includes none" in found["sentence"]


def test_a_lead_is_as_sure_as_its_least_sure_place() -> None:
    """Its least mean may stand where nobody doubts it."""
    rng, unsure_at_the_end = np.random.default_rng(0), np.full((5, 1, 2), 0.5)
    unsure_at_the_end[4, 0, 0] = 200
    ours = scores(rng, [83, 83, 83, 83, 110], noise=unsure_at_the_end)  # type: ignore[arg-type]
    (found,) = compared({"pooled": ours, "steerlm": scores(rng, 80)})["leads"]["verbosity"]
    assert found["least"]["low"] > 2 and not found["sure"]
    assert "but the interval includes none" in found["sentence"]


def test_a_lead_whose_interval_includes_less_than_its_bar_says_so() -> None:
    for noise, doubt in ((6, True), (0.5, False)):
        rng = np.random.default_rng(1)
        policies = {"pooled": scores(rng, 84, noise=noise), "steerlm": scores(rng, 80, noise=noise)}
        (found,) = compared(policies)["leads"]["verbosity"]
        assert found["holds"] and found["sure"], found["sentence"]
        assert ("but the interval includes less than 2" in found["sentence"]) == doubt, found["sentence"]


def test_a_direction_without_a_score_in_one_seed_is_left_out_of_the_picture() -> None:
    for broken in ("pooled", "sft"):
        policies = {"pooled": scores(np.random.default_rng(0), 86), "sft": scores(np.random.default_rng(1), 80)}
        for name in ("gold", "model"):
            policies[broken][1][name][2] = np.nan
        results = compared(policies) | {"space": space_of("helpfulness", "verbosity").to_dict()}
        assert bool(results["equal"]["verbosity"]["at"]) == (broken == "sft")
        shown = [(policy["title"], 0, policy) for policy in results["policies"]]
        assert "<svg" in _chart(results, shown, "fronts", "verbosity").svg()


@pytest.mark.parametrize(
    ("first", "noise", "holds", "doubt"), [(80, 0.5, True, False), (85.5, 10, True, True), (90, 0.5, False, False)]
)
def test_a_front_that_rises_within_its_doubt_says_so(first: float, noise: float, holds: bool, doubt: bool) -> None:
    last = scores(np.random.default_rng(0), 86, noise=noise)
    claim = compared({"pooled": last}, first=scores(np.random.default_rng(1), first, noise=noise))["claims"][0]
    assert claim["holds"] is holds
    assert ("does NOT rise with every iteration" in claim["sentence"]) is not holds
    assert ("but the interval of last includes none" in claim["sentence"]) is doubt


def test_the_lead_is_that_of_the_true_reward_where_there_is_one() -> None:
    rng = np.random.default_rng(0)
    policies = {"pooled": scores(rng, 90, noise=0), "steerlm": scores(rng, 80, noise=0)}
    (found,) = compared(policies)["leads"]["verbosity"]
    assert found["least"]["value"] == pytest.approx(10)


def test_a_budget_is_spent_in_every_seed_and_not_on_average() -> None:
    rng = np.random.default_rng(0)
    policies = {"pooled": scores(rng, 90), "steerlm": scores(rng, 80)}
    pooled, steerlm = compared(policies, {"pooled": [(400, 300), (400, 900), (400, 600)]})["costs"]
    assert pooled["total"] == 1000 and not pooled["equal"]
    assert steerlm["equal"]
