"""What is published by name: the direction space of RLHFlow/DPA-v1-Mistral-7B.
Run its tests: pytest tests/test_real_templates.py tests/test_recipes.py
"""

from dpa.core.directions import DirectionSpace
from dpa.core.objective import Objective

DPA_V1 = DirectionSpace(
    objectives=(
        Objective("helpfulness", {"helpsteer-helpfulness": 1.0}),
        Objective("verbosity", {"helpsteer-verbosity": 1.0}),
    ),
    max_angle=45.0,
    presets={"terse": "-40deg", "balanced": "0deg", "full": "40deg"},
)
"""Objectives, order, sentence and advised range (|angle| <= 45 degrees) of the released policy, arXiv 2402.18571.

Not published: which attributes make the two objectives. Outputs 0 and 4 of the released reward model are what RPS
(arXiv 2510.20498) reads for them. The presets are ours.
"""

SPACES = {"dpa-v1": DPA_V1}
"""Published spaces by the name a configuration (`space: dpa-v1`) or `--space` gives."""
