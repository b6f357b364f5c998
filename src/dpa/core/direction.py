"""One direction: unit weights over the objectives of a space, and how they are printed.
Run its tests: pytest tests/test_directions.py
"""

import math
from dataclasses import dataclass

from dpa.core.sentences import weighted_rating


@dataclass(frozen=True)
class Direction:
    """A unit vector over the objectives of a space; `str()` prints it as published, zero-padded for no policy."""

    space_names: tuple[str, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.space_names) != len(self.weights):
            raise ValueError(f"{len(self.weights)} weights for {len(self.space_names)} objectives")
        if abs(math.hypot(*self.weights) - 1) > 1e-6:
            raise ValueError(f"not a unit vector: {self.weights}")

    @property
    def integers(self) -> tuple[int, ...]:
        """round(100 * weight): what the policy reads, in one writing or another."""
        return tuple(round(100 * weight) for weight in self.weights)

    def as_mapping(self) -> dict[str, float]:
        """Objective -> weight."""
        return dict(zip(self.space_names, self.weights, strict=True))

    def __str__(self) -> str:
        return weighted_rating(self.space_names, self.integers)
