"""Rated data sets of every form become one table on the 0-100 scale; docs/data.md describes the forms.
Run its tests: pytest tests/test_ratings.py
"""

import difflib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from dpa.core.config import RatingsConfig
from dpa.core.errors import DataError, DpaError, RejectRateError
from dpa.core.records import SCALE, Messages, Prompt, stable_hash
from dpa.storage.console import print_table
from dpa.storage.rows import (
    BadRow,
    check_messages,
    check_text,
    column_names,
    find_files,
    given_messages,
    is_hub_id,
    read_hub_rows,
    read_rows,
    shown,
)
from dpa.storage.schemas import RATINGS, name_taken, number_matrix, with_numbers
from dpa.storage.stage_records import Reject, count_reasons, write_rejects
from dpa.storage.tables import FileRecord, read_json, read_record, read_table, write_record, write_table

Scale = tuple[float, float]
WIDEST_SCALE = 1e9
"""A wider one leaves nothing of the marks, or infinity."""

SUMMARY = (
    *("rows", "prompts", "unrated_rows", "rejects", "reasons", "trapped_overall_scores", "attributes", "correlations"),
    "file",
)
"""Fields of ratings_summary.json."""

HELPSTEER_MARKS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
HELPSTEER_SCALE: Scale = (0, 4)
ULTRAFEEDBACK_MARKS = ("instruction_following", "truthfulness", "honesty", "helpfulness")
ULTRAFEEDBACK_SCALE: Scale = (1, 5)
ULTRAFEEDBACK_OVERALL_SCALE: Scale = (1, 10)

TEXT_COLUMNS: tuple[Literal["prompt", "response", "messages", "source"], ...] = (
    "prompt",
    "response",
    "messages",
    "source",
)

NEMO_MARKS = ("quality", "toxicity", "humor", "creativity", *HELPSTEER_MARKS)
"""Order of `label` in NeMo-Aligner's regression form; the first four are Open Assistant's and are not read."""
NEMO_MISSING = -100.0
NEMO_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""Boilerplate NeMo-Aligner puts before every conversation; it is not part of the data."""

_log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Ratings:
    """All rated rows. `table` is docs/architecture.md's ratings.parquet; `scales` are the data sets' own."""

    table: pa.Table
    scales: dict[str, Scale]
    rejects: list[Reject]
    trapped: int
    """UltraFeedback overall scores of 10 that were dropped."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the M attributes, in the order of the table's columns."""
        return tuple(self.scales)


def read_ratings(configs: Sequence[RatingsConfig]) -> Ratings:
    """Read every rated data set into one table, scale 0-100 (see `to_hundred`).

    Bad rows go to `rejects` with their reason. Raises DataError when a data set cannot be read at all and
    RejectRateError when more than its `max_reject_rate` of rows are bad.
    """
    scales: dict[str, Scale] = {}
    rows: list[RatedRow] = []
    rejects: list[Reject] = []
    for config in configs:
        declared = declared_scales(config)
        for name, scale in declared.items():
            if scales.setdefault(name, scale) != scale:
                raise DataError(
                    f"ratings: {name} is on {list(scales[name])} in one data set and on {list(scale)} in "
                    f"{config.path}; rename one of them."
                )
        good, bad = _read_one(config, declared)
        if len(bad) > config.max_reject_rate * (len(good) + len(bad)):
            raise RejectRateError(_too_many(config, len(good) + len(bad), bad))
        rows += good
        rejects += bad
    if not rows:
        why = ""
        if rejects:
            why = f" ({count_reasons(_kinds(rejects), most=3)}; first at {rejects[0].id}: {rejects[0].reason})"
        raise DataError(f"ratings: there is no usable row{why}; check the paths and the columns.")
    return Ratings(_table(rows, scales), scales, rejects, sum(row.trapped for row in rows))


def leave_out(ratings: Ratings, prompts: Sequence[Prompt]) -> Ratings:
    """The ratings without the rows of these prompts, so that what is measured on was never trained on."""
    held_out = {stable_hash(json.dumps(prompt.messages, ensure_ascii=False)) for prompt in prompts}
    kept = [prompt_id not in held_out for prompt_id in ratings.table["prompt_id"].to_pylist()]
    if not any(kept):
        raise DataError("ratings: every rated row belongs to a prompt of evaluate.prompts; measure on other prompts.")
    return replace(ratings, table=ratings.table.filter(pa.array(kept)))


def save_ratings(ratings: Ratings, folder: Path) -> dict[str, Any]:
    """Write ratings.parquet, ratings_rejects.jsonl and, last, ratings_summary.json; return the summary.

    The summary holds the table's checksum: ratings are there when it says so.
    """
    record = write_table(folder / "ratings.parquet", ratings.table)
    write_rejects(folder / "ratings_rejects.jsonl", "ratings", ratings.rejects)
    summary = {**summarise(ratings), "file": asdict(record)}
    write_record(folder / "ratings_summary.json", summary)
    return read_json(folder / "ratings_summary.json")


def load_ratings(folder: Path) -> tuple[pa.Table, dict[str, Any]] | None:
    """The saved table, its checksum verified, and its summary; None where none was finished, or it is damaged."""
    file = folder / "ratings_summary.json"
    if not file.exists():
        return None
    try:
        read_record(file, SUMMARY, optional=None)
        summary = read_json(file)
        return read_table(folder / "ratings.parquet", FileRecord(**summary["file"])), summary
    except (DpaError, TypeError) as error:
        _log.warning("ratings: %s; the rated data are read again.", str(error).split("; ")[0].removesuffix("."))
        return None


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


def summarise(ratings: Ratings) -> dict[str, Any]:
    """Counts, and for every attribute on 0-100: count, mean, standard deviation, range; Pearson of every pair.

    Correlations are over the rows that have both marks (`n` says how many), null where one does not vary.
    """
    marks_NM = number_matrix(ratings.table, ratings.attributes)
    attributes = {}
    for name, marks_N in zip(ratings.attributes, marks_NM.T, strict=True):
        present = marks_N[~np.isnan(marks_N)]
        some = present.size > 0
        attributes[name] = {
            "scale": list(ratings.scales[name]),
            "count": int(present.size),
            "mean": float(present.mean()) if some else None,
            "std": float(present.std()) if some else None,
            "min": float(present.min()) if some else None,
            "max": float(present.max()) if some else None,
        }
    correlations = [
        {"a": a, "b": b, **_pearson(marks_NM[:, i], marks_NM[:, j])}
        for i, a in enumerate(ratings.attributes)
        for j, b in enumerate(ratings.attributes[:i])
    ]
    return {
        "rows": ratings.table.num_rows,
        "prompts": len(set(ratings.table["prompt_id"].to_pylist())),
        "unrated_rows": int(np.isnan(marks_NM).all(axis=1).sum()),
        "rejects": len(ratings.rejects),
        "reasons": dict(Counter(_kind(bad.reason) for bad in ratings.rejects).most_common()),
        "trapped_overall_scores": ratings.trapped,
        "attributes": attributes,
        "correlations": correlations,
    }


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `summarise` found: a table of attributes, then their correlations."""
    console = console or Console()
    title = f"{summary['rows']:,} rated rows of {summary['prompts']:,} prompts, {summary['rejects']:,} rejected"
    table = Table(title=title)
    for heading in ("attribute", "scale", "rated", "mean", "std", "range"):
        table.add_column(heading, justify="left" if heading == "attribute" else "right")
    for name, facts in summary["attributes"].items():
        low, high = facts["scale"]
        row = [name, f"{low:g}..{high:g}", f"{facts['count']:,}"]
        if facts["count"]:
            row += [f"{facts['mean']:.1f}", f"{facts['std']:.1f}", f"{facts['min']:.0f}-{facts['max']:.0f}"]
        table.add_row(*row)
    print_table(table, console)
    known = [pair for pair in summary["correlations"] if pair["pearson"] is not None]
    for pair in sorted(known, key=lambda pair: -abs(pair["pearson"])):
        console.print(f"  {pair['pearson']:+.2f}  {pair['a']} ~ {pair['b']}  (n = {pair['n']:,})", highlight=False)
    for reason, count in summary["reasons"].items():
        console.print(f"  rejected {count:,}: {reason}", highlight=False)
    if summary["trapped_overall_scores"]:
        console.print(f"  {summary['trapped_overall_scores']:,} overall scores of 10 dropped (OpenBMB issue 8)")


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


def _read_one(config: RatingsConfig, scales: Mapping[str, Scale]) -> tuple[list[RatedRow], list[Reject]]:
    parse: Callable[[RatingsConfig, dict[str, Any], Sequence[str]], Iterator[RatedRow | BadRow]]
    parse = {"helpsteer": _helpsteer, "helpsteer2": _helpsteer, "ultrafeedback": _ultrafeedback, "generic": _generic}[
        config.format
    ]
    good: list[RatedRow] = []
    bad: list[Reject] = []
    names = list(scales)
    columns: set[str] = set()
    for place, raw in _raw_rows(config, names):
        if isinstance(raw, dict):
            columns |= raw.keys()
            results = parse(config, raw, names)
        else:
            results = iter([raw])
        for result in results:
            try:
                if isinstance(result, BadRow):
                    raise result
                _check_range(result, scales)
                good.append(result)
            except BadRow as reason:
                bad.append(Reject(place, str(reason)))
    if config.format == "generic":
        files = [] if is_hub_id(config.path) else find_files(Path(config.path))
        _check_columns(config, names, columns.union(*map(column_names, files)))
    return good, bad


def _raw_rows(config: RatingsConfig, attributes: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    columns, texts = _named_columns(config, attributes)
    if is_hub_id(config.path):
        yield from read_hub_rows(config.path, config.split, "ratings", columns)
        return
    for file in find_files(Path(config.path)):
        yield from read_rows(file, columns, texts)


def _named_columns(config: RatingsConfig, attributes: Sequence[str]) -> tuple[list[str], list[str]]:
    """The columns that are read, and those of them that hold text."""
    match config.format:
        case "helpsteer" | "helpsteer2":
            return ["prompt", "response", "text", "label", *HELPSTEER_MARKS], ["prompt", "response", "text"]
        case "ultrafeedback":
            return ["instruction", "completions", "source"], ["instruction", "source"]
        case "generic":
            texts = [config.columns.get(name, name) for name in TEXT_COLUMNS]
            return [*texts, *attributes], texts


def _helpsteer(config: RatingsConfig, raw: dict[str, Any], names: Sequence[str]) -> Iterator[RatedRow | BadRow]:
    """HelpSteer and HelpSteer2 rows (prompt, response, five marks), or NeMo-Aligner's `text` and `label` of them."""
    try:
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
    except BadRow as reason:
        yield reason
        return
    yield RatedRow(messages, response, config.format, marks)


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
    try:
        messages = _asked(raw.get("instruction"), "instruction")
        if not isinstance(completions, list):
            raise BadRow(f"completions is {type(completions).__name__}, not a list")
        given = _source(raw.get("source"), "source")
    except BadRow as reason:
        yield reason
        return
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


def _generic(config: RatingsConfig, raw: dict[str, Any], names: Sequence[str]) -> Iterator[RatedRow | BadRow]:
    """`prompt` or `messages`, `response`, one column per attribute; `columns` renames."""
    column = {name: config.columns.get(name, name) for name in ("prompt", "response", "messages", "source")}
    try:
        given = given_messages(raw.get(column["messages"]), column["messages"])
        if given is not None:
            messages, response = _conversation(given, raw.get(column["response"]), column["response"])
        else:
            messages = _asked(raw.get(column["prompt"]), column["prompt"])
            response = _answer(raw.get(column["response"]), column["response"])
        marks = {name: _mark(raw.get(name), name) for name in names}
        source = _source(raw.get(column["source"]), column["source"]) or Path(config.path).stem
    except BadRow as reason:
        yield reason
        return
    yield RatedRow(messages, response, source, marks)


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
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return check_text(value, field)


def _check_columns(config: RatingsConfig, names: Sequence[str], columns: set[str]) -> None:
    for name in names:
        if columns and name not in columns:
            near = difflib.get_close_matches(name, columns, n=1)
            some = ", ".join(sorted(columns)[:20]).encode("utf-8", "backslashreplace").decode()
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {some}."
            raise DataError(f"ratings: {config.path} has no column {name!r} for that attribute; {hint}")


def _check_range(row: RatedRow, scales: Mapping[str, Scale]) -> None:
    for name, mark in row.marks.items():
        low, high = scales[name]
        if mark is not None and not low <= mark <= high:
            raise BadRow(f"{name} is {mark:g}, outside [{low:g}, {high:g}]")


def _mark(value: Any, field: str) -> float | None:
    """A finite number (or text that reads as one), or None where there is no mark. Raises BadRow."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    number = _number(value)
    if number is None:
        raise BadRow(f"{field} is {shown(value)}, not a finite number")
    return number


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if np.isfinite(number) else None


def _table(rows: list[RatedRow], scales: Mapping[str, Scale]) -> pa.Table:
    messages = [json.dumps(row.messages, ensure_ascii=False) for row in rows]
    prompt_ids = [stable_hash(text) for text in messages]
    occurrences: Counter[tuple[str, str, str]] = Counter()
    row_ids = []
    for row, prompt_id in zip(rows, prompt_ids, strict=True):
        key = (row.source, prompt_id, row.response)
        row_ids.append(stable_hash(*key, occurrences[key]))
        occurrences[key] += 1
    texts = [row_ids, prompt_ids, messages, [row.response for row in rows], [row.source for row in rows]]
    marks = [
        [None if (mark := row.marks.get(name)) is None else to_hundred(mark, scale) for row in rows]
        for name, scale in scales.items()
    ]
    return pa.table([*texts, *marks], schema=with_numbers(RATINGS, list(scales)))


def _pearson(a_N: np.ndarray, b_N: np.ndarray) -> dict[str, Any]:
    both = ~(np.isnan(a_N) | np.isnan(b_N))
    a, b = a_N[both], b_N[both]
    varies = a.size > 1 and np.ptp(a) > 0 and np.ptp(b) > 0
    return {"n": int(both.sum()), "pearson": float(np.corrcoef(a, b)[0, 1]) if varies else None}


def _kind(reason: str) -> str:
    """A reason without its particular numbers and values, to count by."""
    return re.sub(r"'[^']*'|-?\d+(?:[.,]\d+)*", "…", reason)


def _kinds(rejects: Sequence[Reject]) -> list[Reject]:
    return [Reject(reject.id, _kind(reject.reason)) for reject in rejects]


def _too_many(config: RatingsConfig, total: int, bad: list[Reject]) -> str:
    kinds = count_reasons(_kinds(bad), most=3)
    return (
        f"ratings: {len(bad)} of {total} rows of {config.path} are bad, more than max_reject_rate "
        f"{config.max_reject_rate:g} ({kinds}; first at {bad[0].id}: {bad[0].reason}); mend the rows or raise it."
    )
