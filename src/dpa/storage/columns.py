"""A column of a rated file as it is found: what its values are, and whether they are marks.
Run its tests: pytest tests/test_init.py
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from dpa.storage.rating_forms import Scale
from dpa.storage.rows import BadRow, given_messages

MOST_STEPS = 20
"""A whole number with more values than this, each once, numbers the rows."""

MOST_OF_A_NAME = 200
"""Characters of a mark's name."""

MOST_GRADES = 12
"""Values of a mark whose name says that it counts something (`word_count`); with more of them, it does."""

_NAMES_A_ROW = re.compile(
    r"(?:^|_)(?:id|ids|idx|index|uuid|hash|seed|timestamp|date|created|row|version|split|fold"
    r"|temperature|rank)(?:_|$)|(?:^|_)(?:annotator|worker|rater)$|^unnamed"
)
_COUNTS = re.compile(
    r"(?:^|_)(?:n|k|num|number|count|tokens?|chars?|words?|length|len|time|year|price|cost|latency|turns?)(?:_|$)"
)
_SCALE_IN_NAME = re.compile(r"[(\[]\s*(-?\d{1,3})\s*(?:-|–|—|\.\.+|to|/)\s*(-?\d{1,3})\s*[)\]]")
"""`quality (1-5)`: the scale as a form's column says it."""
_SHARE = 0.9
"""Of a column's values that must be alike for it to be of that kind."""


@dataclass
class Column:
    """What is known of a column: how many of its values are numbers, texts, chat messages, and which."""

    name: str
    present: int = 0
    numbers: int = 0
    not_finite: int = 0
    """NaN and infinity, which are no marks."""
    texts: int = 0
    conversations: int = 0
    answered: int = 0
    """Conversations that end with the assistant's turn."""
    nested: int = 0
    """Objects, such as marks by their names."""
    lists: int = 0
    """Lists that are no chat messages."""
    low: float = float("inf")
    high: float = float("-inf")
    whole: bool = True
    steps: Counter[float] = field(default_factory=Counter)
    """Its first numbers that differ, and how often each stands there."""
    distinct: set[int] = field(default_factory=set)
    """Hashes of its values."""
    characters: int = 0

    def add(self, value: Any) -> None:
        """Count a value of a row."""
        if value is None or (isinstance(value, str) and not value.strip()):
            return
        self.present += 1
        self.distinct.add(hash(str(value)))
        messages = _messages(value)
        if messages is not None:
            self.conversations += 1
            self.answered += messages[-1].get("role") == "assistant"
        elif (number := number_of(value)) is not None:
            self.numbers += 1
            self.low, self.high = min(self.low, number), max(self.high, number)
            self.whole = self.whole and number.is_integer()
            if number in self.steps or len(self.steps) <= 100:
                self.steps[number] += 1
        elif isinstance(value, float | Decimal):
            self.not_finite += 1
        elif isinstance(value, str):
            self.texts += 1
            self.characters += len(value)
        elif isinstance(value, dict):
            self.nested += 1
        elif isinstance(value, list):
            self.lists += 1

    def mostly(self, count: int) -> bool:
        """Whether so many of the values are nearly all of them."""
        return self.present > 0 and count >= _SHARE * self.present

    @property
    def said_scale(self) -> Scale | None:
        """The scale that its name says, where nearly all of its numbers are on it; the others are then bad rows."""
        found = _SCALE_IN_NAME.search(self.name)
        if found is None or not float(found[1]) < float(found[2]):
            return None
        low, high = float(found[1]), float(found[2])
        on_it = sum(count for number, count in self.steps.items() if low <= number <= high)
        fits = (low <= self.low and self.high <= high) or on_it >= _SHARE * self.numbers
        return (low, high) if fits else None

    @property
    def is_mark(self) -> bool:
        """Numbers that differ, and that neither count nor name something by what the column is called or holds."""
        name = plain(self.name)
        names_rows = self.whole and self.present > MOST_STEPS and len(self.distinct) == self.present
        counts = _COUNTS.search(name) is not None and len(self.distinct) > MOST_GRADES
        # Without a name are row numbers, as pandas writes them.
        kept = len(self.distinct) > 1 and self.name != "" and _can_be_written(self.name)
        return self.mostly(self.numbers) and kept and not (names_rows or counts or _NAMES_A_ROW.search(name))


def without_scale(name: str) -> str:
    """A mark's name without the scale that it says: `quality (1-5)` is quality."""
    return " ".join(_SCALE_IN_NAME.sub(" ", name).split()) or name


def plain(name: str) -> str:
    """A column's name in small letters, words apart by `_`."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_")


def _messages(value: Any) -> list[Any] | None:
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return None
    try:
        messages = given_messages(value)
    except BadRow:
        return None
    good = isinstance(messages, list) and messages and all(isinstance(one, dict) and "role" in one for one in messages)
    return messages if good else None


def number_of(value: Any) -> float | None:
    """A value as a number, where it is one or the text of one."""
    if not isinstance(value, bool | int | float | str | Decimal):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def _can_be_written(name: str) -> bool:
    """Whether a column's name can be a key of a configuration: YAML takes no longer one, and UTF-8 no half letter."""
    return len(name) <= MOST_OF_A_NAME and name.encode("utf-8", "replace").decode() == name
