"""The space directions live in: what a user may ask for, how it is written, drawn and printed.
Run its tests: pytest tests/test_directions.py
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from dpa.core.cone import Cone, unit
from dpa.core.direction import Direction
from dpa.core.direction_text import (
    index_of,
    is_name,
    read_degrees,
    read_expression,
    read_number,
    read_weights,
    shown,
    unknown,
)
from dpa.core.errors import DirectionError, ModelFileError, OutsideConeError
from dpa.core.objective import Objective, range_of_sum
from dpa.core.sentences import (
    PLACEHOLDER,
    PUBLISHED_TEMPLATE,
    Placement,
    checked_placement,
    checked_target_step,
    checked_target_template,
    checked_template,
    checked_zero_padded,
    weighted_rating,
)

_KIND: dict[str, Any] = {"objectives": list, "center": dict, "max_angle": int | float, "template": str, "presets": dict}
"""Of a space's fields as they travel with a model."""
MAX_OBJECTIVES = 64
"""More are a damaged or hostile file: what a cone needs grows with their square."""
_UNLESS = {"placement": "system", "zero_padded": False}
"""Those that are absent where they are as published."""
_OPTIONAL = ("training_angle", "training_ends", "training_arcs", "target_template", "target_step", *_UNLESS)
"""Those that may be absent."""


@dataclass(frozen=True)
class DirectionSpace:
    """K >= 2 objectives, the trained cone of directions around `center`, and the sentence that states a direction.

    `center` is any non-zero vector (mapping or K numbers; default: the first objective's axis), `max_angle` the
    half-angle, in degrees, of the cone a user may ask in. The published policy has objectives (helpfulness, verbosity),
    the helpfulness axis as center and an advised range of 45 degrees. `training_angle` (default: the same) is the
    half-angle that directions are drawn from in training: a wider one keeps the edge a user asks for from being the
    edge of what was learned; `training_ends` is the share of them that is moved out to the outer fifth of it, and
    `training_arcs` (K > 2) the share that is moved onto an arc, where all but one of the other objectives weigh 0.
    `presets` name directions written in any other form. `target_template` is the sentence that states a target
    (core/targets.py), None where the policy knows none; the values it has read are multiples of `target_step`.
    `placement` is where a sentence stands: in the `system` message, as published, or `after_question`. `zero_padded`
    weights are stated with a sign and three digits, +097 for 97.

    Raises DirectionError when a field cannot be used.
    """

    objectives: tuple[Objective, ...]
    center: Mapping[str, float] | Sequence[float] | None = field(default=None, hash=False)
    max_angle: float = 45.0
    template: str = PUBLISHED_TEMPLATE
    presets: Mapping[str, str | Mapping[str, float]] = field(default_factory=dict, hash=False)
    training_angle: float | None = None
    training_ends: float = 0.0
    training_arcs: float = 0.0
    target_template: str | None = None
    target_step: int = 1
    placement: Placement = "system"
    zero_padded: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", tuple(self.objectives))
        names = self.names
        if len(names) < 2:
            raise DirectionError(f"objectives: {len(names)} given; a direction needs at least two.")
        if len(names) > MAX_OBJECTIVES:
            raise DirectionError(f"objectives: {len(names):,} given; a direction has at most {MAX_OBJECTIVES}.")
        for name in names:
            if names.count(name) > 1:
                raise DirectionError(f"objectives: `{name}` is named twice; give each its own name.")
        max_angle = read_number(self.max_angle, "max_angle")
        if not 0 < max_angle <= 180:
            raise DirectionError(f"max_angle: {max_angle:g} is not in (0, 180]; give the cone's half-angle in degrees.")
        object.__setattr__(self, "max_angle", max_angle)
        training = max_angle if self.training_angle is None else read_number(self.training_angle, "training_angle")
        if not max_angle <= training <= 180:
            raise DirectionError(
                f"training_angle: {training:g} is not in [max_angle, 180], and max_angle is {max_angle:g}; widen it."
            )
        object.__setattr__(self, "training_angle", training)
        for name in ("training_ends", "training_arcs"):
            share = read_number(getattr(self, name), name)
            if not 0 <= share <= 1:
                raise DirectionError(f"{name}: {share:g} is not in [0, 1]; give a share.")
            object.__setattr__(self, name, share)
        checked_template(self.template)
        checked_target_template(self.target_template)
        object.__setattr__(self, "target_step", checked_target_step(self.target_step))
        checked_placement(self.placement)
        checked_zero_padded(self.zero_padded)
        center = read_weights({names[0]: 1.0} if self.center is None else self.center, names, "center")
        unit(center, "center")
        object.__setattr__(self, "center", center)
        object.__setattr__(self, "presets", self._checked_presets())

    # --- what the space is -------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the K objectives, in the order they are printed."""
        return tuple(objective.name for objective in self.objectives)

    @property
    def K(self) -> int:
        """Number of objectives."""
        return len(self.objectives)

    @cached_property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Objective -> the least and the most it can be, its attributes being on 0-100."""
        return {one.name: range_of_sum(one.attributes.values()) for one in self.objectives}

    @cached_property
    def center_K(self) -> np.ndarray:
        """Unit axis of the cone."""
        return np.array(unit(self.center, "center"))  # type: ignore[arg-type]

    @cached_property
    def arc_names(self) -> tuple[str, ...]:
        """The objectives not parallel to the center: those an arc can lead towards."""
        return tuple(self._poles)

    # --- reading and printing ----------------------------------------------------------------------------------

    def parse(self, value: Any, outside: Literal["error", "clamp"] = "error") -> Direction:
        """Read a direction in any form and normalise it to the unit sphere.

        Forms: `helpfulness*0.8 - verbosity*0.6`, `0.8*helpfulness - 0.6*verbosity`, `helpfulness*97 + verbosity*-26`;
        a mapping objective -> number (those left out are 0); K numbers; for K = 2 `-15deg`, the angle from the
        center towards the second objective; a preset's name; a Direction.

        `outside`: what to do beyond the trained cone: "error" raises with the valid range, "clamp" takes the nearest
        direction on the cone's edge (along the great circle). What the space itself prints counts as inside,
        although whole hundredths may lie beyond the edge by asin(0.005 sqrt(K)), 0.4 degrees for K = 2.

        Raises DirectionError.
        """
        if isinstance(value, str) and value.strip() in self.presets:
            value = self.presets[value.strip()]
        direction = self._read(value)
        angle = float(self.angle_to_center(np.array([direction.weights]))[0])
        if angle <= self.max_angle + math.degrees(math.asin(min(1.0, 0.005 * math.sqrt(self.K)))):
            return direction
        if outside == "clamp":
            return self.direction(self._cone.edge(np.array(direction.weights), self.max_angle))
        raise OutsideConeError(
            f"direction {shown(value)} lies {angle:.1f} degrees from {self.direction(self.center)}; "
            f"the policy was trained {self._range()}"
        )

    def direction(self, weights: Mapping[str, float] | Sequence[float] | np.ndarray | None) -> Direction:
        """Normalise weights (mapping, or K numbers) without asking whether they lie in the cone."""
        return Direction(self.names, unit(read_weights(weights, self.names, "direction"), "direction"))

    def prompt(self, direction: Direction) -> str:
        """The sentence that states this direction: `... = helpfulness*97 + verbosity*-26`."""
        if direction.space_names != self.names:
            raise DirectionError(
                f"direction: {direction} is over other objectives than {', '.join(self.names)}; parse it in this space."
            )
        return self.template.replace(PLACEHOLDER, weighted_rating(self.names, direction.integers, self.zero_padded))

    def read_prompt(self, text: str) -> Direction:
        """Invert `prompt`, up to the rounding to hundredths. The cone is not asked: this reads what was shown."""
        before, after = self.template.strip().split(PLACEHOLDER)
        text = text.strip()
        if not (text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)):
            raise DirectionError(f"prompt {shown(text)} is not this space's sentence; it reads {shown(self.template)}.")
        return self.direction(read_expression(text[len(before) : len(text) - len(after)], self.names))

    # --- drawing -----------------------------------------------------------------------------------------------

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw directions_DK uniformly by angle within `training_angle` (our choice; the paper's P_v is not published).

        K = 2: the signed angle is uniform on [-training_angle, training_angle]. K > 2: the angle to the center is
        uniform on [0, training_angle] and the azimuth is uniform, which favours the center over uniform area. The
        `count` draws are stratified, one in each of `count` equal parts of the angle (K = 3: of the azimuth too), in
        random order: few directions still cover the cone, so that a pool made under them holds something for each.
        Then a share `training_arcs` of them (K > 2) is turned about the center onto the nearest arc of one objective:
        people name one or two objectives, and a number that continuous draws hardly ever print, `warmth*0`, is one
        the policy has not read. And a share `training_ends` is moved out along its own great circle, to an angle
        uniform on the outer fifth.
        """
        assert self.training_angle is not None
        return self._cone.draw(count, rng, self.training_angle, self.training_ends, self.training_arcs)

    def arc(self, objective: str, count: int) -> np.ndarray:
        """directions_DK at `count` evenly spaced angles -max_angle..max_angle in the plane (center, objective)."""
        return self._cone.arc(self._pole(objective), self.max_angle, count)

    def grid(self, count: int) -> np.ndarray:
        """Fixed directions_DK for evaluation, in a stable order and without duplicates.

        K = 2: the arc of `count`. K > 2: the arc of `count` towards each objective, then, between every two arcs,
        the diagonals at max_angle / 2 and max_angle (four signs each).
        """
        return self.arc(self.arc_names[-1], count) if self.K == 2 else self._cone.grid(self.max_angle, count)

    def neighbours(self, direction: Direction, angle: float, count: int) -> np.ndarray:
        """directions_DK: `count` directions around the asked one, each at most `angle` degrees away and in the cone.

        K = 2: evenly on both sides, at angle / h, 2 angle / h, ... angle for h a side (an odd one lies on the low
        side). K > 2: evenly on the circle `angle` degrees around the asked one. Those beyond the trained cone are moved
        to its edge, so that two may coincide. The same arguments give the same rows.

        What a robust selection samples besides the asked direction (arXiv 2510.20498). Raises DirectionError.
        """
        angle = read_number(angle, "angle")
        if not 0 < angle <= 90:
            raise DirectionError(f"angle: {angle:g} is not in (0, 90]; give degrees around the asked direction.")
        around_DK = self._cone.around(np.array(direction.weights), angle, count)
        inside = [self.parse(row_K, outside="clamp").weights for row_K in around_DK]
        return np.array(inside).reshape(count, self.K)

    def mirrored(self, weights: Sequence[float] | np.ndarray) -> Direction:
        """The direction on the other side of the center, at the same angle: 2 (v . c) c - v for a unit center c.

        Around an objective's axis, all other objectives change their sign; twice mirrored is the direction itself. It
        lies in the cone where `weights` do. The center is its own mirror image.
        """
        own_K = np.array(self.direction(weights).weights)
        return self.direction(2 * (own_K @ self.center_K) * self.center_K - own_K)

    # --- measuring ---------------------------------------------------------------------------------------------

    def angle_to_center(self, directions_DK: np.ndarray) -> np.ndarray:
        """Degrees in [0, 180] between each direction and the center."""
        return self._cone.angles(directions_DK)

    def asked_angle(self, directions_DK: np.ndarray, objective: str) -> np.ndarray:
        """Signed degrees of each direction from the center towards `objective`, within the plane of the two."""
        pole_K = self._pole(objective)
        return np.degrees(np.arctan2(directions_DK @ pole_K, directions_DK @ self.center_K))

    def on_arc(self, directions_DK: np.ndarray, objective: str) -> np.ndarray:
        """Whether each direction lies on the arc of `objective`: in its plane with the center (K = 2: always)."""
        pole_K = self._pole(objective)
        in_plane_D = np.hypot(directions_DK @ pole_K, directions_DK @ self.center_K)
        return np.abs(in_plane_D - 1.0) < 1e-6

    def asked_angles(self, weights_K: np.ndarray) -> dict[str, float]:
        """Arc -> signed degrees of one direction, for the arcs it lies on."""
        return {
            arc: round(float(self.asked_angle(weights_K[None], arc)[0]), 6) + 0.0  # no minus zero
            for arc in self.arc_names
            if self.on_arc(weights_K[None], arc)[0]
        }

    def combine(self, scores_NM: np.ndarray, attributes: Sequence[str]) -> np.ndarray:
        """scores_NK of the objectives from scores_NM of the named attributes; NaN where a needed one is NaN."""
        column = {name: i for i, name in enumerate(attributes)}
        scores_NK = np.empty((len(scores_NM), self.K))
        for k, objective in enumerate(self.objectives):
            for name in objective.attributes:
                if name not in column:
                    raise unknown(name, column, f"objective `{objective.name}`: attribute")
            needed = [column[name] for name in objective.attributes]
            scores_NK[:, k] = np.asarray(scores_NM)[:, needed] @ np.array(list(objective.attributes.values()))
        return scores_NK

    # --- travelling with a model -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, kept with every model (dpa_config.json); `from_dict` gives back an equal space."""
        return {
            "objectives": [asdict(objective) for objective in self.objectives],
            "center": dict(zip(self.names, self.center, strict=True)),  # type: ignore[arg-type]
            "max_angle": self.max_angle,
            "training_angle": self.training_angle,
            "training_ends": self.training_ends,
            "training_arcs": self.training_arcs,
            "template": self.template,
            "presets": {name: value if isinstance(value, str) else dict(value) for name, value in self.presets.items()},
            **(
                {}
                if self.target_template is None
                else {"target_template": self.target_template, "target_step": self.target_step}
            ),
            **{name: getattr(self, name) for name, usual in _UNLESS.items() if getattr(self, name) != usual},
        }

    @classmethod
    def from_dict(cls, data: Any) -> "DirectionSpace":
        """Rebuild a space. Damaged data raise ModelFileError, or DirectionError where a value is wrong in itself."""
        if not isinstance(data, Mapping):
            raise ModelFileError(f"direction space: a mapping is expected, not {shown(data)}; save the model again.")
        for name, kind in _KIND.items():
            if not isinstance(data.get(name), kind):
                raise ModelFileError(
                    f"direction space: `{name}` is missing or of the wrong kind ({shown(data.get(name))}); "
                    "save the model again."
                )
        objectives = []
        for item in data["objectives"]:
            if not isinstance(item, Mapping) or "name" not in item or item.get("attributes") is None:
                raise ModelFileError(
                    f"direction space: the objective {shown(item)} lacks name or attributes; save the model again."
                )
            objectives.append(Objective(item["name"], item["attributes"], str(item.get("description", ""))))
        optional = {name: data[name] for name in _OPTIONAL if name in data}
        return cls(tuple(objectives), data["center"], data["max_angle"], data["template"], data["presets"], **optional)

    # --- inside ------------------------------------------------------------------------------------------------

    @cached_property
    def _cone(self) -> Cone:
        return Cone(self.center_K, np.array(list(self._poles.values())))

    @cached_property
    def _poles(self) -> dict[str, np.ndarray]:
        """Objective -> unit part of its axis that is orthogonal to the center, for those that have one."""
        poles = {}
        for name, axis_K in zip(self.names, np.eye(self.K), strict=True):
            across_K = axis_K - (axis_K @ self.center_K) * self.center_K
            if (length := np.linalg.norm(across_K)) > 1e-6:
                poles[name] = across_K / length
        return poles

    def _pole(self, objective: str) -> np.ndarray:
        index_of(objective, self.names, "objective")
        if objective not in self._poles:
            raise DirectionError(
                f"objective `{objective}` is the center itself, no arc leads there; take {' or '.join(self.arc_names)}."
            )
        return self._poles[objective]

    def _range(self) -> str:
        if self.K == 2:
            return f"from {-self.max_angle:g}deg to {self.max_angle:g}deg (towards {self.arc_names[-1]})"
        return f"up to {self.max_angle:g} degrees from {self.direction(self.center)}"

    def _checked_presets(self) -> dict[str, str | dict[str, float]]:
        if not isinstance(self.presets, Mapping):
            raise DirectionError(f"presets: {shown(self.presets)} is not a mapping of name to direction; write one.")
        checked: dict[str, str | dict[str, float]] = {}
        inside = DirectionSpace(self.objectives, self.center, self.max_angle, self.template) if self.presets else self
        for name, value in self.presets.items():
            if not is_name(name) or name in self.names:
                raise DirectionError(
                    f"preset name {shown(name)} is not usable; take letters, digits, `_`, `.` or `-`, "
                    "and no objective's name."
                )
            if not isinstance(value, str | Mapping):
                raise DirectionError(f"preset `{name}`: {shown(value)} is neither text nor a mapping; write one.")
            try:
                inside.parse(value)
            except DirectionError as error:
                raise DirectionError(f"preset `{name}`: {error}") from None
            checked[name] = value if isinstance(value, str) else dict(value)
        return checked

    def _read(self, value: Any) -> Direction:
        if isinstance(value, Direction):
            value = value.as_mapping()
        if not isinstance(value, str):
            return self.direction(value)
        text = value.strip()
        if not text.endswith("deg") or text.endswith(self.names):
            return self.direction(read_expression(text, self.names, list(self.presets)))
        if self.K != 2:
            raise DirectionError(
                f"direction {shown(text)}: an angle says enough for two objectives only; weigh {', '.join(self.names)}."
            )
        return self.direction(self._cone.turn(np.array([read_degrees(text)]), self._cone.poles_AK[-1])[0])
