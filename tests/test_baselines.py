"""Each baseline does what its authors describe: labels move SteerLM's output, soups differ by mix, DPO's margin grows.

pytest tests/test_baselines.py
"""

import json
import shutil
import weakref
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from damage import damage
from fakes import FakeSampler, FakeScorer, space_of
from safetensors.torch import load_file

from dpa.core.compare_config import load_comparison
from dpa.core.directions import DirectionSpace
from dpa.core.errors import DamageError, DataError, ModelFileError
from dpa.core.objective import Objective
from dpa.core.records import Sample, SampleRequest
from dpa.core.sections.ratings import RatingsConfig
from dpa.models.policy import load_policy
from dpa.recipes.baselines import demonstrations, dpo, moc, modpo, pooled, pooled_best, prompted, ric, soups, steerlm
from dpa.recipes.baselines.asking import (
    NearestSampler,
    OncePerPromptSampler,
    TranslatingSampler,
    without_direction,
)
from dpa.recipes.baselines.lab import Lab, Trained, spent, unstated
from dpa.recipes.baselines.labels import (
    Labelled,
    asking,
    asking_best,
    candidate_targets,
    labelled,
    target_rule,
    weight_range,
    with_label,
)
from dpa.recipes.baselines.methods import METHODS
from dpa.recipes.baselines.ric import near_front
from dpa.recipes.compare import ComparisonJob, measure
from dpa.sampling.best_of import BestOfSampler
from dpa.sampling.engine import SamplingEngine
from dpa.sampling.samplers import SamplerSpec
from dpa.sampling.soups import SoupSampler, interpolate
from dpa.world.answers import answer_of_size
from dpa.world.comparison import QUICK, write_recipe, write_worlds
from dpa.world.demo import START_MODEL
from dpa.world.questions import make_questions

SPACE3 = space_of("helpfulness", "verbosity", "warmth")
QUESTION = make_questions(1, seed=5)[0]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A lab at the quick demo world, what its methods share made; its own folder is empty."""
    folder = tmp_path_factory.mktemp("lab")
    recipe = write_recipe(folder / "world", folder / "run")
    flags = {**QUICK, "budget": "60000", "run.finetune.packed_rows_per_step": "2"}
    flags |= {"run.finetune.optimizer": "adamw"}
    config = load_comparison(recipe, flags)
    write_worlds(folder / "world", folder / "run", [0], quick=True)
    ComparisonJob(config, None, 0).run()
    return ComparisonJob(config, METHODS["sft"], 0).lab


def in_folder(lab: Lab, folder: Path) -> Lab:
    """The same lab with an empty folder."""
    return Lab(lab.config, lab.shared, folder, lab.budget)


# --- translating -----------------------------------------------------------------------------------------------------


class Echo:
    """Says what it was asked."""

    revision = "echo"

    def sample(self, requests: list[SampleRequest]) -> list[list[Sample]]:
        return [[Sample(f"{r.direction} {r.messages[0]['content']}", 1) for _ in r.seeds] for r in requests]


class Echoes(Echo):
    """Says what it was asked with each seed, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[SampleRequest] = []

    def sample(self, requests: list[SampleRequest]) -> list[list[Sample]]:
        self.asked.extend(requests)
        return [[Sample(f"{r.messages[0]['content']} {seed}", 1) for seed in r.seeds] for r in requests]


def test_a_policy_that_knows_no_direction_is_never_told_one() -> None:
    request = SampleRequest(QUESTION.messages, (1.0, 0.0), (1, 2))
    (answers,) = TranslatingSampler(Echo(), without_direction).sample([request])
    assert [answer.text.split()[0] for answer in answers] == ["None", "None"]


def test_a_policy_that_knows_no_directions_is_asked_once_for_all_of_them() -> None:
    echoes = Echoes()
    other = [{"role": "user", "content": "other"}]
    requests = [
        SampleRequest(messages, direction, (10 * place, 10 * place + 1))
        for messages in (QUESTION.messages, other)
        for place, direction in enumerate([(1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 1.0)])
    ]
    first, second, again, fourth, *of_other = OncePerPromptSampler(echoes).sample(requests)
    assert len(echoes.asked) == 4 and all(request.direction is None for request in echoes.asked)
    assert (first, second) == (again, fourth), "of two answers each under two directions two are made"
    assert first != second
    assert [answer.text for answers in of_other for answer in answers[:1]] == ["other 0", "other 10"] * 2


def test_each_direction_chooses_among_the_same_answers() -> None:
    class Words(FakeScorer):
        """helpfulness falls with the last number of a response, verbosity rises."""

        def score(self, prompts: object, responses: list[str]) -> np.ndarray:
            last_R = np.array([int(response.split()[-1]) % 1000 for response in responses], float)
            return np.stack([1000 - last_R, last_R], axis=1)

    space, one = space_of(), OncePerPromptSampler(Echoes())
    chosen = BestOfSampler(one, Words(), space, 4).sample(
        [SampleRequest(QUESTION.messages, direction, (5,)) for direction in ((1.0, 0.0), (0.0, 1.0), (1.0, 0.0))]
    )
    first, second, third = (answers[0] for answers in chosen)
    pool = Echoes().sample([SampleRequest(QUESTION.messages, None, BestOfSampler(one, Words(), space, 4)._seeds(5))])[0]
    by_last = sorted(pool, key=lambda sample: int(sample.text.split()[-1]) % 1000)
    assert first.text == third.text == by_last[0].text
    assert second.text == by_last[-1].text
    assert first.tokens == 4, "what it would cost a user"


def test_a_label_leads_the_system_message_that_is_there_or_follows_the_question() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION.messages]
    assert with_label(messages, "label", "system")[0] == {"role": "system", "content": "label\n\nBe brief."}  # type: ignore[arg-type]
    assert with_label(QUESTION.messages, "label", "system")[0] == {"role": "system", "content": "label"}
    after = with_label(messages, "label", "after_question")  # type: ignore[arg-type]
    assert after[0] == messages[0] and after[-1]["content"].endswith("\n\nlabel")


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_ask_for_the_most_of_what_weighs_most_and_in_between_for_the_rest() -> None:
    scores_RK = np.random.default_rng(0).uniform(10, 90, (5000, 3))
    low, high = np.quantile(scores_RK, [0.02, 0.98], axis=0)
    targets = target_rule(scores_RK, SPACE3)
    center = targets((1.0, 0.0, 0.0))
    np.testing.assert_allclose(center, [high[0], (low[1] + high[1]) / 2, (low[2] + high[2]) / 2])
    half = 0.5**0.5
    terse = targets((half + 1e-4, -half, 0.0))
    assert terse[0] == pytest.approx(high[0])
    assert terse[1] == pytest.approx(low[1])
    wordy = targets((half, half, 0.0))
    np.testing.assert_allclose(wordy[:2], high[:2])


def test_the_range_of_a_weight_over_the_cone_is_what_its_directions_show() -> None:
    drawn_DK = SPACE3.sample(20_000, np.random.default_rng(0))
    lowest_K, highest_K = weight_range(SPACE3)
    assert (drawn_DK.min(axis=0) >= lowest_K - 1e-9).all()
    assert (drawn_DK.max(axis=0) <= highest_K + 1e-9).all()
    np.testing.assert_allclose(drawn_DK.min(axis=0), lowest_K, atol=0.02)
    np.testing.assert_allclose(drawn_DK.max(axis=0), highest_K, atol=0.02)


def test_labelled_rows_say_what_each_response_scored_and_rows_without_a_score_are_left_out() -> None:
    rows = pa.table(
        {
            "candidate_id": ["a", "b"],
            "prompt_id": ["p", "p"],
            "messages": [json.dumps(QUESTION.messages)] * 2,
            "response": ["x", "y"],
            "complete": [False, True],
        }
    )
    table = labelled(
        rows, np.array([[90.0, 10.0], [np.nan, 5.0]]), lambda scores_K: f"label {scores_K[0]:.0f}", "system"
    )
    assert table["candidate_id"].to_pylist() == ["a"] and table["complete"].to_pylist() == [False]
    assert table["direction"].to_pylist() == [None]
    assert json.loads(table["messages"][0].as_py())[0] == {"role": "system", "content": "label 90"}


def test_a_direction_is_asked_for_in_labels() -> None:
    scores_RK = np.random.default_rng(0).uniform(0, 100, (100, 3))
    translate = asking(SPACE3, scores_RK, lambda scores_K: " ".join(f"{score:.0f}" for score in scores_K))
    asked = translate(SampleRequest(QUESTION.messages, (0.8, -0.6, 0.0), (1,)))
    assert asked.direction is None
    assert asked.messages[0]["role"] == "system"
    most, least, _ = map(int, asked.messages[0]["content"].split())
    assert most > 90
    assert least < 15


def test_steerlm_labels_move_its_output(lab: Lab, tmp_path: Path) -> None:
    """Trained on short and on long answers under their labels, the policy is longer when it is asked to be."""
    lab = in_folder(lab, tmp_path)
    rows, scores = [], []
    for question in make_questions(120, seed=11):
        for size in (1, 6):
            answer = answer_of_size(question, size, warm=0)
            row = {"candidate_id": f"{question.question_id}-{size}", "prompt_id": question.question_id}
            rows.append({**row, "messages": json.dumps(question.messages), "response": answer, "complete": True})
            scores.append([90.0, 19.0 * size - 14.0, 0.0])  # 5 for a short answer, 100 for a long one
    scores_RK, write = np.array(scores), partial(steerlm.write_label, lab.space)
    policy = lab.finetune(
        0, lab.config.policy, labelled(pa.Table.from_pylist(rows), scores_RK, write, "system"), 40_000
    )
    sampler = lab.sampler(policy, measuring=True, translate=asking(lab.space, scores_RK, write))
    half = 0.5**0.5

    def words(direction: tuple[float, ...]) -> float:
        answers = sampler.sample([SampleRequest(p.messages, direction, (1, 2, 3, 4)) for p in lab.held_out])
        return float(np.mean([len(sample.text.split()) for answer in answers for sample in answer]))

    terse, wordy = words((half, -half, 0.0)), words((half, half, 0.0))
    assert wordy > 1.5 * terse, (terse, wordy)


def test_rewards_in_context_keeps_what_no_other_answer_to_the_prompt_dominates() -> None:
    scores_RK = np.array([[90, 50, 0], [60, 50, 0], [60, 10, 0], [50, 50, 0]], dtype=float)
    # the second is worse in every wish; the third is terser; the fourth belongs to another prompt
    assert near_front(["p", "p", "p", "q"], scores_RK, SPACE3).tolist() == [0, 2, 3]


def test_rewards_that_do_not_vary_are_written_as_their_mean(lab: Lab, tmp_path: Path) -> None:
    class Constant(Lab):
        def rated_scores(self) -> np.ndarray:
            return np.column_stack([np.arange(len(self.rated)), np.full((len(self.rated), 2), 40.0)])

        def finetune(self, t: int, policy: object, rows: pa.Table, tokens: float) -> Path:
            texts = {json.loads(text)[0]["content"].partition("verbosity")[2] for text in rows["messages"].to_pylist()}
            assert texts == {" 0 warmth 0"}
            raise StopIteration

    with pytest.raises(StopIteration):
        ric.train(Constant(lab.config, lab.shared, tmp_path, lab.budget))


def test_candidate_labels_are_apart_and_as_many_as_are_asked_for() -> None:
    scores_RK = np.random.default_rng(0).uniform(0, 100, (1000, 3))
    write = partial(steerlm.write_label, SPACE3)
    targets_LK = candidate_targets(scores_RK, SPACE3, write, seed=0)
    texts = [write(target_K) for target_K in targets_LK]
    assert len(set(texts)) == len(texts) == 75
    assert min(int(text[len("helpfulness:")]) for text in texts) >= 5, "more of it is always wished"
    assert {int(text[-1]) for text in texts} >= {0, 9}, "of warmth less may be wished"
    assert len(candidate_targets(scores_RK, SPACE3, write, seed=0, most=20)) == 20


def test_of_many_objectives_not_every_combination_is_written_down() -> None:
    space = space_of(*"abcdefghijklmnopqrstuvwxyz")
    scores_RK = np.random.default_rng(0).uniform(0, 100, (100, space.K))
    targets_LK = candidate_targets(scores_RK, space, partial(steerlm.write_label, space), seed=0)
    assert targets_LK.shape == (80, space.K)


def test_the_best_label_is_the_one_whose_answers_score_highest_under_the_direction(lab: Lab, tmp_path: Path) -> None:
    """The policy answers its label and the scorer reads there what that label gives: not what it asks for. A label of
    which no answer could be scored is not the best."""
    gives = {"a": (80.0, 10.0, 0.0), "b": (60.0, 90.0, 0.0), "c": (70.0, 50.0, 95.0), "unscored": (np.nan,) * 3}
    targets = {name: np.array(asked) for name, asked in zip(gives, [*np.eye(3), np.ones(3)], strict=True)}

    def write(scores_K: np.ndarray) -> str:
        return min(targets, key=lambda name: float(np.abs(targets[name] - scores_K).sum()))

    class Repeats:
        revision = "repeats"

        def sample(self, requests: list[SampleRequest]) -> list[list[Sample]]:
            return [[Sample(r.messages[0]["content"], 5, "stop") for _ in r.seeds] for r in requests]

    class Gives:
        attributes, revision = lab.scorer.attributes, "gives"

        def score(self, prompts: list, responses: list[str]) -> np.ndarray:
            helpful, wordy, warm = np.array([gives[text] for text in responses]).T
            of = {"readers-helpfulness": helpful, "critics-overall": helpful, "readers-verbosity": wordy}
            return np.stack([{**of, "critics-warmth": warm}[name] for name in self.attributes], axis=1)

    class Bench(Lab):
        scorer = Gives()  # type: ignore[assignment]

        def sampler(self, policy: object, measuring: bool = False, translate: object = None) -> TranslatingSampler:
            return TranslatingSampler(Repeats(), translate)  # type: ignore[arg-type]

    several = lab.config.rollout.model_copy(update={"samples": 3})
    bench = Bench(lab.config.model_copy(update={"rollout": several}), lab.shared, tmp_path, lab.budget)
    ask = asking_best(bench, 3, Labelled(Path("policy"), write, np.array([[0.0] * 3, [1.0] * 3])))
    half = 0.5**0.5
    for direction, label in (((half, -half, 0.0), "a"), ((half, half, 0.0), "b"), ((half, 0.0, half), "c")):
        assert ask(SampleRequest(QUESTION.messages, direction, (1,))).messages[0]["content"] == label
    asked = bench.stage(3, "rollout").whole_table()
    assert spent(tmp_path).tokens_generated == 5 * len(asked) > 0
    assert set(asked["k"].to_pylist()) == {0}, "one answer each, however many a rollout samples"


def test_the_best_direction_is_the_one_whose_answers_score_highest_under_the_wished_one(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that does the opposite of what its direction says of verbosity is asked the opposite."""
    monkeypatch.setattr(pooled_best, "loop_policies", lambda lab: ["policy"])

    class Repeats:
        revision = "repeats"

        def sample(self, requests: list[SampleRequest]) -> list[list[Sample]]:
            return [[Sample(json.dumps(r.direction), 5, "stop") for _ in r.seeds] for r in requests]

    class Opposite:
        attributes, revision = lab.scorer.attributes, "opposite"

        def score(self, prompts: list, responses: list[str]) -> np.ndarray:
            asked_NK = np.array([json.loads(text) for text in responses])
            of = {"readers-verbosity": 50 - 50 * asked_NK[:, 1], "critics-warmth": 50 + 50 * asked_NK[:, 2]}
            return np.stack([of.get(name, np.full(len(asked_NK), 50.0)) for name in self.attributes], axis=1)

    class Bench(Lab):
        scorer = Opposite()  # type: ignore[assignment]

        def sampler(self, policy: object, measuring: bool = False, translate: object = None) -> TranslatingSampler:
            return TranslatingSampler(Repeats(), translate or (lambda request: request))  # type: ignore[arg-type]

    (trained,) = pooled_best.train(Bench(lab.config, lab.shared, tmp_path, lab.budget))
    half = 0.5**0.5
    wishes = (half, -half, 0.0), (half, half, 0.0), (half, 0.0, half)
    found = trained.open().sample([SampleRequest(QUESTION.messages, wish, (1,)) for wish in wishes])
    terse, wordy, warm = (json.loads(answers[0].text) for answers in found)
    assert terse[1] > 0.6 and wordy[1] < -0.6 and warm[2] > 0.6
    assert spent(tmp_path).tokens_generated > 0, "trying is charged"


# --- what is loaded, and when ----------------------------------------------------------------------------------------


def test_a_shared_reward_model_that_is_damaged_is_made_again_by_its_own_job(lab: Lab, tmp_path: Path) -> None:
    shutil.copytree(lab.shared, tmp_path / "shared")
    assert damage(tmp_path / "shared" / "reward_model" / "dpa_reward.json", "truncated")
    own = Lab(lab.config, tmp_path / "shared", tmp_path / "own", lab.budget)
    with pytest.raises(DamageError, match="the model of train_reward is damaged"):
        pooled.METHOD.train(own)


def test_a_job_that_goes_on_loads_and_counts_nothing_for_what_is_done(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class GoesOn(Lab):
        @property
        def scorer(self) -> None:  # type: ignore[override]
            raise AssertionError("the reward model is loaded")

        def sampler(self, *_: object, **__: object) -> None:  # type: ignore[override]
            raise AssertionError("a policy is loaded")

    def counted(*_: object) -> None:
        raise AssertionError("rows are tokenised")

    policy = steerlm.labelled_policy(Lab(lab.config, lab.shared, tmp_path, 20_000)).policy
    monkeypatch.setattr("dpa.recipes.baselines.lab.count_tokens", counted)
    assert steerlm.labelled_policy(GoesOn(lab.config, lab.shared, tmp_path, 20_000)).policy == policy


@pytest.mark.parametrize("card", [True, False])
def test_no_policy_is_held_while_the_scorer_is_loaded_nor_on_a_card_the_scorer_while_a_policy_is(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: bool
) -> None:
    monkeypatch.setattr(SamplingEngine, "wants_card", lambda *_: card)
    opened: list[weakref.ref] = []
    stayed: list[bool] = []

    class Even:
        attributes, revision = lab.scorer.attributes, "even"

        def score(self, prompts: list, responses: list[str]) -> np.ndarray:
            return np.full((len(responses), len(self.attributes)), 50.0)

    class Bench(Lab):
        @cached_property
        def scorer(self) -> Even:  # type: ignore[override]
            assert not any(sampler() for sampler in opened)
            return Even()

        def sampler(self, *_: object, **__: object) -> FakeSampler:  # type: ignore[override]
            stayed.append("scorer" in vars(self))
            sampler = FakeSampler()
            opened.append(weakref.ref(sampler))
            return sampler

    bench = Bench(lab.config, lab.shared, tmp_path, lab.budget)
    for t in (1, 2):
        bench.rollout(t, bench.sampler, count=2)
    measure(bench, Trained("fake", bench.sampler))
    assert stayed == [False, not card, not card]
    vars(bench).pop("scorer")
    assert bench.scorer, "what was measured is gone too"


# --- soups -----------------------------------------------------------------------------------------------------------


def test_a_mixture_is_a_specialist_at_its_own_direction_and_adds_up_to_one_everywhere() -> None:
    for place, wish_K in enumerate(soups.wishes(SPACE3)):
        np.testing.assert_allclose(soups.mixture(tuple(wish_K), SPACE3), np.eye(5)[place], atol=1e-6)
    for direction_K in SPACE3.sample(50, np.random.default_rng(0)):
        shares = soups.mixture(tuple(direction_K), SPACE3)
        assert sum(shares) == pytest.approx(1)
        assert min(shares) >= 0
    assert len(soups.wishes(space_of("a", "b"))) == 3


@pytest.mark.parametrize(("center", "count"), [((1, 1, 1), 7), ((0.8, 0.6, 0), 5)])
def test_around_a_center_that_is_no_axis_a_mixture_is_a_specialist_at_its_own_direction_too(
    center: tuple[float, ...], count: int
) -> None:
    """Around (0.8, 0.6, 0) the arcs of the first two objectives are one."""
    space = replace(SPACE3, center=dict(zip(SPACE3.names, center, strict=True)))
    wishes_IK = soups.wishes(space)
    assert len(wishes_IK) == count == len(np.unique(wishes_IK.round(9), axis=0))
    for place, wish_K in enumerate(wishes_IK):
        np.testing.assert_allclose(soups.mixture(tuple(wish_K), space), np.eye(count)[place], atol=1e-6)


def test_a_steerlm_label_spans_what_its_objective_can_reach() -> None:
    space = DirectionSpace((Objective("terse", {"verbosity": -1.0}), Objective("both", {"a": 1.0, "b": 1.0})))
    assert steerlm.write_label(space, np.array([-100.0, 200.0])) == "terse:0,both:9"
    assert steerlm.write_label(space, np.array([0.0, 100.0])) in ("terse:9,both:4", "terse:9,both:5")


def test_soups_interpolation_is_the_exact_weighted_sum() -> None:
    one, two = ({"w": torch.randn(3, 4), "steps": torch.tensor(7)} for _ in range(2))
    mixed = interpolate([one, two], [0.25, 0.75])
    assert torch.equal(mixed["w"], (0.25 * one["w"].double() + 0.75 * two["w"].double()).float())
    assert torch.equal(interpolate([one, two], [1.0, 0.0])["w"], one["w"])
    with pytest.raises(ModelFileError, match="architecture"):
        interpolate([one, {"w": torch.randn(2, 4), "steps": torch.tensor(7)}], [0.5, 0.5])
    with pytest.raises(ValueError, match="add up to"):
        interpolate([one, two], [0.5, 0.6])


def test_soups_differ_by_mix_and_their_ends_are_the_specialists(tmp_path: Path) -> None:
    model, tokenizer = load_policy(START_MODEL)
    other = tmp_path / "other"
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    space = space_of("helpfulness", "verbosity")
    folders = [str(START_MODEL), str(other)]
    spec = SamplerSpec(folders[0], space, max_new_tokens=24)

    def share(direction: tuple[float, ...]) -> list[float]:
        return [1 - direction[1], direction[1]]

    soup = SoupSampler(folders, share, spec)
    seeds = tuple(range(6))
    directions = [(1.0, 0.0), (0.8, 0.6), (0.0, 1.0)]
    answers = soup.sample([SampleRequest(QUESTION.messages, direction, seeds) for direction in directions])
    texts = [[sample.text for sample in answer] for answer in answers]
    assert texts[0] != texts[1] != texts[2]
    for folder, mixed in ((folders[0], texts[0]), (folders[1], texts[2])):
        (alone,) = replace(spec, policy=folder).build().sample([SampleRequest(QUESTION.messages, None, seeds)])
        assert [sample.text for sample in alone] == mixed
    with pytest.raises(ModelFileError, match="same weights"):
        SoupSampler([folders[0], folders[0]], share, spec)


# --- MODPO -----------------------------------------------------------------------------------------------------------


def test_modpos_pairs_follow_the_largest_objective_and_their_margin_is_what_the_others_account_for() -> None:
    scores_RK = np.array([[90.0, 10.0, 0.0], [10.0, 60.0, 40.0]])
    rated = pa.table(
        {
            "prompt_id": ["p", "p"],
            "messages": ["[]", "[]"],
            "response": ["good", "bad"],
            "complete": [True, False],
        }
    )
    wish_K = np.array([0.8, -0.6, 0.0])
    pairs, share = modpo.margin_pairs(rated, scores_RK, wish_K, seed=0)
    assert share == pytest.approx(0.8) and len(pairs) == modpo.PAIRS
    for row in pairs.to_pylist():
        assert (row["chosen"], row["rejected"], row["direction"]) == ("good", "bad", None)
        assert (row["chosen_complete"], row["rejected_complete"]) == (True, False)
        assert row["margin"] == pytest.approx(-0.6 * (10 - 60) / modpo.POINTS / 0.8)
    less, _ = modpo.margin_pairs(rated, scores_RK, np.array([-0.8, 0.6, 0.0]), seed=0)
    assert less["chosen"].to_pylist() == ["bad"] * modpo.PAIRS, "less of it is wished"


def test_without_two_responses_to_a_prompt_there_is_no_pair_and_a_sentence_says_so(lab: Lab, tmp_path: Path) -> None:
    rated = pa.table({"prompt_id": ["p", "q"], "messages": ["[]"] * 2, "response": ["a", "b"], "complete": [True] * 2})
    pairs, _ = modpo.margin_pairs(rated, np.array([[90.0, 10.0, 0.0], [10.0, 60.0, 40.0]]), np.eye(3)[0], seed=0)
    with pytest.raises(DataError, match=r"iter_1: no prompt .* has two responses .*; rate several"):
        in_folder(lab, tmp_path).prefer(1, lab.config.policy, pairs, 1000)


def test_a_direction_is_answered_by_the_policy_of_the_nearest_wish() -> None:
    class Named:
        def __init__(self, revision: str) -> None:
            self.revision = revision

        def sample(self, requests: list[SampleRequest]) -> list[list[Sample]]:
            return [[Sample(f"{self.revision} {r.seeds[0]}", 1)] for r in requests]

    sampler = NearestSampler([Named("first"), Named("second"), Named("third")], np.eye(3))
    directions = [(0.6, 0.8, 0.0), (0.8, 0.6, 0.0), (0.0, 0.6, 0.8), (0.9, 0.1, 0.2)]
    answers = sampler.sample([SampleRequest([], v, (seed,)) for seed, v in enumerate(directions)])
    assert [answer[0].text for answer in answers] == ["second 0", "first 1", "third 2", "first 3"]


# --- MOC -------------------------------------------------------------------------------------------------------------


def test_min_norm_weights_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        vectors_JN = rng.normal(size=(3, 6)) + 0.7
        unit_JN = vectors_JN / np.linalg.norm(vectors_JN, axis=1, keepdims=True)
        steps = np.linspace(0, 1, 101)
        every = np.array([(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1 + 1e-9])
        least = np.linalg.norm(every @ unit_JN, axis=1).min()
        weight_J = moc.min_norm(vectors_JN)
        assert weight_J.sum() == pytest.approx(1) and (weight_J >= 0).all()
        assert np.linalg.norm(weight_J @ unit_JN) <= least + 1e-3
    np.testing.assert_allclose(moc.min_norm(np.array([[1.0, 0.0], [0.0, 5.0]])), [0.5, 0.5])
    np.testing.assert_allclose(moc.min_norm(np.array([[2.0, 0.0]])), [1.0])


def test_moc_aims_are_signed_and_an_objective_that_is_not_named_does_not_matter() -> None:
    scores_NK = np.array([[50.0, 10.0, 5.0], [60.0, 30.0, 95.0], [70.0, 20.0, 1.0], [80.0, 40.0, 60.0]])
    directions_NK = np.array([[0.8, -0.6, 0.0]] * 4)
    targets_NK = np.array([[80.0, 10.0, 50.0]] * 4)
    advantages_JN = moc.aims(scores_NK, directions_NK, targets_NK, group=4)
    assert len(advantages_JN) == 4, "of warmth none"
    more, less, near, low = advantages_JN
    assert more.argmax() == 3 and less.argmax() == 0 and near.argmax() == 3 and low.argmax() == 0
    np.testing.assert_allclose(advantages_JN.mean(axis=1), 0, atol=1e-9)
    scores_NK[1] = np.nan
    assert (moc.aims(scores_NK, directions_NK, targets_NK, group=4)[:, 1] == 0).all()
    assert moc.aims(np.full((4, 3), 7.0), directions_NK, targets_NK, group=4).shape == (0, 4)
    equal_NK = np.tile([91.27555772777217, 81.58535541215322, 5.0], (3, 1))  # their mean is not quite them
    assert moc.aims(equal_NK, directions_NK[:3], targets_NK[:3], group=3).shape == (0, 3)


# --- selection of the offline rows, budgets, DPO ---------------------------------------------------------------------


def test_the_best_rated_responses_are_the_best_by_the_scalar(lab: Lab, tmp_path: Path) -> None:
    best = in_folder(lab, tmp_path).best_rated(lab.space.center_K)
    scalar_R, ids = lab.rated_scores() @ lab.space.center_K, lab.ratings["prompt_id"].to_pylist()
    for row in best.to_pylist():
        own = [value for value, prompt_id in zip(scalar_R, ids, strict=True) if prompt_id == row["prompt_id"]]
        assert row["helpfulness"] == pytest.approx(max(own))
    assert set(unstated(best)["direction"].to_pylist()) == {None}


def test_a_finetuning_spends_the_tokens_it_is_given(lab: Lab, tmp_path: Path) -> None:
    lab = in_folder(lab, tmp_path)
    rows = unstated(lab.best_rated(lab.space.center_K))
    assert lab.scorer.attributes and "scorer" in vars(lab)
    gated = lab.config.finetune.model_copy(update={"min_listening": 0.9})  # the loop's; here no direction is stated
    lab.config = lab.config.model_copy(update={"finetune": gated})
    lab.finetune(0, lab.config.policy, rows, 5_000)
    assert "scorer" not in vars(lab), "the reward model leaves its memory to the training"
    assert spent(tmp_path).training_tokens == pytest.approx(5_000, rel=0.02)
    assert lab.left == lab.budget - spent(tmp_path).training_tokens
    lab.take_over_t0()
    charged = json.loads((lab.shared / "iter_0" / "finetune" / "done.json").read_text())["ledger"]["training_tokens"]
    assert lab.left == pytest.approx(lab.budget - 5_000 - charged, rel=0.01)


def test_dpo_pairs_are_the_best_against_the_others_and_its_margin_grows(lab: Lab, tmp_path: Path) -> None:
    lab = in_folder(lab, tmp_path)
    pairs = dpo.rated_pairs(lab, unstated(lab.best_rated(lab.space.center_K)))
    assert all(row["utility_chosen"] > row["utility_rejected"] for row in pairs.to_pylist())
    assert all(row["chosen"] != row["rejected"] for row in pairs.to_pylist()), "not the best against itself"
    assert len(pairs) > 4 * len(set(pairs["prompt_id"].to_pylist()))
    policy = lab.prefer(1, lab.config.policy, pairs.slice(0, 64), 16_000)
    assert load_file(policy / "model.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "iter_1" / "finetune" / "log.jsonl").read_text().splitlines()]
    margins = [line["rewards/margins"] for line in lines if "rewards/margins" in line]
    assert np.mean(margins[-2:]) > np.mean(margins[:2]) + 0.05, margins
    assert spent(tmp_path).training_tokens == pytest.approx(16_000, rel=0.02)


def test_the_prompted_start_policy_is_asked_for_fewer_words_the_terser_the_direction(lab: Lab) -> None:
    asked: list[str] = []

    class Start:
        revision = "start"

        def sample(self, requests: list[SampleRequest]) -> list[list[Sample]]:
            assert all(request.direction is None for request in requests), "it knows no direction"
            asked.extend(request.messages[-1]["content"] for request in requests)
            return [[Sample("yes", 1, "stop")] for _ in requests]

    class Bench(Lab):
        def start_sampler(self) -> Start:
            return Start()

    wished = prompted.asked_for([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}], 3)
    assert wished[0]["content"] == "Answer in about 3 words.\n\nBe kind.", "the prompt's own system message stays"
    bench = Bench(lab.config, lab.shared, lab.folder, lab.budget)
    (trained,) = prompted.train(bench)
    messages = [{"role": "user", "content": "Why?"}]
    arc_DK = bench.space.arc("verbosity", 5)
    trained.open().sample([SampleRequest(messages, tuple(direction), (0,)) for direction in arc_DK])
    words = [int(text.split("about ")[1].split()[0]) for text in asked]
    assert words == sorted(words) and words[0] < words[-1] and all(text.startswith("Why?\n\n") for text in asked)


def test_demonstrations_are_the_rows_people_wrote_of_the_ratings_that_its_own_configuration_names(
    lab: Lab, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "Why?", "response": "So.", "mark": 1, "source": "expert"},
        {"prompt": "Why?", "response": "No.", "mark": 5, "source": "start"},
        {"prompt": "Who?", "response": "I.", "mark": 1, "source": "expert"},
        {"prompt": lab.held_out[0].messages[-1]["content"], "response": "Measured.", "mark": 1, "source": "expert"},
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ratings = [RatingsConfig(path=str(file), scales={"mark": (0, 10)})]  # type: ignore[call-arg]
    trained: list[pa.Table] = []

    class Bench(Lab):
        def finetune(self, t: int, policy: str | Path, rows: pa.Table, tokens: float) -> Path:
            trained.append(rows)
            return Path("nowhere")

    bench = Bench(lab.config.model_copy(update={"ratings": ratings}), lab.shared, tmp_path, lab.budget)
    demonstrations.train(bench)
    assert trained[0]["response"].to_pylist() == ["So.", "I."]
    assert trained[0]["direction"].null_count == 2
    with pytest.raises(DataError, match="source `expert`"):
        demonstrations.train(Bench(lab.config, lab.shared, tmp_path, lab.budget))
