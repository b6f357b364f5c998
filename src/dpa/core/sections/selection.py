"""`selection`: which candidate each direction keeps.
Run its tests: pytest tests/test_config.py tests/test_loop_options.py
"""

from typing import Literal, Self

from pydantic import Field

from dpa.core.sections.section import Section


class SelectionConfig(Section):
    """Which candidate each direction keeps."""

    method: Literal["pooled", "best_mean", "per_direction", "random"] = Field(
        "pooled",
        description="pooled: best of all candidates of a prompt for each direction; best_mean: best of those made "
        "under whichever direction did best for it on average, so that luck decides less (t = 0: as pooled); "
        "per_direction: best of those made under that direction (the paper read literally); random: the control.",
    )
    utility: Literal["linear", "ray", "chebyshev"] = Field(
        "linear",
        repr=False,  # what was selected before there was a choice keeps its identity (stages/select.py)
        description="What makes a candidate the best under a direction v. linear: v . r, the paper's, which never "
        "keeps what lies inside the convex hull of a pool; ray: how far it comes along v in every objective "
        "(Pascoletti and Serafini); chebyshev: the weighted distance to the best of the pool in each objective.",
    )
    augmentation: float = Field(
        0.01,
        ge=0,
        repr=False,
        description="ray, chebyshev: how much of v . r is added. A little tells candidates apart that are equal in "
        "their weakest objective; 1 mixes the two.",
    )
    directions: int = Field(
        4,
        ge=1,
        description="Directions served by each prompt's pool (pooled, best_mean, random): first those it was asked "
        "under, then new ones; per_direction serves those it was asked under.",
    )
    online_directions: int | None = Field(
        None,
        ge=1,
        repr=False,  # it is `directions` where it holds (of_iteration)
        description="The same from t = 1 on, where the candidates are the policy's own. Default: directions.",
    )
    advantage_share: float = Field(
        1.0,
        gt=0,
        le=1,
        repr=False,  # in the identity of a shard only where some are left out
        description="method best_mean, from t = 1 on: share of the winners that are kept, the largest advantages first "
        "(docs/learning.md), among winners of neighbouring directions: where the direction makes no difference there "
        "is nothing to learn from it. Serve more directions (online_directions) for as many rows.",
    )
    standardise: bool = Field(
        False,
        description="Divide each objective by its standard deviation over the iteration's candidates before weighing, "
        "so that an objective that varies little counts as much. A constant one is left as it is.",
    )
    rejected: Literal["worst", "random", "other_direction"] = Field(
        "worst",
        description="learner: dpo. What the winner is compared with: the worst of the same pool under the direction, "
        "a random one below the winner, or the winner of another direction of the pool, so that every pair occurs in "
        "both orders and only the direction explains it (keep quality with dpo.sft_weight).",
    )
    ends_until: int = Field(
        0,
        ge=0,
        description="Iterations t below this one draw all their directions from the outer fifth of the training cone, "
        "where winners differ most; later ones from the whole cone.",
    )
    targets: float = Field(
        0.0,
        ge=0,
        le=1,
        repr=False,  # in the identity of a shard only where there are some
        description="Share of the winners of each prompt that are those of a target instead of a direction, such as "
        "`helpfulness; verbosity=40` (docs/method.md); the policy then takes both. method pooled only; with another "
        "learner than sft only t = 0, which is always sft, holds some.",
    )

    def of_iteration(self, t: int) -> Self:
        """The same with the directions of iteration t as `directions`."""
        online = self.online_directions if t > 0 else None
        return self if online is None else self.model_copy(update={"directions": online})

    def winners(self, asked: int) -> float:
        """Winners of a prompt that the policy was asked under so many directions, on average."""
        return asked if self.method == "per_direction" else self.directions * self.advantage_share

    @property
    def target_share(self) -> float:
        """`targets`, where the method keeps winners of targets."""
        return self.targets if self.method == "pooled" else 0.0
