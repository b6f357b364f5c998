"""Export: every form as its consumer reads it, one entry per direction, resumed without asking anything twice.
pytest tests/test_export.py
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from fakes import FakeSampler, space_of

from dpa.core.errors import DataError, RunFolderError
from dpa.core.records import Sample, SampleRequest
from dpa.stages import export as module
from dpa.stages.export import Form, entry_name, export, read_questions, write_curve
from dpa.storage.locks import RunLock

SPACE = space_of("helpfulness", "verbosity")
DIRECTIONS = [SPACE.direction(weights) for weights in SPACE.arc("verbosity", 3)]
NAME = "pol@helpfulness+71_verbosity-71"
SETTINGS = {"temperature": 0.7}
ROWS = {
    "alpaca_eval": [{"instruction": f"Do {n}.", "dataset": "koala", "output": "x"} for n in range(5)],
    "mt_bench": [{"question_id": 81 + n, "category": "stem", "turns": [f"Do {n}.", "Again."]} for n in range(5)],
    "arena_hard": [{"uid": f"u{n}", "category": "c", "subcategory": "s", "prompt": f"Do {n}."} for n in range(5)],
}


class Recorder(FakeSampler):
    """Keeps the requests; dies after `lives` calls."""

    def __init__(self, lives: int = 1000) -> None:
        super().__init__()
        self.requests: list[SampleRequest] = []
        self.lives = lives

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        if self.lives == 0:
            raise KeyboardInterrupt
        self.lives -= 1
        self.requests += requests
        return super().sample(requests)


def questions_of(form: str, folder: Path) -> Path:
    file = folder / f"{form}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[form]))
    return file


def test_alpaca_eval_has_its_four_fields_and_one_file_per_direction(tmp_path: Path) -> None:
    questions = read_questions(questions_of("alpaca_eval", tmp_path), "alpaca_eval")
    files = export(FakeSampler(), questions, DIRECTIONS, "alpaca_eval", tmp_path / "out", "pol", SETTINGS)
    assert files[0] == tmp_path / "out" / "alpaca_eval" / f"{NAME}.json"
    assert len(set(files)) == 3
    rows = json.loads(files[0].read_text())
    assert [set(row) for row in rows] == [{"instruction", "output", "generator", "dataset"}] * 5
    assert rows[2]["instruction"] == "Do 2."
    assert rows[2]["generator"] == NAME
    assert rows[2]["dataset"] == "koala"
    lengths = [sum(len(row["output"]) for row in json.loads(file.read_text())) for file in files]
    assert lengths == sorted(lengths)  # the fake sampler obeys verbosity


def test_the_official_json_list_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps(ROWS["alpaca_eval"]))
    assert len(read_questions(tmp_path / "q.json", "alpaca_eval")) == 5
    (tmp_path / "q.json").write_text(json.dumps(ROWS["alpaca_eval"]), encoding="utf-8-sig")
    assert len(read_questions(tmp_path / "q.json", "alpaca_eval")) == 5
    (tmp_path / "q.json").write_text("[1,")
    with pytest.raises(DataError, match=r"not readable JSON \(Expecting value: line 1"):
        read_questions(tmp_path / "q.json", "alpaca_eval")


def test_mt_bench_asks_the_second_turn_after_the_first_answer(tmp_path: Path) -> None:
    sampler = Recorder()
    questions = read_questions(questions_of("mt_bench", tmp_path), "mt_bench")
    (file,) = export(sampler, questions, DIRECTIONS[:1], "mt_bench", tmp_path / "out", "pol", SETTINGS)
    row = json.loads(file.read_text().splitlines()[3])
    assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert row["question_id"] == 84
    assert row["model_id"] == NAME
    (choice,) = row["choices"]
    assert choice["index"] == 0
    assert len(choice["turns"]) == 2
    second = sampler.requests[5 + 3].messages
    assert [message["role"] for message in second[:3]] == ["user", "assistant", "user"]
    assert second[1]["content"] == choice["turns"][0]
    assert file.parent.name == "model_answer"  # where FastChat looks


def test_arena_hard_v2_has_messages_whose_last_is_an_answer_object(tmp_path: Path) -> None:
    questions = read_questions(questions_of("arena_hard", tmp_path), "arena_hard")
    (file,) = export(FakeSampler(), questions, DIRECTIONS[:1], "arena_hard", tmp_path / "out", "pol", SETTINGS)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["uid"] for row in rows] == [f"u{n}" for n in range(5)]
    assert set(rows[0]) == {"uid", "ans_id", "model", "messages", "tstamp"}
    assert rows[0]["messages"][0] == {"role": "user", "content": "Do 0."}
    assert rows[0]["messages"][-1]["content"]["answer"]
    assert len({row["ans_id"] for row in rows}) == 5


def test_an_interrupted_export_goes_on_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    rows = [{"uid": f"u{n}", "prompt": f"Do {n}."} for n in range(3 * module.CHUNK)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read_questions(file, "arena_hard")
    with pytest.raises(KeyboardInterrupt):
        export(Recorder(lives=2), questions, DIRECTIONS[:1], "arena_hard", tmp_path / "a", "pol", SETTINGS)
    kept = tmp_path / "a" / "answers" / "arena_hard" / f"{NAME}.jsonl"
    with kept.open("ab") as lines:
        lines.write(b'{"id": "half a li')
    again = Recorder()
    (resumed,) = export(again, questions, DIRECTIONS[:1], "arena_hard", tmp_path / "a", "pol", SETTINGS)
    assert len(again.requests) == module.CHUNK
    (whole,) = export(FakeSampler(), questions, DIRECTIONS[:1], "arena_hard", tmp_path / "b", "pol", SETTINGS)

    def answers(path: Path) -> list[dict]:
        return [{**json.loads(line), "tstamp": 0} for line in path.read_text().splitlines()]

    assert answers(resumed) == answers(whole)
    third = Recorder()
    export(third, questions, DIRECTIONS[:1], "arena_hard", tmp_path / "a", "pol", SETTINGS)
    assert third.requests == []
    export(third, questions, DIRECTIONS[:1], "arena_hard", tmp_path / "a", "pol", {"temperature": 1.0})
    assert len(third.requests) == len(rows)  # other settings: nothing of the old answers is used


def test_two_processes_do_not_answer_into_one_folder_nor_one_form_over_another(tmp_path: Path) -> None:
    forms: tuple[Form, ...] = ("alpaca_eval", "mt_bench")
    asked = {form: read_questions(questions_of(form, tmp_path), form) for form in forms}
    lock = RunLock(tmp_path / "lock")
    with pytest.raises(RunFolderError, match="is in use by process"):
        export(FakeSampler(), asked["mt_bench"], DIRECTIONS[:1], "mt_bench", tmp_path, "pol", SETTINGS)
    lock.close()
    for again in (False, True):  # whichever form was asked in between
        for form in forms:
            sampler = Recorder()
            export(sampler, asked[form], DIRECTIONS[:1], form, tmp_path, "pol", SETTINGS)
            assert again == (sampler.requests == [])


def test_the_curve_has_length_against_the_angle(tmp_path: Path) -> None:
    questions = read_questions(questions_of("alpaca_eval", tmp_path), "alpaca_eval")
    files = export(FakeSampler(), questions, DIRECTIONS, "alpaca_eval", tmp_path, "pol", SETTINGS)
    rows = list(csv.DictReader(write_curve(tmp_path, "alpaca_eval", SPACE, DIRECTIONS, "pol").open()))
    assert [float(row["angle"]) for row in rows] == [-45.0, 0.0, 45.0]
    outputs = [row["output"] for row in json.loads(files[1].read_text())]
    assert float(rows[1]["characters"]) == round(sum(map(len, outputs)) / 5, 1)
    assert float(rows[0]["characters_low"]) <= float(rows[0]["characters"]) <= float(rows[0]["characters_high"])
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")


def test_a_question_that_cannot_be_asked_gets_an_empty_answer(tmp_path: Path) -> None:
    questions = read_questions(questions_of("alpaca_eval", tmp_path), "alpaca_eval")
    sampler = FakeSampler(misbehave={"Do 1.": "empty"})
    (file,) = export(sampler, questions, DIRECTIONS[:1], "alpaca_eval", tmp_path / "out", "pol", SETTINGS)
    outputs = [row["output"] for row in json.loads(file.read_text())]
    assert [bool(output) for output in outputs] == [True, False, True, True, True]


@pytest.mark.parametrize(
    ("form", "row", "said"),
    [
        ("alpaca_eval", {"prompt": "x"}, "instruction is missing"),
        ("mt_bench", {"question_id": 1}, "turns is missing"),
        ("arena_hard", {"uid": "a", "prompt": " "}, "prompt is empty"),
    ],
)
def test_a_file_of_another_form_is_refused(form: str, row: dict, said: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=said):
        read_questions(tmp_path / "q.jsonl", form)  # type: ignore[arg-type]


def test_names_are_file_names() -> None:
    assert entry_name("pol", DIRECTIONS[0]) == NAME
    assert entry_name("pol", None) == "pol"
