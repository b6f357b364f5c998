"""Questions of the demo world: each carries the notes it is answered from, so a tiny model can be right by copying.

    What are the home and food of Bramble?
    Notes on Bramble: kind otter; home river; food fish; age four; friend Juniper; hobby singing.

The wording carries little entropy on purpose (one wording per fact, facts in one order): what varies between answers
is what a preference can decide: how many facts, how many repetitions, how many kind words.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from dpa.core.records import Messages, stable_hash

TOPICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "kind": (
        "It is a kind of {}.",
        (
            "otter",
            "badger",
            "rabbit",
            "sparrow",
            "beetle",
            "salmon",
            "lizard",
            "pony",
            "goat",
            "mouse",
            "raven",
            "bear",
        ),
    ),
    "colour": (
        "It is {} all over.",
        ("brown", "grey", "golden", "silver", "green", "crimson", "black", "white", "blue", "purple", "orange", "pink"),
    ),
    "home": (
        "It lives by the {}.",
        ("river", "forest", "harbour", "mountain", "meadow", "castle", "desert", "marsh", "orchard", "cave", "mill"),
    ),
    "food": (
        "It eats {}.",
        ("fish", "clover", "apples", "honey", "acorns", "barley", "cheese", "berries", "carrots", "pears", "walnuts"),
    ),
    "age": (
        "It is {} years old.",
        ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty"),
    ),
    "friend": (
        "Its friend is {}.",
        ("Juniper", "Otto", "Marigold", "Pip", "Hazel", "Rufus", "Tansy", "Wilbur", "Fern", "Oscar", "Clementine"),
    ),
    "hobby": (
        "It likes {}.",
        (
            "singing",
            "swimming",
            "painting",
            "digging",
            "dancing",
            "sailing",
            "reading",
            "climbing",
            "skating",
            "baking",
        ),
    ),
    "fear": (
        "It fears {}.",
        ("thunder", "spiders", "fire", "ghosts", "darkness", "heights", "wolves", "storms", "snow", "bells", "mirrors"),
    ),
    "toy": (
        "It carries a {}.",
        ("lantern", "drum", "kite", "whistle", "compass", "ribbon", "basket", "button", "feather", "marble", "bell"),
    ),
}
"""Topic -> (the one wording of its fact, possible values). Dictionary order is the order on every card."""

NAMES = [
    "Bramble",
    "Nettle",
    "Thistle",
    "Pepper",
    "Biscuit",
    "Maple",
    "Clover",
    "Ember",
    "Willow",
    "Sorrel",
    "Cricket",
    "Saffron",
    "Poppy",
    "Barnaby",
    "Dusty",
    "Flint",
    "Ginger",
    "Heather",
    "Ivy",
    "Jasper",
    "Kelpie",
    "Linnet",
    "Mossy",
    "Nutmeg",
    "Olive",
    "Parsley",
    "Quill",
    "Rowan",
    "Sage",
    "Teasel",
    "Umber",
    "Violet",
]

FACTS_PER_CARD = 6
MOST_ASKED = 3


@dataclass(frozen=True)
class Question:
    """A question about one creature, with the notes that answer it."""

    name: str
    card: tuple[tuple[str, str], ...]
    asked: tuple[str, ...]

    @property
    def text(self) -> str:
        """What the user types."""
        *first, last = self.asked
        topics = f"{', '.join(first)} and {last}" if first else last
        notes = "; ".join(f"{topic} {value}" for topic, value in self.card)
        return f"What {'are' if first else 'is'} the {topics} of {self.name}?\nNotes on {self.name}: {notes}."

    @property
    def messages(self) -> Messages:
        """The chat a policy sees."""
        return [{"role": "user", "content": self.text}]

    @property
    def question_id(self) -> str:
        """Stable identity: the hash of the text."""
        return f"world-{stable_hash(self.text)}"

    @property
    def ranked(self) -> tuple[tuple[str, str], ...]:
        """Facts in the order of their worth: what was asked first, then the rest of the card."""
        asked = [fact for fact in self.card if fact[0] in self.asked]
        return (*asked, *(fact for fact in self.card if fact[0] not in self.asked))


def make_question(random: Random) -> Question:
    """Draw one question: a name, six facts of nine, one to three of them asked for."""
    topics = sorted(random.sample(range(len(TOPICS)), FACTS_PER_CARD))
    names = list(TOPICS)
    card = tuple((names[t], random.choice(TOPICS[names[t]][1])) for t in topics)
    asked = sorted(random.sample(range(FACTS_PER_CARD), random.randint(1, MOST_ASKED)))
    return Question(random.choice(NAMES), card, tuple(card[a][0] for a in asked))


def make_questions(count: int, seed: int, exclude: Sequence[Question] = ()) -> list[Question]:
    """`count` different questions, none of them in `exclude`."""
    random = Random(f"questions-{seed}")
    seen = {question.text for question in exclude}
    questions: list[Question] = []
    while len(questions) < count:
        question = make_question(random)
        if question.text not in seen:
            seen.add(question.text)
            questions.append(question)
    return questions


_HEAD = re.compile(r"What (?:is|are) the (.+) of (\w+)\?\s+Notes on \w+: (.+)\.\s*$")


@lru_cache(maxsize=65536)
def read_question(text: str) -> Question | None:
    """Read a question back from its text; None when the text is not one of this world."""
    match = _HEAD.search(text)
    if match is None:
        return None
    topics, name, notes = match.groups()
    asked = tuple(re.split(r", | and ", topics))
    card = tuple((part.split(" ", 1)[0], part.split(" ", 1)[-1]) for part in notes.split("; "))
    if any(topic not in TOPICS for topic, _ in card) or any(topic not in dict(card) for topic in asked):
        return None
    return Question(name, card, asked)
