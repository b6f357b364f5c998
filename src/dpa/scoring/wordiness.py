"""How long a response is, as a score: the second objective of data whose marks all agree (`dpa init`).
Run its tests: pytest tests/test_init.py
"""

import math

FULL_LENGTH = 400
"""Words that make 100 points."""


def wordiness(messages: list[dict[str, str]], response: str) -> float:
    """Words on the scale on which people feel them: 100 log(1 + words) / log(1 + FULL_LENGTH), at most 100.

    10 words are 40, 50 are 66, 200 are 88. Named in a configuration as `dpa.scoring.wordiness:wordiness`.
    """
    return 100.0 * min(1.0, math.log1p(len(response.split())) / math.log1p(FULL_LENGTH))
