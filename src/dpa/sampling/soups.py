"""Rewarded soups: the weights of several finetuned copies of one model, averaged exactly, a mixture for each request.
Run its tests: pytest tests/test_baselines.py -k soups
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from dpa.core.errors import ModelFileError
from dpa.core.records import Sample, SampleRequest, places_of, stable_hash
from dpa.core.reference import ModelReference
from dpa.models.files import folder_revision
from dpa.models.policy import load_policy
from dpa.sampling.samplers import SamplerSpec, TransformersSampler

Tensors = dict[str, torch.Tensor]


def interpolate(ingredients: Sequence[Tensors], mixture: Sequence[float]) -> Tensors:
    """sum_i mixture_i * theta_i for every tensor, summed in double precision (arXiv 2306.04488, equation 1).

    The sum is of the weights themselves: of adapters, merge each first (a weighted sum of A and B apart is no weighted
    sum of A B). Raises ModelFileError when the ingredients are not copies of one architecture.
    """
    if len(ingredients) != len(mixture) or abs(sum(mixture) - 1) > 1e-6:
        raise ValueError(f"{len(mixture)} shares that add up to {sum(mixture):g} for {len(ingredients)} ingredients")
    first = ingredients[0]
    for other in ingredients[1:]:
        if {name: tensor.shape for name, tensor in other.items()} != {n: t.shape for n, t in first.items()}:
            raise ModelFileError("soup: its models differ in architecture; mix finetuned copies of one model.")
    mixed: Tensors = {}
    for name, tensor in first.items():
        if tensor.is_floating_point():
            total = sum(share * other[name].double() for share, other in zip(mixture, ingredients, strict=True))
            mixed[name] = torch.as_tensor(total).to(tensor.dtype)
        else:
            mixed[name] = tensor
    return mixed


class SoupSampler:
    """A Sampler whose weights depend on the direction: `mixture(direction)` gives each ingredient's share.

    The direction is not stated in the prompt. Requests are served direction by direction; the interpolated weights of
    one direction are loaded into one model, so that memory holds the ingredients and that model, however many
    directions there are. Raises ModelFileError when two ingredients are the same weights: every mixture would then
    answer alike.
    """

    def __init__(
        self, ingredients: Sequence[str], mixture: Callable[[tuple[float, ...]], Sequence[float]], spec: SamplerSpec
    ) -> None:
        revisions = [folder_revision(folder) for folder in ingredients]
        if len(set(revisions)) < len(revisions):
            raise ModelFileError("soup: two of its models have the same weights, so no mixture of them differs.")
        self.revision = stable_hash("soup", *revisions)
        start = ModelReference.of(spec.policy)
        policies = [replace(start, name=folder) for folder in ingredients]
        loaded = [load_policy(policy, dtype=torch.float32, device="cpu")[0].state_dict() for policy in policies]
        self._ingredients: list[Tensors] = [{n: t.clone() for n, t in weights.items()} for weights in loaded]
        self._mixture, self._spec = mixture, spec
        self._sampler: TransformersSampler = spec.build()
        self._stirred: tuple[float, ...] | None = None

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """One Sample per seed of each request (core.records.Sampler). Raises EngineError."""
        answers: list[list[Sample]] = [[] for _ in requests]
        for direction, own in places_of(request.direction for request in requests).items():
            if direction is None or any(requests[i].held is not None for i in own):
                raise ValueError("a soup needs a direction to be mixed for, and no target")
            self._stir(direction)
            asked = [SampleRequest(requests[i].messages, None, requests[i].seeds) for i in own]
            for place, samples in zip(own, self._sampler.sample(asked), strict=True):
                answers[place] = samples
        return answers

    def _stir(self, direction: tuple[float, ...]) -> None:
        if direction != self._stirred:
            self._sampler.load_weights(interpolate(self._ingredients, self._mixture(direction)))
            self._stirred = direction
