"""What an engine is (`rollout.engine.kind`): whatever opens samplers of a policy. sampling/engines.py lists them.
Run its tests: pytest tests/test_engines.py
"""

from contextlib import AbstractContextManager

import torch

from dpa.core.closing import Closing
from dpa.core.directions import DirectionSpace
from dpa.core.records import Sampler
from dpa.core.reference import Model
from dpa.core.sections.rollout import RolloutConfig
from dpa.sampling.samplers import SamplerSpec


class SamplingEngine(Closing):
    """Samples the policies of a run, one after another. It is made when the run opens, starts nothing before it is
    asked for samplers, and is closed with the run.

    A new one is a subclass in a file of its own and a line in ENGINES.
    """

    def wants_card(self, config: RolloutConfig) -> bool:
        """Whether it takes the memory of a card here, so that a scorer there makes room for it."""
        return torch.cuda.is_available()

    def check(self, config: RolloutConfig) -> None:
        """Look for what it lacks to sample every policy of a whole run. Raises ConfigError."""

    def samplers(
        self, policy: Model, space: DirectionSpace, config: RolloutConfig
    ) -> AbstractContextManager[list[Sampler]]:
        """The samplers of a rollout, which work side by side; they are closed at the end of the block.

        Raises ModelFileError, ConfigError, EngineError.
        """
        raise NotImplementedError

    def spec(self, policy: Model, space: DirectionSpace, config: RolloutConfig) -> SamplerSpec | None:
        """What makes one of its samplers in another process or on another machine; None where that cannot be, and
        `samplers` are asked wherever the run is. Raises ModelFileError."""
        return None
