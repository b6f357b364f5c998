"""Samplers that translate: a request carries a direction, and the policy is asked in the words it was trained on.
Run its tests: pytest tests/test_baselines.py
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from dpa.core.records import Messages, Sample, Sampler, SampleRequest


class TranslatingSampler:
    """Hands every request on as `translate` rewrites it, so that any policy is measured over the same directions."""

    def __init__(self, sampler: Sampler, translate: Callable[[SampleRequest], SampleRequest]) -> None:
        self.revision = sampler.revision
        self._sampler, self._translate = sampler, translate

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """The samples of the translated requests, in order."""
        return self._sampler.sample([self._translate(request) for request in requests])


def without_direction(request: SampleRequest) -> SampleRequest:
    """For a policy that knows no directions."""
    return replace(request, direction=None)


def with_system(messages: Messages, text: str) -> Messages:
    """The messages with `text` leading the system message."""
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{text}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
