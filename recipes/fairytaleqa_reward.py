"""The two true rewards of recipes/fairytaleqa.yaml: how much of an expert's answer a response holds, and its words.
Run its tests: pytest tests/test_fairytaleqa.py

The experts' answers are looked up by the question's own text in every `*.jsonl` of the data folder (FAIRYTALEQA in the
environment, else ../shared/data/fairytaleqa), whose rows hold `prompt` and `answers`.
"""

import json
import math
import os
import re
from functools import cache
from pathlib import Path

FOLDER = "../shared/data/fairytaleqa"
FULL_LENGTH = 100
"""Words that make 100 points of verbosity."""
ARTICLES = frozenset({"a", "an", "the"})


def helpfulness(messages: list[dict], response: str) -> float:
    """Share of an expert's words that the response holds, in per cent: of the answer it holds best.

    Case, punctuation and articles do not count, all other words do; each word of the answer is looked for once.
    """
    return share_held(answers(messages[-1]["content"]), response)


def verbosity(messages: list[dict], response: str) -> float:
    """Words on a log scale: 100 log(1 + words) / log(1 + FULL_LENGTH), at most 100.

    1 word is 15, 5 are 39, 20 are 66. Silence counts as a word: it is no terse answer, and must not win as one.
    """
    return 100.0 * min(1.0, math.log1p(max(1, len(response.split()))) / math.log1p(FULL_LENGTH))


def share_held(experts: list[str], response: str) -> float:
    """Per cent of an answer's content words that stand in the response, the best of the answers."""
    held = frozenset(content_words(response))
    wanted = [frozenset(content_words(answer)) for answer in experts]
    return max((100.0 * len(words & held) / len(words) for words in wanted if words), default=0.0)


def content_words(text: str) -> list[str]:
    """Lower-case words without articles and punctuation, in order."""
    return [word for word in re.findall(r"[a-z0-9]+", text.lower().replace("'", "")) if word not in ARTICLES]


def answers(prompt: str) -> list[str]:
    """What the experts answered. Raises KeyError for a question that is not in the data folder."""
    return _answers_by_prompt(os.environ.get("FAIRYTALEQA", FOLDER))[prompt]


@cache
def _answers_by_prompt(folder: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in sorted(Path(folder).glob("*.jsonl")):
        with file.open(encoding="utf-8") as lines:  # no splitlines: a story may hold what that splits at
            for row in map(json.loads, lines):
                found.setdefault(row["prompt"], []).extend(row["answers"])  # a question may stand there twice
    return found
