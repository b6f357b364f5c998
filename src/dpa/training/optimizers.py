"""Muon on the hidden weights, AdamW on the rest, as the one optimizer a Trainer asks for.
Run its tests: pytest tests/test_finetuning.py -k muon
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel


class MuonInFloat32(torch.optim.Muon):
    """`torch.optim.Muon` with its Newton-Schulz iteration in fp32, for processors: torch's own is in bf16, which one
    without bf16 units multiplies 14 to 40 times slower (bench/optimizers.py). Matrices of one shape go together.

    Takes `lr`, `weight_decay`, `momentum`, `ns_coefficients`, `ns_steps` and `eps` from its groups; always Nesterov and
    `match_rms_adamw`. Keller Jordan, Muon (2024); steps scaled as in arXiv 2502.16982, eq. 4.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            alike: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                updates_PRC = torch.stack([self._momentum(parameter, group["momentum"]) for parameter in parameters])
                updates_PRC = _orthogonal(updates_PRC, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates_PRC), alpha=-rate)
        return loss

    def _momentum(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum_buffer"], momentum)


def _orthogonal(matrices_PRC: torch.Tensor, coefficients: tuple[float, ...], steps: int, eps: float) -> torch.Tensor:
    """Each matrix with its singular values brought near 1 by Newton-Schulz iterations on its shorter side."""
    tall = matrices_PRC.shape[1] > matrices_PRC.shape[2]
    x_PRC = matrices_PRC.mT if tall else matrices_PRC
    x_PRC = x_PRC / torch.linalg.matrix_norm(x_PRC, keepdim=True).clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram_PRR = x_PRC @ x_PRC.mT
        gram_PRR = torch.baddbmm(gram_PRR, gram_PRR, gram_PRR, beta=b, alpha=c)
        x_PRC = torch.baddbmm(x_PRC, gram_PRR, x_PRC, beta=a)
    return x_PRC.mT if tall else x_PRC


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
        muon = MuonInFloat32 if model.device.type == "cpu" else torch.optim.Muon
        self._parts: list[torch.optim.Optimizer] = [
            muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
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
