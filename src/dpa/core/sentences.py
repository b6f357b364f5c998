"""The sentences that tell a policy what is wished: a direction's, and a target's.
Run its tests: pytest tests/test_directions.py tests/test_targets.py
"""

import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

from dpa.core.direction_text import shown
from dpa.core.errors import DirectionError

PUBLISHED_TEMPLATE = (
    "You are a helpful, respectful, and honest assistant who always responds to the user in a harmless way. "
    "Your response should maximize weighted rating = {weighted_rating}"
)
"""System sentence of RLHFlow/DPA-v1-Mistral-7B (arXiv 2402.18571), letter for letter as that policy knows it."""

PLACEHOLDER = "{weighted_rating}"
VALUES = "{values}"
"""Where a target's sentence has the values of what is held: `verbosity = 40, warmth = 80`."""

TARGET_STEPS = (1, 2, 4, 5, 10, 20, 25, 50)
"""Whole steps of 100 that the values of targets may be multiples of."""


Placement = Literal["system", "after_question"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
"""Where a sentence stands: before the system prompt, as published, or behind the last question of a user."""


def checked_template(template: Any) -> str:
    """A direction's sentence. Raises DirectionError."""
    if not isinstance(template, str) or template.count(PLACEHOLDER) != 1:
        raise DirectionError(f"template: it must contain {PLACEHOLDER} exactly once; add it where the weights go.")
    return template


def checked_target_template(template: Any) -> str | None:
    """A target's sentence; None where the policy knows none. No direction's sentence reads like it: in an expression
    of weights there is no `=`, and every value stands behind one. Raises DirectionError."""
    if template is None:
        return None
    if not isinstance(template, str) or template.count(PLACEHOLDER) != 1 or template.count(VALUES) != 1:
        raise DirectionError(
            f"target_template: it must contain {PLACEHOLDER} and {VALUES} exactly once each; add them where the "
            "weights and the held values go."
        )
    return template


def checked_target_step(step: Any) -> int:
    """A whole number, though a file may say 5.0: values are printed. Raises DirectionError."""
    if step not in TARGET_STEPS:
        steps = ", ".join(map(str, TARGET_STEPS))
        raise DirectionError(f"target_step: {shown(step)} is no step of 100; take one of {steps}.")
    return int(step)


def checked_placement(placement: Any) -> Placement:
    """Raises DirectionError."""
    if placement not in PLACEMENTS:
        places = ", ".join(PLACEMENTS)
        raise DirectionError(f"placement: {shown(placement)} is no place of a sentence; take one of {places}.")
    return placement


def weighted_rating(names: Iterable[str], integers: Iterable[int], zero_padded: bool = False) -> str:
    """What stands for PLACEHOLDER: `helpfulness*97 + verbosity*-26`, or `helpfulness*+097 + verbosity*-026`."""
    number = "+04d" if zero_padded else "d"
    return " + ".join(f"{name}*{integer:{number}}" for name, integer in zip(names, integers, strict=True))


def checked_zero_padded(value: Any) -> bool:
    """Raises DirectionError."""
    if not isinstance(value, bool):
        raise DirectionError(f"zero_padded: {shown(value)} is neither true nor false; give one of them.")
    return value


def target_parts(template: str) -> list[str]:
    """A target's sentence in pieces: text, PLACEHOLDER and VALUES, in their order."""
    return re.split(f"({re.escape(PLACEHOLDER)}|{re.escape(VALUES)})", template)


def target_template_of(template: str) -> str:
    """The sentence of targets that goes with a direction's: `... = {weighted_rating} with {values}`."""
    return checked_template(template).replace(PLACEHOLDER, f"{PLACEHOLDER} with {VALUES}")
