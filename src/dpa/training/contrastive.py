"""Learning that goes for the direction: a winner must be likelier under its own direction than under others.
Run its tests: pytest tests/test_contrastive.py

The paper's loss, -log p(y | x, v), falls without v being read: the wording of an answer costs a thousand times what the
direction explains. The contrastive term of a row (x, v, y) falls only by reading it. Over v = v_0 and negatives
v_1 .. v_m, directions that do not choose y,

    -log( p(y | x, v_0) / sum_j p(y | x, v_j) )        (m = 1: softplus(log p(y | x, v_1) - log p(y | x, v_0)))

with log p(y | x, v) summed over the tokens of the response and its end token. This is InfoNCE (arXiv 1807.03748) over
directions with the policy's own log-likelihood as the critic: log(m + 1) minus its mean is a lower bound on
I(y; v | x), the mutual information that MI-EPO (arXiv 2607.01392) argues preference learning has to raise. The sum,
not the mean over tokens, is what makes it that bound, so `finetune.contrastive` weighs nats a response.

Loss of an optimizer step: nats a token of the winners under their own directions, over all label tokens of the step, as
without the term; plus `finetune.contrastive` times the mean of the term over all rows of the step. Rows without a
negative count in that mean with 0. Neither how a step is cut into passes and ranks nor what is packed beside what
changes it. A row travels with its negatives, the same response behind other prompts, in one packed row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dpa.core.directions import DirectionSpace
from dpa.core.records import places_of
from dpa.storage.schemas import held_values, named_negatives

_LABELS_AT_ONCE = 1024
"""Positions whose logits are held in fp32 at a time."""


# --- which directions a winner is contrasted with ------------------------------------------------------------------


def negative_directions(rows: pa.Table, space: DirectionSpace, count: int, seed: int) -> list[list[list[float]]]:
    """For each row (select shard columns) up to `count` directions (K weights) that do not choose its winner.

    They are drawn from the other directions of the same pool (the rows of one prompt; of one `pool`, where the rows
    have that column) that chose another response and that read differently from the row's own and from each other.
    Where no row tells, the one that the selection found by asking the pool (`negative_direction`; none, where it found
    none). Where the selection does not say, the mirrored direction (`DirectionSpace.mirrored`), unless that is known
    to choose the response too: because the pool kept it for a direction that lies as far out on that side, or because
    it reads the same, as the center's does. A row without a direction has no negatives, nor has a target's
    (target_negatives.py).
    """
    names = rows["pool" if "pool" in rows.column_names else "prompt_id"].to_pylist()
    responses = rows["response"].to_pylist()
    directions: list[Any] = [
        weights if held is None else None
        for weights, held in zip(rows["direction"].to_pylist(), held_values(rows), strict=True)
    ]
    pools, named = places_of(names), named_negatives(rows)
    rng = np.random.default_rng([seed, 0x1F0CE])
    found: list[list[list[float]]] = []
    for row, name in enumerate(names):
        if directions[row] is None:
            found.append([])
            continue
        others = {
            _printed(space, directions[other]): directions[other]
            for other in pools[name]
            if directions[other] is not None and responses[other] != responses[row]
        }
        others.pop(_printed(space, directions[row]), None)
        choices = list(others.values())
        if choices:
            drawn = rng.permutation(len(choices))[:count]
            found.append([choices[place] for place in drawn])
        elif (negative := named[row]) is not None:
            found.append([negative] if negative else [])
        else:
            same = [directions[other] for other in pools[name] if responses[other] == responses[row]]
            found.append(_mirrored(space, directions[row], [other for other in same if other is not None]))
    return found


def _mirrored(space: DirectionSpace, own: list[float], choosing: Sequence[list[float]]) -> list[list[float]]:
    """The mirrored direction, unless it reads the same or one of `choosing` lies as far out on its side.

    The directions that choose a candidate form a convex cone, so for K = 2 such a one proves that it chooses it too.
    """
    mirrored = space.mirrored(own)
    if mirrored.integers == space.direction(own).integers:
        return []
    mirrored_K = np.array(mirrored.weights)
    outwards_K = mirrored_K - (mirrored_K @ space.center_K) * space.center_K
    if any(np.array(other) @ outwards_K >= mirrored_K @ outwards_K - 1e-9 for other in choosing):
        return []
    return [list(mirrored.weights)]


def _printed(space: DirectionSpace, direction: list[float]) -> tuple[int, ...]:
    return space.direction(direction).integers


# --- the loss ------------------------------------------------------------------------------------------------------


def label_log_probabilities(logits_LV: torch.Tensor, labels_L: torch.Tensor) -> torch.Tensor:
    """log p of each label (L, fp32) from its logits; they are turned to fp32 a part at a time, in both directions."""
    parts = [
        checkpoint(_log_probabilities, logits, labels, use_reentrant=False)
        for logits, labels in zip(logits_LV.split(_LABELS_AT_ONCE), labels_L.split(_LABELS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts)


def _log_probabilities(logits_LV: torch.Tensor, labels_L: torch.Tensor) -> torch.Tensor:
    return -functional.cross_entropy(logits_LV.float(), labels_L, reduction="none")


def info_nce(log_p_RJ: torch.Tensor) -> torch.Tensor:
    """The contrastive term of each row (R), nats. `log_p_RJ`: log p of its response under its own direction, then under
    its negatives (-inf where it has fewer)."""
    return torch.logsumexp(log_p_RJ, dim=1) - log_p_RJ[:, 0]


def contrast_slots(places_L: torch.Tensor, lengths: Sequence[int], sizes: Sequence[int]) -> dict[str, torch.Tensor]:
    """Which segment each label of a pass belongs to, in a table of rows and their segments.

    `places_L`: where the labels stand; `lengths`: of the segments, behind each other; `sizes`: how many of them each
    row has, its own the first. Returned: `slot_L`, the place in the table (R, J), flattened, and `present_RJ`.
    """
    present_RJ = torch.arange(max(2, *sizes)) < torch.tensor(sizes)[:, None]
    segment_L = torch.searchsorted(torch.tensor(lengths).cumsum(0), places_L, right=True)
    return {"slot_L": present_RJ.flatten().nonzero()[segment_L, 0], "present_RJ": present_RJ}


# --- in a Trainer --------------------------------------------------------------------------------------------------


class AddsContrast:
    """Mixin before a Trainer class: its loss is `contrast_loss`, and the log says what that is made of.

    The log has `nll` (nats a token: the loss without the term), `contrast` (the mean term) and `own_likelier` (the
    share of contrasted rows that are likelier under their own direction than under each negative) of every step.
    """

    contrastive: float
    _sums: torch.Tensor | None = None

    def begin(self) -> None:
        """A step begins, or begins again."""
        self._sums = None

    def contrast_loss(
        self, log_p_L: torch.Tensor, slot_L: torch.Tensor, present_RJ: torch.Tensor, labels: Any, examples: Any
    ) -> torch.Tensor:
        """The share of a pass in the loss of its step, of as many own `labels` and as many `examples`.

        `log_p_L`: of the labels in the pass; the others are what `contrast_slots` returned for them.
        """
        log_p_RJ = log_p_L.new_zeros(present_RJ.numel()).index_add(0, slot_L, log_p_L).view(present_RJ.shape)
        log_p_RJ = log_p_RJ.masked_fill(~present_RJ, -torch.inf)
        nll, contrast = -log_p_RJ[:, 0].sum() / labels, info_nce(log_p_RJ).sum() / examples
        with torch.no_grad():
            contrasted_R = present_RJ[:, 1]
            likelier_R = (log_p_RJ[:, 0] > log_p_RJ[:, 1:].amax(1)) & contrasted_R
            sums = torch.stack([nll, contrast, likelier_R.sum(), contrasted_R.sum()])
            self._sums = sums if self._sums is None else self._sums + sums
        return nll + self.contrastive * contrast

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One entry of the log, with what the steps since the last one amounted to."""
        if self._sums is not None and "grad_norm" in logs:
            nll, contrast, likelier, contrasted = self._over_ranks(self._sums).tolist()
            logs |= {"nll": nll, "contrast": contrast, "own_likelier": likelier / max(contrasted, 1.0)}
            self._sums = None
        super().log(logs, start_time)  # type: ignore[misc]

    def _over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        accelerator = self.accelerator  # type: ignore[attr-defined]
        return accelerator.reduce(sums.to(accelerator.device), "sum")


class AccumulatesContrast(AddsContrast):
    """The same where passes accumulate as a Trainer does it.

    The batch of a pass has, beside what the model takes, `labels` (1, T), `label_places`, what `contrast_slots`
    returns, and how many own labels (`count`) and examples with one (`examples`) there are.
    """

    _of_step: torch.Tensor

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one optimizer step; what is in all of them, over all ranks, is counted."""
        batches, tokens = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        counts = [sum(batch.pop(name) for batch in batches) for name in ("count", "examples")]
        self._of_step = self._over_ranks(torch.tensor(counts)).clamp(min=1)
        return batches, tokens

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of this pass in the loss of its step."""
        names = ("slot_L", "present_RJ", "label_places", "labels")
        slot_L, present_RJ, places_L, labels_BT = (inputs[name] for name in names)
        given = {name: value for name, value in inputs.items() if name not in names}
        outputs = model(**given, use_cache=False, logits_to_keep=places_L - 1)
        log_p_L = label_log_probabilities(outputs.logits[0], labels_BT[0, places_L])
        loss = self.contrast_loss(log_p_L, slot_L, present_RJ, *self._of_step)
        loss = loss * self.accelerator.num_processes  # type: ignore[attr-defined]  # gradients are averaged over ranks
        return (loss, outputs) if return_outputs else loss
