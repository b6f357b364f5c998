"""The engines: the name that `rollout.engine.kind` gives and the class that samples so. A new one is a line here.
Run its tests: pytest tests/test_engines.py
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dpa.core.directions import DirectionSpace
from dpa.core.lookup import look_up
from dpa.core.records import Sampler
from dpa.core.reference import Model
from dpa.core.sections.rollout import RolloutConfig
from dpa.models.files import load_space, resolve_model
from dpa.sampling.auto_engine import AutoEngine
from dpa.sampling.engine import SamplingEngine
from dpa.sampling.http_sampler import HttpEngine
from dpa.sampling.transformers_engine import TransformersEngine
from dpa.sampling.vllm_sampler import VllmEngine

ENGINES: dict[str, type[SamplingEngine]] = {
    "auto": AutoEngine,
    "transformers": TransformersEngine,
    "vllm": VllmEngine,
    "http": HttpEngine,
}


def engine_named(name: str) -> type[SamplingEngine]:
    """The engine of that name. Raises ConfigError, which names the nearest."""
    return look_up(ENGINES, name, "rollout.engine.kind")


def engine_of(config: RolloutConfig) -> SamplingEngine:
    """The engine a rollout names, not yet started. Raises ConfigError."""
    return engine_named(config.engine.kind)()


@contextmanager
def build_samplers(
    policy: Model, config: RolloutConfig, space: DirectionSpace | None = None, engine: SamplingEngine | None = None
) -> Iterator[list[Sampler]]:
    """The samplers a rollout asks for; they are closed at the end of the block.

    `space` defaults to the one saved with the policy. `engine` outlives the block, so that several policies pay one
    start; without it the one that `config` names is made and closed here. Raises ModelFileError, ConfigError.
    """
    with ExitStack() as stack:
        engine = engine or stack.enter_context(engine_of(config))
        space = space or load_space(resolve_model(policy).path)
        yield stack.enter_context(engine.samplers(policy, space, config))
