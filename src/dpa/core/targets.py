"""Targets: wishes that hold objectives at a value and leave the others as high as they go, `helpfulness; verbosity=40`.
Run its tests: pytest tests/test_targets.py

Before the `;` stands a direction over the objectives that are free, after it the held ones with a value of 0 to 100. In
tables and requests a target is its direction (K weights, 0 where held) and beside it `held` (K whole numbers, None
where free); where `held` is None altogether, the direction is all that is wished.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dpa.core.cone import Cone, unit
from dpa.core.direction import Direction
from dpa.core.direction_text import MAX_TEXT, NUMBER, index_of, read_expression, read_number, shown
from dpa.core.directions import DirectionSpace
from dpa.core.errors import DirectionError, OutsideConeError
from dpa.core.records import SCALE
from dpa.core.sentences import PLACEHOLDER, VALUES, target_parts, weighted_rating

Held = Sequence[int | None]
"""K values; None where an objective is free."""

_FLAT = 1e-9


@dataclass(frozen=True)
class Target:
    """A unit vector over the free objectives of a space (`weights`, 0 where held) and the values of the others.

    `str()` prints it as it is read: `helpfulness*100 + warmth*0; verbosity=40`.
    """

    space_names: tuple[str, ...]
    weights: tuple[float, ...]
    held: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if len(self.held) != len(self.weights) or any(
            value is not None and (weight != 0 or not SCALE[0] <= value <= SCALE[1])
            for weight, value in zip(self.weights, self.held, strict=True)
        ):
            raise ValueError(f"no target: weights {self.weights}, held {self.held}")
        if all(value is None for value in self.held):
            raise ValueError("nothing is held; that is a Direction")
        Direction(self.space_names, self.weights)

    @property
    def integers(self) -> tuple[int, ...]:
        """round(100 * weight), 0 where held."""
        return Direction(self.space_names, self.weights).integers

    @property
    def values(self) -> dict[str, int]:
        """Held objective -> its value."""
        return {name: value for name, value in zip(self.space_names, self.held, strict=True) if value is not None}

    @property
    def free(self) -> dict[str, int]:
        """Free objective -> its integer."""
        terms = zip(self.space_names, self.integers, strict=True)
        return {name: integer for name, integer in terms if name not in self.values}

    def as_mapping(self) -> dict[str, float | str]:
        """Free objective -> weight, held objective -> `=40`: what a chat template's `preference` takes."""
        return preference_of(self.space_names, self.weights, self.held)

    def __str__(self) -> str:
        free = weighted_rating(self.free, self.free.values())
        return f"{free}; {', '.join(f'{name}={value}' for name, value in self.values.items())}"


Wish = Direction | Target


# --- reading -------------------------------------------------------------------------------------------------------


def read_wish(space: DirectionSpace, value: Any, outside: Literal["error", "clamp"] = "error") -> Wish:
    """A direction in any form `DirectionSpace.parse` reads, or a target in any form `read_target` does."""
    return read_target(space, value, outside) if is_target(value) else space.parse(value, outside)


NO_DIRECTION = "none"
"""`--direction none`: what states no direction is asked under none."""


def wish_or_center(
    space: DirectionSpace, text: str | None, outside: Literal["error", "clamp"] = "error"
) -> Wish | None:
    """What a user asks for who wrote `text`: nothing at all (`none`), and without any text the center of the cone.

    A policy was trained on stated directions only, and answers badly where none is (docs/findings.md).
    """
    if text == NO_DIRECTION:
        return None
    return space.direction(space.center) if text is None else read_wish(space, text, outside)


def is_target(value: Any) -> bool:
    """Whether something a user wrote is meant as a target: a text with `;` or `=`, or a mapping with a text in it."""
    if isinstance(value, str):
        return ";" in value or "=" in value
    return isinstance(value, Target) or (isinstance(value, Mapping) and any(isinstance(v, str) for v in value.values()))


def read_target(space: DirectionSpace, value: Any, outside: Literal["error", "clamp"] = "error") -> Target:
    """Read `helpfulness; verbosity=40`, `helpfulness*0.8 + warmth*0.6; verbosity=40`, the mapping that says the same
    (`{"helpfulness": 1, "verbosity": "=40"}`), or a Target. Values are rounded to multiples of `target_step`, as the
    policy reads them.

    The free direction must lie in the cone as far as that is free: within max_angle of the center whose held
    objectives weigh 0 (`outside` as for `DirectionSpace.parse`). Raises DirectionError; also where the policy knows no
    targets.
    """
    where, names = f"target {shown(value)}", space.names
    example = f"write e.g. `{names[0]}; {names[1]}=40`."
    for name in value if isinstance(value, Mapping) else ():
        index_of(name, names, where)
    if space.target_template is None:
        raise DirectionError(
            f"{where}: this policy was trained on directions and knows no targets; ask a direction, such as "
            f"`{names[0]}*0.8 - {names[1]}*0.6`, or train it with selection.targets."
        )
    weights, values = _parts(value.as_mapping() if isinstance(value, Target) else value, names, where, example)
    held = _held(values, space, where)
    for name in values:
        if name in weights:
            raise DirectionError(f"{where}: `{name}` is both weighed and held; name it on one side of the `;`.")
    if not values:
        raise DirectionError(f"{where}: nothing is held; {example}")
    if not weights:
        raise DirectionError(f"{where}: no objective is left free; say what shall be as high as it goes, {example}")
    weights_K = np.array(unit([weights.get(name, 0.0) for name in names], where))
    center_K = free_center(space, held)
    if center_K is None:
        raise DirectionError(
            f"{where}: with {' and '.join(f'`{name}`' for name in values)} held, what this policy was trained to raise "
            f"is held too; leave {' or '.join(f'`{n}`' for n, c in zip(names, space.center_K, strict=True) if c)} free."
        )
    return Target(names, tuple(_within(space, weights_K, center_K, held, outside, where).tolist()), held)


def _parts(value: Any, names: Sequence[str], where: str, example: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Weights of what is free, and values of what is held, as they were given."""
    if isinstance(value, Mapping):
        texts = {name: text.strip() for name, text in value.items() if isinstance(text, str)}
        weighed = {name: weight for name, weight in value.items() if name not in texts}
        for name, text in texts.items():
            if not text.startswith("="):
                raise DirectionError(f'{where}: `{name}` is neither a weight nor a value; write e.g. 0.8, or "=40".')
        weights = {name: read_number(weight, f"{where}: `{name}`") for name, weight in weighed.items()}
        return weights, {name: text[1:] for name, text in texts.items()}
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isascii():
        raise DirectionError(f"{where} is no plain text of at most {MAX_TEXT} characters; {example}")
    free, semicolon, rest = value.partition(";")
    if not semicolon:
        raise DirectionError(f"{where}: a value is held after a `;`; {example}")
    values: dict[str, str] = {}
    for item in re.split("[,;]", rest) if rest.strip() else ():
        name, equals, text = (part.strip() for part in item.partition("="))
        if not (name and equals):
            raise DirectionError(f"{where}: {shown(item.strip())} is not an objective and its value; {example}")
        if name in values:
            raise DirectionError(f"{where}: `{name}` is held twice; give it one value.")
        values[name] = text
    return read_expression(free, names) if free.strip() else {}, values


def _held(values: Mapping[str, str], space: DirectionSpace, where: str) -> tuple[int | None, ...]:
    held: list[int | None] = [None] * space.K
    for name, given in values.items():
        place, text = index_of(name, space.names, where), given.strip()
        number = float(text) if NUMBER.fullmatch(text) else np.nan
        if not SCALE[0] <= number <= SCALE[1]:
            raise DirectionError(
                f"{where}: `{name}` is held at {shown(text)}; take a number from {SCALE[0]:g} to {SCALE[1]:g}."
            )
        held[place] = to_step(space, number)
    return tuple(held)


def _within(
    space: DirectionSpace, weights_K: np.ndarray, center_K: np.ndarray, held: Held, outside: str, where: str
) -> np.ndarray:
    """The free direction, or the nearest one in the cone."""
    free = _free(held)
    angle = _free_angle(weights_K, center_K, held)
    # Whole hundredths of an edge may lie a little beyond it, as in DirectionSpace.parse.
    if angle <= space.max_angle + np.degrees(np.arcsin(0.005 * len(free) ** 0.5)):
        return weights_K
    if outside != "clamp":
        raise OutsideConeError(
            f"{where}: its direction lies {angle:.1f} degrees from {space.direction(center_K)}; the policy was "
            f"trained up to {space.max_angle:g} degrees from that"
        )
    edge_K = np.zeros(len(weights_K))
    edge_K[free] = (
        _free_cone(center_K, held).edge(weights_K[free], space.max_angle) if len(free) > 1 else center_K[free]
    )
    return edge_K / np.linalg.norm(edge_K)


# --- what is free --------------------------------------------------------------------------------------------------


def free_center(space: DirectionSpace, held: Held) -> np.ndarray | None:
    """center_K, a unit vector: the space's center with 0 where held; None where nothing of it is left free."""
    center_K = np.where([value is None for value in held], space.center_K, 0.0)
    length = float(np.linalg.norm(center_K))
    return center_K / length if length > _FLAT else None


def angle_to_center(space: DirectionSpace, wish: Wish) -> float:
    """Degrees between what is weighed and the center as far as that is free: what `max_angle` bounds."""
    weights_K = np.array(wish.weights)
    if isinstance(wish, Direction):
        return float(space.angle_to_center(weights_K[None])[0])
    center_K = free_center(space, wish.held)
    assert center_K is not None  # read_target
    return _free_angle(weights_K, center_K, wish.held)


def draw_free(space: DirectionSpace, held: Held, rng: np.random.Generator) -> np.ndarray:
    """A direction of training over what is free (K weights, 0 where held): in half of all draws the center alone, as
    most requests have it, else one drawn from the free part of the cone as `DirectionSpace.sample` draws."""
    center_K = free_center(space, held)
    assert center_K is not None and space.training_angle is not None
    free = _free(held)
    drawn_K = np.zeros(space.K)
    if rng.random() < 0.5 or len(free) == 1:
        return center_K
    cone = _free_cone(center_K, held)
    drawn_K[free] = cone.draw(1, rng, space.training_angle, space.training_ends, space.training_arcs)[0]
    return drawn_K


def _free(held: Held) -> list[int]:
    return [k for k, value in enumerate(held) if value is None]


def _free_angle(weights_K: np.ndarray, center_K: np.ndarray, held: Held) -> float:
    """Degrees between two directions of what is free."""
    return float(_free_cone(center_K, held).angles(weights_K[None, _free(held)])[0])


def _free_cone(center_K: np.ndarray, held: Held) -> Cone:
    """The cone in the coordinates of what is free."""
    center_F = center_K[_free(held)]
    across_FF = np.eye(len(center_F)) - np.outer(center_F, center_F)
    length_F = np.linalg.norm(across_FF, axis=1)
    return Cone(center_F, across_FF[length_F > 1e-6] / length_F[length_F > 1e-6, None])


# --- printing ------------------------------------------------------------------------------------------------------


def sentence(space: DirectionSpace, wish: Wish) -> str:
    """The sentence that states a wish; for a target `... = helpfulness*100 + warmth*0 with verbosity = 40`."""
    if isinstance(wish, Direction):
        return space.prompt(wish)
    if wish.space_names != space.names or space.target_template is None:
        raise DirectionError(f"target: {wish} is not of a space of {', '.join(space.names)} that knows targets.")
    values = ", ".join(f"{name} = {value}" for name, value in wish.values.items())
    filled = {PLACEHOLDER: weighted_rating(wish.free, wish.free.values(), space.zero_padded), VALUES: values}
    return "".join(filled.get(part, part) for part in target_parts(space.target_template))


def to_step(space: DirectionSpace, value: float) -> int:
    """The multiple of `target_step` as which a value is stated."""
    return round(value / space.target_step) * space.target_step


def wish_of(space: DirectionSpace, weights: Sequence[float], held: Held | None = None) -> Wish:
    """The wish that a row or a request carries as numbers."""
    if held is None:
        return space.direction(weights)
    free = [weight if value is None else 0.0 for weight, value in zip(weights, held, strict=True)]
    return Target(space.names, space.direction(free).weights, tuple(held))


def numbers_of(wish: Wish | None) -> tuple[tuple[float, ...] | None, tuple[int | None, ...] | None]:
    """(direction, held) as rows and requests carry a wish; None twice where there is none."""
    return None if wish is None else wish.weights, wish.held if isinstance(wish, Target) else None


def preference_of(names: Sequence[str], weights: Sequence[float], held: Held | None = None) -> dict[str, float | str]:
    """The same as a mapping: objective -> weight, or `=40` where it is held."""
    held = [None] * len(names) if held is None else held
    return {
        name: float(weight) if value is None else f"={value}"
        for name, weight, value in zip(names, weights, held, strict=True)
    }
