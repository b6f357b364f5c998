"""Does the policy read its direction? Measured on selected rows that are kept out of training, before any rollout.
Run its tests: pytest tests/test_listening.py

The flip gap of a held-out row (x, v, y): the loss of the winner y under another direction of its pool that chose
another winner (where the rows have none, one that the selection found by asking the pool; for a target a value the
winner does not have) minus its loss under its own,

    log p(y | x, v) - log p(y | x, v'),      in nats; over the tokens of all rows, and as a mean over rows.

While it is near zero, and the own direction makes only about half of the rows likelier, the direction is not read, and
a rollout would sample the same answers whatever is asked. Intervals are 95% bootstrap intervals over prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpa.core.directions import DirectionSpace
from dpa.core.records import stable_hash
from dpa.models.attention import pack_lengths, to_device
from dpa.storage.schemas import completeness, held_values, named_negatives
from dpa.training.contrastive import label_log_probabilities
from dpa.training.target_negatives import Stated, negatives

LISTENING_ROWS = 64
"""Rows kept out of training where the configuration does not say how many ..."""
LISTENING_SHARE = 0.02
"""... but at most this share of them, ..."""
FEWEST = 8
"""... and none where that is fewer than these."""

HEARD = 0.55
"""A policy whose share of likelier rows may be as low as this, by its interval, is not known to listen."""

WHERE_NOT_FOLLOWING = "more in docs/learning.md, 'Where a policy does not follow'"
"""Ends what is said of a policy that does not follow its direction."""

PREFIX = "listening_"
"""Before the names of the figures in a log and in a ledger."""

_RESAMPLES = 1000


@dataclass(frozen=True)
class Listening:
    """Figures over `rows` held-out rows. `share` of them are likelier under their own direction (ties count half), with
    its interval; the flip gap `gap_token` in nats a token and `gap_response` in nats a response, with its interval."""

    rows: int
    share: float
    share_low: float
    share_high: float
    gap_token: float
    gap_response: float
    gap_response_low: float
    gap_response_high: float

    @property
    def heard(self) -> bool:
        """Whether more rows are likelier under their own direction than chance would make."""
        return self.share_low >= HEARD

    def to_log(self) -> dict[str, float]:
        """Its figures by the names they have in a log and in a ledger."""
        return {f"{PREFIX}{name}": float(value) for name, value in vars(self).items()}

    def __str__(self) -> str:
        return (
            f"own direction likelier for {self.share:.0%} ({self.share_low:.0%} to {self.share_high:.0%}) of "
            f"{self.rows} held-out rows, flip gap {self.gap_token:.4f} nats a token, {self.gap_response:.2f} a response"
        )


def hold_out(rows: pa.Table, count: int | None, gated: bool = False) -> tuple[pa.Table, pa.Table]:
    """(rows to train on, rows to measure listening on) of selected rows; the latter may be none.

    Whole prompts are held out, those with the smallest hash, so that another iteration or seed takes the same: as many
    as stay within `count` rows, at most half of them. `count` None: LISTENING_ROWS, LISTENING_SHARE, FEWEST. Where the
    run is `gated` by what is measured, FEWEST rows and one prompt at least, if they are no more than half of all. Not
    held out are rows that state no direction, and prompts whose rows have one response and know no direction for which
    the pool keeps another: nothing could be measured on them.
    """
    prompts = rows["prompt_id"].to_pylist()
    if count is None:
        count = min(LISTENING_ROWS, int(LISTENING_SHARE * len(rows)))
        if count < FEWEST:
            count = FEWEST if gated else 0
    count = min(count, len(rows) // 2)
    if count == 0:  # prompts to learn from have no responses
        return rows, rows.slice(0, 0)
    sizes: dict[str, int] = {}
    said: dict[str, set[str]] = {}
    measurable: set[str] = set()
    stated = rows["direction"].is_valid().to_pylist()
    responses = rows["chosen" if "chosen" in rows.column_names else "response"].to_pylist()
    for prompt, is_stated, response, negative in zip(prompts, stated, responses, named_negatives(rows), strict=True):
        if is_stated:
            sizes[prompt] = sizes.get(prompt, 0) + 1
            said.setdefault(prompt, set()).add(response)
            if negative != [] or len(said[prompt]) > 1:
                measurable.add(prompt)
    held: set[str] = set()
    for prompt in sorted(measurable, key=lambda name: stable_hash("listening", name)):
        is_needed = gated and not held and sizes[prompt] <= len(rows) // 2
        if sizes[prompt] > count and not is_needed:
            break
        held.add(prompt)
        count -= sizes[prompt]
    out = pa.array([prompt in held for prompt in prompts], pa.bool_())
    return rows.filter(pa.array([not each for each in out.to_pylist()], pa.bool_())), rows.filter(out)


def listening(
    own_R: Sequence[float], other_R: Sequence[float], tokens_R: Sequence[int], names_R: Sequence[str]
) -> Listening:
    """Figures from log p of each row's response under its own and under another direction, its number of tokens and its
    prompt's name. The bootstrap draws prompts."""
    gap_R, tokens, names = np.array(own_R) - np.array(other_R), np.array(tokens_R, float), list(dict.fromkeys(names_R))
    likelier_R = np.where(gap_R == 0, 0.5, gap_R > 0)
    member_RP = np.array(names_R)[:, None] == np.array(names)
    rows_P, likelier_P, gap_P = member_RP.sum(0), likelier_R @ member_RP, gap_R @ member_RP
    drawn_BP = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), _RESAMPLES)
    counted_B = drawn_BP @ rows_P
    share_B, gap_B = drawn_BP @ likelier_P / counted_B, drawn_BP @ gap_P / counted_B
    share_low, share_high = np.quantile(share_B, [0.025, 0.975])
    gap_low, gap_high = np.quantile(gap_B, [0.025, 0.975])
    return Listening(
        rows=len(gap_R),
        share=float(likelier_R.mean()),
        share_low=float(share_low),
        share_high=float(share_high),
        gap_token=float(gap_R.sum() / tokens.sum()),
        gap_response=float(gap_R.mean()),
        gap_response_low=float(gap_low),
        gap_response_high=float(gap_high),
    )


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows as token ids: (own prompt, other prompt, response) of each, and the name of its prompt."""

    rows: tuple[tuple[list[int], list[int], list[int]], ...]
    prompts: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Read in one measurement."""
        return sum(len(own) + len(other) + 2 * len(response) for own, other, response in self.rows)

    def measure(self, model: Any) -> Listening:
        """The flip gap of `model`, one response at a time, without gradients; its mode is left as it was."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                own, other = ([_log_p(model, row[side], row[2]) for row in self.rows] for side in (0, 1))
        finally:
            model.train(was_training)
        return listening(own, other, [len(row[2]) for row in self.rows], self.prompts)


def held_out_rows(
    rows: pa.Table, space: DirectionSpace, seed: int, encode: Callable[..., tuple[list[int], list[list[int]]] | str]
) -> HeldOut | None:
    """The held-out rows (select shard columns, of winners or of pairs) that can be measured, or None where none can.

    `encode`: `RowEncoder.encode` of the training. A row without a direction that does not choose its response, or too
    long, is left out.
    """
    if "chosen" in rows.column_names:
        rows = rows.append_column("response", rows["chosen"])
    complete = completeness(rows, "chosen_complete" if "chosen" in rows.column_names else "complete")
    columns = (rows[name].to_pylist() for name in ("prompt_id", "messages", "direction", "response"))
    stated = zip(zip(*columns, strict=True), held_values(rows), negatives(rows, space, 1, seed), strict=True)
    found, prompts = [], []
    for ((prompt, messages, direction, response), held, others), whole in zip(stated, complete, strict=True):
        sides = [
            encode(messages, side.direction, [response], [whole], side.held)
            for side in (Stated(direction, held), *others)
        ]
        if len(sides) == 2 and not isinstance(sides[0], str) and not isinstance(sides[1], str):
            found.append((sides[0][0], sides[1][0], sides[0][1][0]))
            prompts.append(prompt)
    return HeldOut(tuple(found), tuple(prompts)) if found else None


class MeasureListening(TrainerCallback):
    """Measures every `every` optimizer steps and after the last, and writes the figures into the Trainer's log.

    Add it last: an entry of its own follows that of the step, whose callbacks have been called by then.
    """

    def __init__(self, held_out: HeldOut, every: int, trainer: Any) -> None:
        self._held_out, self._every, self._trainer = held_out, every, trainer
        self._measured = 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure where it is time."""
        step = state.global_step
        due = step % self._every == 0 or step >= state.max_steps
        # A step that fails logs its loss under the number of the one before.
        if due and step > self._measured and "loss" in kwargs["logs"]:
            self._measured = step
            self._trainer.log(self._held_out.measure(kwargs["model"]).to_log())

    def last(self) -> Listening | None:
        """What was measured last, in this process or in the one that this one resumed."""
        entries = [entry for entry in self._trainer.state.log_history if f"{PREFIX}share" in entry]
        if not entries:
            return None
        figures = {name: entries[-1][f"{PREFIX}{name}"] for name in Listening.__dataclass_fields__}
        return Listening(**figures | {"rows": int(figures["rows"])})


def advice(found: Listening, more: str) -> str:
    """What to change where a policy does not listen: `more` is a learner's own. No higher rate: with the paper's loss
    that unlearned the direction (docs/findings.md)."""
    return (
        f"the policy hardly reads its direction: {found}. To change it: train on more questions with fewer directions "
        f"each (prompts.count, selection.directions){', or ' if more else ''}{more}; {WHERE_NOT_FOLLOWING}."
    )


def _log_p(model: Any, prompt: list[int], response: list[int]) -> float:
    """log p of the response's tokens behind the prompt."""
    device, length = next(model.parameters()).device, len(prompt) + len(response)
    inputs = to_device(
        {
            "input_ids": torch.tensor([[*prompt, *response]]),
            "logits_to_keep": torch.arange(len(prompt) - 1, length - 1),
            **pack_lengths([length]),  # a row of one: attention may be that of packed rows just now
        },
        device,
    )
    logits = model(**inputs, use_cache=False).logits
    return float(label_log_probabilities(logits[0], inputs["input_ids"][0, len(prompt) :]).sum())
