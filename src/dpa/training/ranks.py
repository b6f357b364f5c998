"""The ranks of a launched training (`accelerate launch`, torchrun): who is first, and how they stay together.
Run its tests: pytest tests/test_launch.py

The first rank alone holds the run folder and writes in it. Without a launch there is one rank, and nothing waits.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from dpa.core.errors import DpaError

LAUNCHED = "DPA_LAUNCHED"
"""Set in the environment of the ranks that launching.py starts."""


def ranks() -> int:
    """Processes in this launch (set by `accelerate launch` and torchrun)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def in_one_process() -> bool:
    """Whether nothing was launched: with DeepSpeed even a single rank takes an optimizer step after its last pass only
    where the Trainer accumulates."""
    return ranks() == 1 and LAUNCHED not in os.environ


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Return when every rank is here."""
    if ranks() > 1:
        _state().wait_for_everyone()


def any_of(flag: bool) -> bool:
    """Whether the flag is set on some rank; the same answer on all. Every rank must ask."""
    return least_of(int(not flag)) == 0


def least_of(count: int) -> int:
    """The least that a rank has; the same answer on all. Every rank must ask."""
    if ranks() == 1:
        return count
    found = torch.tensor(count, device=_state().device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    return int(found)


def first_then_rest(work: Callable[[bool], Any]) -> Any:
    """`work(False)` on the first rank, then `work(True)` on the others; where the first fails on purpose, they exit."""
    failed: list[DpaError | None] = [None]
    result = None
    if is_first():
        try:
            result = work(False)
        except DpaError as error:
            failed = [error]
    if ranks() > 1:
        _state()
        broadcast_object_list(failed)
    if failed[0] is not None:
        if ranks() > 1:
            # Nobody leaves before all know, nor with the group open: the end of a peer would abort the rest.
            wait_for_all()
            _state().destroy_process_group()
        if not is_first():
            sys.exit(failed[0].exit_code)  # the first says why
        raise failed[0]
    return result if is_first() else work(True)


def _state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())
