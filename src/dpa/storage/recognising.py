"""Which form a rated file has, found by looking at it: the section of the configuration that reads it.
Run its tests: pytest tests/test_init.py
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from dpa.core.config import parse_config
from dpa.core.errors import ConfigError, DataError
from dpa.core.sections.ratings import RatingsConfig
from dpa.storage.columns import Column, number_of, plain
from dpa.storage.rating_forms import HELPSTEER_MARKS, Scale
from dpa.storage.rows import find_files, is_hub_id, quoted, read_hub_rows, read_rows

NO_COLUMN = "(none)"
"""What a text is read from where the column of its name is something else."""
PEEKED = 100
"""Rows whose columns say which published form a file has."""
PROMPT_NAMES = ("prompt", "question", "instruction", "query", "input", "user", "request", "problem", "task", "context")
RESPONSE_NAMES = (
    "response",
    "answer",
    "completion",
    "output",
    "reply",
    "assistant",
    "generation",
    "prediction",
    "text",
)
"""Column names that mean it, the surest first; a longer name may hold one of them (`model_answer`)."""
REFERENCE_WORDS = {"gold", "golden", "reference", "ref", "expected", "correct", "truth", "target", "ideal"}
"""In the name of a text that rated responses are held against (`gold_answer`)."""
USUAL_SCALES: tuple[Scale, ...] = (
    *(
        (0, 1),
        (1, 2),
        (0, 2),
        (-1, 1),
        (1, 3),
        (0, 3),
        (1, 4),
        (0, 4),
        (1, 5),
        (-2, 2),
        (0, 5),
        (1, 6),
        (1, 7),
        (1, 10),
    ),
    *((0, 10), (1, 100), (0, 100)),
)


@dataclass(frozen=True)
class Recognised:
    """A data set: the section that reads it, what each part was recognised by, and columns that nothing reads."""

    config: RatingsConfig
    said: str
    unread: tuple[str, ...] = ()


def recognise(
    paths: Sequence[str], split: str = "train", named: Mapping[str, str] | None = None, marks: Sequence[str] = ()
) -> list[Recognised]:
    """How each file, folder or Hub data set is read. `named`: prompt, response -> column, and `marks`, where they are
    told. A mark of several files has one scale. Raises DataError where no form fits."""
    found = [_recognise(path, split, dict(named or {}), marks) for path in paths]
    scales: dict[str, dict[str, Scale]] = {}
    for path, one in zip(paths, found, strict=True):
        for name, scale in one.config.scales.items() if one.config.format == "generic" else ():
            scales.setdefault(name, {})[path] = scale
    shared = {name: _shared(name, of) for name, of in scales.items()}
    return [
        Recognised(
            one.config.model_copy(update={"scales": {name: shared[name] for name in one.config.scales}}),
            one.said,
            one.unread,
        )
        for one in found
    ]


def _shared(name: str, scales: Mapping[str, Scale]) -> Scale:
    """The scale that holds a mark's scales in several files (path -> scale). Raises DataError."""
    low, high = min(low for low, _ in scales.values()), max(high for _, high in scales.values())
    for (path, scale), (other, another) in combinations(scales.items(), 2):
        if not _may_be_one(scale, another):
            raise DataError(
                f"data: {name!r} is on {scale[0]:g} to {scale[1]:g} in {path} and on {another[0]:g} to {another[1]:g} "
                f"in {other}; give it another name in one of them."
            )
    return low, high


def _may_be_one(scale: Scale, other: Scale) -> bool:
    """Whether two guesses may be of one scale, which one of them does not use to its end."""
    narrow, wide = sorted(high - low for low, high in (scale, other))
    return scale == other or ((0, 1) not in (scale, other) and 2 * narrow >= wide)


def _recognise(path: str, split: str, named: dict[str, str], marks: Sequence[str]) -> Recognised:
    first = list(islice(_rows(path, split), PEEKED))
    names = {name for row in first for name in row}
    if not first:
        raise DataError(f"data: {path} has no row that can be read; is it the right file?")
    here = f"./{path}" if path.startswith("~") else path  # a file, not a home folder
    where: dict[str, Any] = {"path": path, "split": split} if is_hub_id(path) else {"path": here}
    if not named and not marks:
        if {"instruction", "completions"} <= names:
            config = RatingsConfig(**where, format="ultrafeedback")
            return Recognised(config, "UltraFeedback: an instruction and its rated completions")
        if _is_helpsteer(first, names) and _is_helpsteer(_rows(path, split), names):
            second = re.search(r"(?i)helpsteer-?_?2", path) is not None
            others = tuple(sorted(names - {"prompt", "response", "text", "label", "source", *HELPSTEER_MARKS}))
            config = RatingsConfig(**where, format="helpsteer2" if second else "helpsteer")
            return Recognised(config, f"HelpSteer{'2' if second else ''}: prompt, response, five marks on 0..4", others)
    columns: dict[str, Column] = {}
    for row in _rows(path, split):
        for name, value in row.items():
            columns.setdefault(name, Column(name)).add(value)
    return _generic(path, where, columns, named, marks)


def _generic(
    path: str, where: dict[str, Any], columns: dict[str, Column], named: dict[str, str], marks: Sequence[str]
) -> Recognised:
    for name in (*named.values(), *marks):
        if name not in columns:
            raise DataError(f"data: {path} has no column {name!r}; it has: {_listed(columns)}.")
    if "response" not in named and not marks:
        _check_one_response_a_row(path, columns)
    renamed: dict[str, str] = {}
    conversation = _pick([one for one in columns.values() if one.mostly(one.conversations)], ("messages",))
    if "prompt" in named:
        conversation = None
    if conversation is not None:
        renamed["messages"] = conversation.name
    elif "messages" in columns and "messages" not in named.values():
        renamed["messages"] = NO_COLUMN  # what is called so would be read before the prompt
    asked = _prompt_and_response(path, columns, named, conversation)
    renamed |= asked
    source = columns.get("source")
    if source is not None and not (source.mostly(source.texts) or (source.mostly(source.numbers) and source.whole)):
        renamed["source"] = NO_COLUMN
    texts_of = {column: name for name, column in ({"source": "source"} | renamed).items()}
    for name in marks:
        if name in texts_of:
            raise DataError(f"data: {path}: {name!r} is read as the {texts_of[name]}, so it is no mark; name another.")
        if not columns[name].numbers:
            raise DataError(f"data: {path}: {name!r} holds no numbers, so it is no mark; it has: {_listed(columns)}.")
    given = [columns[name] for name in marks] or [
        one for one in columns.values() if one.is_mark and one.name not in texts_of
    ]
    if not given:
        raise DataError(_no_marks(path, columns))
    scales = _scales(given)
    read = {*renamed.values(), *scales, "source", "prompt", "response", "messages"}
    section = where | {
        "columns": {name: column for name, column in renamed.items() if name != column},
        "scales": scales,
    }
    try:
        config = parse_config(section, RatingsConfig)
    except ConfigError as error:
        raise DataError(f"data: {path}: {error}") from None
    texts = [f"{column!r} is the {name}" for name, column in renamed.items() if name in ("prompt", "response")]
    if conversation is not None:
        texts.insert(0, f"{conversation.name!r} are the messages" + ("" if asked else ", the last one the response"))
    return Recognised(config, f"own columns: {', '.join(texts)}", tuple(name for name in columns if name not in read))


def _prompt_and_response(
    path: str, columns: dict[str, Column], named: dict[str, str], conversation: Column | None
) -> dict[str, str]:
    """prompt and response -> column; what the conversation holds is not looked for. Raises DataError."""
    texts = [one for one in columns.values() if one.mostly(one.texts) and one.name != "source"]
    if conversation is not None:
        if conversation.answered > conversation.present / 2:
            if "response" in named:
                raise DataError(
                    f"data: {path}: {conversation.name!r} ends with the response, so {named['response']!r} is no "
                    "answer to it; leave --response-column out, or name the prompt's column with --prompt-column."
                )
            return {"response": "(last message)"} if "response" in columns else {}
        response = named.get("response") or _named(_without_references(texts), RESPONSE_NAMES)
        if response is None:
            raise DataError(
                f"data: {path}: {conversation.name!r} ends with the user's turn and no column looks like the response; "
                f"name it with --response-column (it has: {_listed(columns)})."
            )
        return {"response": response}
    prompt = named.get("prompt") or _named([one for one in texts if one.name != named.get("response")], PROMPT_NAMES)
    rest = [one for one in texts if one.name != prompt]
    called = {plain(one.name): one.name for one in texts}
    if "prompt" not in named and {"instruction", "input"} <= called.keys():  # as Alpaca's
        raise DataError(
            f"data: {path} parts a prompt into {called['instruction']!r} and {called['input']!r}; write both into one "
            f"column, or name the one that is the whole prompt with --prompt-column."
        )
    rated = _without_references(rest)
    response = named.get("response") or _named(rated, RESPONSE_NAMES)
    if response is None and rated:  # every row has a response of its own
        response = max(rated, key=lambda one: (len(one.distinct), one.characters)).name
    others = [one for one in rest if one.name != response]
    if prompt is None and others:
        prompt = max(others, key=lambda one: one.characters).name
    if prompt is None or response is None:
        what, option = ("prompt", "--prompt-column") if prompt is None else ("response", "--response-column")
        raise DataError(_no_text(path, columns, what, option))
    return {"prompt": prompt, "response": response}


def _without_references(texts: Sequence[Column]) -> Sequence[Column]:
    return [one for one in texts if not REFERENCE_WORDS & set(plain(one.name).split("_"))] or texts


def _no_text(path: str, columns: dict[str, Column], what: str, option: str) -> str:
    hint = ""
    lists = [one.name for one in columns.values() if one.mostly(one.lists)]
    if lists:
        hint = f" Messages in {lists[0]!r} would be read if each had a role (system, user, assistant) and its content."
    elif len(columns) == 1 and any(sign in next(iter(columns)) for sign in ";\t"):
        hint = " Columns of a CSV are parted by commas."
    return f"data: {path}: no column looks like the {what}; name it with {option} (it has: {_listed(columns)}).{hint}"


def _no_marks(path: str, columns: dict[str, Column]) -> str:
    inside = [one.name for one in columns.values() if one.mostly(one.nested)]
    hint = f" Marks inside {inside[0]!r} are not seen: give each a column of its own." if inside else ""
    for one in columns.values():
        if one.not_finite and one.mostly(one.numbers + one.not_finite):
            hint = (
                f" {one.name!r} is NaN or infinite in {one.not_finite:,} of {one.present:,} rows: write null, or "
                "nothing in a CSV, where nobody rated."
            )
    return (
        f"data: {path}: no column looks like a mark (numbers that differ from row to row); name one with --mark (it "
        f"has: {_listed(columns)}).{hint}"
    )


def _check_one_response_a_row(path: str, columns: dict[str, Column]) -> None:
    """Pairs are no marks, and of several responses in a row nobody knows whose the marks are. Raises DataError."""
    called = {plain(name): name for name in columns}
    if {"chosen", "rejected"} <= called.keys():
        raise DataError(
            f"data: {path} holds pairs (chosen, rejected), not marks; rate the responses with numbers, one row each, "
            "or take a data set that has them, such as nvidia/HelpSteer2."
        )
    for stem in RESPONSE_NAMES:
        several = [name for own, name in called.items() if re.fullmatch(rf"{stem}s?_?(?:[a-d]|[0-9])", own)]
        if len(several) > 1:
            raise DataError(
                f"data: {path} has several responses in a row ({', '.join(map(repr, several[:4]))}); write a row for "
                "each, with the prompt and its own marks, or name one with --response-column and --mark."
            )


def _scales(marks: Iterable[Column]) -> dict[str, Scale]:
    """The scale that a mark's name says, else a usual one that holds it; marks in whole numbers share one where it
    fits, so that a 5 nobody gave for one of them is not forgotten."""
    marks = list(marks)
    said = {one.name: scale for one in marks if (scale := one.said_scale) is not None}
    own = {one.name: said.get(one.name) or usual_scale(one.low, one.high, one.whole) for one in marks}
    graded = [one for one in marks if one.whole and own[one.name] in USUAL_SCALES and own[one.name] != (0, 1)]
    if not graded:
        return own
    ends = [said.get(one.name, (one.low, one.high)) for one in graded]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    shared = usual_scale(low, high, whole=True)
    for one in (one for one in graded if one.name not in said):
        if shared in USUAL_SCALES and _may_be_one(own[one.name], shared):
            own[one.name] = shared
    return own


def usual_scale(low: float, high: float, whole: bool) -> Scale:
    """The narrowest scale in use that holds these marks; where they fill none, whole numbers around them."""
    around: Scale = (float(_floor(low)), float(max(_floor(low) + 1, -_floor(-high))))
    for scale in sorted(USUAL_SCALES, key=lambda scale: (scale[1] - scale[0], abs(scale[0] - low))):
        if scale[0] <= low and high <= scale[1]:
            few_steps = whole and scale[1] <= 10
            fits = few_steps or scale[1] - scale[0] <= 1.5 * (high - low) or scale == (0, 1)
            return scale if fits or high > 50 else around
    return around


def _floor(value: float) -> int:
    return int(value // 1)


def _is_helpsteer(rows: Iterable[Mapping[str, Any]], names: set[str]) -> bool:
    if {"text", "label"} <= names:
        return any(isinstance(row.get("label"), list) for row in rows)
    if not {"prompt", "response", *HELPSTEER_MARKS} <= names:
        return False
    marks = {number for row in rows for name in HELPSTEER_MARKS if (number := number_of(row.get(name))) is not None}
    return bool(marks) and min(marks) >= 0 and max(marks) <= 4


def _rows(path: str, split: str) -> Iterable[dict[str, Any]]:
    """Every row that can be read, all its columns."""
    if is_hub_id(path):
        read = (read_hub_rows(path, split, "data", None),)
    else:
        read = tuple(read_rows(file) for file in find_files(Path(path)))  # type: ignore[assignment]
    return (row for rows in read for _, row in rows if isinstance(row, dict))


def _pick(columns: Sequence[Column], names: Sequence[str]) -> Column | None:
    """The column of one of these names, else the first one."""
    named = {plain(one.name): one for one in columns}
    return next((named[name] for name in names if name in named), columns[0] if columns else None)


def _named(columns: Sequence[Column], names: Sequence[str]) -> str | None:
    """The column called by the surest of these names, else one whose name holds it as a word."""
    called = {plain(one.name): one.name for one in reversed(columns)}
    whole = next((called[name] for name in names if name in called), None)
    return whole or next((called[own] for name in names for own in called if name in own.split("_")), None)


def _listed(columns: Mapping[str, Column]) -> str:
    return ", ".join(quoted(name) for name in list(columns)[:20])
