"""Data: a finished selection as a data set that other trainers read, with the policy they start from beside it.
Run its tests: pytest tests/test_elsewhere.py

    trl        prompt and completion (or chosen and rejected) as lists of messages, and a column `chat_template_kwargs`
               with the row's direction, which TRL's SFTTrainer and DPOTrainer hand to the chat template row by row
    messages   the direction's sentence in the messages themselves, for programs that pass no template variables
               (LLaMA-Factory, axolotl)

The sentence of a target stands in the messages in both: a column of numbers does not take the values it holds.

Rows are read shard by shard, each checked against its record, and written as they come.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError

from dpa.core.directions import DirectionSpace
from dpa.core.errors import DataError
from dpa.core.records import Messages, stable_hash
from dpa.core.targets import preference_of, sentence, wish_of
from dpa.models.chat_template import has_system_role, with_sentence
from dpa.models.policy import encode_chat, encode_prompt
from dpa.sampling.prompting import Prompting
from dpa.storage.run_folder import StageFolder
from dpa.storage.schemas import HELD, completeness
from dpa.storage.tables import file_digest

Form = Literal["trl", "messages"]
SPLITS = ("train", "test")
CUT = "an answer was cut at its limit of tokens: written as a turn, it would teach to stop in mid-sentence"

_CHECKED = 200
"""Rows whose token ids are compared with those dpa's own learner would read."""

_MESSAGE = pa.struct({"role": pa.string(), "content": pa.string()})
_CHAT = pa.list_(_MESSAGE)


@dataclass(frozen=True)
class DataSettings:
    """`count`: as many rows, drawn by `seed` (None: all). `held_out`: share of the prompts that is kept apart in the
    split `test`, a prompt's rows all in the same one. `keep_cut`: also rows whose answer was cut at a limit."""

    form: Form = "trl"
    format: str = "parquet"
    count: int | None = None
    held_out: float = 0.0
    seed: int = 0
    keep_cut: bool = False


@dataclass
class Written:
    """What was written: `rows` and `files` (name -> SHA-256) of each split, rows `left_out` by reason; of the `checked`
    rows those whose token ids are `other` than dpa's own, and the text `after` an answer's end token, which other
    trainers train on too."""

    pairs: bool
    rows: dict[str, int]
    files: dict[str, str]
    left_out: dict[str, int] = field(default_factory=dict)
    checked: int = 0
    other: int = 0
    after: str = ""


def write_data(
    selection: StageFolder, folder: Path, space: DirectionSpace, prompting: Prompting, settings: DataSettings
) -> Written:
    """Write the winners or pairs of a finished selection as `train` and, where any are held out, `test`.

    `prompting` is that of the policy to be trained, its template as it will be there. Raises DataError when no row is
    left, RunFolderError when the selection is not finished, StorageError when it is damaged.
    """
    pairs, written = None, Written(False, {}, {})
    usable = [_usable(table, settings.keep_cut) for table in selection.tables()]
    kept = _drawn(usable, settings)
    left_out = sum(map(len, usable)) - sum(int(rows.sum()) for rows in usable)
    if left_out:
        written.left_out[CUT] = left_out
    system_role = has_system_role(prompting.tokenizer.get_chat_template())
    with ExitStack() as files:
        writers: dict[str, _Writer] = {}
        for table, wanted in zip(selection.tables(), kept, strict=True):
            pairs = "chosen" in table.column_names
            parts: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
            for row in table.filter(pa.array(wanted)).to_pylist():
                made = _row(row, space, settings.form, system_role, pairs)
                parts["test" if _is_held_out(row["messages"], settings) else "train"].append(made)
                if written.checked < _CHECKED:
                    _check(row, made, prompting, space, pairs, written)
            for name, rows in parts.items():
                if rows and name not in writers:
                    schema = _schema(space, settings.form, pairs)
                    writers[name] = files.enter_context(_Writer(folder / f"{name}.{settings.format}", schema))
                if rows:
                    writers[name].write(rows)
    written.pairs = bool(pairs)
    if "train" not in writers:
        raise DataError(
            f"{selection.name}: no row is left to train on"
            + (f" ({left_out} x {CUT}); --keep-cut takes them all the same." if left_out else "; lower --held-out.")
        )
    written.rows = {name: writer.rows for name, writer in writers.items()}
    written.files = {writer.file.name: file_digest(writer.file) for writer in writers.values()}
    return written


class _Writer:
    """The file of a split, Parquet or JSON lines, written part by part."""

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        self.file, self.rows, self._schema = file, 0, schema
        self._parquet = pq.ParquetWriter(file, schema, compression="zstd") if file.suffix == ".parquet" else None
        self._lines = None if self._parquet else file.open("wb")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        for opened in filter(None, (self._parquet, self._lines)):
            opened.close()

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows."""
        self.rows += len(rows)
        if self._parquet is not None:
            self._parquet.write_table(pa.Table.from_pylist(list(rows), self._schema))
        if self._lines is not None:
            self._lines.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)


def _usable(table: pa.Table, keep_cut: bool) -> np.ndarray:
    """Which rows may be written, one flag each."""
    columns = ("chosen_complete", "rejected_complete") if "chosen" in table.column_names else ("complete",)
    whole = np.all([completeness(table, column) for column in columns], axis=0).reshape(len(table))
    return whole | keep_cut


def _drawn(usable: Sequence[np.ndarray], settings: DataSettings) -> list[np.ndarray]:
    """The flags of those that are drawn, `settings.count` of all tables together."""
    flags = np.concatenate([*usable, np.zeros(0, bool)])
    places = np.flatnonzero(flags)
    if settings.count is not None and settings.count < len(places):
        drawn = np.random.default_rng([settings.seed, 0xDA7A]).choice(places, settings.count, replace=False)
        flags = np.zeros(len(flags), bool)
        flags[drawn] = True
    return np.split(flags, np.cumsum([len(rows) for rows in usable])[:-1])


def _is_held_out(messages: str, settings: DataSettings) -> bool:
    """By the prompt's own text: the same question under another id is on the same side."""
    return int(stable_hash("held-out", settings.seed, messages), 16) < settings.held_out * 16**16


def _schema(space: DirectionSpace, form: Form, pairs: bool) -> pa.Schema:
    numbers = pa.struct([(name, pa.float64()) for name in space.names])
    if form == "trl":
        answers = ("chosen", "rejected") if pairs else ("completion",)
        fields: dict[str, pa.DataType] = {"prompt": _CHAT, **dict.fromkeys(answers, _CHAT)}
        fields["chat_template_kwargs"] = pa.struct({"preference": numbers})
    else:
        fields = {"messages": _CHAT} | (dict.fromkeys(("chosen", "rejected"), _MESSAGE) if pairs else {})
        fields["direction"] = pa.string()
    return pa.schema({**fields, "prompt_id": pa.string(), "scores": numbers})


def _row(row: Mapping[str, Any], space: DirectionSpace, form: Form, system_role: bool, pairs: bool) -> dict[str, Any]:
    """A row of a selection as it is written. `scores` are the winner's (of a pair: the chosen one's)."""
    prompt = [{"role": one["role"], "content": one["content"]} for one in json.loads(row["messages"])]
    answers = {
        name: {"role": "assistant", "content": row[name if pairs else "response"]}
        for name in (("chosen", "rejected") if pairs else ("completion",))
    }
    weights, held = row["direction"], row.get(HELD.name)
    wish = None if weights is None else wish_of(space, weights, held)
    stated = prompt if wish is None else with_sentence(prompt, sentence(space, wish), space.placement, system_role)
    about = {"prompt_id": row["prompt_id"], "scores": {name: row[name] for name in space.names}}
    if form == "trl":
        alone = {name: [answer] for name, answer in answers.items()}
        if held is not None:
            return {"prompt": stated, **alone, "chat_template_kwargs": {"preference": None}, **about}
        preference = None if weights is None else preference_of(space.names, weights)
        return {"prompt": prompt, **alone, "chat_template_kwargs": {"preference": preference}, **about}
    said: dict[str, Any] = {"messages": stated, **answers} if pairs else {"messages": [*stated, answers["completion"]]}
    return {**said, "direction": None if wish is None else str(wish), **about}


def _check(
    row: Mapping[str, Any],
    made: Mapping[str, Any],
    prompting: Prompting,
    space: DirectionSpace,
    pairs: bool,
    written: Written,
) -> None:
    """Compare what the written row becomes through the chat template with what dpa's learner reads: prompt, answer and
    an end token."""
    tokenizer = prompting.tokenizer
    written.checked += 1
    try:
        prompt = encode_prompt(tokenizer, space, json.loads(row["messages"]), row["direction"], row.get(HELD.name))
        for answer, chat, variables in _conversations(row, made, pairs):
            own = prompt + tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
            theirs = encode_chat(tokenizer, chat, add_generation_prompt=False, **variables)
            if theirs[: len(own)] != own or theirs[len(own) : len(own) + 1] not in ([end] for end in prompting.end_ids):
                written.other += 1
                return
            written.after = written.after or str(tokenizer.decode(theirs[len(own) + 1 :]))
    except (TemplateError, KeyError, TypeError, ValueError):
        written.other += 1


def _conversations(
    row: Mapping[str, Any], made: Mapping[str, Any], pairs: bool
) -> Iterator[tuple[str, Messages, dict[str, Any]]]:
    """(answer, the whole conversation, template variables) of a written row."""
    if "prompt" in made:
        for name in ("chosen", "rejected") if pairs else ("completion",):
            yield made[name][0]["content"], [*made["prompt"], *made[name]], made["chat_template_kwargs"]
    elif pairs:
        for name in ("chosen", "rejected"):
            yield made[name]["content"], [*made["messages"], made[name]], {}
    else:
        yield row["response"], made["messages"], {}
