"""The engine of a configuration that names none: vLLM where it can be, else transformers.
Run its tests: pytest tests/test_vllm_sampler.py -k auto
"""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from dpa.core.directions import DirectionSpace
from dpa.core.records import Sampler
from dpa.core.reference import Model
from dpa.core.sections.rollout import RolloutConfig
from dpa.sampling.engine import SamplingEngine
from dpa.sampling.samplers import SamplerSpec
from dpa.sampling.transformers_engine import TransformersEngine
from dpa.sampling.vllm_sampler import VllmEngine

_log = logging.getLogger(__name__)


class AutoEngine(SamplingEngine):
    """vLLM where it is installed and there is a CUDA card, until it does not start; else, and on a cluster,
    transformers. `vllm` is the engine to try (default: the installed one, where that can be)."""

    def __init__(self, vllm: VllmEngine | None = None) -> None:
        at_hand = torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
        self._vllm = vllm or (VllmEngine() if at_hand else None)
        self._plain = TransformersEngine()

    def wants_card(self, config: RolloutConfig) -> bool:
        return self._vllm is not None or super().wants_card(config)

    @contextmanager
    def samplers(self, policy: Model, space: DirectionSpace, config: RolloutConfig) -> Iterator[list[Sampler]]:
        with ExitStack() as stack:
            opened: list[Sampler] | None = None
            if self._vllm is not None:
                try:
                    opened = stack.enter_context(self._vllm.samplers(policy, space, config))
                except Exception as error:  # what a start can raise is vLLM's, CUDA's and Python's
                    said = " ".join(str(error).split())[:200]
                    _log.warning(
                        "vLLM does not start (%s: %s); transformers samples instead.", type(error).__name__, said
                    )
                    self.close()
            yield opened or stack.enter_context(self._plain.samplers(policy, space, config))

    def spec(self, policy: Model, space: DirectionSpace, config: RolloutConfig) -> SamplerSpec | None:
        return self._plain.spec(policy, space, config)

    def close(self) -> None:
        if self._vllm is not None:
            self._vllm.close()
        self._vllm = None
