"""`dpa init` looks at rated files of every form and writes a configuration that runs as it is.
Run: pytest tests/test_init.py
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from decimal import Decimal
from io import StringIO
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tiny_models import save_tiny_model

from dpa.core.config import RunConfig, load_config, load_run, parse_config
from dpa.core.config_identity import resolved
from dpa.core.errors import ConfigError, DataError, DpaError
from dpa.core.records import messages_text
from dpa.recipes.checks import check_run
from dpa.recipes.costs.devices import Device
from dpa.recipes.dpa import Loop
from dpa.recipes.rated_rows import RewardRun
from dpa.recipes.starting.init import Wanted, init
from dpa.recipes.starting.objectives import is_bad
from dpa.scoring.wordiness import wordiness
from dpa.stages.prompts import read_prompts
from dpa.stages.ratings import prompt_id_of, read_ratings
from dpa.storage.recognising import recognise, usual_scale
from dpa.storage.rows import read_rows

TOY = Device("a toy", peak=1e13, bandwidth=1e12, memory=8e9, card=False)
SLOW = Device("a slow toy", peak=1e6, bandwidth=1e7, memory=8e9, card=False)
CARD = Device("a card", peak=1e15, bandwidth=3e12, memory=80e9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def answers(n: int) -> list[tuple[str, int, int]]:
    """Three responses to prompt n: text, and marks 0..4 for how good and how long; the longer, the worse."""
    rng = Random(n)
    found = []
    for words in rng.sample(range(5), 3):
        found.append(("word " * (1 + 3 * words) + "!" * rng.randrange(3), max(0, 4 - words - rng.randrange(2)), words))
    return found


PAIRS = [(f"question {n}?", *answer) for n in range(40) for answer in answers(n)]


def csv_with_own_columns(folder: Path) -> list[Path]:
    lines = ["id,Question,Model Answer,Clarity,Word Count Rating,annotator_id"]
    lines += [f'{n},"{q}","{a.strip()}",{good + 1},{long + 1},{n % 3}' for n, (q, a, good, long) in enumerate(PAIRS)]
    (folder / "own.csv").write_text("\n".join(lines) + "\n")
    return [folder / "own.csv"]


def jsonl_of_this_project(folder: Path) -> list[Path]:
    rows = [{"prompt": q, "response": a, "helpfulness": good, "verbosity": long} for q, a, good, long in PAIRS]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, rows[0], {"prompt": "", "response": "x", "verbosity": 1}])
    (folder / "mine.jsonl").write_text(text + "not JSON\n" * 9)
    return [folder / "mine.jsonl"]


def parquet_like_helpsteer(folder: Path) -> list[Path]:
    marks = {"helpfulness": 2, "correctness": 2, "coherence": 2, "complexity": 3, "verbosity": 3}
    columns = {"prompt": [row[0] for row in PAIRS], "response": [row[1] for row in PAIRS]}
    columns |= {name: [row[place] for row in PAIRS] for name, place in marks.items()}
    pq.write_table(pa.table(columns), folder / "helpsteer2.parquet")
    return [folder / "helpsteer2.parquet"]


def like_ultrafeedback(folder: Path) -> list[Path]:
    with (folder / "feedback.jsonl").open("w") as file:
        for n in range(40):
            completions = []
            for text, good, long in answers(n):
                aspects = {"instruction_following": good, "truthfulness": long, "honesty": good, "helpfulness": good}
                given = {name: {"Rating": str(value + 1)} for name, value in aspects.items()}
                completions.append({"response": text, "overall_score": 2 * good + 1, "annotations": given})
            file.write(json.dumps({"instruction": f"question {n}?", "source": "x", "completions": completions}) + "\n")
    return [folder / "feedback.jsonl"]


def conversations_and_a_csv(folder: Path) -> list[Path]:
    with (folder / "talks.jsonl").open("w") as file:
        for n, (q, a, good, _) in enumerate(PAIRS):
            turns = [("user", "Hello."), ("assistant", "Yes?"), ("user", q), ("assistant", a)]
            row = {
                "conversation": [{"role": r, "content": c} for r, c in turns],
                "rating": good / 4,
                "n_tokens": len(a) + n,
            }
            file.write(json.dumps(row) + "\n")
    (folder / "more.csv").write_text(
        "prompt,completion,rating\n" + "".join(f"alone {n},{'word ' * (n % 7)}x,{n % 5 / 4}\n" for n in range(30))
    )
    return [folder / "talks.jsonl", folder / "more.csv"]


FIVE = [
    csv_with_own_columns,
    jsonl_of_this_project,
    parquet_like_helpsteer,
    like_ultrafeedback,
    conversations_and_a_csv,
]


def begun(files: list[Path], model: Path, device: Device = TOY, **more: object) -> tuple[Path, str]:
    """The configuration written, and what was printed."""
    out = StringIO()
    wanted = Wanted(tuple(map(str, files)), str(model), files[0].with_suffix(".yaml"), **more)
    return init(wanted, Console(file=out, width=100), device), re.sub(r"\s+", " ", out.getvalue())


@pytest.mark.parametrize("write", FIVE, ids=lambda write: write.__name__)
def test_what_it_wrote_runs_from_rated_rows_to_a_report(
    tmp_path: Path, model: Path, write: Callable[[Path], list[Path]]
) -> None:
    file, printed = begun(write(tmp_path), model)
    config = load_config(file)
    check_run(config)
    for path in (config.prompts.path, config.evaluate.prompts.path):
        assert read_prompts(path)[1] == []
    fields = resolved(config)
    toy = {"rollout": {"max_new_tokens": 4, "directions": 1, "samples": 2}, "evaluate": {"directions": 3}}
    for section, changes in toy.items():
        fields[section] |= changes
    fields |= {"out": str(tmp_path / "run"), "iterations": 1 if write is csv_with_own_columns else 0}
    fields["prompts"]["count"] = fields["evaluate"]["prompts"]["count"] = 2
    fields["ratings"] = [{**one, "count": 24} for one in fields["ratings"]]
    fields["evaluate"]["resamples"] = 5
    fields["finetune"] |= {"learning_rate": 1e-3, "epochs": 0.2}
    fields["reward"]["train"]["allow_worse_than_mean"] = True
    with Loop(parse_config(fields)) as loop:
        assert loop.run().is_file()
    assert f"dpa run {file}" in printed and "iter_1/policy" in printed


def test_each_form_is_recognised_and_said(tmp_path: Path) -> None:
    found = {write.__name__: recognise([str(file) for file in write(tmp_path)]) for write in FIVE}
    (own,) = found["csv_with_own_columns"]
    assert own.config.columns == {"prompt": "Question", "response": "Model Answer"}
    assert own.config.scales == {"Clarity": (1, 5), "Word Count Rating": (1, 5)}
    assert own.unread == ("id", "annotator_id") and "'Question' is the prompt" in own.said
    (ours,) = found["jsonl_of_this_project"]
    assert ours.config.columns == {} and ours.config.scales == {"helpfulness": (0, 4), "verbosity": (0, 4)}
    assert found["parquet_like_helpsteer"][0].config.format == "helpsteer2"
    assert found["like_ultrafeedback"][0].config.format == "ultrafeedback"
    talks, more = found["conversations_and_a_csv"]
    assert talks.config.columns == {"messages": "conversation"} and "the last one the response" in talks.said
    assert more.config.columns == {"response": "completion"} and more.config.scales == {"rating": (0, 1)}


def test_the_look_says_what_is_there_and_what_pulls_against_what(tmp_path: Path, model: Path) -> None:
    file, printed = begun(jsonl_of_this_project(tmp_path), model)
    assert "121 rated responses to 40 prompts, usually 3 a prompt" in printed
    assert "10 bad rows, left out: 9 x not JSON" in printed and "1 rows repeat a prompt" in printed
    assert "correlations between responses to the same prompt" in printed and "helpfulness and verbosity" in printed
    config = load_config(file)
    assert list(config.space.objectives) == ["helpfulness", "verbosity"] and "terse" in config.space.presets
    assert config.ratings[0].max_reject_rate == pytest.approx(0.09), "the share of bad rows is put up with, and said"


def test_held_out_prompts_are_in_no_other_set_and_their_rows_are_counted(tmp_path: Path, model: Path) -> None:
    file, printed = begun(csv_with_own_columns(tmp_path), model)
    config = load_config(file)
    held_out, online = (read_prompts(path)[0] for path in (config.evaluate.prompts.path, config.prompts.path))
    assert len(held_out) == 4 and len(online) == 36
    assert not {prompt_id_of(p.messages) for p in held_out} & {prompt_id_of(p.messages) for p in online}
    assert "4 prompts to measure on, drawn from the data; their 12 rated rows (10.0%) train nothing" in printed


def test_where_more_is_rated_than_fits_the_held_out_prompts_cost_no_rated_row(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": f"{q} {n}", "response": a, "good": g, "long": w} for n in range(3) for q, a, g, w in PAIRS]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file, printed = begun([tmp_path / "more.jsonl"], model, SLOW)
    assert load_config(file).ratings[0].count == 67, "200 rated rows are the least"
    assert "none of the rated rows used is theirs" in printed and "more than --hours 1;" in printed
    assert "Even the smallest run, over 67 of" in printed and "gets through" not in printed
    quick, _ = begun([tmp_path / "more.jsonl"], model, TOY, force=True)
    assert load_config(quick).ratings[0].count is None


def test_marks_that_agree_get_the_length_as_what_pulls_against_them(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": q, "response": a, "overall": good, "clarity": good} for q, a, good, _ in PAIRS]
    (tmp_path / "agree.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file, printed = begun([tmp_path / "agree.jsonl"], model)
    config = load_config(file)
    assert list(config.space.objectives) == ["overall", "verbosity"]
    assert config.reward.functions == {"verbosity": "dpa.scoring.wordiness:wordiness"}
    assert "verbosity is added" in printed and "# clarity: {clarity: 1.0}" in file.read_text()
    assert [round(wordiness([], "word " * count)) for count in (0, 10, 400, 900)] == [0, 40, 100, 100]


def test_of_a_mark_that_is_worse_the_more_of_it_there_is_nobody_is_offered_more(tmp_path: Path, model: Path) -> None:
    rng = Random(0)
    marks = [(good, 4 - good, long, rng.randrange(5), 4 - long) for _, _, good, long in PAIRS]
    names = ("helpfulness", "toxicity", "verbosity", "risk", "unbiased")

    def written(*chosen: str) -> tuple[RunConfig, str]:
        rows = [dict(zip(names, row, strict=True)) for row in marks]
        lines = [
            json.dumps({"prompt": q, "response": a, **{name: row[name] for name in chosen}}) + "\n"
            for (q, a, *_), row in zip(PAIRS, rows, strict=True)
        ]
        (tmp_path / "bad.jsonl").write_text("".join(lines))
        file, printed = begun([tmp_path / "bad.jsonl"], model, force=True)
        check_run(load_config(file))
        return load_config(file), printed

    config, _ = written("helpfulness", "toxicity", "verbosity")
    assert list(config.space.objectives) == ["helpfulness", "verbosity"], "little toxicity agrees with helpfulness"
    config, printed = written("helpfulness", "risk", "unbiased")
    assert list(config.space.objectives) == ["helpfulness", "risk"]
    assert list(config.space.presets) == ["balanced", "less-risk"] and "its sign turned: more of it is worse" in printed
    config, printed = written("toxicity")
    assert config.space.center == {"toxicity": -1.0} and config.space.presets["balanced"] == {"toxicity": -1.0}
    assert config.space.presets["terse"] == {"toxicity": -0.77, "verbosity": -0.64}
    assert "toxicity is taken as what a good response lacks" in printed


def test_reward_only_needs_no_policy_and_trains(tmp_path: Path, model: Path) -> None:
    file, printed = begun(jsonl_of_this_project(tmp_path), model, reward_only=True)
    assert not list(tmp_path.glob("*-prompts.jsonl")) and "reward_model" in printed
    config = load_run(file)
    assert not isinstance(config, RunConfig)
    with RewardRun(config.model_copy(update={"out": str(tmp_path / "run")})) as run:
        assert (run.run() / "dpa_reward.json").is_file()


def test_nothing_is_written_over_unless_told(tmp_path: Path, model: Path) -> None:
    files = jsonl_of_this_project(tmp_path)
    first, _ = begun(files, model)
    with pytest.raises(ConfigError, match=r"mine.yaml is there already; pass --force"):
        begun(files, model)
    again, _ = begun(files, model, force=True)
    assert again.read_text() == first.read_text()


def test_prompts_are_never_written_among_the_rated_rows(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine,) = jsonl_of_this_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    for given, out in ((".", None), ("../" + tmp_path.name, Path("own.yaml"))):
        file = init(Wanted((given,), str(model), out), Console(file=StringIO()), TOY)
        config = load_config(file)
        assert Path(config.prompts.path).parent == Path(config.evaluate.prompts.path).parent == Path(file.stem)
        assert Path(config.prompts.path).is_file() and list(Path().glob("*.jsonl")) == [Path("mine.jsonl")]
    rated = mine.rename("my-prompts.jsonl").read_bytes()
    Path("link.jsonl").symlink_to("my-prompts.jsonl")
    wanted = Wanted(("my-prompts.jsonl",), str(model), Path("my.yaml"), force=True)
    for files in (("my-prompts.jsonl",), ("link.jsonl",), (".", "my")):
        with pytest.raises(ConfigError, match=r"my-prompts.jsonl would be written among the rated rows; give another"):
            init(replace(wanted, files=files), Console(file=StringIO()), TOY)
    assert Path("my-prompts.jsonl").read_bytes() == rated
    assert init(replace(wanted, reward_only=True), Console(file=StringIO()), TOY) == Path("my.yaml")


def test_a_policy_that_is_not_here_is_named_with_what_to_do(tmp_path: Path) -> None:
    file, printed = begun(csv_with_own_columns(tmp_path), Path("Qwen/Qwen2.5-7B-Instruct"), CARD)
    config = load_config(file)
    assert config.policy == "Qwen/Qwen2.5-7B-Instruct" and config.finetune.lora is not None
    assert (
        "not on this machine: the run fetches it from the Hub" in printed
        and "tokens guessed, 4 characters each" in printed
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "holds pairs"),
        ('{"prompt": "a", "response": "b", "scores": {"x": 1}}\n', "Marks inside 'scores' are not seen"),
        (
            '{"response": "b", "mark": 1}\n{"response": "c", "mark": 2}\n',
            "no column looks like the prompt; name it with",
        ),
        ("nothing\n", "has no row that can be read"),
        (
            '{"prompt": "a", "response_a": "b", "response_b": "c", "score_a": 1, "score_b": 2}\n',
            "several responses in a row .*'response_a', 'response_b'",
        ),
    ],
)
def test_a_file_that_fits_no_form_is_refused_with_what_to_do(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "odd.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        recognise([str(tmp_path / "odd.jsonl")])


@pytest.mark.parametrize(
    ("mark", "bad"),
    [
        ("harm", True),
        ("toxicity", True),
        ("harm_avoidance", False),
        ("bias mitigation", False),
        ("errorHandling", False),
    ],
)
def test_a_mark_of_how_well_harm_is_avoided_is_a_good_one(mark: str, bad: bool) -> None:
    assert is_bad(mark) == bad


def rated(file: Path, header: str, rows: Iterable[str]) -> str:
    file.write_text(header + "\n" + "".join(f"{row}\n" for row in rows))
    return str(file)


def test_marks_of_one_name_on_scales_that_cannot_be_one_are_refused(tmp_path: Path) -> None:
    def score(name: str, *values: float) -> str:
        texts = (f"q{n // 2},a{n},{values[n % len(values)]}" for n in range(40))
        return rated(tmp_path / f"{name}.csv", "prompt,response,score", texts)

    five, four, ten, share = score("a", 1, 3, 5), score("b", 1, 3, 4), score("c", 1, 6, 10), score("d", 0.1, 0.55, 0.9)
    scales = [one.config.scales["score"] for one in recognise([five, four])]
    assert scales == [(1, 5), (1, 5)], "a 5 that nobody gave"
    for other in (ten, share):
        with pytest.raises(DataError, match=r"'score' is on 1 to 5 in .*a\.csv and on .* another name"):
            recognise([five, other])
    eight, one = score("e", 1, 5, 8), score("f", 2, 3, 4)
    for order in ([five, eight, one], [eight, one, five], [one, five, eight]):
        with pytest.raises(DataError, match="'score' is on"):  # whichever comes first
            recognise([ten, *order])


def test_helpsteers_columns_on_another_scale_are_read_as_they_are(tmp_path: Path) -> None:
    marks = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    header = ",".join(("prompt", "response", *marks, "safety"))
    for top, form in ((4, "helpsteer"), (5, "generic")):
        rows = (f"q{n},a{n}," + ",".join([str(1 + (top - 1) * n // 299)] * 6) for n in range(300))  # the best come last
        (found,) = recognise([rated(tmp_path / "sorted.csv", header, rows)])
        assert found.config.format == form
        assert ("safety" in found.unread) == (form == "helpsteer")


def test_the_row_numbers_of_pandas_are_no_mark(tmp_path: Path) -> None:
    rows = (f"{n % 40},q{n // 2},a{n},{n % 5}" for n in range(120))
    (found,) = recognise([rated(tmp_path / "index.csv", ",prompt,response,score", rows)])
    assert list(found.config.scales) == ["score"]


def test_columns_that_are_told_are_believed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ask,first,second,n\n" + "".join(f"a{n},b{n},c{n},{n % 3}\n" for n in range(9)))
    (found,) = recognise([str(tmp_path / "a.csv")], named={"prompt": "ask", "response": "second"}, marks=["n"])
    assert found.config.columns == {"prompt": "ask", "response": "second"} and found.config.scales == {"n": (0, 2)}
    with pytest.raises(DataError, match="no column 'third'"):
        recognise([str(tmp_path / "a.csv")], named={"response": "third"})


@pytest.mark.parametrize("messages", [[{"role": "user", "content": "other"}], "no conversation", None])
def test_a_prompt_that_is_told_is_read_beside_messages(messages: object, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = ({"ask": f"q{n // 2}", "messages": messages, "answer": f"a{n}", "good": n % 3} for n in range(9))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = recognise([str(file)], named={"prompt": "ask"})
    table = read_ratings([found.config]).table
    assert {messages_text([{"role": "user", "content": f"q{n // 2}"}]) for n in range(9)} == set(
        table["messages"].to_pylist()
    )
    assert "'ask' is the prompt" in found.said and "are the messages" not in found.said


def test_a_response_beside_messages_that_hold_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = ({"messages": talk, "other": f"b{n}", "good": n % 3} for n in range(9))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="'messages' ends with the response, so 'other' is no answer to it"):
        recognise([str(file)], named={"response": "other"})


def test_an_instruction_apart_from_its_input_is_refused_unless_told(tmp_path: Path) -> None:
    file = rated(
        tmp_path / "a.csv", "instruction,input,output,good", [f"Sum up.,text {n},a{n},{n % 3}" for n in range(9)]
    )
    with pytest.raises(DataError, match="parts a prompt into 'instruction' and 'input'; write both into one column"):
        recognise([file])
    (found,) = recognise([file], named={"prompt": "input"})
    assert found.config.columns == {"prompt": "input", "response": "output"} and found.unread == ("instruction",)


@pytest.mark.parametrize("gold", ["gold_answer", "Reference Answer", "expected_response", "correct answer", "target"])
def test_what_responses_are_held_against_is_not_the_rated_response(gold: str, tmp_path: Path) -> None:
    rows = [f"q{n},the longest text of all {n},a{n},{n % 3}" for n in range(9)]
    (found,) = recognise([rated(tmp_path / "a.csv", f"question,{gold},model_output,good", rows)])
    assert found.config.columns["response"] == "model_output" and gold in found.unread


def test_what_is_read_as_text_is_no_mark(tmp_path: Path) -> None:
    rows = [f"{n} plus 1?,{n + 1 + n % 2},{n % 5},{n % 3}\n" for n in range(30)]
    (tmp_path / "sums.csv").write_text("prompt,answer,good,source\n" + "".join(rows))
    (found,) = recognise([str(tmp_path / "sums.csv")], named={"response": "answer"})
    assert list(found.config.scales) == ["good"] and found.config.columns == {"response": "answer"}
    with pytest.raises(DataError, match="'answer' is read as the response, so it is no mark"):
        recognise([str(tmp_path / "sums.csv")], named={"response": "answer"}, marks=["good", "answer"])


def test_decimal_marks_are_read_and_nan_is_named_as_what_is_wrong(tmp_path: Path, model: Path) -> None:
    columns = {"prompt": [row[0] for row in PAIRS], "response": [row[1] for row in PAIRS]}
    good = pa.array([Decimal(row[2]) / 2 for row in PAIRS], pa.decimal128(4, 1))
    pq.write_table(pa.table(columns | {"good": good}), tmp_path / "decimal.parquet")
    file, printed = begun([tmp_path / "decimal.parquet"], model)
    assert load_config(file).ratings[0].scales == {"good": (0, 2)} and "120 rated responses" in printed
    holes = [math.nan if n % 5 == 0 else float(row[2]) for n, row in enumerate(PAIRS)]
    pq.write_table(pa.table(columns | {"good": holes}), tmp_path / "holes.parquet")
    with pytest.raises(DataError, match="'good' is NaN or infinite in 24 of 120 rows: write null"):
        recognise([str(tmp_path / "holes.parquet")])


@pytest.mark.parametrize(
    ("low", "high", "whole", "scale"),
    [
        *((0, 1, True, (0, 1)), (0.1, 0.9, False, (0, 1)), (1, 4, True, (1, 4)), (1, 5, True, (1, 5))),
        *((2, 9, True, (1, 10)), (0.5, 98, False, (0, 100)), (-3.2, 27.5, False, (-4, 28)), (1.3, 4.7, False, (1, 5))),
    ],
)
def test_scales_are_those_in_use(low: float, high: float, whole: bool, scale: tuple[float, float]) -> None:
    assert usual_scale(low, high, whole) == scale


def test_a_scale_in_a_marks_name_is_believed_unless_the_marks_are_others(tmp_path: Path, model: Path) -> None:
    heads = ("quality (1-5)", "brevity [0 to 10]", "warmth (1-3)", "politeness")
    rows = [(q, a, good + 1, 10 - 2 * long, 10 * good, 5 - good) for q, a, good, long in PAIRS]
    rows[0] = (*rows[0][:2], 7, *rows[0][3:])  # off the scale
    with (tmp_path / "form.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "reply", *heads), *rows])
    written, printed = begun([tmp_path / "form.csv"], model)
    config = load_config(written)
    scales = config.ratings[0].scales
    assert scales["quality (1-5)"] == (1, 5) and scales["brevity [0 to 10]"] == (0, 10)
    assert scales["warmth (1-3)"] == (0, 40)
    assert "1 bad rows, left out: 1 x quality (1-5) is 7, outside [1, 5]" in printed
    names = list(config.space.objectives)
    assert names[0] == "quality" and not any(letter.isdigit() for name in names for letter in name)


def test_names_that_yaml_or_a_direction_cannot_take_are_written_safely(tmp_path: Path, model: Path) -> None:
    odd = {"Überblick: #1": 2, "no": 3, "2nd, [try]": 2}
    rows = [{"prompt": row[0], "response": row[1], **{k: row[v] for k, v in odd.items()}} for row in PAIRS]
    (tmp_path / "o'dd: file.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file, _ = begun([tmp_path / "o'dd: file.jsonl"], model)
    config = load_config(file)
    assert set(config.ratings[0].scales) == set(odd)
    check_run(config)


ODD_NAMES = [
    *(
        "a\nlearner: dpo",
        "a\u2028learner: dpo",
        "a\x85learner: dpo",
        "a\u2029b",
        "\x7f",
        "\x1b[31m",
        "\ufffe",
        "\ufeff",
        "[/bold]",
        "[bold]x",
    ),
    *(".5", ".inf", ".nan", "...", "~", "1:30", "<<", "٣", "a}b", "{x}", "*a", "!!x", "x" * 200),
]


@pytest.mark.parametrize("reward_only", [False, True])
def test_what_a_mark_is_called_never_becomes_yaml_of_its_own(tmp_path: Path, model: Path, reward_only: bool) -> None:
    marks = [*ODD_NAMES, "score", "long"]
    rows = [
        {"prompt": row[0], "response": row[1], **{name: row[2 + n % 2] for n, name in enumerate(marks)}}
        for row in PAIRS
    ]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file, printed = begun([tmp_path / "odd.jsonl"], model, reward_only=reward_only)
    config = load_run(file)
    assert set(config.ratings[0].scales) == set(marks) and getattr(config, "learner", "sft") == "sft"
    assert "[/bold]" in printed and "[bold]x" in printed


@pytest.mark.parametrize("name", ["a\nseed: 7.jsonl", "a\u2028seed: 7.jsonl", "~x.jsonl", ".5.jsonl", "a #b.jsonl"])
def test_what_a_file_is_called_never_becomes_yaml_of_its_own(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl_of_this_project(tmp_path)[0].rename(name)
    file = init(Wanted((name,), str(model)), Console(file=StringIO(), width=100), TOY)
    config = load_config(file)
    assert config.name == Path(name).stem and config.seed == 0
    assert Path(config.ratings[0].path) == Path(name) and Path(config.prompts.path).is_file()
    check_run(config)


def test_a_name_that_no_configuration_holds_is_not_read(tmp_path: Path) -> None:
    marks = {"good": 2, "\ud800": 2, "x" * 2000: 3}
    rows = [{"prompt": row[0], "response": row[1], **{k: row[v] for k, v in marks.items()}} for row in PAIRS]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = recognise([str(tmp_path / "odd.jsonl")])
    assert set(found.config.scales) == {"good"} and set(found.unread) == set(marks) - {"good"}


def test_names_that_a_run_refuses_are_no_objectives(tmp_path: Path, model: Path) -> None:
    for names in (("balanced", "terse"), ("utility", "complete"), ("direction", "held"), ("chosen", "full")):
        rows = [{"prompt": q, "response": a, names[0]: good, names[1]: long} for q, a, good, long in PAIRS]
        (tmp_path / "taken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        file, _ = begun([tmp_path / "taken.jsonl"], model, force=True)
        config = load_config(file)
        check_run(config)
        assert {f"{name}_2" for name in names} == set(config.space.objectives)
    rows = [{"prompt": q, "response": a, "good": good, "valid": long > 1} for q, a, good, long in PAIRS]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"a mark cannot be called 'valid', .* name the other marks with --mark"):
        begun([tmp_path / "valid.jsonl"], model)
    begun([tmp_path / "valid.jsonl"], model, marks=("good",))


def test_an_estimate_that_fails_leaves_no_file(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("no time")

    files = jsonl_of_this_project(tmp_path)
    monkeypatch.setattr("dpa.recipes.starting.init.estimate", refuse)
    with pytest.raises(ConfigError, match="no time"):
        begun(files, model)
    assert list(tmp_path.iterdir()) == files


@pytest.mark.parametrize("name", ["somebody/ratings", "nvidia/HelpSteer2"])
def test_the_time_of_a_hub_data_set_is_that_of_the_rows_it_has(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (mine,) = jsonl_of_this_project(tmp_path)
    here, _ = begun([mine], model, SLOW)

    def rows(*_: object) -> object:
        return read_rows(mine)

    for module in ("storage.recognising", "stages.ratings"):
        monkeypatch.setattr(f"dpa.{module}.read_hub_rows", rows)
    out, printed = tmp_path / "hub.yaml", StringIO()
    init(Wanted((name,), str(model), out, split="validation"), Console(file=printed, width=500), SLOW)
    promised = [re.findall("takes about .* here|in about .* on", text) for text in (here.read_text(), out.read_text())]
    assert promised[0] == promised[1] != []
    assert load_config(out).ratings[0].path == name


def test_a_policy_that_nobody_knows_is_taken_for_a_middling_one_and_it_is_said(tmp_path: Path) -> None:
    file, printed = begun(csv_with_own_columns(tmp_path), Path("owner/unheard-of"), CARD)
    assert "owner/unheard-of: its size is not known; sizes and times are for 1 billion parameters." in printed
    assert load_config(file).policy == "owner/unheard-of"


def test_large_marks_keep_every_digit_of_their_scale(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": row[0], "response": row[1], "elo": 1234567.5 + row[2], "long": row[3]} for row in PAIRS]
    (tmp_path / "large.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file, _ = begun([tmp_path / "large.jsonl"], model)
    assert load_config(file).ratings[0].scales["elo"] == (1234567.0, 1234572.0)


def test_a_card_gets_a_reward_model_of_all_weights_where_rows_suffice(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": f"{q} {n}", "response": a, "good": g, "long": w} for n in range(20) for q, a, g, w in PAIRS]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file, _ = begun([tmp_path / "many.jsonl"], model, CARD)
    config = load_config(file)
    assert config.reward.train is not None and config.reward.train.method == "full" and config.iterations == 2


def test_every_refusal_is_a_users_mistake(tmp_path: Path, model: Path) -> None:
    (tmp_path / "few.csv").write_text("prompt,response,good\na,b,1\nc,d,2\n")
    (mine,) = jsonl_of_this_project(tmp_path)
    for wanted in (
        Wanted((str(tmp_path / "few.csv"),), str(model), tmp_path / "few.yaml"),
        Wanted((str(tmp_path / "few.csv"),), str(tmp_path / "no model"), tmp_path / "few.yaml"),
        Wanted((str(tmp_path / "few.csv"),), str(model), tmp_path / "few.txt"),
        Wanted((str(tmp_path / "none.csv"),), str(model), tmp_path / "few.yaml"),
        Wanted(("nobody/nothing",), str(model), tmp_path / "few.yaml"),
        Wanted((str(tmp_path / "few.csv"),), str(model), tmp_path / f"{'x' * 300}.yaml"),
        Wanted((str(tmp_path / "few.csv"),), str(model), tmp_path / "few.yaml", hours=math.nan),
        Wanted((str(tmp_path / "few.csv"),), str(model), tmp_path / "few.yaml", marks=("response",)),
        Wanted((str(tmp_path / "few.csv"),), str(model), tmp_path / "few.yaml", columns=(("prompt", "response"),)),
        Wanted((str(mine),), str(model), mine / "under-a-file.yaml"),
    ):
        with pytest.raises(DpaError) as refused:
            init(wanted, Console(file=StringIO()), TOY)
        assert refused.value.exit_code == 2
    assert not list(tmp_path.glob("few*.jsonl")), "nothing is left of what was refused"
