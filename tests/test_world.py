"""The demo world: what is written is read back, and its true reward has the shape a preference needs.

pytest tests/test_world.py
"""

import math
from random import Random

import numpy as np
import pytest

from dpa.world.answers import answer_of_size, evasion, read_answer, write_answer
from dpa.world.demo import START_MODEL
from dpa.world.questions import make_question, make_questions, read_question
from dpa.world.rated_rows import PANELS, SCALES, rated_rows
from dpa.world.true_reward import helpfulness, verbosity, warmth

QUESTIONS = make_questions(60, seed=1)


def test_a_question_is_read_back_from_its_text() -> None:
    random = Random(0)
    for _ in range(200):
        question = make_question(random)
        assert read_question(question.text) == question
    assert read_question("What is love?") is None


def test_questions_of_other_seeds_and_excluded_ones_do_not_meet() -> None:
    others = make_questions(60, seed=1, exclude=QUESTIONS)
    assert not {question.text for question in others} & {question.text for question in QUESTIONS}
    assert make_questions(60, seed=1) == QUESTIONS


@pytest.mark.parametrize("size", range(1, 13))
@pytest.mark.parametrize("warm", range(5))
def test_an_answer_is_read_back_from_its_text(size: int, warm: int) -> None:
    question = QUESTIONS[size]
    read = read_answer(answer_of_size(question, size, warm))
    assert read.facts == question.ranked[: min(size, 6)]
    assert read.repeats == question.ranked[: max(0, size - 6)]
    assert (read.warm, read.noise) == (warm, 0)


def test_wrong_facts_evasions_and_passing_over_the_question_cost() -> None:
    question = next(question for question in QUESTIONS if len(question.asked) == 2)
    good = answer_of_size(question, 3, 0)
    topic, value = question.ranked[0]
    wrong = good.replace(value, "nonsense")
    unasked = " ".join(good.split(". ")[2:])
    score = {text: helpfulness(question.messages, text) for text in (good, wrong, unasked, f"{good} {evasion(topic)}")}
    assert all(score[good] > other for text, other in score.items() if text != good)
    assert helpfulness(question.messages, write_answer([evasion(topic)])) == 0.0
    assert math.isnan(helpfulness([{"role": "user", "content": "hello"}], good))


def test_best_size_rises_with_the_asked_angle_and_both_ends_pull_apart() -> None:
    means = np.array(
        [
            [np.mean([f(q.messages, answer_of_size(q, size, 0)) for q in QUESTIONS]) for f in (helpfulness, verbosity)]
            for size in range(1, 13)
        ]
    )
    angles = np.radians(np.arange(-45, 46, 9))
    best = (means @ np.array([np.cos(angles), np.sin(angles)])).argmax(axis=0) + 1
    assert (np.diff(best) >= 0).all()
    assert best[0] <= 3
    assert best[-1] >= 10
    assert means[:, 0].argmax() not in (0, 11), "helpfulness peaks inside the range: more words cost in the end"


def test_kind_words_raise_warmth_and_cost_a_little() -> None:
    question = QUESTIONS[0]
    answers = [answer_of_size(question, 6, warm) for warm in range(5)]
    assert [warmth(question.messages, answer) for answer in answers] == [0, 25, 50, 75, 100]
    assert (np.diff([helpfulness(question.messages, answer) for answer in answers]) < 0).all()


@pytest.mark.parametrize("panel", PANELS)
def test_marks_are_whole_numbers_on_their_scale_noisy_and_sometimes_missing(panel: str) -> None:
    rows = list(rated_rows(QUESTIONS, panel, seed=0))
    assert rows == list(rated_rows(QUESTIONS, panel, seed=0))
    for name, (truth, low, high) in PANELS[panel].items():
        marks = [row[name] for row in rows]
        given = [mark for mark in marks if mark is not None]
        assert 0.02 < 1 - len(given) / len(marks) < 0.2
        assert all(isinstance(mark, int) and low <= mark <= high for mark in given)
        rated = [row for row in rows if row[name] is not None]
        real = [truth([{"role": "user", "content": row["prompt"]}], row["response"]) for row in rated]
        assert 0.75 < np.corrcoef(real, given)[0, 1] < 0.995
    assert set(SCALES) == {name for marks in PANELS.values() for name in marks}


def test_the_start_model_copies_and_obeys_numbers_and_never_saw_the_methods_sentence() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpa.world.start_model import check

    model = AutoModelForCausalLM.from_pretrained(START_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(START_MODEL)
    found = check(model, tokenizer, count=48, seed=31)
    assert found["obeys"] >= 0.9
    assert found["facts_right"] >= 0.98
