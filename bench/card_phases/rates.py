"""What the card itself can do: the rates that the other phases' shares are of. About 10 s, most of it imports."""

import torch

from card_phases.common import Card, on_device, timed
from dpa.recipes.costs.devices import matrix_rate


def rates(card: Card) -> None:
    """FLOP/s of bf16 matrix products of 8192, bytes/s read and written by a copy within the card's memory."""
    device, _ = on_device()
    card.row("matrix", matrix_rate(0.1 if card.tiny else 3.0), "FLOP/s")
    size = 2**24 if card.tiny else 2**32
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    count = 3 if card.tiny else 50
    work = timed(lambda: [target.copy_(source) for _ in range(count)])
    card.row("copy", 2 * size * count / work.seconds, "bytes/s")
