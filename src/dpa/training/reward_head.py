"""The linear layer that a reward model ends in: what it is given, its weights, and the unit of marks while it trains.
Run its tests: pytest tests/test_reward_training.py
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from dpa.core.errors import ModelFileError
from dpa.scoring.reward_model import find_head, forward


class Head:
    """The last linear layer of a sequence classifier, whatever the architecture calls it."""

    def __init__(self, model: PreTrainedModel, outputs: int) -> None:
        found = find_head(model, outputs)
        if found is None:
            raise ModelFileError(
                f"reward.train.backbone: {type(model).__name__} ends in no linear layer; take another."
            )
        self.model = model
        self.name, self.linear = found

    @property
    def has_bias(self) -> bool:
        """Llama, Mistral and Qwen classifiers have none."""
        return self.linear.bias is not None

    def features(self, ids_N: Sequence[Sequence[int]], pad_token_id: int) -> np.ndarray:
        """What the layer is given, features_NH, pooled as the architecture itself does: it is an identity meanwhile."""
        training = self.model.training
        self.model.eval().set_submodule(self.name, nn.Identity())
        try:
            features_NH = forward(self.model, ids_N, pad_token_id)
        finally:
            self.model.set_submodule(self.name, self.linear)
            self.model.train(training)
        if not np.isfinite(features_NH).all():
            raise ModelFileError("reward.train.backbone: its features are not finite; are its weights damaged?")
        return features_NH

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """weight_MH and bias_M (zero where the layer has none)."""
        weight_MH = self.linear.weight.detach().double().cpu().numpy()
        bias = self.linear.bias
        return weight_MH, np.zeros(len(weight_MH)) if bias is None else bias.detach().double().cpu().numpy()

    def write(self, weight_MH: np.ndarray, bias_M: np.ndarray) -> None:
        """Set the layer; a bias is only accepted where it has one."""
        assert self.has_bias or not bias_M.any(), f"{self.name} has no bias"
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(weight_MH))
            if self.has_bias:
                self.linear.bias.copy_(torch.from_numpy(bias_M))


@dataclass(frozen=True)
class Unit:
    """The unit marks are in while training: label = (mark - mean) / std of each attribute.

    A layer without bias cannot undo a mean, so there the mean is 0 and only the scale changes.
    """

    mean_M: np.ndarray
    std_M: np.ndarray

    @classmethod
    def of(cls, marks_NM: np.ndarray, has_bias: bool) -> "Unit":
        """The unit of these marks (NaN: missing)."""
        std_M = np.nanstd(marks_NM, axis=0)
        return cls(
            np.nanmean(marks_NM, axis=0) if has_bias else np.zeros(marks_NM.shape[1]), np.where(std_M > 0, std_M, 1.0)
        )

    def enter(self, marks_NM: np.ndarray) -> np.ndarray:
        """Marks as labels."""
        return (marks_NM - self.mean_M) / self.std_M

    def leave(self, weight_MH: np.ndarray, bias_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same linear layer, its output on 0-100 again: exact, by linearity."""
        return weight_MH * self.std_M[:, None], bias_M * self.std_M + self.mean_M
