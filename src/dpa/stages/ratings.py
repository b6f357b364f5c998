"""Rated data sets of every form become one table on the 0-100 scale; docs/data.md describes the forms.
Run its tests: pytest tests/test_ratings.py
"""

import difflib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpa.core.errors import DamageError, DataError, RejectRateError
from dpa.core.records import Messages, Prompt, messages_text, stable_hash
from dpa.core.sections.ratings import RatingsConfig
from dpa.storage.console import print_table
from dpa.storage.rating_forms import RatedRow, Scale, declared_scales, named_columns, read_row, to_hundred
from dpa.storage.rows import (
    BadRow,
    column_names,
    find_files,
    is_hub_id,
    read_hub_rows,
    read_rows,
)
from dpa.storage.schemas import RATINGS, number_matrix, with_numbers
from dpa.storage.stage_records import Reject, count_reasons, write_rejects
from dpa.storage.tables import FileRecord, read_json, read_record, read_table, write_record, write_table

SUMMARY = (
    *("rows", "prompts", "unrated_rows", "rejects", "reasons", "trapped_overall_scores", "attributes", "correlations"),
    "file",
)
"""Fields of ratings_summary.json."""

_log = logging.getLogger(__name__)


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
    for place, config in enumerate(configs):
        field = f"ratings.{place}"
        declared = declared_scales(config)
        for name, scale in declared.items():
            if scales.setdefault(name, scale) != scale:
                raise DataError(
                    f"ratings: {name} is on {list(scales[name])} in one data set and on {list(scale)} in "
                    f"{config.path}; rename one of them."
                )
        good, bad = _read_one(config, declared, field)
        if len(bad) > config.max_reject_rate * (len(good) + len(bad)):
            raise RejectRateError(_too_many(config, len(good) + len(bad), bad, field))
        rows += _of_some_prompts(good, config.count)
        rejects += bad
    if not rows:
        why = ""
        if rejects:
            why = f" ({count_reasons(_kinds(rejects), most=3)}; first at {rejects[0].id}: {rejects[0].reason})"
        raise DataError(f"ratings: there is no usable row{why}; check the paths and the columns.")
    return Ratings(_table(rows, scales), scales, rejects, sum(row.trapped for row in rows))


def leave_out(ratings: Ratings, prompts: Sequence[Prompt]) -> Ratings:
    """The ratings without the rows of these prompts, so that what is measured on was never trained on."""
    held_out = {prompt_id_of(prompt.messages) for prompt in prompts}
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
    summary = {**summarise_ratings(ratings), "file": asdict(record)}
    write_record(folder / "ratings_summary.json", summary)
    return read_json(folder / "ratings_summary.json")


def load_ratings(folder: Path) -> tuple[pa.Table, dict[str, Any]] | None:
    """The saved table, its checksum verified, and its summary; None where none was finished, or it is damaged."""
    file, rows = folder / "ratings_summary.json", folder / "ratings.parquet"
    if not file.exists():
        return None
    try:
        read_record(file, SUMMARY, optional=None)
        summary = read_json(file)
        if not rows.exists():
            raise DamageError(f"{rows} is gone.")
        return read_table(rows, FileRecord(**summary["file"])), summary
    except (DamageError, TypeError) as error:
        _log.warning("ratings: %s; the rated data are read again.", str(error).split("; ")[0].removesuffix("."))
        return None


def summarise_ratings(ratings: Ratings) -> dict[str, Any]:
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
    """Print what `summarise_ratings` found: a table of attributes, then their correlations."""
    console = console or Console()
    title = f"{summary['rows']:,} rated rows of {summary['prompts']:,} prompts, {summary['rejects']:,} rejected"
    table = Table(title=title, caption="mean, std and range on 0-100")
    for heading in ("attribute", "scale", "rated", "mean", "std", "range"):
        table.add_column(heading, justify="left" if heading == "attribute" else "right")
    for name, facts in summary["attributes"].items():
        low, high = facts["scale"]
        row: list[Text | str] = [Text(name), f"{low:g}..{high:g}", f"{facts['count']:,}"]
        if facts["count"]:
            row += [f"{facts['mean']:.1f}", f"{facts['std']:.1f}", f"{facts['min']:.0f}-{facts['max']:.0f}"]
        table.add_row(*row)
    print_table(table, console)
    known = [pair for pair in summary["correlations"] if pair["pearson"] is not None]
    for pair in sorted(known, key=lambda pair: -abs(pair["pearson"])):
        text = f"  {pair['pearson']:+.2f}  {pair['a']} ~ {pair['b']}  (n = {pair['n']:,})"
        console.print(text, highlight=False, markup=False)
    for reason, count in summary["reasons"].items():
        console.print(f"  rejected {count:,}: {reason}", highlight=False, markup=False)
    if summary["trapped_overall_scores"]:
        console.print(f"  {summary['trapped_overall_scores']:,} overall scores of 10 dropped (OpenBMB issue 8)")


def _read_one(config: RatingsConfig, scales: Mapping[str, Scale], field: str) -> tuple[list[RatedRow], list[Reject]]:
    good: list[RatedRow] = []
    bad: list[Reject] = []
    names = list(scales)
    columns: set[str] = set()
    for place, raw in _raw_rows(config, names, field):
        if isinstance(raw, dict):
            columns |= raw.keys()
            results = read_row(config, raw, names)
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
        files = [] if is_hub_id(config.path) else find_files(Path(config.path), f"{field}.path")
        _check_columns(config, names, columns.union(*map(column_names, files)), field)
    return good, bad


def _of_some_prompts(rows: list[RatedRow], count: int | None) -> list[RatedRow]:
    """The rows of `count` prompts, those whose ids come first: as good as drawn, and the same ones everywhere."""
    if count is None:
        return rows
    ids = [prompt_id_of(row.messages) for row in rows]
    kept = set(sorted(set(ids))[:count])
    return [row for row, prompt_id in zip(rows, ids, strict=True) if prompt_id in kept]


def prompt_id_of(messages: Messages) -> str:
    """What a rated table calls a prompt: by its content, so that two files may rate responses to the same one."""
    return stable_hash(messages_text(messages))


def _raw_rows(
    config: RatingsConfig, attributes: Sequence[str], field: str
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    columns, texts = named_columns(config, attributes)
    if is_hub_id(config.path):
        yield from read_hub_rows(config.path, config.split, field, columns)
        return
    for file in find_files(Path(config.path), f"{field}.path"):
        yield from read_rows(file, columns, texts, f"{field}.path")


def _check_columns(config: RatingsConfig, names: Sequence[str], columns: set[str], field: str) -> None:
    for name in names:
        if columns and name not in columns:
            near = difflib.get_close_matches(name, columns, n=1)
            some = ", ".join(sorted(columns)[:20]).encode("utf-8", "backslashreplace").decode()
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {some}."
            raise DataError(f"{field}: {config.path} has no column {name!r} for that attribute; {hint}")


def _check_range(row: RatedRow, scales: Mapping[str, Scale]) -> None:
    for name, mark in row.marks.items():
        low, high = scales[name]
        if mark is not None and not low <= mark <= high:
            raise BadRow(f"{name} is {mark:g}, outside [{low:g}, {high:g}]")


def _table(rows: list[RatedRow], scales: Mapping[str, Scale]) -> pa.Table:
    messages = [messages_text(row.messages) for row in rows]
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
    """A reason without its particular numbers and values, to count by; the scale in a column's name stays."""
    kept = r"\(\d+ ?(?:-|to|\.\.) ?\d+\)"
    return re.sub(rf"({kept})|'[^']*'|-?\d+(?:[.,]\d+)*", lambda found: found[1] or "…", reason)


def _kinds(rejects: Sequence[Reject]) -> list[Reject]:
    return [Reject(reject.id, _kind(reject.reason)) for reject in rejects]


def _too_many(config: RatingsConfig, total: int, bad: list[Reject], field: str) -> str:
    kinds = count_reasons(_kinds(bad), most=3)
    return (
        f"{field}: {len(bad)} of {total} rows of {config.path} are bad, more than max_reject_rate "
        f"{config.max_reject_rate:g} ({kinds}; first at {bad[0].id}: {bad[0].reason}); mend the rows or raise it."
    )
