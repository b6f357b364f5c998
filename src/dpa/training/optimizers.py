"""Muon on the hidden weights, AdamW on the rest, as the one optimizer a Trainer asks for.
Run its tests: pytest tests/test_finetuning.py -k muon
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on the trainable 2-D weights, `torch.optim.AdamW` on embeddings, head, norms and biases.

    One learning rate serves both: Muon's steps are scaled to the size AdamW's would have (`match_rms_adamw`,
    arXiv 2502.16982). `weight_decay` is decoupled in both and spares 1-D parameters.
    """

    def __init__(self, model: PreTrainedModel, lr: float, weight_decay: float) -> None:
        ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        hidden = [parameter for parameter in trained if parameter.ndim == 2 and id(parameter) not in ends]
        decayed = [parameter for parameter in trained if id(parameter) in ends]
        others = [parameter for parameter in trained if parameter.ndim != 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        ]
        if filled := [group for group in groups if group["params"]]:  # adapters train hidden weights only
            self._parts.append(torch.optim.AdamW(filled, lr=lr, betas=(0.9, 0.95)))
        # The groups are shared with the parts, so a schedule that sets their lr reaches both.
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step of each part."""
        loss = closure() if closure is not None else None
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state dicts of the parts."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]
