"""Best-of-n and robust selections: what is asked of the engine for one, and which of its answers is the best.
Run its tests: pytest tests/test_gateway.py
"""

import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpa.core.direction import Direction
from dpa.core.directions import DirectionSpace
from dpa.core.target_selection import select_targets
from dpa.core.targets import Target, Wish
from dpa.serve.bodies import TOGETHER
from dpa.serve.seeds import nth_seed
from dpa.serve.shapes import TOKEN_COUNTS, named
from dpa.serve.understanding import Asked
from dpa.serve.upstream import UpstreamError


@dataclass(frozen=True)
class Candidate:
    """One answer to be sampled: the direction it is asked under, and the body that asks for it."""

    direction: Wish
    body: dict[str, Any]


def candidates(asked: Asked, space: DirectionSpace, together: bool) -> list[Candidate]:
    """`best_of` under the asked direction and (robust) under each of its neighbours, with seeds derived from the
    request's. `together`: the engine is ours, and counts them as one request where turns are taken.
    """
    body, direction = asked.steering.body, asked.steering.direction
    assert direction is not None
    robust = asked.options.robustly
    under_D: list[Wish] = [direction]
    if robust is not None and isinstance(direction, Direction):
        under_D += map(space.direction, space.neighbours(direction, robust.angle, robust.neighbors))
    seed = asked.body.seed if asked.body.seed is not None else secrets.randbits(48)
    whole = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    shared = {**whole, **({TOGETHER: secrets.token_hex(8)} if together else {})}
    found: list[Candidate] = []
    for under in under_D:
        kwargs = {**body.get("chat_template_kwargs", {}), "preference": under.as_mapping()}
        for _ in range(asked.options.best_of):
            # OpenAI's seeds are 64-bit and signed.
            own = nth_seed(seed, len(found)) % 2**63 if found else seed
            found.append(Candidate(under, {**shared, "chat_template_kwargs": kwargs, "seed": own}))
    return found


def best_of(direction: Wish, scores_NK: np.ndarray) -> tuple[int, np.ndarray]:
    """The number of the answer the direction values most, and what it values each at (NaN: it could not be scored). For
    a target it is that which `core.target_selection.select_targets` keeps, and the value is that of what is free.

    Raises UpstreamError where none could be scored.
    """
    weights_K = np.array(direction.weights)
    utility_N = scores_NK @ weights_K
    if not np.isfinite(utility_N).any():
        raise UpstreamError("scorer: it could score none of the answers; ask again.", 502)
    if isinstance(direction, Target):
        held_K = np.array(direction.held, dtype=np.float64)
        return int(select_targets(scores_NK[None], weights_K[None, None], held_K[None, None])[0, 0]), utility_N
    return int(np.where(np.isfinite(utility_N), utility_N, -np.inf).argmax()), utility_N


def chosen_of(answers: list[dict[str, Any]], best: int) -> dict[str, Any]:
    """The best answer, which counts the tokens of all of them."""
    usage = [answer.get("usage") or {} for answer in answers]
    total = {name: sum(one.get(name) or 0 for one in usage) for name in TOKEN_COUNTS}
    return {**answers[best], "usage": {**usage[best], **total}}


def listing(
    asked: list[Candidate], names: tuple[str, ...], scores_NK: np.ndarray, utility_N: np.ndarray, best: int
) -> list[dict[str, Any]]:
    """`dpa.candidates`: every answer's direction, scores and utility, and which was chosen."""
    return [
        {
            "direction": str(one.direction),
            "scores": named(names, row_K),
            "utility": float(utility) if np.isfinite(utility) else None,
            "chosen": n == best,
        }
        for n, (one, row_K, utility) in enumerate(zip(asked, scores_NK, utility_N, strict=True))
    ]
