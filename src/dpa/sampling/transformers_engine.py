"""The engine that needs nothing but this package: transformers, in this process or in `rollout.workers` of its own.
Run its tests: pytest tests/test_samplers.py
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

from dpa.core.directions import DirectionSpace
from dpa.core.records import Sampler
from dpa.core.reference import Model
from dpa.core.sections.rollout import RolloutConfig
from dpa.sampling.engine import SamplingEngine
from dpa.sampling.process_sampler import ProcessSampler
from dpa.sampling.samplers import SamplerSpec, sampler_spec


class TransformersEngine(SamplingEngine):
    """One TransformersSampler here, or processes that share the cores (or, one after another, the cards)."""

    @contextmanager
    def samplers(self, policy: Model, space: DirectionSpace, config: RolloutConfig) -> Iterator[list[Sampler]]:
        spec, workers = sampler_spec(policy, config, space), config.workers
        if workers == 1:
            yield [spec.build()]
            return
        cards = torch.cuda.device_count()
        spec = replace(spec, threads=max(1, (os.cpu_count() or 1) // workers), sharing=-(-workers // max(cards, 1)))
        with ExitStack() as stack:
            yield [
                stack.enter_context(ProcessSampler(replace(spec, device=f"cuda:{i % cards}" if cards else "cpu")))
                for i in range(workers)
            ]

    def spec(self, policy: Model, space: DirectionSpace, config: RolloutConfig) -> SamplerSpec:
        return sampler_spec(policy, config, space)
