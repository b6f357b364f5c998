"""Samplers in Ray actors: remote/ray_pool.py.
Run its tests: pytest tests/test_ray.py
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from dpa.core.errors import ModelFileError
from dpa.core.records import Sample, Sampler, SampleRequest
from dpa.core.reference import ModelReference
from dpa.core.sections.cluster import ClusterConfig
from dpa.models.files import folder_revision
from dpa.remote.ray_pool import RayPool, threads_of
from dpa.sampling.samplers import SamplerSpec


class RaySampler:
    """A Sampler whose requests are served by any worker of a pool."""

    def __init__(self, pool: RayPool, revision: str) -> None:
        self.revision = revision
        self._pool = pool

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """As the sampler in the worker. Raises EngineError."""
        return self._pool.call("sample", list(requests))


@contextmanager
def ray_samplers(spec: SamplerSpec, workers: int, cluster: ClusterConfig) -> Iterator[list[Sampler]]:
    """`workers` samplers over as many actors; they end with the block. Raises ConfigError, EngineError."""
    here = replace(spec, policy=ModelReference.of(spec.policy).absolute(), threads=threads_of(cluster))
    with RayPool(SameWeights(here), workers, cluster) as pool:
        yield [RaySampler(pool, spec.revision) for _ in range(workers)]


@dataclass(frozen=True)
class SameWeights:
    """A SamplerSpec that is only built where its folder holds the weights it was made from."""

    spec: SamplerSpec

    def build(self) -> Sampler:
        found = folder_revision(str(self.spec.policy))
        if found != self.spec.revision:
            raise ModelFileError(
                f"model: {self.spec.policy} on node {os.uname().nodename} has other weights ({found}) than the run "
                f"started with ({self.spec.revision}); put the model on storage that every node shares."
            )
        return self.spec.build()
