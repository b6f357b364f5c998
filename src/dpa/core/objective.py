"""An objective: what a user can weigh, made of what is rated.
Run its tests: pytest tests/test_directions.py
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from dpa.core.direction_text import MAX_NAME, is_name, read_number, shown
from dpa.core.errors import DirectionError
from dpa.core.records import SCALE


@dataclass(frozen=True)
class Objective:
    """A quality a user can weigh: a weighted sum of rated attributes.

    `attributes` maps each to its weight; none given means the attribute of the objective's own name, with weight 1.
    The paper does not say how its ten attributes make "helpfulness" and "verbosity", so the weights are the user's.
    """

    name: str
    attributes: Mapping[str, float] = field(default=None, hash=False)  # type: ignore[arg-type]
    description: str = ""

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise DirectionError(
                f"objective name {shown(self.name)} is not usable; take up to {MAX_NAME} ASCII letters, digits, "
                "`_`, `.` or `-`, starting with a letter and ending with a letter or digit."
            )
        given = {self.name: 1.0} if self.attributes is None else self.attributes
        if not isinstance(given, Mapping) or not given:
            raise DirectionError(
                f"objective `{self.name}` has no attributes; give a mapping such as {{'{self.name}': 1.0}}."
            )
        weights = {str(name): read_number(weight, f"objective `{self.name}`") for name, weight in given.items()}
        for name, weight in weights.items():
            if weight == 0:
                raise DirectionError(f"objective `{self.name}`: attribute `{name}` has weight 0; leave it out.")
        object.__setattr__(self, "attributes", weights)


def range_of_sum(weights: Collection[float]) -> tuple[float, float]:
    """The least and the most that attributes on the scale give, weighed so and added up."""
    low, high = (round(SCALE[1] * sum(end(weight, 0.0) for weight in weights), 6) for end in (min, max))
    return low, high
