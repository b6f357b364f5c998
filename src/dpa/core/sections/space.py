"""`space`: what a user can weigh, and how far.
Run its tests: pytest tests/test_config.py
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from dpa.core.directions import DirectionSpace
from dpa.core.objective import Objective
from dpa.core.presets import SPACES
from dpa.core.sections.section import Section
from dpa.core.sentences import PUBLISHED_TEMPLATE, Placement, checked_target_template, target_template_of


class SpaceConfig(Section):
    """The direction space: what a user can weigh, and how far. `space: dpa-v1` is that of the published policy."""

    objectives: dict[str, dict[str, float] | None] = Field(
        description="Objective -> weights of the attributes it is made of; null means the attribute of the same name."
    )
    center: dict[str, float] | None = Field(
        None, description="Axis of the cone of directions, objective -> weight. Default: the first objective."
    )
    max_angle: float = Field(45.0, gt=0, le=180, description="Half-angle of the cone a user may ask in, in degrees.")
    training_angle: float | None = Field(
        None,
        gt=0,
        le=180,
        description="Half-angle of the cone training draws directions from; a wider one than max_angle keeps what is "
        "asked off the edge of what was learned. Default: max_angle.",
    )
    training_ends: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the directions drawn in training that is moved out to the outer fifth of that cone.",
    )
    training_arcs: float = Field(
        0.0,
        ge=0,
        le=1,
        description="With three or more objectives: share of the directions drawn in training that lie on the arc of "
        "one objective, where the others weigh exactly 0, as most requests have it; drawn freely, a `warmth*0` is "
        "hardly ever read.",
    )
    template: str = Field(
        PUBLISHED_TEMPLATE, description="The sentence; {weighted_rating} becomes `helpfulness*97 + verbosity*-26`."
    )
    target_template: str | None = Field(
        None,
        description="The sentence of a target, where selection.targets trains some; {weighted_rating} as above, "
        "{values} becomes `verbosity = 40`. Default: `template` with {weighted_rating} followed by ` with {values}`.",
    )
    target_step: Literal[1, 2, 4, 5, 10, 20, 25, 50] = Field(
        5,
        description="Values of targets are rounded to multiples of it, in training and when one is asked: the fewer "
        "values there are, the more often each has been read.",
    )
    placement: Placement = Field(
        "system",
        description="Where the sentence stands: before the `system` prompt, as in the paper, or `after_question`, "
        "behind the last user message (of a model with a chat template). Prompts that differ in their direction alone "
        "then share all that stands before it, which finetuning, sampling on a processor and prefix caches read once.",
    )
    zero_padded: bool = Field(
        False,
        description="State weights with a sign and three digits, `helpfulness*+097 + verbosity*-026`: where a "
        "tokenizer cuts numbers into digits, each then stands at its own place, and -8 does not begin like -80.",
    )
    presets: dict[str, str | dict[str, float]] = Field(
        default_factory=dict, description="Name -> direction, in any form a direction can be written."
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """A published space's name becomes its fields, so that the resolved configuration names every choice."""
        if not isinstance(data, str):
            return data
        if data not in SPACES:
            raise ValueError(f"give the fields of a space, or the name of a published one: {', '.join(SPACES)}")
        space = SPACES[data]
        return {
            "objectives": {objective.name: dict(objective.attributes) for objective in space.objectives},
            "max_angle": space.max_angle,
            "template": space.template,
            "placement": space.placement,
            "zero_padded": space.zero_padded,
            "presets": dict(space.presets),
        }

    def build(self, targets: bool = False) -> DirectionSpace:
        """Make the DirectionSpace this section describes; with `targets`, one that states them."""
        objectives = tuple(Objective(name, dict(parts or {name: 1.0})) for name, parts in self.objectives.items())
        stated = checked_target_template(self.target_template) or target_template_of(self.template)
        return DirectionSpace(
            objectives=objectives,
            center=self.center,
            max_angle=self.max_angle,
            template=self.template,
            placement=self.placement,
            zero_padded=self.zero_padded,
            presets=self.presets,
            training_angle=self.training_angle,
            training_ends=self.training_ends,
            training_arcs=self.training_arcs,
            target_template=stated if targets else None,
            target_step=self.target_step if targets else 1,
        )
