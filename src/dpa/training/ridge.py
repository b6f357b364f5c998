"""Ridge regression with missing labels: the closed-form head on frozen features, and the start of a trained one.
Run its tests: pytest tests/test_reward_training.py
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from dpa.core.records import stable_hash

FOLDS = 5
PENALTIES_PER_ROW = tuple(10.0 ** (power / 2) for power in range(-8, 9))
"""Choices of `choose_penalties`, times the number of rows: from hardly any to one that leaves hardly any weight."""
CONSTANT_PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Choices of `choose_constant`, times the rows and the largest feature's mean square. With more features than rows many
combinations are exactly 1 on those rows; a larger penalty takes one that is nearly 1 on others too."""


def fit_ridge(
    features_NH: np.ndarray,
    labels_NM: np.ndarray,
    penalty: float | Sequence[float],
    intercept: bool = True,
    penalise: Literal["spread", "size"] = "spread",
    constant: float = CONSTANT_PENALTIES[0],
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight_MH and bias_M, each output fitted on the rows that have its label (NaN: missing).

    Minimises sum_i (y_i - w.f_i - b)^2 + penalty * sum_h (s_h w_h)^2; `penalty` is one for all outputs, or one for
    each, and an infinite one leaves the mean label. With `penalise="spread"` s_h is the feature's
    standard deviation: an L2 penalty on standardised features, folded back onto the raw ones. With "size" it is the
    root mean square, so that a feature that hardly varies gets no large weight. An output without any label is zero.

    `intercept=False` is for a linear layer without a bias (Llama, Mistral, Qwen: a plain
    `AutoModelForSequenceClassification` has none to load). There the constant is the combination u of features that is
    most nearly 1, all but unpenalised (`constant`, see `choose_constant`), and the penalty is on w - mean * u, so that
    it still draws towards the mean label.
    """
    penalties_M = np.broadcast_to(np.asarray(penalty, dtype=np.float64), labels_NM.shape[1])
    columns = [
        _fit_one(features_NH, labels_N, float(one), intercept, penalise, constant)
        for labels_N, one in zip(labels_NM.T, penalties_M, strict=True)
    ]
    return np.stack([weight for weight, _ in columns]), np.array([bias for _, bias in columns])


def choose_penalties(
    features_NH: np.ndarray,
    labels_NM: np.ndarray,
    groups_N: Sequence[str],
    intercept: bool = True,
    constant: float = CONSTANT_PENALTIES[0],
) -> list[float]:
    """For each output the penalty of `fit_ridge` whose squared error in cross-validation is smallest.

    Whole groups (prompts) are left out together, a fifth of them at a time: with several rows of a group on both sides
    the features of the group itself would seem to predict, and too small a penalty would win. The choices are
    PENALTIES_PER_ROW times the rows, and infinity: an output gets its mean where no penalty does better than that by
    more than a standard error over the groups, or where its labels are all of one group.
    """
    return [_choose(features_NH, labels_N, groups_N, intercept, constant) for labels_N in labels_NM.T]


def choose_constant(features_NH: np.ndarray, groups_N: Sequence[str]) -> float:
    """The `constant` of `fit_ridge` whose combination of features is most nearly 1 on groups that were left out."""
    features = features_NH.astype(np.float64)
    folds_N, count = _folds(groups_N)
    if count < 2:
        return CONSTANT_PENALTIES[0]
    errors = np.zeros(len(CONSTANT_PENALTIES))
    for fold in range(count):
        for place, constant in enumerate(CONSTANT_PENALTIES):
            one_H = _constant(features[folds_N != fold], constant)
            errors[place] += ((features[folds_N == fold] @ one_H - 1) ** 2).sum()
    return CONSTANT_PENALTIES[int(errors.argmin())]


def _folds(groups_N: Sequence[str]) -> tuple[np.ndarray, int]:
    """The fold of each row, groups whole, and how many folds there are."""
    groups = sorted(set(groups_N), key=lambda group: stable_hash("fold", group))
    fold_of = {group: place % FOLDS for place, group in enumerate(groups)}
    return np.array([fold_of[group] for group in groups_N]), min(FOLDS, len(groups))


def _choose(
    features_NH: np.ndarray, labels_N: np.ndarray, groups_N: Sequence[str], intercept: bool, constant: float
) -> float:
    rows = np.flatnonzero(~np.isnan(labels_N))
    groups = [groups_N[row] for row in rows.tolist()]
    folds_N, count = _folds(groups)
    if count < 2:
        return float("inf")
    features, labels = features_NH[rows].astype(np.float64), labels_N[rows]
    penalties = np.array([*(len(rows) * share for share in PENALTIES_PER_ROW), np.inf])
    errors_LN = np.zeros((len(penalties), len(rows)))
    for fold in range(count):
        train, test = folds_N != fold, folds_N == fold
        said_LQ = _along_path(features[train], labels[train], features[test], penalties, intercept, constant)
        errors_LN[:, test] = (said_LQ - labels[test]) ** 2
    best = int(errors_LN.sum(axis=1).argmin())
    names, group_N = np.unique(groups, return_inverse=True)
    gain_G = np.bincount(group_N, weights=errors_LN[-1] - errors_LN[best])
    certain = gain_G.sum() > gain_G.std(ddof=1) * len(names) ** 0.5
    return float(penalties[best] if certain else np.inf)


def _along_path(
    features_NH: np.ndarray,
    labels_N: np.ndarray,
    asked_QH: np.ndarray,
    penalties_L: np.ndarray,
    intercept: bool,
    constant: float,
) -> np.ndarray:
    """What `fit_ridge` with each penalty says of other rows (L, Q): one eigendecomposition serves all penalties."""
    mean, scale_H = labels_N.mean(), _scale(features_NH, "spread")
    if intercept:
        center_H = features_NH.mean(axis=0)
        inputs, targets, base_Q = features_NH - center_H, labels_N - mean, np.full(len(asked_QH), mean)
        asked_QH = asked_QH - center_H
    else:
        one_H = _constant(features_NH, constant)
        inputs, targets, base_Q = features_NH, labels_N - mean * (features_NH @ one_H), mean * (asked_QH @ one_H)
    inputs, asked_QH = inputs / scale_H, asked_QH / scale_H
    if len(inputs) < inputs.shape[1]:  # the smaller of the two Gram matrices
        values_R, vectors = np.linalg.eigh(inputs @ inputs.T)
        basis_QR, coordinates_R = asked_QH @ (inputs.T @ vectors), vectors.T @ targets
    else:
        values_R, vectors = np.linalg.eigh(inputs.T @ inputs)
        basis_QR, coordinates_R = asked_QH @ vectors, vectors.T @ (inputs.T @ targets)
    shrunk_LR = coordinates_R / (np.maximum(values_R, 0.0) + penalties_L[:, None])
    return base_Q + shrunk_LR @ basis_QR.T


def _fit_one(
    features_NH: np.ndarray, labels_N: np.ndarray, penalty: float, intercept: bool, penalise: str, constant: float
) -> tuple[np.ndarray, float]:
    present = ~np.isnan(labels_N)
    features, labels = features_NH[present].astype(np.float64), labels_N[present]
    if not labels.size:
        return np.zeros(features_NH.shape[1]), 0.0
    mean, one_H = labels.mean(), np.zeros(features.shape[1])
    if not intercept:
        one_H = _constant(features, constant)
    if np.isinf(penalty):
        return mean * one_H, float(mean) if intercept else 0.0
    scale_H = _scale(features, penalise)
    if intercept:
        center_H = features.mean(axis=0)
        weight_H = _solve(features - center_H, labels - mean, penalty * scale_H**2)
        return weight_H, float(mean - weight_H @ center_H)
    weight_H = _solve(features, labels - mean * (features @ one_H), penalty * scale_H**2)
    return weight_H + mean * one_H, 0.0


def _scale(features_NH: np.ndarray, penalise: str) -> np.ndarray:
    """What a feature's weight is multiplied with before it is penalised."""
    spread_H, size_H = features_NH.std(axis=0), np.sqrt((features_NH**2).mean(axis=0))
    # A feature that does not vary is penalised by its size in any case: by its spread it would be free.
    by_spread_H = np.where(spread_H > 1e-6 * size_H, spread_H, np.maximum(size_H, 1.0))
    return by_spread_H if penalise == "spread" else np.maximum(size_H, by_spread_H)


def _constant(features_NH: np.ndarray, constant: float) -> np.ndarray:
    """The combination of features that is most nearly 1."""
    size_H = np.sqrt((features_NH**2).mean(axis=0))
    count = len(features_NH)
    return _solve(features_NH, np.ones(count), np.full_like(size_H, constant * count * size_H.max() ** 2))


def _solve(features_NH: np.ndarray, labels_N: np.ndarray, penalty_H: np.ndarray) -> np.ndarray:
    return np.linalg.solve(features_NH.T @ features_NH + np.diag(penalty_H), features_NH.T @ labels_N)
