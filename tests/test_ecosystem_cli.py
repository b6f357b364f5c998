"""`dpa export`, `fold`, `judge` and `--space` as a user types them; a mistake is one sentence and exit code 2.
pytest tests/test_ecosystem_cli.py
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from test_judge import Server, by_length
from tiny_models import SPACE, save_tiny_model, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from dpa.cli.commands import app
from dpa.core.errors import ConfigError, DpaError, ModelFileError
from dpa.core.presets import DPA_V1
from dpa.models.files import load_space
from dpa.models.policy import save_policy
from dpa.stages.judge import read_answers


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "pol"
    save_policy(tiny_model(context=1024), tiny_tokenizer(), folder, SPACE, {"from": "test"})
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("q") / "q.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"Do {n}.", "dataset": "d"}) + "\n" for n in range(3)))
    return file


def dpa(*arguments: object) -> str:
    """Run a command in this process; what it raises is raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_export_writes_one_entry_per_direction_and_a_curve(policy: Path, questions: Path, tmp_path: Path) -> None:
    output = dpa("export", policy, questions, "--grid", 3, "--out", tmp_path, "--max-new-tokens", 5)
    files = [Path(line) for line in output.splitlines() if line.endswith(".json")]
    assert [file.stem for file in files] == [f"pol@{d}" for d in (
        "helpfulness+71_verbosity-71", "helpfulness+100_verbosity+0", "helpfulness+71_verbosity+71"
    )]  # fmt: skip
    assert len(read_answers(files[0])[1]) == 3
    assert (tmp_path / "curve.csv").read_text().count("\n") == 4
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_lm_eval_gets_a_configuration_per_direction(policy: Path, tmp_path: Path) -> None:
    output = dpa("export", policy, "--form", "lm-eval", "-d", "helpfulness*0.8 - verbosity*0.6", "--out", tmp_path)
    (file,) = tmp_path.glob("lm_eval/*.yaml")
    assert str(file) in output
    config = yaml.safe_load(file.read_text())
    assert config["model_args"]["chat_template_args"] == {"preference": {"helpfulness": 0.8, "verbosity": -0.6}}


def test_lm_eval_is_refused_where_the_folder_reads_no_direction(tmp_path: Path) -> None:
    """Every entry would measure the same unsteered model under another name."""
    published = save_tiny_model(tmp_path / "published")
    with pytest.raises(ModelFileError, match=r"does not read `preference` as this space states it; .*--bake"):
        dpa("export", published, "--space", "dpa-v1", "--form", "lm-eval", "--out", tmp_path)
    assert not list(tmp_path.glob("lm_eval/*"))


def test_bake_writes_a_folder(policy: Path, tmp_path: Path) -> None:
    dpa("export", policy, "--bake", "-30deg", "--out", tmp_path / "terse")
    assert load_space(tmp_path / "terse") == SPACE


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--bake", "-30deg", "--limit", 1), "--bake does not use --limit; leave it out."),
        (("QUESTIONS", "--bake", "-30deg"), "--bake does not use QUESTIONS; leave it out."),
        (("--bake", "-30deg", "-d", "-30deg"), "--bake does not use --direction; leave it out."),
        (("QUESTIONS", "--form", "lm-eval"), "--form lm-eval does not use QUESTIONS; leave it out."),
        (("--form", "lm-eval", "--seed", 0), "--form lm-eval does not use --seed; leave it out."),
        (("QUESTIONS", "--name", "me/model"), "--name: 'me/model' has a slash"),
    ],
)
def test_an_option_that_would_not_be_looked_at_is_refused(
    given: tuple[object, ...], said: str, policy: Path, questions: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        dpa(
            "export", policy, *(questions if part == "QUESTIONS" else part for part in given), "--out", tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_judge_of_two_files_asks_nobody_questions(questions: Path, tmp_path: Path) -> None:
    common = ("judge", questions, questions, "-p", "40deg", "--judge", "fake", "--out", tmp_path / "out")
    for more in (("--questions", questions), ("--max-new-tokens", 5)):
        with pytest.raises(ConfigError, match=f"judge, of two answer files, does not use {more[0]}; leave it out"):
            dpa(*common, *more)


@pytest.mark.parametrize(
    "command",
    [("export", "POLICY", "--bake", "-30deg"), ("fold", "POLICY", "-d", "x"), ("adopt", "POLICY", "POLICY")],
    ids=lambda command: command[0],
)
def test_what_lies_there_is_never_replaced(command: tuple[str, ...], policy: Path, tmp_path: Path) -> None:
    """Not even a policy of dpa's: its owner may have put something of his own into it."""
    mine = shutil.copytree(policy, tmp_path / "mine") / "notes.txt"
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="mine exists, and it would be replaced as a whole; choose a new folder"):
        dpa(*(part.replace("POLICY", str(policy)) for part in command), "--out", mine.parent)
    assert mine.read_text() == "mine"


def test_a_published_policy_without_dpa_config_is_steered_by_its_spaces_name(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "DPA-v1-Mistral-7B", "mistral", context=1024)
    with pytest.raises(ModelFileError, match=r"dpa_config\.json"):
        dpa("generate", folder, "Why?", "-d", "-15deg", "--max-new-tokens", 3)
    dpa("generate", folder, "Why?", "-d", "-15deg", "--max-new-tokens", 3, "--space", "dpa-v1")
    direction = DPA_V1.parse("-15deg")
    assert DPA_V1.prompt(direction) == (
        "You are a helpful, respectful, and honest assistant who always responds to the user in a harmless way. "
        "Your response should maximize weighted rating = helpfulness*97 + verbosity*-26"
    )


def test_judge_asks_models_shows_the_cost_first_and_replays(policy: Path, questions: Path, tmp_path: Path) -> None:
    server = Server(by_length)
    try:
        sides = (f"{policy}@-40deg", f"{policy}@40deg")
        common = ("judge", *sides, "-p", "40deg", "--judge", "fake", "--questions", questions, "--out", tmp_path)
        common += ("--max-new-tokens", 5)
        with pytest.raises(ConfigError, match="--yes"):
            dpa(*common, "--base-url", server.url, "--limit-tokens", 10)
        with pytest.raises(ConfigError, match=r"tokens \(each reply counted as all of --max-tokens 4000\) are more"):
            dpa(*common, "--base-url", server.url, "--limit-tokens", 20_000, "--max-tokens", 4000)
        beyond = CliRunner().invoke(app, [*map(str, common), "-p", "120deg", "--limit-tokens", "1"])
        assert "lies 120.0 degrees from helpfulness*100 + verbosity*0;" in beyond.stderr
        assert "the judge is told its edge, helpfulness*71 + verbosity*71." in beyond.stderr
        assert server.bodies() == []
        output = dpa(*common, "--base-url", server.url, "--price-in", 2)
        assert "6 calls to make" in output
        assert "in your prices" in output
        assert len(server.bodies()) == 6
    finally:
        server.stop()
    again = dpa(*common)
    assert "0 calls to make (6 are in the cache)" in again
    assert [line for line in output.splitlines() if line.startswith("Told")] == [
        line for line in again.splitlines() if line.startswith("Told")
    ]
    assert (tmp_path / "judge.html").is_file()


def test_the_policies_of_two_runs_bear_two_names_and_two_of_one_name_are_not_judged_into_one_file(
    policy: Path, questions: Path, tmp_path: Path
) -> None:
    for run in ("a", "b"):
        shutil.copytree(policy, tmp_path / run / "iter_1" / "policy")
        folder = tmp_path / run / "iter_1" / "policy"
        output = dpa("export", folder, questions, "-d", "0deg", "--out", tmp_path / "out", "--max-new-tokens", 3)
        assert f"{run}-1@helpfulness" in output
    shutil.copytree(policy, tmp_path / "elsewhere" / "pol")
    asked = ("judge", f"{policy}@0deg", f"{tmp_path}/elsewhere/pol@0deg", "-p", "0deg", "--judge", "fake")
    with pytest.raises(ConfigError, match="would answer under one name"):
        dpa(*asked, "--questions", questions, "--out", tmp_path / "judged")
    assert not (tmp_path / "judged").exists()


def test_a_policy_of_the_hub_bears_its_ids_name_not_its_commits(
    policy: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = Path(shutil.copytree(policy, tmp_path / "snapshots" / ("0a" * 20)))
    monkeypatch.setattr("dpa.models.files._fetch", lambda hub_id, revision: fetched)
    how = ("--out", tmp_path / "out", "--max-new-tokens", 3, "--limit", 1)
    assert "/pol-7b@helpfulness" in dpa("export", "me/pol-7b", questions, "-d", "0deg", *how)
    with pytest.raises(ConfigError, match="--yes"):
        dpa("judge", "me/pol-7b@-40deg", "me/pol-7b@40deg", "-p", "0deg", "--judge", "fake", "--questions", questions,
            *how, "--limit-tokens", 0)  # fmt: skip
    names = [file.name.partition("@")[0] for file in (tmp_path / "out" / "alpaca_eval").glob("*.json")]
    assert names == ["pol-7b"] * 3


def test_only_the_first_questions_are_answered_where_only_the_first_pairs_are_judged(
    policy: Path, questions: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--yes"):
        dpa("judge", f"{policy}@-40deg", f"{policy}@40deg", "-p", "0deg", "--judge", "fake", "--questions", questions,
            "--out", tmp_path, "--max-new-tokens", 3, "--limit", 1, "--limit-tokens", 0)  # fmt: skip
    assert [len(read_answers(file)[1]) for file in tmp_path.glob("alpaca_eval/*.json")] == [1, 1]


def test_a_key_that_no_header_takes_is_refused_and_not_shown(
    policy: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPA_JUDGE_API_KEY", "schlüssel-42")
    with pytest.raises(ConfigError, match=r"DPA_JUDGE_API_KEY.*no HTTP header takes") as refused:
        dpa("judge", f"{policy}@-40deg", f"{policy}@40deg", "-p", "0deg", "--judge", "fake", "--questions", questions,
            "--out", tmp_path, "--max-new-tokens", 3)  # fmt: skip
    assert "42" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "POLICY"), "question file is missing"),
        (("export", "POLICY", "--form", "helm"), "--form"),
        (("export", "POLICY", "-d", "80deg", "q.jsonl"), "degrees"),
        (("export", "POLICY", "q.jsonl", "--grid", "1"), "--grid: 1 would be one end"),
        (("judge", "a.json", "b.json", "-p", "0deg", "--judge", "m"), "is no file"),
        (("judge", "POLICY@0deg", "b.json", "-p", "0deg", "--judge", "m"), "give --questions"),
        (("fold", "POLICY", "-d", "x", "--out", "o"), "dpa_reward.json"),
        (("fold", "POLICY", "-d", "x", "--out", "o", "--preset", "v2"), "--preset"),
        (("push", "missing", "me/x"), "no folder"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: tuple[str, ...], said: str, policy: Path) -> None:
    with pytest.raises(DpaError, match=said) as error:
        dpa(*(argument.replace("POLICY", str(policy)) for argument in arguments))
    assert error.value.exit_code == 2
