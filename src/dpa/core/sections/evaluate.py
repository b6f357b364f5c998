"""`evaluate`: how a policy is measured.
Run its tests: pytest tests/test_config.py tests/test_evaluate.py
"""

from pydantic import Field, field_validator

from dpa.core.sections.rollout import PromptsConfig
from dpa.core.sections.section import PathText, Section


class EvaluateConfig(Section):
    """Measuring a policy on held-out prompts over a fixed grid of directions."""

    prompts: PromptsConfig = Field(description="Held-out prompts; never used in training.")
    directions: int = Field(
        9,
        ge=3,
        description="Grid points on each arc from the centre towards an objective; an odd number, so that the centre "
        "is one of them.",
    )
    samples: int = Field(1, ge=1, description="Responses for each prompt and direction.")
    temperature: float = Field(0.7, gt=0, description="Softmax temperature (the published policy uses 0.7).")
    gold: dict[str, PathText] = Field(
        default_factory=dict,
        description="Objective -> function of a known true reward, for all of them or none; written as in "
        "`reward.functions`. Measured beside the model's scores, never trained on.",
    )
    reference: float = Field(0.0, description="Reference point of the hypervolume, on every objective.")
    resamples: int = Field(1000, ge=1, description="Bootstrap resamples over prompts.")

    @field_validator("directions")
    @classmethod
    def _with_the_centre(cls, directions: int) -> int:
        if directions % 2 == 0:
            raise ValueError("take an odd number, such as 9, so that the centre of each arc is measured too")
        return directions
