"""Scorers in Ray actors: remote/ray_pool.py.
Run its tests: pytest tests/test_ray.py
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from dpa.core.records import Messages, Scored, Scorer
from dpa.core.reference import ModelReference
from dpa.core.sections.cluster import ClusterConfig
from dpa.core.sections.reward import RewardConfig
from dpa.remote.ray_pool import RayPool, threads_of
from dpa.scoring.scorers import build_scorer, on_every_node


class RayScorer:
    """A Scorer whose rows are scored by any worker of a pool."""

    def __init__(self, pool: RayPool) -> None:
        self._pool = pool
        self.revision, *attributes = pool.describe()
        self.attributes = tuple(attributes)

    def score(self, prompts: Sequence[Messages], responses: Sequence[str]) -> np.ndarray:
        """scores_NM, as the scorer in the worker. Raises EngineError."""
        return self.score_in_full(prompts, responses).scores_NM

    def score_in_full(self, prompts: Sequence[Messages], responses: Sequence[str]) -> Scored:
        """The same, with reasons and costs. Raises EngineError."""
        return self._pool.call("score_in_full", list(prompts), list(responses))


@contextmanager
def ray_scorers(
    config: RewardConfig, trained: ModelReference | None, code_revision: str | None, cluster: ClusterConfig
) -> Iterator[list[Scorer]]:
    """`cluster.scorers` scorers over as many actors; they end with the block. Raises ConfigError, EngineError."""
    spec = _ScorerSpec(on_every_node(config), trained and trained.absolute(), code_revision, threads_of(cluster))
    with RayPool(spec, cluster.scorers, cluster) as pool:
        scorer = RayScorer(pool)
        yield [scorer] * cluster.scorers


@dataclass(frozen=True)
class _ScorerSpec:
    """What a worker needs to make a run's scorer: the arguments of `build_scorer`, paths made absolute."""

    config: RewardConfig
    trained: ModelReference | None = None
    code_revision: str | None = None
    threads: int | None = None

    def build(self) -> Scorer:
        """Raises ModelFileError, ConfigError."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return build_scorer(self.config, self.trained, self.code_revision)
