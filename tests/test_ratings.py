"""Rated data of every form becomes one table on 0-100; bad rows are rejected with their reason.
pytest tests/test_ratings.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from damage import damage, failing_reads
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dpa.core.errors import DataError, RejectRateError, StorageError
from dpa.core.sections.ratings import RatingsConfig
from dpa.stages.ratings import Ratings, load_ratings, print_summary, read_ratings, save_ratings, summarise_ratings
from dpa.storage.rating_forms import is_overall_score_trap, to_hundred
from dpa.storage.stage_records import Reject

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
needs_helpsteer = pytest.mark.skipif(not (SHARED / "helpsteer2-100").is_dir(), reason="no ../shared/data")
needs_truthfulqa = pytest.mark.skipif(not (SHARED / "truthfulqa-judge").is_dir(), reason="no ../shared/data")


def config(path: Path | str, **fields: Any) -> RatingsConfig:
    return RatingsConfig.model_validate({"path": str(path), **fields})


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def column(ratings: Ratings, name: str) -> list[float | None]:
    return ratings.table[name].to_pylist()


# The scale


@pytest.mark.parametrize(
    ("scale", "marks", "values"),
    [
        ((0, 4), [0, 1, 2, 3, 4], [10, 30, 50, 70, 90]),
        ((1, 5), [1, 2, 3, 4, 5], [10, 30, 50, 70, 90]),
        ((1, 10), [1, 5, 10], [5, 45, 95]),
        ((0, 1), [0, 1], [25, 75]),
        ((0, 100), [0, 37.5, 100], [0, 37.5, 100]),
    ],
)
def test_bin_centres(scale: tuple[int, int], marks: list[float], values: list[float]) -> None:
    assert [to_hundred(mark, scale) for mark in marks] == pytest.approx(values)


@given(st.integers(-10, 10), st.integers(1, 20))
def test_bin_centres_are_symmetric_equally_spaced_and_inside(low: int, steps: int) -> None:
    values = [to_hundred(mark, (low, low + steps)) for mark in range(low, low + steps + 1)]
    assert np.allclose(np.add(values, values[::-1]), 100)
    assert np.allclose(np.diff(values), 100 / (steps + 1))
    assert 0 < values[0] < values[-1] < 100


# The forms


def helpsteer_row(**changes: Any) -> dict[str, Any]:
    marks = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
    return {"prompt": "Why?", "response": "Because.", **marks, **changes}


@pytest.mark.parametrize("form", ["helpsteer", "helpsteer2"])
def test_helpsteer(tmp_path: Path, form: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [helpsteer_row(), helpsteer_row(verbosity=None)])
    ratings = read_ratings([config(path, format=form)])
    assert ratings.table.column_names[:5] == ["row_id", "prompt_id", "messages", "response", "source"]
    assert ratings.attributes[0] == f"{form}-helpfulness"
    assert column(ratings, f"{form}-helpfulness") == [70, 70]
    assert column(ratings, f"{form}-verbosity") == [30, None]
    assert json.loads(ratings.table["messages"][0].as_py()) == [{"role": "user", "content": "Why?"}]
    assert len(set(column(ratings, "row_id"))) == 2
    assert len(set(column(ratings, "prompt_id"))) == 1


def test_helpsteer_turns_are_split(tmp_path: Path) -> None:
    prompt = "Hello\n<extra_id_1>Assistant\nHi there.\n<extra_id_1>User\nWhy?"
    ratings = read_ratings(
        [config(write_jsonl(tmp_path / "r.jsonl", [helpsteer_row(prompt=prompt)]), format="helpsteer2")]
    )
    roles = [(m["role"], m["content"]) for m in json.loads(ratings.table["messages"][0].as_py())]
    assert roles == [("user", "Hello"), ("assistant", "Hi there."), ("user", "Why?")]


def completion(overall: Any, marks: tuple[Any, ...], critique: str = "It lacks detail.") -> dict[str, Any]:
    names = ("instruction_following", "truthfulness", "honesty", "helpfulness")
    annotations = {name: {"Rating": mark, "Rationale": "."} for name, mark in zip(names, marks, strict=True)}
    return {
        "response": f"Answer {overall} {marks}.",
        "overall_score": overall,
        "critique": critique,
        "annotations": annotations,
        "custom_system_prompt": "Be honest.",
    }


def test_ultrafeedback(tmp_path: Path) -> None:
    row = {"source": "flan", "instruction": "Name a colour.", "completions": []}
    row["completions"] = [completion(7.5, ("5", "4", "N/A", "1")), completion(10.0, ("1", "2", "N/A", "2"))]
    path = write_jsonl(tmp_path / "uf.jsonl", [row])
    ratings = read_ratings([config(path, format="ultrafeedback")])
    assert column(ratings, "ultrafeedback-overall_score") == [70, None]
    assert column(ratings, "ultrafeedback-instruction_following") == [90, 10]
    assert column(ratings, "ultrafeedback-honesty") == [None, None]
    assert column(ratings, "source") == ["ultrafeedback/flan"] * 2
    assert len(set(column(ratings, "prompt_id"))) == 1, "a completion's own system prompt does not split the pool"
    assert ratings.trapped == 1
    kept = read_ratings([config(path, format="ultrafeedback", drop_overall_score_trap=False)])
    assert column(kept, "ultrafeedback-overall_score") == [70, 95]
    assert kept.trapped == 0


@pytest.mark.parametrize(
    ("overall", "marks", "critique", "trapped"),
    [
        (10, (1, 2, 2, 2), "Poor.", True),  # the repository's repair makes it a 1
        (10, (3, 4, 4, 4), "Fair.", True),  # the repair asks GPT-4 again: unknown
        (10, (5, 5, 5, 4), "Excellent work.", False),
        (10, ("N/A",) * 4, "Nothing to go by.", True),
        (10, (5, 5, 5, 5), "Wrong throughout.\nOverall Score: 1", True),
        (10, (5, 5, 5, 5), "I would give it a score of 1 out of 10.", True),
        (10, (5, 5, 5, 5), "I rate this 1/10.", True),
        (10, (5, 5, 5, 5), "Overall Score: 10", False),
        (10, (5, 5, 5, 5), "A score of 1.5 higher would need sources; see section 1.", False),
        (9, (1, 1, 1, 1), "Overall Score: 1", False),  # only a 10 can be a multiplied 1
    ],
)
def test_overall_score_trap(overall: int, marks: tuple, critique: str, trapped: bool) -> None:
    assert is_overall_score_trap(completion(overall, marks, critique)) is trapped


def test_generic_columns_and_scales(tmp_path: Path) -> None:
    rows = [
        {"question": "Q?", "answer": "A.", "good": 1, "long": 7.5},
        {"question": "Q?", "answer": "B.", "good": None},
    ]
    fields = {"columns": {"prompt": "question", "response": "answer"}, "attributes": ["good", "long"]}
    ratings = read_ratings([config(write_jsonl(tmp_path / "mine.jsonl", rows), **fields, scales={"good": [0, 1]})])
    assert column(ratings, "good") == [75, None]
    assert column(ratings, "long") == [7.5, None]
    assert ratings.scales == {"good": (0, 1), "long": (0, 100)}
    assert column(ratings, "source") == ["mine", "mine"]


def test_generic_messages(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q?"}]
    rows = [
        {"messages": asked, "response": "A.", "good": 3},
        {"messages": [*asked, {"role": "assistant", "content": "B."}], "good": 4},
    ]
    ratings = read_ratings([config(write_jsonl(tmp_path / "m.jsonl", rows), scales={"good": [0, 4]})])
    assert column(ratings, "response") == ["A.", "B."]
    assert len(set(column(ratings, "prompt_id"))) == 1


def test_parquet_csv_and_jsonl_agree(tmp_path: Path) -> None:
    rows = [{"prompt": "2, 3?", "response": "5", "good": 4}, {"prompt": "7", "response": 'a "b"\nc', "good": None}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text('prompt,response,good\n"2, 3?",5,4\n7,"a ""b""\nc",\n')
    tables = [
        read_ratings([config(tmp_path / f"rows.{suffix}", scales={"good": [0, 4]})]).table
        for suffix in ("jsonl", "parquet", "csv")
    ]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    assert tables[0]["good"].to_pylist() == [90, None]


def test_several_sets_stand_side_by_side(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q?", "response": "A.", "x": 1}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "Q?", "response": "A.", "y": 2}])
    both = [config(first, scales={"x": [0, 4]}), config(second, scales={"y": [0, 4]})]
    ratings = read_ratings(both)
    assert (column(ratings, "x"), column(ratings, "y")) == ([30, None], [None, 50])
    assert len(set(column(ratings, "row_id"))) == 2
    with pytest.raises(DataError, match="rename one"):
        read_ratings([both[0], config(first, scales={"x": [1, 5]})])


# Bad rows and user mistakes

BAD = {
    "prompt is missing": {"response": "A."},
    "prompt is int, not text": {"prompt": 7},
    "prompt is empty": {"prompt": " \n"},
    "response is missing": {"response": None},
    "response contains NUL": {"response": "a\x00b"},
    "prompt has a lone surrogate at character 1": {"prompt": "a\ud800"},
    "response has 1,000,001 characters, more than 1,000,000": {"response": "x" * 1_000_001},
    "good is 'fine', not a finite number": {"good": "fine"},
    "good is 'nan', not a finite number": {"good": float("nan")},
    "good is '[1]', not a finite number": {"good": [1]},
    "good is 5, outside [0, 4]": {"good": 5},
    "messages do not go user, assistant, ..., user: user, user": {"messages": [{"role": "user", "content": "a"}] * 2},
    "messages[0].role is 'tool', not one of system, user, assistant": {"messages": [{"role": "tool", "content": "a"}]},
    "the line is list, not an object": [1, 2],
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows_are_rejected_with_their_reason(tmp_path: Path, reason: str) -> None:
    good = {"prompt": "Q?", "response": "A.", "good": 2}
    change = BAD[reason]
    bad = change if isinstance(change, list) else {**good, **change}
    if reason == "prompt is missing":
        del bad["prompt"]
    path = write_jsonl(tmp_path / "rows.jsonl", [good, bad, good])
    ratings = read_ratings([config(path, scales={"good": [0, 4]}, max_reject_rate=0.5)])
    assert ratings.table.num_rows == 2
    assert ratings.rejects == [Reject("rows.jsonl:2", reason)]


def test_a_torn_line_is_rejected(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Q?", "response": "A.", "good": 2}])
    path.write_bytes(path.read_bytes() + b'{"prompt": "Q?", "resp\n\xff\xfe\n')
    ratings = read_ratings([config(path, scales={"good": [0, 4]}, max_reject_rate=1)])
    assert [reject.id for reject in ratings.rejects] == ["rows.jsonl:2", "rows.jsonl:3"]


def test_too_many_rejects_stop(tmp_path: Path) -> None:
    rows = [{"prompt": "Q?", "response": "A.", "good": mark} for mark in (1, 2, 9, 9)]
    with pytest.raises(RejectRateError, match=r"2 of 4 rows .* are bad, more than max_reject_rate 0\.05 \(2 x good is"):
        read_ratings([config(write_jsonl(tmp_path / "rows.jsonl", rows), scales={"good": [0, 4]})])


def test_csv_with_a_short_line(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,response,good\nQ?,A.,1\nonly one\n")
    ratings = read_ratings([config(tmp_path / "rows.csv", scales={"good": [0, 4]}, max_reject_rate=0.5)])
    assert ratings.table.num_rows == 1
    assert ratings.rejects[0].reason == "1 values for 3 columns"


def test_a_csv_s_rejects_are_named_by_their_own_rows(tmp_path: Path) -> None:
    rows = ["Q1,A.,1", "only one", '"Q3\nand more",A.,2', "a,b,c,d", "Q5,A.,9"]
    (tmp_path / "rows.csv").write_text("prompt,response,good\n" + "\n".join(rows) + "\n")
    ratings = read_ratings([config(tmp_path / "rows.csv", scales={"good": [0, 4]}, max_reject_rate=1)])
    assert [reject.id for reject in ratings.rejects] == ["rows.csv:2", "rows.csv:4", "rows.csv:5"]


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("none.jsonl", None, {"scales": {"good": [0, 4]}}, "no file at"),
        ("rows.pkl", b"x", {"scales": {"good": [0, 4]}}, "never opened"),
        ("rows.parquet", b"not parquet", {"scales": {"good": [0, 4]}}, "cannot be read"),
        ("rows.jsonl", b'{"prompt": "Q", "response": "A", "good": 1}\n', {}, "name its attributes"),
        ("rows.jsonl", b'{"prompt": "Q", "response": "A", "good": 1}\n', {"attributes": ["goood"]}, "mean 'good'"),
        ("rows.jsonl", b"", {"attributes": ["good"]}, "no usable row"),
        ("rows.jsonl", b"", {"scales": {"good": [4, 0]}}, "lower end first"),
        ("rows.jsonl", b"", {"attributes": ["x"], "scales": {"good": [0, 4]}}, "`attributes` lacks"),
    ],
)
def test_user_mistakes_are_one_sentence(
    tmp_path: Path, name: str, content: bytes | None, fields: dict, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_ratings([config(tmp_path / name, **fields)])
    assert "\n" not in str(caught.value)


# The summary and the files


def test_summary_against_numpy(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    marks_NM = random.integers(0, 5, (200, 3)).astype(float)
    marks_NM[:, 1] = np.clip(marks_NM[:, 0] + random.integers(-1, 2, 200), 0, 4)
    missing_NM = random.random((200, 3)) < 0.4
    rows = [
        {"prompt": f"Q{i % 50}", "response": f"A{i}"}
        | {name: None if missing else mark for name, mark, missing in zip("abc", marks, gone, strict=True)}
        for i, (marks, gone) in enumerate(zip(marks_NM, missing_NM, strict=True))
    ]
    ratings = read_ratings([config(write_jsonl(tmp_path / "r.jsonl", rows), scales={name: [0, 4] for name in "abc"})])
    summary = summarise_ratings(ratings)
    values_NM = np.where(missing_NM, np.nan, 20 * marks_NM + 10)
    assert summary["rows"] == 200
    assert summary["prompts"] == 50
    assert summary["unrated_rows"] == missing_NM.all(axis=1).sum()
    for name, values in zip("abc", values_NM.T, strict=True):
        facts = summary["attributes"][name]
        assert facts["count"] == (~np.isnan(values)).sum()
        assert facts["mean"] == pytest.approx(np.nanmean(values))
        assert facts["std"] == pytest.approx(np.nanstd(values))
    pair = next(pair for pair in summary["correlations"] if {pair["a"], pair["b"]} == {"a", "b"})
    both = ~missing_NM[:, :2].any(axis=1)
    assert pair["n"] == both.sum()
    assert pair["pearson"] == pytest.approx(np.corrcoef(values_NM[both, 0], values_NM[both, 1])[0, 1])


def test_an_attribute_that_never_varies_has_no_correlation(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "response": f"A{i}", "a": 2, "b": i} for i in range(4)]
    summary = summarise_ratings(
        read_ratings([config(write_jsonl(tmp_path / "r.jsonl", rows), scales={"a": [0, 4], "b": [0, 4]})])
    )
    assert summary["correlations"] == [{"a": "b", "b": "a", "n": 4, "pearson": None}]


def test_saved_ratings_come_back(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [helpsteer_row(), helpsteer_row(helpfulness=9)])
    ratings = read_ratings([config(path, format="helpsteer", max_reject_rate=0.5)])
    assert load_ratings(tmp_path) is None
    summary = save_ratings(ratings, tmp_path)
    loaded = load_ratings(tmp_path)
    assert loaded is not None
    assert loaded[0].equals(ratings.table)
    assert loaded[1] == summary == json.loads((tmp_path / "ratings_summary.json").read_text())
    for name in ("ratings_summary.json", "ratings.parquet"):
        with failing_reads(tmp_path / name), pytest.raises(StorageError, match="reading failed"):
            load_ratings(tmp_path)  # not None: they are not damaged
    rejected = json.loads((tmp_path / "ratings_rejects.jsonl").read_text())
    reason = "helpsteer-helpfulness is 9, outside [0, 4]"
    assert rejected == {"id": "r.jsonl:2", "stage": "ratings", "reason": reason}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    print_summary(summary, console)
    text = console.export_text()
    assert "helpsteer-verbosity" in text
    assert "rejected 1: helpsteer-helpfulness is …, outside […, …]" in text
    for way in ("a flipped bit", "deleted"):
        assert damage(tmp_path / "ratings.parquet", way) and load_ratings(tmp_path) is None


# Real rows


@needs_helpsteer
def test_real_helpsteer2() -> None:
    ratings = read_ratings([config(SHARED / "helpsteer2-100" / "helpsteer_train.jsonl", format="helpsteer2")])
    summary = summarise_ratings(ratings)
    assert (summary["rows"], summary["prompts"], summary["rejects"]) == (100, 50, 0)
    assert {tuple(facts["scale"]) for facts in summary["attributes"].values()} == {(0, 4)}
    assert set(column(ratings, "helpsteer2-verbosity")) <= {10, 30, 50, 70, 90}


@needs_helpsteer
def test_real_nemo_regression_form() -> None:
    ratings = read_ratings([config(SHARED / "helpsteer2-100" / "nemo_aligner_test-rm.jsonl", format="helpsteer2")])
    assert ratings.table.num_rows == 8
    assert [ratings.table[name][0].as_py() for name in ratings.attributes] == [90, 90, 90, 70, 50]
    messages = json.loads(ratings.table["messages"][0].as_py())
    assert messages == [{"role": "user", "content": "explain master slave replication nsql"}]
    assert ratings.table["response"][0].as_py().endswith("protected in case of a failure.")


@needs_truthfulqa
def test_real_truthfulqa_judge() -> None:
    fields = {"columns": {"prompt": "question", "response": "answer"}}
    scales = {"truthful": [0, 1], "informative": [0, 1]}
    ratings = read_ratings([config(SHARED / "truthfulqa-judge" / "joined.derived.jsonl", scales=scales, **fields)])
    summary = summarise_ratings(ratings)
    assert summary["rows"] == 18_244
    assert summary["correlations"][0]["n"] == 18_244
    assert summary["correlations"][0]["pearson"] == pytest.approx(-0.48, abs=0.005)
