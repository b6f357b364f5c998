"""Rated rows of the demo world: answers by writers of mixed skill, rated by two panels with human-like noise.

`readers` rate helpfulness and verbosity on 0..4; `critics` rate an overall score on 1..10 and warmth on 1..5. Each
panel sees half of the questions, some marks are missing, every rater has a leniency, and nobody is exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from dpa.world.answers import evasion, fact_sentence, write_answer
from dpa.world.questions import Question
from dpa.world.true_reward import helpfulness, verbosity, warmth

ANSWERS_PER_QUESTION = 8
MARK_NOISE = 9.0
"""Standard deviation of one mark, on the 0-100 scale."""
LENIENCY = 4.0
"""Standard deviation of a rater's own offset."""
UNRATED_SHARE = 0.1
"""Share of marks a rater forgets."""

PANELS = {
    "readers": {"readers-helpfulness": (helpfulness, 0, 4), "readers-verbosity": (verbosity, 0, 4)},
    "critics": {"critics-overall": (helpfulness, 1, 10), "critics-warmth": (warmth, 1, 5)},
}
"""Panel -> attribute -> (the true reward behind it, lowest and highest mark)."""

SCALES = {name: [low, high] for panel in PANELS.values() for name, (_, low, high) in panel.items()}


@dataclass(frozen=True)
class Writer:
    """Somebody who answers: how often a fact is evaded ("What is the food?"), notes are mixed up, kindness shown."""

    evades: float
    mixes_up: float
    warm: float

    def write(self, question: Question, random: Random) -> str:
        """An answer in this writer's manner: evasions stand where the facts would."""
        size = random.randint(1, len(question.card))
        values = [value for _, value in question.card]
        told: list[tuple[str, str]] = []
        parts: list[str] = []
        for topic, value in question.ranked[:size]:
            if random.random() < self.evades:
                parts.append(evasion(topic))
            else:
                told.append((topic, random.choice(values) if random.random() < self.mixes_up else value))
                parts.append(fact_sentence(*told[-1]))
        repeats = told[: random.randint(1, 6)] if random.random() < 0.4 else []
        warm = sum(random.random() < self.warm for _ in range(4))
        return write_answer(parts, repeats, warm)


def make_writer(random: Random) -> Writer:
    """Draw a writer: most are fair, none is perfect."""
    return Writer(
        evades=random.uniform(0.05, 0.6),
        mixes_up=random.uniform(0.0, 0.05),
        warm=random.choice((0.0, 0.2, 0.5, 0.9)),
    )


def rated_rows(questions: list[Question], panel: str, seed: int) -> Iterator[dict]:
    """Yield one JSON-able row per answer: prompt, response, and the panel's marks (null = missing)."""
    random = Random(f"{panel}-{seed}")
    for question in questions:
        leniency = random.gauss(0.0, LENIENCY)
        for _ in range(ANSWERS_PER_QUESTION):
            response = make_writer(random).write(question, random)
            marks = {
                name: None
                if random.random() < UNRATED_SHARE
                else _mark(truth(question.messages, response) + leniency + random.gauss(0.0, MARK_NOISE), low, high)
                for name, (truth, low, high) in PANELS[panel].items()
            }
            yield {"prompt": question.text, "response": response, **marks}


def _mark(value: float, low: int, high: int) -> int:
    """The whole-number mark whose bin a value on 0-100 falls in."""
    bins = high - low + 1
    return low + min(bins - 1, max(0, int(value / 100.0 * bins)))
