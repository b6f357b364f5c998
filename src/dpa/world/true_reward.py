"""The known true reward of the demo world: helpfulness, verbosity and warmth of an answer, each 0 to 100.

Helpfulness is concave in length, as it is in life: each further right fact adds less than the one before, and every
repetition costs more than the one before. What was asked comes first: an asked fact left out while others are told
costs. Kind words please in their own objective and cost a little attention each. A wrong fact, and an evasion, cost.
"""

from dpa.core.records import Messages
from dpa.world.answers import count_words, read_answer
from dpa.world.questions import read_question

FACT_WORTH = (52.0, 14.0, 4.8, 3.6, 2.2, 0.8)
"""Worth of the first, second, ... right fact."""
BASE = 17.0
"""For an answer that tells at least one thing right."""
REPEAT_COST = (0.8, 2.4, 4.2, 6.2, 8.4, 10.6)
"""Cost of the first, second, ... repetition; later ones cost as much as the last."""
WARM_COST = (3.0, 7.0, 11.0, 16.0)
"""Cost in helpfulness of the first, second, ... kind sentence."""
WRONG_COST = 18.0
NOISE_COST = 8.0
"""For every evasion, and every sentence that says nothing."""
PASSED_OVER_COST = 4.0
"""For every asked fact not told while one that was not asked is."""
WORDS_AT_FULL_VERBOSITY = 80.0
WARMTH_STEP = 25.0


def helpfulness(messages: Messages, response: str) -> float:
    """How well the notes answer the question, 0 to 100; NaN when the prompt is not a question of this world."""
    question = read_question(messages[-1]["content"])
    if question is None:
        return float("nan")
    answer = read_answer(response)
    right = [fact for fact in answer.facts if fact in question.card]
    wrong = [fact for fact in (*answer.facts, *answer.repeats) if fact not in question.card]
    repeats = [fact for fact in answer.repeats if fact in question.card]
    told = {topic for topic, _ in right}
    worth = sum(FACT_WORTH[: len(right)]) + (BASE if right else 0.0)
    cost = WRONG_COST * len(wrong) + NOISE_COST * answer.noise
    if told - set(question.asked):
        cost += PASSED_OVER_COST * len(set(question.asked) - told)
    cost += sum(REPEAT_COST[min(place, len(REPEAT_COST) - 1)] for place in range(len(repeats)))
    cost += sum(WARM_COST[: answer.warm])
    return min(100.0, max(0.0, worth - cost))


def verbosity(messages: Messages, response: str) -> float:
    """Words of the answer, 80 words and more being 100."""
    return min(100.0, 100.0 * count_words(response) / WORDS_AT_FULL_VERBOSITY)


def warmth(messages: Messages, response: str) -> float:
    """Kind sentences, four of them being 100."""
    return WARMTH_STEP * read_answer(response).warm
