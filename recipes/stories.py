"""Function scorers of recipes/stories260k.yaml: how long a story is, and how much of it is spoken."""

import re

FULL_LENGTH = 75
"""Words that make 100 points."""


def length(messages: list[dict], response: str) -> float:
    """Words, 75 and more being 100."""
    return 100.0 * min(1.0, len(response.split()) / FULL_LENGTH)


def dialogue(messages: list[dict], response: str) -> float:
    """Share of the characters that stand inside double quotes, in per cent; an unclosed quote does not count."""
    spoken = sum(len(match) for match in re.findall(r'"[^"]*"', response))
    return 100.0 * spoken / max(len(response), 1)
