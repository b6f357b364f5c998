"""Export: a policy's answers to a benchmark's questions under several directions, in the benchmark's own file form.
Run its tests: pytest tests/test_export.py

| form | reads | writes, one file for each direction |
|---|---|---|
| alpaca_eval | `instruction`, `dataset` | alpaca_eval/NAME.json: list of instruction, output, generator, dataset |
| mt_bench | `question_id`, `turns` | mt_bench/model_answer/NAME.jsonl: FastChat's answers, one turn after the other |
| arena_hard | `uid`, `prompt` | arena-hard-v2.0/model_answer/NAME.jsonl: uid, ans_id, model, messages, tstamp |

NAME is `model@helpfulness+97_verbosity-26`. Answers are kept in `answers/FORM/NAME.jsonl` as they come, so that a run
that was stopped goes on where it was; curve.csv and curve.svg show mean length against the direction.
"""

import csv
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpa.core.direction import Direction
from dpa.core.directions import DirectionSpace
from dpa.core.errors import DataError, EngineError
from dpa.core.measures import bootstrap_means, interval
from dpa.core.records import Messages, Sampler, SampleRequest, seed_of, stable_hash
from dpa.pages.charts import Chart, Point, Series
from dpa.storage.locks import RunLock
from dpa.storage.progress import ProgressBar
from dpa.storage.rows import BadRow, check_text, find_files, read_rows
from dpa.storage.stopping import StopOnSignal
from dpa.storage.tables import disk_error, write_bytes, write_json

Form = Literal["alpaca_eval", "mt_bench", "arena_hard"]

CHUNK = 64
"""Questions asked together and written together: what an interruption can lose."""

RESAMPLES = 1000


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One question of a benchmark: its id, the user's turns, and the row it came from."""

    id: str
    turns: tuple[str, ...]
    row: Mapping[str, Any]


@dataclass(frozen=True)
class BenchmarkAnswer:
    """The answers to a question's turns. `tokens` counts generated tokens; `stopped`: none was cut off; `time` in s."""

    id: str
    turns: tuple[str, ...]
    tokens: int
    stopped: bool
    time: float


def read_questions(path: str | Path, form: Form) -> list[BenchmarkQuestion]:
    """A benchmark's questions: .json (a list), .jsonl, .parquet or .csv. Raises DataError, which names the row."""
    path = Path(path)
    questions: dict[str, BenchmarkQuestion] = {}
    for place, row in _rows(path):
        try:
            question = _question(row, form, len(questions))
            if question.id in questions:
                raise BadRow(f"{question.id!r} is there twice")
        except BadRow as error:
            raise DataError(f"questions: {place} cannot be used as a row of {form} ({error}); mend the file.") from None
        questions[question.id] = question
    if not questions:
        raise DataError(f"questions: {path} has no rows; give the benchmark's question file.")
    return list(questions.values())


def entry_name(model: str, direction: Direction | None) -> str:
    """`model@helpfulness+97_verbosity-26`: a name that is a file name everywhere, and says what was asked."""
    if direction is None:
        return model
    weights = zip(direction.space_names, direction.integers, strict=True)
    return f"{model}@{'_'.join(f'{name}{number:+d}' for name, number in weights)}"


def export(
    sampler: Sampler,
    questions: Sequence[BenchmarkQuestion],
    directions: Sequence[Direction | None],
    form: Form,
    out: Path,
    model: str,
    settings: Mapping[str, Any],
    seed: int = 0,
) -> list[Path]:
    """Answer every question under every direction; return the benchmark's files, in the order of the directions.

    `settings` says how the sampler draws (temperature, longest answer): answers made with others, by another policy or
    to other questions are made anew. A question longer than the context gets an empty answer.
    Raises Interrupted on a signal, StorageError when the disk refuses, RunFolderError where another process answers
    into `out`.
    """
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = RunLock(out / "lock")
    except OSError as error:
        raise disk_error(error, out, "writing answers") from None
    try:
        for direction in directions:
            name = entry_name(model, direction)
            answers = _answer_all(sampler, questions, direction, _kept(out, form, name), name, settings, seed)
            files.append(_write(form, out, name, questions, answers))
    finally:
        lock.close()
    return files


def write_curve(
    out: Path, form: Form, space: DirectionSpace, directions: Sequence[Direction | None], model: str
) -> Path:
    """Write curve.csv and, where the directions lie on one arc, curve.svg: mean length against the direction.

    From the finished `answers/`. Characters are what AlpacaEval calls length. Intervals are 95% over questions.
    """
    arc = space.arc_names[-1]
    rows, points = [], []
    for direction in directions:
        name = entry_name(model, direction)
        answers = _read_answers(_kept(out, form, name), None)[1]
        lengths_N = np.array([sum(map(len, answer.turns)) for answer in answers], dtype=np.float64)
        draws_R = bootstrap_means(lengths_N[None, :, None], RESAMPLES, seed=0)[:, 0, 0]
        found = interval(float(lengths_N.mean()), draws_R)
        weights_DK = None if direction is None else np.array([direction.weights])
        angle = None
        if weights_DK is not None and bool(space.on_arc(weights_DK, arc)[0]):
            angle = round(float(space.asked_angle(weights_DK, arc)[0]), 3) + 0.0  # no minus zero
        rows.append(
            {
                "entry": name,
                "direction": "" if direction is None else str(direction),
                "angle": "" if angle is None else angle,
                "questions": len(answers),
                "characters": round(float(lengths_N.mean()), 1),
                "characters_low": round(found["low"] or 0.0, 1),
                "characters_high": round(found["high"] or 0.0, 1),
                "words": round(float(np.mean([sum(len(turn.split()) for turn in a.turns) for a in answers])), 1),
                "tokens": round(float(np.mean([answer.tokens for answer in answers])), 1),
                "cut_off": round(float(np.mean([not answer.stopped for answer in answers])), 4),
            }
        )
        if angle is not None:
            about = f"{direction}: {lengths_N.mean():.0f} characters"
            span = (found["low"] or 0.0, found["high"] or 0.0)
            points.append(Point(angle, float(lengths_N.mean()), y_range=span, tooltip=about))
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    write_bytes(out / "curve.csv", text.getvalue().encode())
    if len(points) > 1:
        points.sort(key=lambda point: point.x)
        chart = Chart(
            [Series(model, 0, points)],
            f"{model}: length of answers",
            f"asked direction, degrees towards {arc}",
            "characters of an answer",
            "Mean length of the answers against the asked direction, with 95% intervals over questions.",
            band=True,
        )
        write_bytes(out / "curve.svg", chart.svg(alone=True).encode())
    return out / "curve.csv"


# --- asking ----------------------------------------------------------------------------------------------------


def _kept(out: Path, form: Form, name: str) -> Path:
    """Where the answers of an entry are kept as they come."""
    return out / "answers" / form / f"{name}.jsonl"


def _answer_all(
    sampler: Sampler,
    questions: Sequence[BenchmarkQuestion],
    direction: Direction | None,
    file: Path,
    name: str,
    settings: Mapping[str, Any],
    seed: int,
) -> list[BenchmarkAnswer]:
    """The answers of one entry, those of an earlier run first."""
    weights = None if direction is None else direction.weights
    asked = [(question.id, question.turns) for question in questions]
    header = {
        "entry": name,
        "policy": sampler.revision,
        "direction": None if direction is None else direction.as_mapping(),
        "seed": seed,
        "settings": dict(settings),
        "questions": stable_hash(json.dumps(asked)),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        known, answers = _read_answers(file, header)
        if known:
            os.truncate(file, known)  # a line that was being written
        else:
            write_bytes(file, (json.dumps(header) + "\n").encode())
        done = {answer.id for answer in answers}
        left = [question for question in questions if question.id not in done]
        with StopOnSignal() as stop, ProgressBar(name, len(questions), "questions", "tokens", len(done)) as bar:
            for start in range(0, len(left), CHUNK):
                if stop.requested:
                    raise stop.interrupted(name, len(answers), len(questions), "questions")
                chunk = _answer(sampler, left[start : start + CHUNK], weights, name, seed)
                with file.open("a", encoding="utf-8") as lines:
                    lines.writelines(json.dumps(answer.__dict__, ensure_ascii=False) + "\n" for answer in chunk)
                    lines.flush()
                    os.fsync(lines.fileno())
                answers += chunk
                bar.advance(len(chunk), sum(answer.tokens for answer in chunk))
    except OSError as error:
        raise disk_error(error, file, "writing answers") from None
    by_id = {answer.id: answer for answer in answers}
    return [by_id[question.id] for question in questions]


def _answer(
    sampler: Sampler, questions: Sequence[BenchmarkQuestion], direction: tuple[float, ...] | None, name: str, seed: int
) -> list[BenchmarkAnswer]:
    """Ask turn after turn, the earlier answers in the conversation."""
    talks: list[Messages] = [[] for _ in questions]
    turns: list[list[str]] = [[] for _ in questions]
    tokens, stopped = [0] * len(questions), [True] * len(questions)
    for turn in range(max(len(question.turns) for question in questions)):
        places = [place for place, question in enumerate(questions) if turn < len(question.turns)]
        for place in places:
            talks[place].append({"role": "user", "content": questions[place].turns[turn]})
        requests = [
            SampleRequest(talks[place], direction, (seed_of(f"{seed}-{name}-{questions[place].id}-{turn}"),))
            for place in places
        ]
        replies = sampler.sample(requests)
        if len(replies) != len(requests):
            raise EngineError(f"sampler: {len(replies)} answers came back for {len(requests)} requests.")
        for place, reply in zip(places, replies, strict=True):
            text = reply[0].text if reply else ""
            turns[place].append(text.encode("utf-8", "replace").decode())
            talks[place].append({"role": "assistant", "content": text})
            tokens[place] += reply[0].tokens if reply else 0
            stopped[place] &= bool(reply) and reply[0].finish_reason == "stop"
    return [
        BenchmarkAnswer(question.id, tuple(turns[place]), tokens[place], stopped[place], round(time.time(), 3))
        for place, question in enumerate(questions)
    ]


def _read_answers(file: Path, header: Mapping[str, Any] | None) -> tuple[int, list[BenchmarkAnswer]]:
    """Bytes of whole lines, and their answers; 0 and none where the file is missing or has another header."""
    if not file.exists():
        return 0, []
    good, answers = 0, []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True)):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
            if row is None or (number == 0 and header is not None and row != header):
                break
            if number > 0:
                answers.append(BenchmarkAnswer(**{**row, "turns": tuple(row["turns"])}))
        except (ValueError, TypeError, KeyError):
            break
        good += len(line)
    return good, answers


# --- forms -----------------------------------------------------------------------------------------------------


def _rows(path: Path) -> list[tuple[str, Any]]:
    if path.suffix != ".json":
        return [pair for file in find_files(path) for pair in read_rows(file)]
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"questions: {path} is not readable JSON ({error}); check it.") from None
    if not isinstance(rows, list):
        raise DataError(f"questions: {path} is not a list of rows; give the benchmark's question file.")
    return [(f"{path.name}:{number}", row) for number, row in enumerate(rows, start=1)]


def _question(row: Any, form: Form, place: int) -> BenchmarkQuestion:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("it is not an object")
    if form == "alpaca_eval":  # its rows have no id; two of the 805 instructions are the same text
        return BenchmarkQuestion(str(place), (check_text(row.get("instruction"), "instruction"),), row)
    if form == "arena_hard":
        return BenchmarkQuestion(check_text(row.get("uid"), "uid"), (check_text(row.get("prompt"), "prompt"),), row)
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or row.get("question_id") is None:
        raise BadRow("question_id or turns is missing")
    return BenchmarkQuestion(str(row["question_id"]), tuple(check_text(turn, "turns") for turn in turns), row)


def _write(
    form: Form, out: Path, name: str, questions: Sequence[BenchmarkQuestion], answers: Sequence[BenchmarkAnswer]
) -> Path:
    pairs = list(zip(questions, answers, strict=True))
    file = {
        "alpaca_eval": out / "alpaca_eval" / f"{name}.json",
        "mt_bench": out / "mt_bench" / "model_answer" / f"{name}.jsonl",
        "arena_hard": out / "arena-hard-v2.0" / "model_answer" / f"{name}.jsonl",
    }[form]
    file.parent.mkdir(parents=True, exist_ok=True)
    if form == "alpaca_eval":
        write_json(file, [_alpaca_eval(question, answer, name) for question, answer in pairs])
        return file
    row = _mt_bench if form == "mt_bench" else _arena_hard
    lines = [json.dumps(row(question, answer, name), ensure_ascii=False) + "\n" for question, answer in pairs]
    write_bytes(file, "".join(lines).encode("utf-8", "backslashreplace"))
    return file


def _alpaca_eval(question: BenchmarkQuestion, answer: BenchmarkAnswer, name: str) -> dict[str, Any]:
    dataset = {"dataset": question.row["dataset"]} if "dataset" in question.row else {}
    return {"instruction": question.turns[0], "output": answer.turns[0], "generator": name, **dataset}


def _mt_bench(question: BenchmarkQuestion, answer: BenchmarkAnswer, name: str) -> dict[str, Any]:
    return {
        "question_id": question.row["question_id"],
        "answer_id": stable_hash(name, question.id, *answer.turns),
        "model_id": name,
        "choices": [{"index": 0, "turns": list(answer.turns)}],
        "tstamp": answer.time,
    }


def _arena_hard(question: BenchmarkQuestion, answer: BenchmarkAnswer, name: str) -> dict[str, Any]:
    return {
        "uid": question.row["uid"],
        "ans_id": stable_hash(name, question.id, *answer.turns),
        "model": name,
        "messages": [
            {"role": "user", "content": question.turns[0]},
            {"role": "assistant", "content": {"answer": answer.turns[0]}},
        ],
        "tstamp": answer.time,
    }
