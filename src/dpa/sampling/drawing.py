"""Drawing tokens: each row's distribution is inverted at the row's own uniform number.
Run its tests: pytest tests/test_samplers.py

A number comes from its row's seed alone, so that a row draws the same in any batch. The sum over the vocabulary runs
in two levels, over blocks of tokens and then within the one block drawn: the same inversion as a running sum over all
tokens, in double precision, without writing one of the vocabulary's length.
"""

import numpy as np
import torch

BLOCK = 256  # tokens summed at once


def uniforms(seed: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1): a counter-based generator keyed by the seed, the same on every machine."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def draw(
    logits_BV: torch.Tensor,
    uniform_B: torch.Tensor,
    temperature: float | torch.Tensor,
    top_p: float | torch.Tensor,
) -> torch.Tensor:
    """Invert the cumulative distribution of each row at its uniform number: token_B.

    With `top_p` < 1 only the most probable tokens whose mass before them is below `top_p` are kept. The sums run in
    double precision, so that a token of probability zero is never drawn. `temperature` and `top_p` may be columns
    (B, 1), one number for each row; a column of top_p always sorts, so it must hold none that is 1.
    """
    cold = isinstance(temperature, torch.Tensor) or temperature != 1
    probabilities_BV = torch.softmax(logits_BV / temperature if cold else logits_BV, dim=-1)
    if not isinstance(top_p, torch.Tensor) and top_p == 1:
        return _invert(probabilities_BV, uniform_B)
    probabilities_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    place_B = _invert(probabilities_BV.masked_fill(before_BV >= top_p, 0.0), uniform_B)
    return order_BV.gather(1, place_B[:, None])[:, 0]


def _invert(mass_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The first place of each row at which the running sum of its masses passes `uniform_B` of their total."""
    rows, count = mass_BV.shape
    short = -count % BLOCK
    if short:
        mass_BV = torch.nn.functional.pad(mass_BV, (0, short))
    blocks_BNM = mass_BV.view(rows, -1, BLOCK)
    until_BN = blocks_BNM.sum(-1, dtype=torch.float64).cumsum(-1)
    block_B1, left_B1 = _first_beyond(until_BN, uniform_B.double()[:, None] * until_BN[:, -1:])
    within_BM = blocks_BNM.gather(1, block_B1[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    place_B1, _ = _first_beyond(within_BM, left_B1)
    return (block_B1 * BLOCK + place_B1)[:, 0].clamp(max=count - 1)  # a row of NaN has no place


def _first_beyond(until_BN: torch.Tensor, mass_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Place of the first running sum above `mass_B1`, and what is left of that mass after the places before it."""
    # Rounding may bring the mass up to the whole: just below it, the place still is one that has mass of its own.
    mass_B1 = torch.minimum(mass_B1, until_BN[:, -1:] * (1 - 2**-52))
    place_B1 = torch.searchsorted(until_BN, mass_B1, right=True).clamp(max=until_BN.shape[1] - 1)
    before_B1 = until_BN.gather(1, (place_B1 - 1).clamp(min=0)).masked_fill(place_B1 == 0, 0.0)
    return place_B1, mass_B1 - before_B1
