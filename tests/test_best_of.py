"""Best-of-n and robust selection: what is sampled, what is picked, what it costs.
pytest tests/test_best_of.py
"""

from pathlib import Path

import numpy as np
import pytest
from fakes import FakeSampler, FakeScorer, prompts_of, space_of

from dpa.cli.talk import answer
from dpa.core.errors import ConfigError, DirectionError
from dpa.core.records import Sampler, SampleRequest
from dpa.core.reference import ModelReference
from dpa.core.sections.rollout import RolloutConfig
from dpa.sampling.best_of import BestOfSampler, RobustSampler
from dpa.stages.rollout import rollout
from dpa.storage.run_folder import StageFolder

SPACE = space_of(max_angle=45)
TERSE, WORDY = SPACE.direction([1.0, -0.5]).weights, SPACE.direction([1.0, 0.5]).weights
QUESTION = [{"role": "user", "content": "why"}]


class Recording(FakeSampler):
    """Remembers what it was asked."""

    def __init__(self, **more) -> None:  # type: ignore[no-untyped-def]
        super().__init__(**more)
        self.asked: list[SampleRequest] = []

    def sample(self, requests):  # type: ignore[no-untyped-def]
        self.asked += requests
        return super().sample(requests)


def utility(text: str, direction: tuple[float, ...]) -> float:
    return float(FakeScorer().score([QUESTION], [text])[0] @ np.array(direction))


@pytest.mark.parametrize("kind", [BestOfSampler, RobustSampler])
def test_one_candidate_is_the_plain_sampler(kind: type) -> None:
    requests = [SampleRequest(QUESTION, TERSE, (1, 2)), SampleRequest(QUESTION, None, (3,))]
    assert kind(FakeSampler(), FakeScorer(), SPACE, 1).sample(requests) == FakeSampler().sample(requests)


@pytest.mark.parametrize("kind", [BestOfSampler, RobustSampler])
@pytest.mark.parametrize("direction", [TERSE, WORDY, None])
def test_the_pick_is_the_best_candidate_and_costs_all_of_them(kind: type, direction) -> None:  # type: ignore[no-untyped-def]
    inner = Recording()
    (picked,) = kind(inner, FakeScorer(), SPACE, 6).sample([SampleRequest(QUESTION, direction, (5, 6))])
    candidates = [sample for answers in FakeSampler().sample(inner.asked) for sample in answers]
    assert len(candidates) == 12
    for sample, pool in zip(picked, (candidates[:6], candidates[6:]), strict=True):
        judged_by = direction or tuple(SPACE.center_K)
        assert utility(sample.text, judged_by) == max(utility(candidate.text, judged_by) for candidate in pool)
        assert sample.tokens == sum(candidate.tokens for candidate in pool)


def test_best_of_asks_the_direction_itself_and_robust_its_neighbours() -> None:
    best, robust = Recording(), Recording()
    request = SampleRequest(QUESTION, WORDY, (5,))
    BestOfSampler(best, FakeScorer(), SPACE, 8).sample([request])
    RobustSampler(robust, FakeScorer(), SPACE, 8, within=15).sample([request])
    assert [asked.direction for asked in best.asked] == [WORDY]
    directions_DK = np.array([asked.direction for asked in robust.asked])
    assert directions_DK.shape == (8, 2)
    assert tuple(directions_DK[0]) == WORDY
    away_D = np.degrees(np.arccos(np.clip(directions_DK @ np.array(WORDY), -1, 1)))
    assert away_D[1:].min() > 0 and away_D.max() == pytest.approx(15)
    seeds = {seed for asked in robust.asked for seed in asked.seeds}
    assert seeds == set(best.asked[0].seeds) and len(seeds) == 8, "equal cost, and the same randomness"


@pytest.mark.parametrize("kind", [BestOfSampler, RobustSampler])
def test_the_same_seed_gives_the_same_answer_whatever_else_is_asked(kind: type) -> None:
    sampler: Sampler = kind(FakeSampler(), FakeScorer(), SPACE, 4)
    request, other = SampleRequest(QUESTION, TERSE, (7,)), SampleRequest(QUESTION, WORDY, (8, 9))
    assert sampler.sample([other, request])[1] == sampler.sample([request])[0]
    assert sampler.sample([]) == []


def test_the_revision_names_policy_scorer_and_settings() -> None:
    def named(sampler: str = "p", scorer: str = "r", n: int = 4, kind: type = BestOfSampler, **more: float) -> str:
        return kind(FakeSampler(sampler), FakeScorer(scorer), SPACE, n, **more).revision

    assert named() == named()
    others = [named("q"), named(scorer="s"), named(n=5), named(kind=RobustSampler), named(kind=RobustSampler, within=5)]
    assert len({named(), *others}) == 6


def test_a_prompt_that_cannot_be_answered_gets_nothing() -> None:
    inner = FakeSampler(misbehave={"why": "empty"})
    for kind in (BestOfSampler, RobustSampler):
        answers = kind(inner, FakeScorer(), SPACE, 3).sample([SampleRequest(QUESTION, TERSE, (1,))])
        assert answers == [[]]


def test_fault_14_candidates_without_a_score_are_not_picked() -> None:
    request = SampleRequest(QUESTION, TERSE, (1,))
    ((best,),) = BestOfSampler(FakeSampler(), FakeScorer(), SPACE, 5).sample([request])
    broken = FakeScorer(broken={best.text.split()[0]: float("nan")})
    ((second,),) = BestOfSampler(FakeSampler(), broken, SPACE, 5).sample([request])
    assert second.text != best.text
    unusable = FakeScorer(broken={"why": float("nan")})
    ((first,),) = BestOfSampler(FakeSampler(), unusable, SPACE, 5).sample([request])
    assert first.text == FakeSampler().sample([request])[0][0].text


def test_a_scorer_of_other_attributes_is_refused_at_once() -> None:
    with pytest.raises(DirectionError, match="honesty"):
        BestOfSampler(FakeSampler(), FakeScorer(), space_of("honesty", "verbosity"), 2)


def test_a_rollout_takes_them_as_any_sampler_and_counts_every_candidate(tmp_path: Path) -> None:
    plain, best = StageFolder(tmp_path / "plain"), StageFolder(tmp_path / "best")
    config = RolloutConfig(directions=2, samples=1)
    rollout(plain, prompts_of(4), SPACE, [FakeSampler()], config, 0)
    rollout(best, prompts_of(4), SPACE, [BestOfSampler(FakeSampler(), FakeScorer(), SPACE, 4)], config, 0)
    assert best.ledger.rows == plain.ledger.rows == 8
    assert best.ledger.tokens_generated > 2.5 * plain.ledger.tokens_generated


def test_the_command_line_says_what_is_missing(tmp_path: Path) -> None:
    how = {"direction": None, "samples": 1, "temperature": 0.7, "max_new_tokens": 9, "seed": 0, "clamp": False}
    with pytest.raises(ConfigError, match=r"--reward: it picks among candidates; add --best-of"):
        answer(ModelReference(str(tmp_path)), ["hello"], **how, reward="runs/my")
    with pytest.raises(ConfigError, match=r"--robust: .* add --best-of"):
        answer(ModelReference(str(tmp_path)), ["hello"], **how, robust=True)
    with pytest.raises(ConfigError, match=r"--reward: .* holds no reward model and is no run that scores; give"):
        answer(ModelReference(str(tmp_path)), ["hello"], **how, best_of=2)


@pytest.mark.parametrize("kind", [BestOfSampler, RobustSampler])
def test_for_a_target_the_candidate_that_keeps_its_value_is_picked(kind: type) -> None:
    inner = Recording()
    request = SampleRequest(QUESTION, (1.0, 0.0), (5,), (None, 30))
    ((picked,),) = kind(inner, FakeScorer(), SPACE, 6).sample([request])
    assert {asked.held for asked in inner.asked} == {(None, 30)} and {asked.direction for asked in inner.asked} == {
        (1, 0)
    }
    candidates = [sample.text for answers in FakeSampler().sample(inner.asked) for sample in answers]
    scores = FakeScorer().score([QUESTION] * 6, candidates)
    assert candidates.index(picked.text) == int(np.abs(scores[:, 1] - 30).argmin())
