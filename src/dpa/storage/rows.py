"""Rows a user brings: JSONL, Parquet and CSV files read one row at a time, a bad row being data and not a crash.
Run its tests: pytest tests/test_ratings.py
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from dpa.core.errors import DataError
from dpa.core.records import Messages

SUFFIXES = (".jsonl", ".parquet", ".csv")
MAX_CHARACTERS = 1_000_000
"""A longer text is a broken row: no context holds it."""

_ROLES = ("system", "user", "assistant")
_NOT_READ = (ValueError, LookupError, TypeError, OverflowError, NotImplementedError, RecursionError, pa.ArrowException)
"""What a value that Python cannot hold ends in: text that is no UTF-8, a duration, a time zone nobody knows."""

CSV_BLOCK = 16 << 20
"""Bytes read at once; a row must fit, and the longest text that is no broken row does."""

_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")
_OTHERS = (".json", ".tsv", ".txt", ".xlsx", ".arrow", ".pkl", ".pickle", ".yaml", ".yml")
"""Suffixes of files that may have been meant; any other one is part of a name, as in `allenai/tulu-2.5-data`."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class BadRow(Exception):
    """One row cannot be used; the message names the field and the value."""


def form_of(path: str | Path) -> str:
    """A file's suffix, however it is written: of SUFFIXES, where its rows are read."""
    return Path(path).suffix.lower()


def find_files(path: Path, field: str = "data") -> list[Path]:
    """The row files at `path`: itself, or those of a folder in the order of their names. Raises DataError, which names
    the `field` that says so."""
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if file.is_file())
        files = [file for file in inside if form_of(file) in SUFFIXES]
        packed = [file.name for file in inside if form_of(file) in _PACKED]
        if packed:
            raise DataError(f"{field}: {path} has {packed[0]} too, which is not read; unpack it, or move it away.")
        if not files:
            raise DataError(f"{field}: {path} has no {', '.join(SUFFIXES)} file; give a file or a folder of them.")
        return files
    if not path.is_file():
        raise DataError(f"{field}: no file at {path}; give a {', '.join(SUFFIXES)} file or a folder of them.")
    if form_of(path) not in SUFFIXES:
        raise DataError(
            f"{field}: {path} is not read, because {path.suffix or 'a file without suffix'} is none of "
            f"{', '.join(SUFFIXES)} (a pickle is never opened); convert it."
        )
    return [path]


def has_hub_form(name: str) -> bool:
    """Whether this is `owner/name` of the Hub: nothing of that name is here, and no folder of the owner's name."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists() and not Path(name).parent.is_dir()


def public_name(name: str) -> str:
    """As it may stand in a card: an id of the Hub, or the last part of a path, since where it lies is nobody else's."""
    return name if has_hub_form(name) else Path(name).name or name


def is_hub_id(path: str) -> bool:
    """Whether this names a data set of the Hub rather than a file, which has a suffix."""
    return has_hub_form(path) and form_of(path) not in (*SUFFIXES, *_PACKED, *_OTHERS)


def read_hub_rows(
    name: str, split: str, field: str, columns: Collection[str] | None
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """As `read_rows`, of a Hub data set. Only its data files are read, never its code. Raises DataError."""
    from datasets import load_dataset  # slow to import
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{field}: {name!r} split {split!r} is neither a file here nor a Hub data set that can be "
            f"read ({type(error).__name__}); check the name, or take its files as they are."
        ) from None
    if columns is not None:
        rows = rows.select_columns([column for column in rows.column_names if column in columns])
    for number in range(len(rows)):
        try:
            row = rows[number]
        except _NOT_READ as error:
            row = BadRow(f"the row cannot be read ({type(error).__name__})")
        yield f"{name}:{number + 1}", row


def read_rows(
    file: Path, columns: Collection[str] | None = None, text_columns: Collection[str] = (), field: str = "data"
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Yield (place, row) for each row of one file; a row that cannot be parsed comes as a BadRow.

    `place` is `name:number`, the first row being 1. Of a Parquet or CSV file only `columns` are read (None: all), so
    that what nobody asked for does no harm; one that the file lacks is lacking, or None, in its rows. `text_columns`
    are read as text even where a CSV's values look like numbers. Raises DataError, which names the `field`, when the
    file as a whole cannot be read.
    """
    reader = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}[form_of(file)]
    try:
        for number, row in enumerate(reader(file, columns, text_columns), start=1):
            yield f"{file.name}:{number}", row
    except (OSError, *_NOT_READ) as error:
        raise DataError(f"{field}: {file} cannot be read ({_one_line(error)}); check or convert it.") from None


def column_names(file: Path) -> list[str]:
    """The columns a Parquet or CSV file has, read or not; of a .jsonl file every row says its own. Raises DataError."""
    try:
        match form_of(file):
            case ".parquet":
                return pyarrow.parquet.read_schema(file).names
            case ".csv":
                with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
                    return next(csv.reader(lines), [])
    except (OSError, csv.Error, *_NOT_READ) as error:
        raise DataError(f"data: {file} cannot be read ({_one_line(error)}); check or convert it.") from None
    return []


def check_text(value: Any, field: str, may_be_empty: bool = False) -> str:
    """A usable text: not blank unless it may be, not huge, valid Unicode without NUL. Raises BadRow."""
    if value is None:
        raise BadRow(f"{field} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{field} is {type(value).__name__}, not text")
    if not value.strip() and not may_be_empty:
        raise BadRow(f"{field} is empty")
    if len(value) > MAX_CHARACTERS:
        raise BadRow(f"{field} has {len(value):,} characters, more than {MAX_CHARACTERS:,}")
    if "\x00" in value:
        raise BadRow(f"{field} contains NUL")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{field} has a lone surrogate at character {error.start}") from None
    return value


def quoted(value: Any) -> str:
    """A value as it may stand in a reason: quoted, escaped and short."""
    try:
        return repr(value if isinstance(value, str) else str(value))[:42]
    except (ValueError, RecursionError):  # a number of 5,000 digits, a list in a list in a list
        return f"a {type(value).__name__}"


def whole_number(value: Any) -> int | None:
    """A whole number, also as pandas writes one (7.0) where other rows have none; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def given_messages(value: Any, field: str = "messages") -> Any:
    """The `messages` of a row, a list or its JSON text, not yet checked; None where there are none. Raises BadRow."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{field} is text, but not JSON") from None


def check_messages(value: Any, field: str = "messages") -> Messages:
    """Chat messages: an optional system message, then user and assistant in turn, from user to user. Raises BadRow."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"{field} is not a list of messages")
    messages: Messages = []
    for number, item in enumerate(value):
        where = f"{field}[{number}]"
        if not isinstance(item, dict):
            raise BadRow(f"{where} is {type(item).__name__}, not a message")
        if item.get("role") not in _ROLES:
            raise BadRow(f"{where}.role is {quoted(item.get('role'))}, not one of {', '.join(_ROLES)}")
        messages.append({"role": item["role"], "content": check_text(item.get("content"), f"{where}.content")})
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if any(message["role"] == "system" for message in messages[1:]):
        raise BadRow(f"{field} has a system message that is not the first")
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise BadRow(f"{field} do not go user, assistant, ..., user: {', '.join(turns)}")
    return messages


def _read_jsonl(
    file: Path, columns: Collection[str] | None, text_columns: Collection[str]
) -> Iterator[dict[str, Any] | BadRow]:
    with file.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_no_name_twice)
            except BadRow as reason:
                yield reason
                continue
            except (ValueError, RecursionError) as error:
                yield BadRow(f"not JSON: {_one_line(error)}")
                continue
            yield row if isinstance(row, dict) else BadRow(f"the line is {type(row).__name__}, not an object")


def _read_parquet(
    file: Path, columns: Collection[str] | None, text_columns: Collection[str]
) -> Iterator[dict[str, Any] | BadRow]:
    with pyarrow.parquet.ParquetFile(file) as parquet:
        _check_twice(parquet.schema_arrow.names, columns)
        names = [name for name in parquet.schema_arrow.names if columns is None or name in columns]
        if not names:  # pyarrow would give batches without rows
            yield from ({} for _ in range(parquet.metadata.num_rows))
            return
        for batch in parquet.iter_batches(batch_size=1024, columns=names):
            yield from _rows_of(batch)


def _read_csv(
    file: Path, columns: Collection[str] | None, text_columns: Collection[str]
) -> Iterator[dict[str, Any] | BadRow]:
    bad: dict[int, BadRow] = {}

    def note(row: pyarrow.csv.InvalidRow) -> str:
        bad[row.number - 1] = BadRow(f"{row.actual_columns} values for {row.expected_columns} columns")  # 1: the header
        return "skip"

    header = column_names(file)
    _check_twice(header, columns)
    for name in header:
        if "\ufffd" in name:
            raise ValueError(f"its header is not UTF-8: {quoted(name)}")
    table = pyarrow.csv.read_csv(
        file,
        read_options=pyarrow.csv.ReadOptions(block_size=CSV_BLOCK, use_threads=False),  # threads do not number
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
        convert_options=pyarrow.csv.ConvertOptions(
            check_utf8=False,  # one bad text is one bad row
            column_types=dict.fromkeys(text_columns, pa.string()),
            strings_can_be_null=False,
            include_columns=None if columns is None else [name for name in header if name in columns],
        ),
    )
    number = 0
    for batch in table.to_batches(max_chunksize=1024):
        for row in _rows_of(batch):
            while (number := number + 1) in bad:
                yield bad.pop(number)
            yield row
    yield from bad.values()


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text. Raises BadRow where a name is given twice: which one is meant, nobody knows."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise BadRow(f"{quoted(twice)} is given twice")
    return found


def _check_twice(names: Sequence[str], columns: Collection[str] | None) -> None:
    """No column that is read stands twice in a file: one of the two would be taken in silence. Raises ValueError."""
    for name, count in Counter(names).items():
        if count > 1 and (columns is None or name in columns):
            raise ValueError(f"it has {count} columns named {quoted(name)}; keep one of them")


def _rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadRow]:
    try:
        yield from batch.to_pylist()
        return
    except _NOT_READ:
        pass
    for number in range(batch.num_rows):
        row: dict[str, Any] = {}
        try:
            for name in batch.schema.names:
                row[name] = batch.column(name)[number].as_py()
        except UnicodeDecodeError:
            yield BadRow(f"{name} is not UTF-8")
        except _NOT_READ as error:
            yield BadRow(f"{name} is {batch.schema.field(name).type}, which is not read ({type(error).__name__})")
        else:
            yield row


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
