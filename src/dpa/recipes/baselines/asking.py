"""Samplers that translate: a request carries a direction, and the policy is asked in the words it was trained on.
Run its tests: pytest tests/test_baselines.py
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from dpa.core.records import Sample, Sampler, SampleRequest, messages_text, stable_hash


class TranslatingSampler:
    """Hands every request on as `translate` rewrites it, so that any policy is measured over the same directions."""

    def __init__(self, sampler: Sampler, translate: Callable[[SampleRequest], SampleRequest]) -> None:
        self.revision = sampler.revision
        self._sampler, self._translate = sampler, translate

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """The samples of the translated requests, in order."""
        return self._sampler.sample([self._translate(request) for request in requests])


class OncePerPromptSampler:
    """For a policy that knows no directions, where the same answers may serve them all: the n-th request of a prompt
    under each direction is one request, with the first one's seeds, and sampled once."""

    def __init__(self, sampler: Sampler) -> None:
        self.revision = sampler.revision
        self._sampler = sampler

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """The samples of every request, in order."""
        asked: dict[tuple[str, int, int], SampleRequest] = {}
        seen: Counter[tuple[object, ...]] = Counter()
        keys = []
        for request in requests:
            prompt = messages_text(request.messages)
            under = prompt, request.direction, request.held
            keys.append((prompt, len(request.seeds), seen[under]))
            seen[under] += 1
            asked.setdefault(keys[-1], replace(request, direction=None, held=None))
        answers = dict(zip(asked, self._sampler.sample(list(asked.values())), strict=True))
        return [answers[key] for key in keys]


class NearestSampler:
    """Hands every request to the sampler whose wish is nearest its direction in angle: one policy for each wish."""

    def __init__(self, samplers: Sequence[Sampler], wishes_IK: np.ndarray) -> None:
        self.revision = stable_hash("nearest", *(sampler.revision for sampler in samplers))
        self._samplers, self._wishes_IK = samplers, wishes_IK

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """The samples of every request, in order. Each must carry a direction."""
        answers: list[list[Sample]] = [[] for _ in requests]
        directions_RK = np.array([request.direction for request in requests], dtype=float)
        nearest_R = (directions_RK @ self._wishes_IK.T).argmax(axis=1)
        for i, sampler in enumerate(self._samplers):
            places = np.flatnonzero(nearest_R == i).tolist()
            for place, samples in zip(places, sampler.sample([requests[place] for place in places]), strict=True):
                answers[place] = samples
        return answers


def without_direction(request: SampleRequest) -> SampleRequest:
    """For a policy that knows no directions."""
    return replace(request, direction=None)
