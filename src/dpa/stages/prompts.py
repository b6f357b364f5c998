"""Prompts a user brings, checked row by row, and the table they are kept in.
Run its tests: pytest tests/test_prompts.py
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

from dpa.core.errors import DataError, RejectRateError
from dpa.core.records import Prompt, messages_text, stable_hash
from dpa.storage.rows import (
    BadRow,
    check_messages,
    check_text,
    find_files,
    given_messages,
    is_hub_id,
    read_hub_rows,
    read_rows,
    whole_number,
)
from dpa.storage.schemas import PROMPTS
from dpa.storage.stage_records import Reject, count_reasons

MAX_ID = 200
"""Characters of an id."""


def read_prompts(
    path: str | Path,
    column: str = "prompt",
    max_reject_rate: float = 0.05,
    split: str = "train",
    field: str = "prompts",
) -> tuple[list[Prompt], list[Reject]]:
    """Read prompts from a .jsonl, .parquet or .csv file, a folder of them, or a `split` of a Hub data set.

    A row has `messages` (chat messages ending with a user's turn, as a list or as JSON text) or text in `column`,
    and optionally `id` (text or a whole number). Without an id the content is the id, so the order of the rows changes
    nothing; the same text twice counts as two prompts. Every row is returned once: as a prompt, or as a reject with
    its reason.

    Raises DataError when the file cannot be read or has no usable row, RejectRateError when more than
    `max_reject_rate` of its rows are bad; both name the `field` of the configuration that says what to read.
    """
    prompts: dict[str, Prompt] = {}
    rejects: list[Reject] = []
    repeats: Counter[str] = Counter()
    for place, row in _rows(str(path), column, split, field):
        try:
            prompt = _read_row(row, column, prompts, repeats)
            prompts[prompt.prompt_id] = prompt
        except BadRow as error:
            rejects.append(Reject(place, str(error)))
    total = len(prompts) + len(rejects)
    if len(rejects) > max_reject_rate * total:
        raise RejectRateError(
            f"{field}: {len(rejects)} of {total} rows of {path} are bad, more than rollout.max_reject_rate "
            f"{max_reject_rate:g} ({count_reasons(rejects)}); mend the file or raise it."
        )
    if not prompts:
        what = f"no usable row ({count_reasons(rejects)})" if rejects else "no rows"
        raise DataError(f"{field}: {path} has {what}; give a file with at least one prompt.")
    return list(prompts.values()), rejects


def without_held_out(prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that no policy is measured on, whatever their ids. Raises DataError where none is left."""
    measured = {messages_text(prompt.messages) for prompt in held_out}
    kept = [prompt for prompt in prompts if messages_text(prompt.messages) not in measured]
    if prompts and not kept:
        raise DataError("prompts: every one is a prompt of evaluate.prompts too; measure on other prompts.")
    return kept


def measured_prompts(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """`count` of the prompts (None: all), those with the smallest hash of their id, so that a file sorted by subject is
    drawn from evenly and every run and seed measures on the same; in the order of the file."""
    by_hash = sorted(range(len(prompts)), key=lambda place: stable_hash("measured", prompts[place].prompt_id))
    return [prompts[place] for place in sorted(by_hash[:count])]


def draw_prompts(
    prompts: Sequence[Prompt], t: int, count: int | None, seed: int, before: int | None = None
) -> list[Prompt]:
    """The prompts of iteration t >= 1: `count` drawn without repeats until all are used, then in another order.

    `before`: how many the iterations before drew, where that is not `count` each.
    """
    if count is None:
        return list(prompts)
    drawn: list[Prompt] = []
    orders: dict[int, list[int]] = {}
    count = min(count, len(prompts))
    first = (t - 1) * count if before is None else before
    for place in range(first, first + count):
        rounds, within = divmod(place, len(prompts))
        if rounds not in orders:
            orders[rounds] = list(range(len(prompts)))
            Random(f"prompts-{seed}-{rounds}").shuffle(orders[rounds])
        drawn.append(prompts[orders[rounds][within]])
    return list({prompt.prompt_id: prompt for prompt in drawn}.values())


def prompts_table(prompts: Sequence[Prompt]) -> pa.Table:
    """The columns of a shard of `prompts` or `eval_prompts`."""
    ids = [prompt.prompt_id for prompt in prompts]
    texts = [messages_text(prompt.messages) for prompt in prompts]
    return pa.table([ids, texts], schema=PROMPTS)


def prompts_from_table(table: pa.Table) -> list[Prompt]:
    """Invert `prompts_table`."""
    columns = (table[name].to_pylist() for name in PROMPTS.names)
    return [Prompt(prompt_id, json.loads(text)) for prompt_id, text in zip(*columns, strict=True)]


def _rows(path: str, column: str, split: str, field: str) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    if is_hub_id(path):
        # A rated data set's `messages` hold the answer too: of a Hub data set only the column is the prompt.
        yield from read_hub_rows(path, split, field, [column])
        return
    named = [column, "id", "messages"]
    for file in find_files(Path(path), f"{field}.path"):
        yield from read_rows(file, named, text_columns=named, field=f"{field}.path")


def _read_row(row: dict[str, Any] | BadRow, column: str, known: dict[str, Prompt], repeats: Counter[str]) -> Prompt:
    if isinstance(row, BadRow):
        raise row
    value = given_messages(row.get("messages"))
    if value is not None:
        messages = check_messages(value)
    else:
        messages = [{"role": "user", "content": check_text(row.get(column), column)}]
    given = row.get("id")
    if given is None or given == "":
        return Prompt(_content_id(messages, known, repeats), messages)
    number = whole_number(given)
    if number is None and not isinstance(given, str):
        raise BadRow(f"id is {type(given).__name__}, not text or a whole number")
    prompt_id = check_text(given if number is None else str(number), "id")
    if len(prompt_id) > MAX_ID:
        raise BadRow(f"id has {len(prompt_id)} characters, more than {MAX_ID}")
    if prompt_id in known:
        raise BadRow(f"id {prompt_id!r} is a duplicate")
    return Prompt(prompt_id, messages)


def _content_id(messages: list, known: dict[str, Prompt], repeats: Counter[str]) -> str:
    """Hash of the messages; a repeated prompt gets the hash of its content and how often it was there before."""
    text = messages_text(messages)
    while (prompt_id := stable_hash("prompt", text, repeats[text])) in known:
        repeats[text] += 1
    repeats[text] += 1
    return prompt_id
