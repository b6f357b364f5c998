"""The forms of rated data sets (docs/data.md): the columns and scales of each, and how a row becomes rated responses.
Run its tests: pytest tests/test_ratings.py
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpa.core.errors import DataError
from dpa.core.records import SCALE, Messages
from dpa.core.sections.ratings import TEXT_COLUMNS, RatingsConfig
from dpa.storage.rows import BadRow, check_messages, check_text, given_messages, quoted, whole_number
from dpa.storage.schemas import RATINGS, name_taken

Scale = tuple[float, float]
WIDEST_SCALE = 1e9
"""A wider one leaves nothing of the marks, or infinity."""

HELPSTEER_MARKS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
HELPSTEER_SCALE: Scale = (0, 4)
ULTRAFEEDBACK_MARKS = ("instruction_following", "truthfulness", "honesty", "helpfulness")
ULTRAFEEDBACK_SCALE: Scale = (1, 5)
ULTRAFEEDBACK_OVERALL_SCALE: Scale = (1, 10)

NEMO_MARKS = ("quality", "toxicity", "humor", "creativity", *HELPSTEER_MARKS)
"""Order of `label` in NeMo-Aligner's regression form; the first four are Open Assistant's and are not read."""
NEMO_MISSING = -100.0
NEMO_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""Boilerplate NeMo-Aligner puts before every conversation; it is not part of the data."""

_TURN = re.compile(r"\n?<extra_id_[01]>(System|User|Assistant)\n")
_LOW_SCORE = re.compile(
    r"(?:overall\s+score|score|rating)\s*(?:of|is|:|=)?\s*(?:0(?:\.\d+)?|1(?:\.0)?)\s*(?:/\s*10|out\s+of\s+10)?(?![\d.])"
    r"|(?<![\d.])[01]\s*(?:/\s*10|out\s+of\s+10)(?!\d)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RatedRow:
    """One response and its marks on the data set's own scales (None: not rated)."""

    messages: Messages
    response: str
    source: str
    marks: dict[str, float | None]
    trapped: bool = False
    """An UltraFeedback overall_score of 10 that is not believed was set to None."""


def to_hundred(mark: float, scale: Scale) -> float:
    """A mark on `scale` as a value on 0-100.

    A scale is read as whole numbers lowest..highest, and a mark becomes the centre of its bin:
    100 (mark - lowest + 0.5) / (highest - lowest + 1). HelpSteer's 0..4 gives 20 x + 10 (arXiv 2402.18571); 1..5 gives
    20 (x - 1) + 10 and 1..10 gives 10 (x - 1) + 5 by the same rule (our inference). 0-100 itself stays as it is.
    """
    low, high = scale
    if (low, high) == SCALE:
        return mark
    return 100.0 * (mark - low + 0.5) / (high - low + 1)


def declared_scales(config: RatingsConfig) -> dict[str, Scale]:
    """Attribute -> the data set's own scale, in the order of the table's columns. Raises DataError."""
    match config.format:
        case "helpsteer" | "helpsteer2":
            return {f"{config.format}-{name}": HELPSTEER_SCALE for name in HELPSTEER_MARKS}
        case "ultrafeedback":
            marks = {f"ultrafeedback-{name}": ULTRAFEEDBACK_SCALE for name in ULTRAFEEDBACK_MARKS}
            return {"ultrafeedback-overall_score": ULTRAFEEDBACK_OVERALL_SCALE, **marks}
        case "generic":
            names = config.attributes or list(config.scales)
            if not names:
                raise DataError(f"ratings: {config.path}: name its attributes in `attributes` or `scales`.")
            unknown = sorted(config.scales.keys() - set(names))
            if unknown:
                raise DataError(
                    f"ratings: {config.path}: scales names {unknown[0]!r}, which `attributes` lacks; add it."
                )
            for name, (low, high) in config.scales.items():
                if not low < high:
                    raise DataError(
                        f"ratings: {config.path}: scale of {name} is [{low}, {high}]; put the lower end first."
                    )
                if not high - low <= WIDEST_SCALE:
                    raise DataError(
                        f"ratings: {config.path}: scale of {name} is [{low}, {high}], wider than {WIDEST_SCALE:g}; "
                        "give the lowest and the highest mark there can be."
                    )
            if taken := name_taken(RATINGS, names):
                raise DataError(
                    f"ratings: {config.path}: an attribute cannot be called {taken!r}, as a column of every rated "
                    "table is; rename it in the file."
                )
            return {name: config.scales.get(name, SCALE) for name in names}


def named_columns(config: RatingsConfig, attributes: Sequence[str]) -> tuple[list[str], list[str]]:
    """The columns that are read, and those of them that hold text."""
    match config.format:
        case "helpsteer" | "helpsteer2":
            return ["prompt", "response", "text", "label", *HELPSTEER_MARKS], ["prompt", "response", "text"]
        case "ultrafeedback":
            return ["instruction", "completions", "source"], ["instruction", "source"]
        case "generic":
            texts = [config.columns.get(name, name) for name in TEXT_COLUMNS]
            return [*texts, *attributes], texts


def read_row(config: RatingsConfig, raw: dict[str, Any], names: Sequence[str]) -> Iterator[RatedRow | BadRow]:
    """The rated responses of one row of a data set, `names` being its attributes; each may be a BadRow instead."""
    try:
        match config.format:
            case "helpsteer" | "helpsteer2":
                yield _helpsteer(config, raw, names)
            case "ultrafeedback":
                yield from _ultrafeedback(config, raw, names)
            case "generic":
                yield _generic(config, raw, names)
    except BadRow as reason:
        yield reason


def _helpsteer(config: RatingsConfig, raw: dict[str, Any], names: Sequence[str]) -> RatedRow:
    """HelpSteer and HelpSteer2 rows (prompt, response, five marks), or NeMo-Aligner's `text` and `label` of them."""
    if raw.get("label") is not None:
        messages, response = _nemo_conversation(raw.get("text"))
        label = raw["label"]
        if not isinstance(label, list) or len(label) != len(NEMO_MARKS):
            raise BadRow(f"label is not a list of {len(NEMO_MARKS)} numbers")
        given = {name: None if mark == NEMO_MISSING else mark for name, mark in zip(NEMO_MARKS, label, strict=True)}
    else:
        messages = check_messages(_turns(check_text(raw.get("prompt"), "prompt")), "prompt")
        response = _answer(raw.get("response"), "response")
        given = raw
    marks = {name: _mark(given.get(short), short) for name, short in zip(names, HELPSTEER_MARKS, strict=True)}
    return RatedRow(messages, response, config.format, marks)


def _nemo_conversation(text: Any) -> tuple[Messages, str]:
    messages = _turns(check_text(text, "text").removesuffix("<extra_id_2>").removesuffix("\n"))
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("text does not end with the assistant's turn")
    response = _answer(messages[-1]["content"], "response")
    prompt = [message for message in messages[:-1] if message["content"] != NEMO_SYSTEM]
    return check_messages(prompt, "text"), response


def _turns(text: str) -> Messages:
    """Split a text at NVIDIA's turn marks (<extra_id_1>User); text before the first mark is the user's."""
    first, *rest = _TURN.split(text)
    messages: list[Any] = [{"role": "user", "content": first}] if first.strip() else []
    messages += [
        {"role": role.lower(), "content": content} for role, content in zip(rest[::2], rest[1::2], strict=True)
    ]
    return messages


def _ultrafeedback(config: RatingsConfig, raw: dict[str, Any], names: Sequence[str]) -> Iterator[RatedRow | BadRow]:
    """One row per completion. A completion's own system prompt, there to vary the answers, is left out."""
    completions = raw.get("completions")
    messages = _asked(raw.get("instruction"), "instruction")
    if not isinstance(completions, list):
        raise BadRow(f"completions is {type(completions).__name__}, not a list")
    given = _source(raw.get("source"), "source")
    source = f"ultrafeedback/{given}" if given else "ultrafeedback"
    for number, completion in enumerate(completions):
        try:
            if not isinstance(completion, dict):
                raise BadRow(f"completions[{number}] is {type(completion).__name__}, not an object")
            response = _answer(completion.get("response"), "response")
            _critique(completion)
            trapped = config.drop_overall_score_trap and is_overall_score_trap(completion)
            overall = None if trapped else _mark(completion.get("overall_score"), "overall_score")
            marks = [overall, *(_fine_mark(completion, name) for name in ULTRAFEEDBACK_MARKS)]
            yield RatedRow(messages, response, source, dict(zip(names, marks, strict=True)), trapped)
        except BadRow as reason:
            yield BadRow(f"completions[{number}]: {reason}")


def is_overall_score_trap(completion: Mapping[str, Any]) -> bool:
    """Whether an UltraFeedback overall_score of 10 is not to be believed (OpenBMB/UltraFeedback issue 8).

    The annotation script multiplied every score of at most 1 by ten, so a 10 may be a 1 ("if score > 1 else 10*score").
    The repository's own repair (fix_overall_score_issue.py) turns a 10 into a 1 where the mean of the four fine-grained
    marks is at most 2, asks GPT-4 again where it is at most 4, and keeps it above. Without GPT-4 at hand, a 10 is
    believed only where that mean is above 4 and the critique's text does not itself state a score of at most 1.
    Raises BadRow where critique or annotations are no such thing.
    """
    if _number(completion.get("overall_score")) != 10:
        return False
    if _LOW_SCORE.search(_critique(completion)):
        return True
    marks = [mark for name in ULTRAFEEDBACK_MARKS if (mark := _fine_mark(completion, name)) is not None]
    return not marks or sum(marks) / len(marks) <= 4


def _fine_mark(completion: Mapping[str, Any], name: str) -> float | None:
    annotation = _object(_object(completion.get("annotations"), "annotations").get(name), f"annotations.{name}")
    rating = annotation.get("Rating")
    return None if rating == "N/A" else _mark(rating, name)


def _object(value: Any, field: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise BadRow(f"{field} is {type(value).__name__}, not an object")
    return value or {}


def _critique(completion: Mapping[str, Any]) -> str:
    critique = completion.get("critique")
    return "" if critique is None else check_text(critique, "critique", may_be_empty=True)


def _generic(config: RatingsConfig, raw: dict[str, Any], names: Sequence[str]) -> RatedRow:
    """`prompt` or `messages`, `response`, one column per attribute; `columns` renames."""
    column = {name: config.columns.get(name, name) for name in TEXT_COLUMNS}
    given = given_messages(raw.get(column["messages"]), column["messages"])
    if given is not None:
        messages, response = _conversation(given, raw.get(column["response"]), column["response"])
    else:
        messages = _asked(raw.get(column["prompt"]), column["prompt"])
        response = _answer(raw.get(column["response"]), column["response"])
    marks = {name: _mark(raw.get(name), name) for name in names}
    source = _source(raw.get(column["source"]), column["source"]) or Path(config.path).stem
    return RatedRow(messages, response, source, marks)


def _conversation(messages: Any, response: Any, column: str) -> tuple[Messages, str]:
    """Messages that end with the user's turn beside a response, or with the assistant's turn as the response."""
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        answered = messages[-1].get("role") == "assistant"
        if response is None and not answered:
            raise BadRow(f"{column} is missing and messages do not end with the assistant's turn")
        if answered and (response is None or response == ""):  # "": a CSV has no other nothing
            messages, response = messages[:-1], messages[-1].get("content")
    return check_messages(messages), _answer(response, column)


def _asked(text: Any, field: str) -> Messages:
    return [{"role": "user", "content": check_text(text, field)}]


def _answer(text: Any, field: str) -> str:
    """A response may be empty: people rate silence too (42 rows of truthfulqa-judge), and its marks teach."""
    return check_text(text, field, may_be_empty=True)


def _source(value: Any, field: str) -> str | None:
    """Where a row comes from, text or a whole number; None where it does not say. Raises BadRow."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if (number := whole_number(value)) is not None:
        return str(number)
    return check_text(value, field)


def _mark(value: Any, field: str) -> float | None:
    """A finite number (or text that reads as one), or None where there is no mark. Raises BadRow."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    number = _number(value)
    if number is None:
        raise BadRow(f"{field} is {quoted(value)}, not a finite number")
    return number


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if np.isfinite(number) else None
