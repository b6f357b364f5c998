"""Rewarded soups: one specialist for each extreme wish, their weights interpolated by the user's (arXiv 2306.04488).

theta(v) = sum_i lambda_i(v) theta_i, sum lambda = 1, all theta_i finetuned from one SFT policy. No direction is stated:
it picks the mixture.

Published: specialists of one reward each from shared weights, linear interpolation, lambda = the preference. Ours: our
cone is signed ("less verbosity" is a wish), so the specialists are trained for the cone's center and the two ends of
every arc, and lambda is read off the angle: at a share rho of max_angle the center has 1 - rho, and the ends have rho
in proportion to how far v leans to each. They are trained by rejection sampling (the trainer of everything here)
instead of PPO: best rated, then one online round. A fifth of the budget for SFT, equal parts for the specialists.
"""

from functools import partial

import numpy as np

from dpa.core.directions import DirectionSpace
from dpa.core.measures import edge_directions
from dpa.recipes.baselines.asking import without_direction
from dpa.recipes.baselines.lab import Lab, Method, Trained, unstated
from dpa.sampling.soups import SoupSampler

SFT_SHARE, OFFLINE = 0.2, 0.4
"""Share of the budget for SFT, and of a specialist's part for the rated responses."""


def train(lab: Lab) -> list[Trained]:
    """The soup of the specialists."""
    folders = specialists(lab)
    spec = lab.spec(folders[0], measuring=True)
    return [Trained("soup", lambda: SoupSampler(folders, lambda v: mixture(v, lab.space), spec))]


def specialists(lab: Lab) -> list[str]:
    """The folders of the policies trained for each of the `wishes`, in their order."""
    start = lab.finetune(0, lab.start_policy, unstated(lab.best_rated(lab.space.center_K)), SFT_SHARE * lab.budget)
    wishes_IK = wishes(lab.space)
    part = (1 - SFT_SHARE) * lab.budget / len(wishes_IK)
    folders = []
    for i, wish_K in enumerate(wishes_IK):
        offline, online = 1 + 2 * i, 2 + 2 * i
        goal = part * (len(wishes_IK) - i - 1)  # what must be left after this specialist
        rows = unstated(lab.best_rated(wish_K, offline))
        policy = lab.finetune(offline, start, rows, OFFLINE * part)
        lab.rollout(online, partial(lab.sampler, policy, translate=without_direction), wish_K[None])
        policy = lab.finetune(online, policy, unstated(lab.best_sampled(wish_K, online)), lab.left - goal, online=True)
        folders.append(str(policy))
    return folders


def wishes(space: DirectionSpace) -> np.ndarray:
    """directions_IK of the specialists: the center, then the low and the high end of every arc, each once: around a
    center that is no objective's axis two arcs may be one."""
    ends_EK = edge_directions(space)
    _, first = np.unique(ends_EK.round(6) + 0.0, axis=0, return_index=True)
    return np.concatenate([space.center_K[None], ends_EK[np.sort(first)]])


def mixture(direction: tuple[float, ...], space: DirectionSpace) -> list[float]:
    """lambda_I, each specialist's share for a direction: exactly one specialist at each of their own directions."""
    direction_K = np.array(direction)
    rho = min(1.0, float(space.angle_to_center(direction_K[None])[0]) / space.max_angle)
    ends_EK = wishes(space)[1:]
    own_E = np.abs(ends_EK - direction_K).max(axis=1) < 1e-6
    if own_E.any():  # others may lean the same way
        return [0.0, *own_E.astype(float).tolist()]
    outward_EK = ends_EK - np.outer(ends_EK @ space.center_K, space.center_K)
    outward_EK /= np.linalg.norm(outward_EK, axis=1, keepdims=True)
    lean_E = np.maximum(outward_EK @ direction_K, 0.0)
    if rho < 1e-9 or lean_E.sum() < 1e-9:
        return [1.0, *np.zeros(len(ends_EK))]
    return [1.0 - rho, *(rho * lean_E / lean_E.sum()).tolist()]


METHOD = Method(
    name="soups",
    title="Rewarded Soups",
    color=("#3f8f2f", "#8fd97a"),
    bar=0.0,
    train=train,
)
