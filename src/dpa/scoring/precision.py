"""What a reward model loses in the precision scorers compute in, and the self-test that tells rounding from damage.
Run its tests: pytest tests/test_precision.py

A reward model is trained in fp32 and scores in bf16 on a card. Its weights then differ by rounding, its scores by as
much as a few points, and a test made for one precision would call the other damage. So the difference is measured once,
on rows it was not trained on, and kept in dpa_reward.json: it sets the tolerance of the self-test, and where it turns
the order of responses to a prompt around, scorers stay in fp32.
"""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpa.core.errors import ModelFileError
from dpa.core.records import places_of
from dpa.models.policy import is_out_of_memory
from dpa.scoring.reward_model import Precision, RewardSpec, check_pad_token, encode, exact_head, forward
from dpa.scoring.reward_quality import pairwise_agreement

PRECISION_ROWS = 64
"""Held-out rows the precisions are compared on, at least, where there are so many."""

_log = logging.getLogger(__name__)


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """A copy of a classifier in another precision, as `load_classifier` would have loaded it."""
    twin = copy.deepcopy(model)
    twin.__dict__.pop("forward", None)  # mixed precision wraps it, around the original
    twin = twin.to(dtype).eval()
    if dtype != torch.float32:
        exact_head(twin)
    return twin


def measure_precision(
    model: Any, ids_N: Sequence[Sequence[int]], prompt_ids: Sequence[str], pad: int
) -> tuple[Precision, np.ndarray] | None:
    """How scores in bf16 compare with those in fp32, and the latter, scores_NM; None where memory does not allow it.

    `model` is in either; a copy is made in the other, for as long as this takes.
    """
    try:
        whole = next(model.parameters()).dtype == torch.float32
        scores = [forward(model, ids_N, pad)]
        twin = in_precision(model, torch.bfloat16 if whole else torch.float32)
        scores.append(forward(twin, ids_N, pad))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    fp32_NM, bf16_NM = scores if whole else scores[::-1]
    taus = [pairwise_agreement(bf16_N, fp32_N, prompt_ids) for bf16_N, fp32_N in zip(bf16_NM.T, fp32_NM.T, strict=True)]
    known = [tau for tau in taus if tau is not None]
    return (
        Precision(
            dtype="bfloat16",
            rows=len(ids_N),
            largest_difference=float(np.abs(fp32_NM - bf16_NM).max()),
            kendall=min(known) if known else None,
        ),
        fp32_NM,
    )


def rows_to_compare(rows: Sequence[int], prompt_ids: Sequence[str], least: int = PRECISION_ROWS) -> list[int]:
    """Whole prompts' rows, those with most responses first, until there are enough. `prompt_ids`: of each row."""
    groups = [[rows[place] for place in places] for places in places_of(prompt_ids).values()]
    chosen: list[int] = []
    for group in sorted(groups, key=lambda group: -len(group)):
        if len(chosen) >= least:
            break
        chosen += group[: 2 * least]
    return chosen


def self_test(model: Any, tokenizer: Any, spec: RewardSpec, name: str | Path, token_budget: int | None = None) -> None:
    """Raise ModelFileError unless the model gives its golden example's scores, alone and beside a longer row."""
    golden, width = spec.golden, len(spec.attributes)
    if model.config.num_labels != width or len(golden.scores) != width:
        raise ModelFileError(
            f"reward model: {name} has {model.config.num_labels} outputs for {width} attributes; "
            "it is not the model its dpa_reward.json describes."
        )
    check_pad_token(tokenizer, model.config.get_text_config().pad_token_id, name)
    if spec.template is None and not tokenizer.chat_template:
        raise ModelFileError(f"reward model: {name} has lost its chat template; restore chat_template.jinja.")
    longest, ids = spec.max_length, golden_ids(tokenizer, spec, str(name))
    tolerance = spec.tolerance(next(model.parameters()).dtype)
    for rows in ([ids], [ids, [*ids, *ids][: min(longest, len(ids) + 8)]]):
        scores = forward(model, rows, tokenizer.pad_token_id, token_budget)[0]
        worst = worst_output(scores, golden.scores, tolerance)
        if worst is not None:
            raise ModelFileError(
                f"reward model: {name} scores its golden example {scores[worst]:.2f} on {spec.attributes[worst]} "
                f"instead of {golden.scores[worst]:.2f}, further off than rounding is ({tolerance:.2f}); its weights, "
                "pad or EOS token were changed; restore them."
            )


def golden_ids(tokenizer: Any, spec: RewardSpec, name: str) -> list[int]:
    """Token ids of a model's golden example. Raises ModelFileError where they are not those it was trained with."""
    golden = spec.golden
    (ids,) = encode(tokenizer, spec.template, spec.max_length, [golden.messages], [golden.response])
    if ids is None or (golden.token_ids is not None and tuple(ids) != golden.token_ids):
        raise ModelFileError(
            f"reward model: {name} turns its golden example into other tokens than when it was trained; its "
            "template, its tokenizer or a special token was changed; restore them."
        )
    return ids


def worst_output(scores_M: np.ndarray, golden_M: Sequence[float], tolerance: float) -> int | None:
    """The output furthest from the golden score, not a number being the furthest; None where all are within."""
    difference_M = np.abs(scores_M - np.array(golden_M))
    if (difference_M <= tolerance).all():
        return None
    return int(np.argmax(np.nan_to_num(difference_M, nan=np.inf)))


def say_fp32(name: str | Path, reason: str) -> None:
    """Once for each model: why its scorers stay in fp32."""
    if str(name) not in _SAID:
        _SAID.add(str(name))
        _log.warning("reward model: %s scores in fp32: %s.", name, reason)


_SAID: set[str] = set()
