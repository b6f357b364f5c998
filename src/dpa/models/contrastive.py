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
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dpa.core.directions import DirectionSpace

_LABELS_AT_ONCE = 1024
"""Positions whose logits are held in fp32 at a time."""


# --- which directions a winner is contrasted with ------------------------------------------------------------------


def negative_directions(rows: pa.Table, space: DirectionSpace, count: int, seed: int) -> list[list[list[float]]]:
    """For each row (select shard columns) up to `count` directions (K weights) that do not choose its winner.

    They are drawn from the other directions of the same pool (the rows of one prompt; of one `pool`, where the rows
    have that column) that chose another response and that read differently from the row's own and from each other.
    Where the pool has none, the mirrored direction (`DirectionSpace.mirrored`), unless that is known to choose the
    response too: because the pool kept it for a direction that lies as far out on that side, or because it reads the
    same, as the center's does. A row without a direction has no negatives.
    """
    names = rows["pool" if "pool" in rows.column_names else "prompt_id"].to_pylist()
    directions, responses = rows["direction"].to_pylist(), rows["response"].to_pylist()
    pools: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        pools.setdefault(name, []).append(row)
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


def info_nce(log_p_S: torch.Tensor, row_S: torch.Tensor, place_S: torch.Tensor) -> torch.Tensor:
    """The contrastive term of each row (R), nats. `log_p_S`: of each segment's response; `row_S`: its row's number;
    `place_S`: 0 for the row's own direction, 1, 2, ... for its negatives."""
    rows, places = int(row_S[-1]) + 1, int(place_S.max()) + 1
    log_p_RJ = log_p_S.new_full((rows, places), -torch.inf).index_put((row_S, place_S), log_p_S)
    return torch.logsumexp(log_p_RJ, dim=1) - log_p_RJ[:, 0]


# --- in a Trainer --------------------------------------------------------------------------------------------------


@dataclass
class ContrastiveCollator:
    """A padding-free collator's batch, and what the term needs to know of it.

    Besides the columns `inner` takes, whose labels are those of the rows' own segments, rows have `all_labels`, those
    of every segment, and `segments`, how many segments each row of the selection has, its own the first.
    Tensors added: `kept_L`, the positions that predict a label; `kept_labels_L`; `segment_L`, the number of the label's
    segment; `row_S` and `place_S` as `info_nce` takes them; `rows`, how many rows have a label.
    """

    inner: Any

    def __call__(self, packed: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate packed rows."""
        batch = self.inner([{k: v for k, v in row.items() if k not in ("all_labels", "segments")} for row in packed])
        lengths = torch.tensor([length for row in packed for length in row["seq_lengths"]])
        sizes = torch.tensor([size for row in packed for size in row["segments"]])
        labels = torch.tensor([label for row in packed for label in row["all_labels"]])
        starts = lengths.cumsum(0) - lengths
        labels[starts] = -100  # nothing before it predicts it
        segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        label_at = (labels != -100).nonzero().flatten()
        row = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        own = sizes.cumsum(0) - sizes
        place = torch.arange(len(lengths)) - own[row]
        learned = torch.zeros(len(lengths), dtype=torch.bool).index_fill(0, segment[label_at], True)
        return batch | {
            "kept_L": label_at - 1,
            "kept_labels_L": labels[label_at],
            "segment_L": segment[label_at],
            "row_S": row,
            "place_S": place,
            "rows": learned[own].sum(),
        }


class AddsContrast:
    """Mixin before an SFTTrainer whose batches come from a ContrastiveCollator: `contrastive` times the term is added.

    The log has `nll` (nats a token: the loss without the term), `contrast` (the mean term) and `own_likelier` (the
    share of contrasted rows that are likelier under their own direction than under each negative) of every step.
    """

    contrastive: float
    _rows_of_step: torch.Tensor
    _sums: torch.Tensor | None = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one optimizer step; the rows in all of them, over all ranks, are counted too."""
        batches, tokens = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        rows = sum((batch["rows"] for batch in batches), torch.tensor(0))
        self._rows_of_step = self._over_ranks(rows).clamp(min=1)
        return batches, tokens

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of this pass in the loss of its step. `num_items_in_batch`: label tokens of the step, all ranks."""
        trainer: Any = self
        kept_L, labels_L, segment_L, row_S, place_S, _ = (
            inputs.pop(name) for name in ("kept_L", "kept_labels_L", "segment_L", "row_S", "place_S", "rows")
        )
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs, use_cache=False, logits_to_keep=kept_L)
        log_p_L = label_log_probabilities(outputs.logits[0], labels_L)
        own_L = place_S[segment_L] == 0
        log_p_S = log_p_L.new_zeros(len(row_S)).index_add(0, segment_L, log_p_L)
        contrast_R = info_nce(log_p_S, row_S, place_S)
        nll = -(log_p_L * own_L).sum() / num_items_in_batch
        contrast = contrast_R.sum() / self._rows_of_step
        with torch.no_grad():
            best_R = torch.full_like(contrast_R, -torch.inf)
            best_R.scatter_reduce_(0, row_S, torch.where(place_S > 0, log_p_S, -torch.inf), "amax")
            contrasted_R = best_R > -torch.inf
            likelier = (log_p_S[place_S == 0] > best_R) & contrasted_R
            sums = torch.stack([nll, contrast, likelier.sum().float(), contrasted_R.sum().float()])
            self._sums = sums if self._sums is None else self._sums + sums
        loss = nll + self.contrastive * contrast
        if trainer.args.average_tokens_across_devices:
            loss = loss * trainer.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, outputs) if return_outputs else loss

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
