"""torch.compile of a model's layers, in place, with the eager layers to fall back on.
Run its tests: pytest tests/test_compiling.py

A small model on a fast card waits for the launch of its kernels; compiled layers launch fewer. On an H200 a training of
SmolLM2-135M's shape was 1.9 times as fast with them, scoring 2.1 times, for about 5 s of compiling (bench/README.md).
Only the calls of the layers are compiled, so parameters keep their names and nothing that is saved changes; numbers
change by rounding. Whatever compiling raises, in a forward or a backward pass, ends in eager layers and a line of log.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from dpa.models.policy import is_out_of_memory

Choice = bool | Literal["auto"]

TRAINING_STEPS, SCORED_ROWS = 200, 5000
"""What `auto` compiles for, on a card: fewer optimizer steps or rows take less time than compiling."""

_log = logging.getLogger(__name__)


def worth_compiling(choice: Choice, device: torch.device, amount: float, least: int) -> bool:
    """Whether to compile for this much work."""
    return choice is True or (choice == "auto" and device.type == "cuda" and amount >= least)


class CompiledLayers:
    """The layers of `model` (any transformers model, also within PEFT's wrapper), compiled until `stop` or `give_up`.

    `training`: the mode they are compiled for; calls in the other one, such as measurements during a training, are
    eager, and so are layers whose activations are computed twice: torch.utils.checkpoint switches compiling off.
    `backend` is torch.compile's.
    """

    def __init__(self, model: torch.nn.Module, training: bool, backend: str | Callable[..., Any] = "inductor") -> None:
        self._training = training
        self._layers: list[Any] = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
        try:
            for layer in self._layers:
                layer.compile(backend=backend)
                layer._compiled_call_impl = self._guarded(layer, layer._compiled_call_impl)
        except Exception as error:  # such as a Python that torch.compile does not know yet
            self.give_up(error)

    def stop(self) -> None:
        """Make the layers eager again."""
        for layer in self._layers:
            layer._compiled_call_impl = None
        self._layers = []

    def give_up(self, error: Exception) -> bool:
        """Stop because of an error and say so; False where nothing was compiled that could have raised it."""
        if not self._layers:
            return False
        self.stop()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        _log.warning("torch.compile: goes on without, at the speed of eager layers (%s).", reason)
        return True

    def _guarded(self, layer: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._layers and layer.training == self._training:
                try:
                    return compiled(*args, **kwargs)
                except Exception as error:
                    # Recomputing ends by an exception of its own once it has what it needs.
                    if is_out_of_memory(error) or type(error).__module__ == "torch.utils.checkpoint":
                        raise
                    self.give_up(error)
            return layer._call_impl(*args, **kwargs)

        return call
