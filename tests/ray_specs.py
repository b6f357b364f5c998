"""What a Ray worker of the tests holds; here, so that a worker that holds a fake imports no torch.
Used by: pytest tests/test_ray.py
"""

import os
from dataclasses import dataclass
from typing import Any

from fakes import FakeSampler

from dpa.core.errors import ModelFileError


@dataclass(frozen=True)
class FakeSpec:
    """A worker without torch's models: what it holds is a fake."""

    sampler: str = "calm"

    def build(self) -> Any:
        if self.sampler == "never":
            os._exit(9)
        if self.sampler == "refused":
            raise ModelFileError("model: it has other weights")
        return Deadly() if self.sampler == "deadly" else FakeSampler()


class Deadly(FakeSampler):
    """Ends its process when it is asked question3, as a driver crash would."""

    def sample(self, requests: Any) -> Any:
        if any(request.messages[-1]["content"] == "question3" for request in requests):
            os._exit(9)
        return super().sample(requests)
