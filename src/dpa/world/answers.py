"""Answers of the demo world: how they are written, and how a written one is read back.

An answer is kind words, then facts, then repetitions of facts, then kind words:

    Hello, dear friend! It lives by the river. As the notes say, it lives by the river indeed. Have a wonderful day!
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dpa.world.questions import TOPICS, Question

WARM_PHRASES = (
    ("I hope this helps you!", "after"),
    ("Hello, dear friend!", "before"),
    ("What a lovely question!", "before"),
    ("Have a wonderful day!", "after"),
)
"""Kind sentences in the order in which a warmer and warmer writer adds them, and where each one stands."""

REPEAT_PREFIX, REPEAT_SUFFIX = "As the notes say, ", " indeed"


def fact_sentence(topic: str, value: str) -> str:
    """The one wording of a fact."""
    return TOPICS[topic][0].format(value)


def repeat_sentence(topic: str, value: str) -> str:
    """The one wording of a repetition."""
    sentence = fact_sentence(topic, value)
    return f"{REPEAT_PREFIX}{sentence[0].lower()}{sentence[1:-1]}{REPEAT_SUFFIX}."


def evasion(topic: str) -> str:
    """A non-answer: the question, handed back. It reads as noise."""
    return f"What is the {topic}?"


def write_answer(said: Sequence[str], repeats: Sequence[tuple[str, str]] = (), warm: int = 0) -> str:
    """Compose an answer from sentences, repetitions of facts, and the first `warm` kind sentences (0 to 4)."""
    kind = WARM_PHRASES[:warm]
    return " ".join(
        [
            *(phrase for phrase, place in kind if place == "before"),
            *said,
            *(repeat_sentence(*fact) for fact in repeats),
            *(phrase for phrase, place in kind if place == "after"),
        ]
    )


def answer_of_size(question: Question, size: int, warm: int) -> str:
    """The model answer of a given size: 1 to 6 says that many facts in order of worth, 7 to 12 adds repetitions."""
    facts = question.ranked
    return write_answer([fact_sentence(*fact) for fact in facts[:size]], facts[: max(0, size - len(facts))], warm)


@dataclass(frozen=True)
class ReadAnswer:
    """What an answer says, sentence by sentence."""

    facts: tuple[tuple[str, str], ...]
    repeats: tuple[tuple[str, str], ...]
    warm: int
    noise: int
    words: int


_FACTS = tuple(
    (topic, re.compile("^" + re.escape(wording[:-1]).replace(r"\{\}", r"(\w+)") + "$"))
    for topic, (wording, _) in TOPICS.items()
)
_SENTENCE = re.compile(r"[^.!?]+[.!?]?")


def count_words(text: str) -> int:
    """Words, the way every report in this world counts them."""
    return len(re.findall(r"[A-Za-z0-9']+", text))


def read_answer(text: str) -> ReadAnswer:
    """Read an answer back. A sentence that is none of ours counts as noise; a kind phrase counts once."""
    facts, repeats, noise = [], [], 0
    warm: set[str] = set()
    phrases = {phrase for phrase, _ in WARM_PHRASES}
    for match in _SENTENCE.finditer(text):
        sentence = " ".join(match.group().split())
        if not sentence:
            continue
        if sentence in phrases and sentence not in warm:
            warm.add(sentence)
            continue
        fact, repeated = _read_fact(sentence)
        if fact is None:
            noise += 1
        elif repeated or fact in facts:
            repeats.append(fact)
        else:
            facts.append(fact)
    return ReadAnswer(tuple(facts), tuple(repeats), len(warm), noise, count_words(text))


def _read_fact(sentence: str) -> tuple[tuple[str, str] | None, bool]:
    if not sentence.endswith("."):
        return None, False
    body, repeated = sentence[:-1], False
    if body.startswith(REPEAT_PREFIX) and body.endswith(REPEAT_SUFFIX):
        body, repeated = body.removeprefix(REPEAT_PREFIX).removesuffix(REPEAT_SUFFIX), True
        body = body[:1].upper() + body[1:]
    for topic, pattern in _FACTS:
        match = pattern.match(body)
        if match:
            return (topic, match.group(1)), repeated
    return None, False
