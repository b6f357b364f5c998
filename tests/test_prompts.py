"""Prompts are read in every form, and their ids do not depend on the order of the rows.
Run: pytest tests/test_prompts.py
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import run_config

from dpa.core.errors import DataError, RejectRateError
from dpa.core.records import Prompt
from dpa.recipes.dpa import Loop
from dpa.stages.prompts import (
    draw_prompts,
    measured_prompts,
    prompts_from_table,
    prompts_table,
    read_prompts,
    without_held_out,
)
from dpa.stages.ratings import read_ratings

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Größe?"},
]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_and_chats_with_and_without_ids(tmp_path: Path) -> None:
    rows = [{"id": 7, "prompt": "Why?"}, {"id": "chat", "messages": CHAT}, {"messages": json.dumps(CHAT)}]
    prompts, rejects = read_prompts(jsonl(tmp_path / "p.jsonl", rows))
    assert rejects == []
    assert prompts[0] == Prompt("7", [{"role": "user", "content": "Why?"}])
    assert prompts[1] == Prompt("chat", CHAT)
    assert prompts[2].messages == CHAT
    assert prompts_from_table(prompts_table(prompts)) == prompts


def test_without_an_id_the_content_is_the_id(tmp_path: Path) -> None:
    texts = ["a", "b", "a", "c", "a"]
    forward, _ = read_prompts(jsonl(tmp_path / "1.jsonl", [{"prompt": text} for text in texts]))
    backward, _ = read_prompts(jsonl(tmp_path / "2.jsonl", [{"prompt": text} for text in reversed(texts)]))
    assert len({prompt.prompt_id for prompt in forward}) == 5, "the same text twice is two prompts"
    assert {prompt.prompt_id for prompt in forward} == {prompt.prompt_id for prompt in backward}


def test_csv_parquet_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"one, two"\n2,12\n')
    pq.write_table(pa.table({"id": ["3"], "text": ["three"]}), tmp_path / "b.parquet")
    prompts, rejects = read_prompts(tmp_path, column="text")
    assert [(prompt.prompt_id, prompt.messages[0]["content"]) for prompt in prompts] == [
        ("1", "one, two"),
        ("2", "12"),
        ("3", "three"),
    ]
    assert rejects == []


def test_too_many_bad_rows_stop_with_counts(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "ok"}, {"prompt": ""}, {"prompt": " "}, {"prompt": 3}])
    with pytest.raises(
        RejectRateError,
        match=r"^evaluate\.prompts: 3 of 4 rows .* more than rollout\.max_reject_rate 0\.05 \(2 x prompt is empty, "
        r"1 x prompt is int, not text\); mend the file or raise it\.$",
    ):
        read_prompts(path, field="evaluate.prompts")


def test_what_cannot_be_read_is_named_by_its_field(tmp_path: Path) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    rated = {"path": str(tmp_path / "nowhere.csv"), "scales": {"helpfulness": [0, 4], "verbosity": [0, 4]}}
    changes = {
        "prompts": {"path": str(tmp_path / "promts.jsonl")},
        "evaluate": {"prompts": {"path": str(tmp_path / "torn.parquet")}},
        "ratings": [rated],
    }
    with Loop(run_config(tmp_path / "run", **changes)) as loop:
        with pytest.raises(DataError, match=r"^prompts\.path: no file at .*promts\.jsonl; give a"):
            assert loop.training_prompts
        with pytest.raises(DataError, match=r"^evaluate\.prompts\.path: .*torn\.parquet cannot be read"):
            assert loop.held_out
        with pytest.raises(DataError, match=r"^ratings\.0\.path: no file at .*nowhere\.csv"):
            read_ratings(loop.config.ratings)


def test_a_wrong_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(RejectRateError, match="question is missing"):
        read_prompts(jsonl(tmp_path / "p.jsonl", [{"prompt": "ok"}]), column="question")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read_prompts(jsonl(tmp_path / "p.jsonl", []))


def test_an_iteration_that_wants_more_prompts_than_there_are_takes_each_once() -> None:
    prompts = [Prompt(str(n), [{"role": "user", "content": str(n)}]) for n in range(7)]
    for t in range(1, 5):
        assert sorted(prompt.prompt_id for prompt in draw_prompts(prompts, t, 10, seed=0)) == list("0123456")
    counts, asked = (1, 4, 2), []
    for t, count in enumerate(counts, start=1):
        asked += [prompt.prompt_id for prompt in draw_prompts(prompts, t, count, seed=0, before=len(asked))]
    assert sorted(asked) == list("0123456"), "counts of their own: none is asked twice before all are"
    drawn = [prompt.prompt_id for t in (1, 2, 3) for prompt in draw_prompts(prompts, t, 3, seed=0)]
    assert len(set(drawn[:7])) == 7, "none again before all were used"


def test_of_a_file_sorted_by_subject_every_subject_is_measured_on_whatever_the_order() -> None:
    prompts = [Prompt(f"{n}", [{"role": "user", "content": f"story {n // 40}, question {n}"}]) for n in range(400)]
    drawn = measured_prompts(prompts, 60)
    assert len(drawn) == 60 and len({int(prompt.prompt_id) // 40 for prompt in drawn}) == 10
    assert drawn == sorted(drawn, key=lambda prompt: int(prompt.prompt_id)), "in the order of the file"
    assert {prompt.prompt_id for prompt in measured_prompts(prompts[::-1], 60)} == {one.prompt_id for one in drawn}
    assert {one.prompt_id for one in measured_prompts(prompts, 30)} < {one.prompt_id for one in drawn}
    assert measured_prompts(prompts, None) == measured_prompts(prompts, 1000) == prompts


def test_what_is_measured_on_is_in_no_iteration() -> None:
    prompts = [Prompt(f"p{n}", [{"role": "user", "content": f"question {n}"}]) for n in range(4)]
    held_out = [Prompt("other", [{"role": "user", "content": "question 2"}])]
    assert [prompt.prompt_id for prompt in without_held_out(prompts, held_out)] == ["p0", "p1", "p3"]
    assert without_held_out([], held_out) == []
    with pytest.raises(DataError, match=r"every one is a prompt of evaluate\.prompts"):
        without_held_out(prompts, prompts)
