"""Ridge regression with missing labels: the closed-form head on frozen features, and the start of a trained one.
Run its tests: pytest tests/test_reward_training.py
"""

from typing import Literal

import numpy as np


def fit_ridge(
    features_NH: np.ndarray,
    labels_NM: np.ndarray,
    penalty: float,
    intercept: bool = True,
    penalise: Literal["spread", "size"] = "spread",
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight_MH and bias_M, each output fitted on the rows that have its label (NaN: missing).

    Minimises sum_i (y_i - w.f_i - b)^2 + penalty * sum_h (s_h w_h)^2. With `penalise="spread"` s_h is the feature's
    standard deviation: an L2 penalty on standardised features, folded back onto the raw ones. With "size" it is the
    root mean square, so that a feature that hardly varies gets no large weight. An output without any label is zero.

    `intercept=False` is for a linear layer without a bias (Llama, Mistral, Qwen: a plain
    `AutoModelForSequenceClassification` has none to load). There the constant is the combination u of features that is
    most nearly 1, unpenalised, and the penalty is on w - mean * u, so that it still draws towards the mean label.
    """
    columns = [_fit_one(features_NH, labels_N, penalty, intercept, penalise) for labels_N in labels_NM.T]
    return np.stack([weight for weight, _ in columns]), np.array([bias for _, bias in columns])


def _fit_one(
    features_NH: np.ndarray, labels_N: np.ndarray, penalty: float, intercept: bool, penalise: str
) -> tuple[np.ndarray, float]:
    present = ~np.isnan(labels_N)
    features, labels = features_NH[present].astype(np.float64), labels_N[present]
    if not labels.size:
        return np.zeros(features_NH.shape[1]), 0.0
    spread_H = features.std(axis=0)
    size_H = np.sqrt((features**2).mean(axis=0))
    # A feature that does not vary is penalised by its size in any case: by its spread it would be free.
    by_spread_H = np.where(spread_H > 1e-6 * size_H, spread_H, np.maximum(size_H, 1.0))
    scale_H = by_spread_H if penalise == "spread" else np.maximum(size_H, by_spread_H)
    mean = labels.mean()
    if intercept:
        center_H = features.mean(axis=0)
        weight_H = _solve(features - center_H, labels - mean, penalty * scale_H**2)
        return weight_H, float(mean - weight_H @ center_H)
    one_H = _solve(features, np.ones_like(labels), np.full_like(size_H, 1e-6 * len(labels) * size_H.max() ** 2))
    weight_H = _solve(features, labels - mean * (features @ one_H), penalty * scale_H**2)
    return weight_H + mean * one_H, 0.0


def _solve(features_NH: np.ndarray, labels_N: np.ndarray, penalty_H: np.ndarray) -> np.ndarray:
    return np.linalg.solve(features_NH.T @ features_NH + np.diag(penalty_H), features_NH.T @ labels_N)
