"""Function scorer of recipes/smollm2-135m.yaml: how long an answer is, on the scale on which people feel it."""

import math

FULL_LENGTH = 400
"""Words that make 100 points."""


def verbosity(messages: list[dict], response: str) -> float:
    """The logarithm of the number of words: none are 0 points, FULL_LENGTH and more 100."""
    return 100.0 * min(1.0, math.log1p(len(response.split())) / math.log1p(FULL_LENGTH))
