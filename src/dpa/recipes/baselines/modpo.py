"""MODPO, multi-objective direct preference optimisation: DPO with a margin, one policy a wish (arXiv 2310.03708).

For weights w and pairs preferred by objective k, with d(y) = log pi(y)/ref(y), c the chosen, r the rejected response:

    -log sigmoid( (beta (d(c) - d(r)) - sum_{j != k} w_j (r_j(c) - r_j(r)) / s) / w_k )

whose optimum is pi ~ ref exp(w . r / (beta s)). It is DPO (training/dpo.py) with beta / w_k for beta, and a margin.

Published: the loss, one SFT policy as start and reference, margins from reward models, a policy for each w. Ours: the
wishes of rewarded soups (the cone's center and the two ends of every arc; w may be negative: the margin takes it as it
is), a direction being answered by the policy of the nearest; k is the objective of the largest |w_k|, pairs preferred
by less of it where w_k < 0; the shared reward model gives the margins, and the preferences too: drawn from Bradley and
Terry's sigmoid((r_k(c) - r_k(r)) / s) on two rated responses, s = POINTS; a fifth of the budget for SFT, equal parts
for the policies.
"""

import numpy as np
import pyarrow as pa

from dpa.core.records import places_of
from dpa.recipes.baselines.asking import NearestSampler, without_direction
from dpa.recipes.baselines.lab import Lab, Method, Trained, unstated
from dpa.recipes.baselines.soups import wishes

SFT_SHARE, PAIRS = 0.2, 3
"""Share of the budget for SFT, and pairs of a prompt for each policy, at most."""
POINTS = 10.0
"""Points of a score that make one nat of preference."""


def train(lab: Lab) -> list[Trained]:
    """A policy for each wish, each direction asked of the nearest."""
    start = lab.finetune(0, lab.start_policy, unstated(lab.best_rated(lab.space.center_K)), SFT_SHARE * lab.budget)
    wishes_IK = wishes(lab.space)
    part = (1 - SFT_SHARE) * lab.budget / len(wishes_IK)
    rated, scores_RK = lab.rated, lab.rated_scores()
    count = max(1, round(part / (2 * lab.row_tokens)))  # pairs beyond these would only be read by the reference
    policies = []
    for i, wish_K in enumerate(wishes_IK):
        goal = part * (len(wishes_IK) - i - 1)  # what must be left after this policy
        pairs, share = margin_pairs(rated, scores_RK, wish_K, lab.config.seed + i)
        beta = lab.config.dpo.beta / share
        policies.append(lab.prefer(1 + i, start, pairs.slice(0, count), lab.left - goal, beta=beta))

    def build() -> NearestSampler:
        opened = [lab.sampler(policy, measuring=True, translate=without_direction) for policy in policies]
        return NearestSampler(opened, wishes_IK)

    return [Trained("MODPO", build)]


def margin_pairs(rated: pa.Table, scores_RK: np.ndarray, wish_K: np.ndarray, seed: int) -> tuple[pa.Table, float]:
    """Pairs preferred by the wish's largest objective, `margin` what the others account for (nats); and |w_k|."""
    k = int(np.abs(wish_K).argmax())
    share = float(abs(wish_K[k]))
    rng, pairs = np.random.default_rng(seed), []
    columns = {name: rated[name].to_pylist() for name in ("prompt_id", "messages", "response", "complete")}
    known = np.isfinite(scores_RK).all(axis=1)
    for own in places_of(columns["prompt_id"]).values():
        able = [place for place in own if known[place]]
        for _ in range(PAIRS if len(able) > 1 else 0):
            chosen, rejected = rng.choice(able, 2, replace=False).tolist()
            gain_K = (scores_RK[chosen] - scores_RK[rejected]) / POINTS
            if rng.random() >= 1 / (1 + np.exp(-np.sign(wish_K[k]) * gain_K[k])):
                chosen, rejected, gain_K = rejected, chosen, -gain_K
            pairs.append(
                {
                    "prompt_id": columns["prompt_id"][chosen],
                    "messages": columns["messages"][chosen],
                    "chosen": columns["response"][chosen],
                    "rejected": columns["response"][rejected],
                    "chosen_complete": columns["complete"][chosen],
                    "rejected_complete": columns["complete"][rejected],
                    "margin": float(np.delete(wish_K * gain_K, k).sum()) / share,
                }
            )
    return unstated(pa.Table.from_pylist([pairs[place] for place in rng.permutation(len(pairs))])), share


METHOD = Method(
    name="modpo",
    title="MODPO",
    color=("#5d4037", "#c9a08e"),
    bar=2.0,
    train=train,
)
