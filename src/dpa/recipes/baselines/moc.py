"""MOC, multi-objective control: one policy that reads the preference, its aims weighed by min-norm (arXiv 2604.04497).

For a direction v, answers y_n of the policy's own and the scores p(v) it asks for, each objective k that v names has
two aims: more of what is wished, sign(v_k) r_k, and control, -(r_k - p_k)^2. With A_jn the advantage of answer n for
aim j:

    reward_n = sum_j c_j A_jn,    c = argmin over the simplex of || sum_j c_j A_j / ||A_j|| ||^2

Published: the preference in the prompt, reward and squared distance to it as aims, weights by min-norm (Frank-Wolfe) at
the level of the policy instead of its parameters, where it costs what one reward does, then a step of policy gradient
on the weighted sum. We had the paper's abstract, summaries and reviews to go by, not its equations. Ours: signed wishes
(less of an objective where v_k < 0; nothing of one that v does not name); p(v) is that of Rewards-in-Context
(labels.target_rule); the norm is of A_j, the gradient of aim j by the answers' log-probabilities, standardised over
each group of answers to one prompt; groups (GRPO, training/grpo.py) instead of PPO's critic; one c for each optimizer
step; from the policy of t = 0, which reads directions already.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpa.core.records import Ledger
from dpa.recipes.baselines.lab import Lab, Method, Trained
from dpa.recipes.baselines.labels import target_rule
from dpa.training.grpo import GRPO

STEPS = 300
"""Of Frank-Wolfe."""
NOTHING = 1e-9


@dataclass(frozen=True)
class MOC(GRPO):
    """GRPO whose reward is the aims' min-norm sum. `targets` gives the scores_K that a direction asks for."""

    targets: Callable[[Sequence[float]], np.ndarray] = lambda direction: np.full(len(direction), np.nan)

    def trainer(self, *arguments: Any) -> Any:
        """Advantages are not divided by a group's deviation again: where aims cancel, nothing is to be learned."""
        trainer = super().trainer(*arguments)
        trainer.scale_rewards = "none"
        return trainer

    def rewards(self, scores_NK: np.ndarray, directions_NK: np.ndarray) -> np.ndarray:
        """reward_N of the answers of one optimizer step."""
        targets_NK = np.array([self.targets(direction) for direction in directions_NK])
        aims_JN = aims(scores_NK, directions_NK, targets_NK, self.rollout.samples)
        reward_N = min_norm(aims_JN) @ aims_JN if len(aims_JN) else np.zeros(len(scores_NK))
        return np.where(np.isfinite(scores_NK).all(axis=1), reward_N, np.nan)

    @property
    def identity(self) -> tuple[object, ...]:
        """And what it is."""
        return "moc", *super().identity


def train(lab: Lab) -> list[Trained]:
    """The policy after T parts of the budget, each a training of its own, the next one's size by what this one cost."""
    policy: str | Path = lab.take_over_t0()
    left = lab.budget - _tokens(lab.stage(0, "taken_over").ledger)
    T, group, step = lab.config.iterations, lab.config.rollout.samples, lab.config.grpo.prompts_per_step
    each = 1.5 * group * lab.row_tokens
    targets = target_rule(lab.rated_scores(), lab.space)
    for t in range(1, T + 1):
        steps = max(1, round(left / (T - t + 1) / each / step))
        policy, cost = lab.practise(t, policy, steps * step, MOC, targets=targets)
        left -= _tokens(cost)
        each = _tokens(cost) / max(1, lab.stage(t, "rollout").ledger.rows)  # fewer where there are no more prompts
    return [lab.trained("MOC", policy)]


def aims(scores_NK: np.ndarray, directions_NK: np.ndarray, targets_NK: np.ndarray, group: int) -> np.ndarray:
    """advantages_JN: more of what is wished of each objective, then control of each, standardised over each group.

    Aims that tell no answer from another are left out; an answer without a score counts for nothing.
    """
    wished_NK = np.where(np.abs(directions_NK) > NOTHING, np.sign(directions_NK), 0.0)
    value_NJ = np.concatenate([wished_NK * scores_NK, -np.abs(wished_NK) * (scores_NK - targets_NK) ** 2], axis=1)
    value_PGJ = np.ma.masked_invalid(value_NJ).reshape(-1, group, value_NJ.shape[1])
    spread_P1J = value_PGJ.std(axis=1, keepdims=True)
    advantages_PGJ = (value_PGJ - value_PGJ.mean(axis=1, keepdims=True)) / np.ma.maximum(spread_P1J, NOTHING)
    advantages_PGJ = advantages_PGJ * (spread_P1J > NOTHING)  # a mean of equal values may differ from them
    advantages_JN = advantages_PGJ.filled(0.0).reshape(len(scores_NK), -1).T
    return advantages_JN[np.linalg.norm(advantages_JN, axis=1) > NOTHING]


def min_norm(vectors_JN: np.ndarray) -> np.ndarray:
    """weight_J on the simplex with the least || sum_j weight_j v_j / ||v_j|| || (MGDA), by Frank-Wolfe, exact steps.

    For two vectors one step is the closed form. No vector may be zero.
    """
    unit_JN = vectors_JN / np.linalg.norm(vectors_JN, axis=1, keepdims=True)
    gram_JJ, weight_J = unit_JN @ unit_JN.T, np.full(len(unit_JN), 1 / len(unit_JN))
    for _ in range(STEPS):
        slope_J = gram_JJ @ weight_J
        corner_J = np.eye(len(weight_J))[slope_J.argmin()]
        way_J = corner_J - weight_J
        length = float(way_J @ gram_JJ @ way_J)
        gain = -float(way_J @ slope_J)
        if gain <= NOTHING or length <= NOTHING:
            break
        weight_J = weight_J + min(1.0, gain / length) * way_J
    return weight_J


def _tokens(ledger: Ledger) -> int:
    return ledger.tokens_generated + ledger.training_tokens


METHOD = Method(
    name="moc",
    title="MOC",
    color=("#37474f", "#a9bcc6"),
    bar=2.0,
    train=train,
)
