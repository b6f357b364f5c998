"""How well a reward model predicts held-out marks, beside two baselines that know nothing of content.
Run its tests: pytest tests/test_reward_training.py
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau, pearsonr

from dpa.core.records import places_of


def measure_quality(
    predicted_NM: np.ndarray, marks_NM: np.ndarray, prompt_ids: Sequence[str], attributes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Agreement of predicted with given marks (NaN: missing), per attribute, on the 0-100 scale.

    `mse`, `mae`; `pearson`, `kendall` (tau-b) over rows, null where one side does not vary; `pairwise_accuracy` over
    `pairs` of responses to the same prompt with different marks (a tie of predictions counts one half), null where
    there is no such pair; `n` rows. Rows the model could not score are left out and counted in `unscored`.
    """
    quality = {}
    for name, predicted_N, marks_N in zip(attributes, predicted_NM.T, marks_NM.T, strict=True):
        rated = ~np.isnan(marks_N)
        both = rated & ~np.isnan(predicted_N)
        predicted, marks = predicted_N[both], marks_N[both]
        error = predicted - marks
        varies = both.sum() > 1 and np.ptp(predicted) > 0 and np.ptp(marks) > 0
        correct, pairs = _pairwise(predicted, marks, [prompt_ids[row] for row in np.flatnonzero(both).tolist()])
        quality[name] = {
            "n": int(both.sum()),
            "unscored": int((rated & ~both).sum()),
            "mse": float((error**2).mean()) if both.any() else None,
            "mae": float(np.abs(error).mean()) if both.any() else None,
            "pearson": float(pearsonr(predicted, marks).statistic) if varies else None,
            "kendall": float(kendalltau(predicted, marks).statistic) if varies else None,
            "pairwise_accuracy": correct / pairs if pairs else None,
            "pairs": pairs,
        }
    return quality


def pairwise_agreement(first_N: np.ndarray, second_N: np.ndarray, prompt_ids: Sequence[str]) -> float | None:
    """Kendall's tau of two scorings over the pairs of rows of one prompt (of all rows, where each prompt has one) that
    `second_N` tells apart; a tie of `first_N` counts nothing. None where there is no such pair."""
    correct, pairs = _pairwise(first_N, second_N, prompt_ids)
    if not pairs:
        correct, pairs = _pairwise(first_N, second_N, [""] * len(first_N))
    return 2 * correct / pairs - 1 if pairs else None


def _pairwise(predicted: np.ndarray, marks: np.ndarray, prompt_ids: Sequence[str]) -> tuple[float, int]:
    correct, pairs = 0.0, 0
    for rows in places_of(prompt_ids).values():
        upper = np.triu_indices(len(rows), k=1)
        asked = np.sign(np.subtract.outer(marks[rows], marks[rows])[upper])
        given = np.sign(np.subtract.outer(predicted[rows], predicted[rows])[upper])
        differ = asked != 0
        correct += float(((given == asked) + 0.5 * (given == 0))[differ].sum())
        pairs += int(differ.sum())
    return correct, pairs
