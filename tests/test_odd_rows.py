"""Any value in any field of a rated row or a prompt: a row, a reject or one sentence, in every form and kind of file.
pytest tests/test_odd_rows.py
"""

import csv
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dpa.core.errors import DataError, RejectRateError
from dpa.core.sections.ratings import RatingsConfig
from dpa.stages.prompts import read_prompts
from dpa.stages.ratings import Ratings, load_ratings, read_ratings, save_ratings
from dpa.storage.rows import find_files, is_hub_id, read_rows

CASES = Path(__file__).parents[1].parent / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="no ../shared/cases")

USER = {"role": "user", "content": "Why?"}
ROWS: dict[str, dict[str, Any]] = {
    "generic": {"prompt": "Why?", "response": "So.", "warmth": 3, "source": "me"},
    "generic, messages": {"messages": [USER, {"role": "assistant", "content": "So."}], "warmth": 3},
    "generic, messages and response": {"messages": [USER], "response": "So.", "warmth": 3},
    "helpsteer": {
        "prompt": "Why?",
        "response": "So.",
        "helpfulness": 3,
        "correctness": 4,
        "coherence": 4,
        "complexity": 2,
        "verbosity": 1,
    },
    "helpsteer2, NeMo": {
        "text": "<extra_id_1>User\nq\n<extra_id_1>Assistant\na\n<extra_id_2>",
        "label": [0, 0, 0, 0, 1, 2, 3, 4, 0],
    },
    "ultrafeedback": {
        "instruction": "Why?",
        "source": "flan",
        "completions": [
            {
                "response": "So.",
                "overall_score": 10,
                "critique": "Good.",
                "annotations": {name: {"Rating": "4"} for name in ("helpfulness", "honesty", "truthfulness")},
            }
        ],
    },
    "prompts": {"prompt": "Why?", "id": "a"},
    "prompts, messages": {"messages": [USER], "id": 7},
}

TEXTS = st.one_of(
    st.text(st.characters(codec=None), max_size=8),  # lone surrogates and NUL too
    st.sampled_from(
        ["", " ", "\ud83d", "\x00", "N/A", "nan", "1e999", "<extra_id_2>", "<extra_id_1>User\n", "[]", "{}"]
    ),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.sampled_from([10**400, -100.0, 1e308])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a row a value can be put: every field, and everything inside it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inside for place in [(*path, key), *places(item, (*path, key))]]


def with_value(row: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copy = dict(row) if isinstance(row, dict) else list(row)
    copy[place[0]] = with_value(row[place[0]], place[1:], value)
    return copy


def config_of(form: str, path: Path) -> RatingsConfig:
    kind = form.split(",")[0]
    scales = {"warmth": [0, 4]} if kind == "generic" else {}
    fields = {"path": str(path), "format": kind, "scales": scales, "max_reject_rate": 1}
    return RatingsConfig.model_validate(fields)


def read(form: str, path: Path) -> Ratings | list:
    """Whatever is read is written and read again too: what a row lets through must fit a table."""
    if form.startswith("prompts"):
        return [*read_prompts(path, max_reject_rate=1)[0]]
    ratings = read_ratings([config_of(form, path)])
    save_ratings(ratings, path.parent)
    assert load_ratings(path.parent) is not None
    return ratings


def is_row_reject_or_sentence(form: str, path: Path) -> None:
    try:
        read(form, path)
    except (DataError, RejectRateError) as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        str(error).encode()


@pytest.mark.parametrize("form", ROWS)
def test_the_plain_row_is_read(form: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[form]) + "\n")
    found = read(form, tmp_path / "rows.jsonl")
    assert (len(found) if isinstance(found, list) else found.table.num_rows) == 1


@pytest.mark.parametrize("form", ROWS)
@given(data=st.data())
@FUZZ
def test_any_json_value_in_any_field(form: str, data: st.DataObject, tmp_path: Path) -> None:
    row = ROWS[form]
    for _ in range(data.draw(st.integers(1, 2))):
        row = with_value(row, data.draw(st.sampled_from(places(row))), data.draw(VALUES)) if places(row) else row
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (row, ROWS[form])))
    is_row_reject_or_sentence(form, file)


@pytest.mark.parametrize("form", ROWS)
@given(data=st.data())
@FUZZ
def test_any_value_in_any_column_of_a_table(form: str, data: st.DataObject, tmp_path: Path) -> None:
    row = with_value(ROWS[form], data.draw(st.sampled_from(places(ROWS[form]))), data.draw(VALUES))
    csv_file, parquet_file = tmp_path / "rows.csv", tmp_path / "rows.parquet"
    with csv_file.open("w", encoding="utf-8", errors="surrogatepass", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(row)
        writer.writerow(json.dumps(item) if isinstance(item, list | dict) else item for item in row.values())
    is_row_reject_or_sentence(form, csv_file)
    try:
        table = pa.Table.from_pylist([row])
        pq.write_table(table, parquet_file)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        assume(False)
    is_row_reject_or_sentence(form, parquet_file)


# The cases


@needs_cases
@pytest.mark.parametrize(
    ("name", "form", "rows", "reasons"),
    [
        ("source_lone_surrogate.jsonl", "generic", 1, ["source has a lone surrogate at character 1"]),
        ("uf_annotations_text.jsonl", "ultrafeedback", 0, ["annotations is str, not an object"]),
        ("uf_critique_nan.jsonl", "ultrafeedback", 0, ["critique is float, not text"]),
        ("nemo_empty_text.jsonl", "helpsteer", 1, ["assistant's turn", "text is empty"]),
        ("invalid_utf8.parquet", "generic", None, ["is not UTF-8"]),
        ("unneeded_duration_column.parquet", "generic", 1, []),
        ("messages_json_text.jsonl", "generic", 1, []),
        ("folder_with_folder_named_jsonl", "generic", None, []),
    ],
)
def test_the_cases(name: str, form: str, rows: int | None, reasons: list[str]) -> None:
    try:
        ratings = read_ratings([config_of(form, CASES / name)])
    except DataError as error:
        assert rows in (0, None)
        assert all(reason in str(error) for reason in reasons[:1] if name != "folder_with_folder_named_jsonl")
        return
    assert rows is None or ratings.table.num_rows == rows
    assert len(ratings.rejects) == len(reasons)
    for reject, reason in zip(ratings.rejects, reasons, strict=True):
        assert reason in reject.reason


# Only named columns


def test_what_nobody_asked_for_does_no_harm(tmp_path: Path) -> None:
    bad_text = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"\xff", b"a"], pa.binary()).buffers()[1:]])
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "response": ["c", "d"],
            "warmth": [1, 2],
            "when": pa.array([timedelta(seconds=1), None], pa.duration("ns")),
            "odd": pa.array([1, 2], pa.duration("ns")),
            "zone": pa.array([1, 2], pa.timestamp("us", tz="Mars/Olympus")),
            "text": bad_text,
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    assert read_ratings([config_of("generic", tmp_path / "rows.parquet")]).table.num_rows == 2
    assert len(read_prompts(tmp_path / "rows.parquet")[0]) == 2
    (tmp_path / "rows.csv").write_bytes(b"prompt,response,warmth,other\na,b,1,\xff\xfe\nc,d,2,x\n")
    assert read_ratings([config_of("generic", tmp_path / "rows.csv")]).table.num_rows == 2


@pytest.mark.parametrize("kind", ["odd", "zone", "text"])
def test_a_named_column_that_cannot_be_read_is_a_reject(kind: str, tmp_path: Path) -> None:
    columns = {
        "odd": pa.array([1, 2], pa.duration("ns")),
        "zone": pa.array([1, 2], pa.timestamp("us", tz="Mars/Olympus")),
        "text": pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"\xff", b"a"], pa.binary()).buffers()[1:]]),
    }
    table = pa.table({"prompt": columns[kind], "response": ["c", "d"], "warmth": [1, 2]})
    pq.write_table(table, tmp_path / "rows.parquet")
    if kind == "text":
        ratings = read_ratings([config_of("generic", tmp_path / "rows.parquet")])
        assert [reject.reason for reject in ratings.rejects] == ["prompt is not UTF-8"]
        assert ratings.table.num_rows == 1, "its neighbour is kept"
    else:
        with pytest.raises(DataError, match=r"no usable row \(.*prompt is "):
            read_ratings([config_of("generic", tmp_path / "rows.parquet")])


def test_bad_bytes_in_a_csv_are_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"prompt,response,warmth\na,\xff,1\nc,d,2\n")
    ratings = read_ratings([config_of("generic", tmp_path / "rows.csv")])
    assert [reject.reason for reject in ratings.rejects] == ["response is not UTF-8"]
    assert ratings.table.num_rows == 1


def test_a_misspelt_column_of_a_table_is_still_named_by_its_likeness(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "response": ["b"], "warmht": [1]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="did you mean 'warmht'"):
        read_ratings([config_of("generic", tmp_path / "rows.parquet")])


def test_a_folder_named_like_a_file_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS["generic"]) + "\n")
    assert [file.name for file in find_files(tmp_path)] == ["rows.jsonl"]
    assert len(read_prompts(tmp_path)[0]) == 1
    (tmp_path / "more.JSONL").write_text((tmp_path / "rows.jsonl").read_text())
    assert [file.name for file in find_files(tmp_path)] == ["more.JSONL", "rows.jsonl"]
    assert len(list(read_rows(tmp_path / "more.JSONL"))) == len(list(read_rows(tmp_path / "rows.jsonl")))
    (tmp_path / "rest.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"has rest\.jsonl\.gz too, which is not read"):
        find_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "hub"),
    [("allenai/tulu-2.5-preference-data", True), ("Skywork/Preference-80K-v0.2", True), ("my/rows.jsonl.gz", False)],
)
def test_a_dot_in_the_name_of_a_hub_data_set_makes_it_no_file(name: str, hub: bool) -> None:
    assert is_hub_id(name) == hub


def test_messages_as_json_text_are_read_by_ratings_as_by_prompts(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["messages", "response", "warmth"])
        writer.writerow([json.dumps([USER]), "So.", 1])
        writer.writerow([json.dumps([USER, {"role": "assistant", "content": "So."}]), "", 2])
        writer.writerow(["[", "So.", 2])
    ratings = read_ratings([config_of("generic", file)])
    assert ratings.table["response"].to_pylist() == ["So.", "So."]
    assert [reject.reason for reject in ratings.rejects] == ["messages is text, but not JSON"]
    prompts, rejects = read_prompts(file, max_reject_rate=1)
    assert prompts[0].messages == [USER]
    assert "messages is text, but not JSON" in {reject.reason for reject in rejects}


@pytest.mark.parametrize("name", ["row_id", "prompt_id", "messages", "response", "source"])
def test_an_attribute_cannot_take_the_name_of_another_column(name: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS["generic"]) + "\n")
    fields = {"path": str(tmp_path / "rows.jsonl"), "scales": {name: [0, 4]}}
    with pytest.raises(DataError, match="rename it"):
        read_ratings([RatingsConfig.model_validate(fields)])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("twice", ["prompt", "h"])
def test_a_column_that_stands_twice_is_refused_where_it_is_read(suffix: str, twice: str, tmp_path: Path) -> None:
    """Of the two, Parquet's reader took the last and that of CSV the first, in silence."""
    file, names = tmp_path / f"rows{suffix}", ["prompt", "response", "h", twice]
    if suffix == ".csv":
        file.write_text(",".join(names) + "\nq,r,1,7\n")
    else:
        pq.write_table(pa.Table.from_arrays([pa.array([text]) for text in ("q", "r", "1", "7")], names=names), file)
    with pytest.raises(DataError, match=f"2 columns named '{twice}'; keep one"):
        read_ratings([RatingsConfig(path=str(file), attributes=["h"])])
    if twice == "h":
        assert len(read_prompts(file)[0]) == 1, "nobody reads it"


def test_a_name_given_twice_in_a_row_is_a_reject(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "response": "r", "h": 1, "h": 4}\n{"prompt": "q", "response": "r", "h": 2}\n')
    found = read_ratings([RatingsConfig(path=str(file), attributes=["h"], max_reject_rate=1)])
    assert found.table["h"].to_pylist() == [2.0] and [bad.reason for bad in found.rejects] == ["'h' is given twice"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_table_whose_header_is_not_utf_8_is_one_sentence(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes("prompt,response,h,größe\nq,r,1,2\n".encode(encoding))
    with pytest.raises(DataError, match="its header is not UTF-8"):
        read_ratings([RatingsConfig(path=str(file), attributes=["h"])])


def test_no_usable_row_gives_the_first_value(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "response": "r", "h": "good", "id": 1.5}\n')
    with pytest.raises(DataError, match=r"first at rows\.jsonl:1: h is 'good'"):
        read_ratings([RatingsConfig(path=str(file), attributes=["h"], max_reject_rate=1)])
    with pytest.raises(DataError, match=r"no usable row \(1 x id is float"):
        read_prompts(file, max_reject_rate=1)


def test_numbers_that_pandas_made_floats_are_ids_and_sources(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"prompt": ["a", "b"], "response": ["x", "y"], "h": [1, 2], "id": [7.0, None], "source": [3.0, None]}),
        tmp_path / "rows.parquet",
    )
    prompts, rejects = read_prompts(tmp_path / "rows.parquet")
    assert prompts[0].prompt_id == "7" and len(prompts) == 2 and not rejects
    found = read_ratings([RatingsConfig(path=str(tmp_path / "rows.parquet"), attributes=["h"])])
    assert found.table["source"].to_pylist() == ["3", "rows"]


def test_a_scale_so_wide_that_marks_overflow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"scale of h is .*wider than"):
        read_ratings([RatingsConfig(path=str(tmp_path), scales={"h": (-1e308, 1e308)})])
