"""The whole loop on the demo world, small: it ends, resumes, refuses another configuration, and reports.

pytest tests/test_loop.py
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import python
from toy_run import toy_config

from dpa.cli.talk import answer
from dpa.core.config import load_config
from dpa.core.errors import ConfigError, RunFolderError, UserError
from dpa.core.records import Ledger
from dpa.core.reference import ModelReference
from dpa.recipes.checks import check_run
from dpa.recipes.dpa import Loop
from dpa.recipes.results import next_step
from dpa.stages.prompts import measured_prompts, prompts_table, read_prompts
from dpa.world.demo import write_world

SMALL = {
    "iterations": "1",
    "prompts.count": "12",
    "rollout.directions": "2",
    "rollout.samples": "2",
    "rollout.prompts_per_shard": "4",
    "rollout.max_new_tokens": "40",
    "rollout.workers": "1",
    "selection.directions": "2",
    "evaluate.directions": "3",
    "evaluate.prompts.count": "6",
    "evaluate.resamples": "50",
    "reward.train.method": "ridge",
    "finetune.optimizer": "adamw",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished small run: (its configuration, its folder)."""
    folder = tmp_path_factory.mktemp("loop")
    recipe = write_world(folder / "world", folder / "run", seed=3, rated_questions=20, prompts=30)
    with Loop(load_config(recipe, SMALL)) as loop:
        loop.run()
    return recipe, folder / "run"


def test_every_iteration_is_measured_and_reported(finished: tuple[Path, Path]) -> None:
    _, run = finished
    results = json.loads((run / "results.json").read_text())
    assert [policy["name"] for policy in results["policies"]] == ["t = 0", "t = 1"]
    assert set(results["policies"][1]["evaluation"]["measures"]) == {"model", "gold"}
    ledger = results["policies"][1]["ledger"]
    assert ledger["rollout"]["rows"] == 12 * 2 * 2
    assert ledger["finetune"]["training_tokens"] > 0
    assert results["reward_model"]
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (run / "table.csv").read_text().count("\n") > 10
    assert json.loads((run / "samples.jsonl").read_text().splitlines()[0])["response"] is not None


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ((True, True), "dpa serve run/iter_1/policy"),
        ((True, False), "dpa serve run/iter_0/policy    # t = 0; those after it do not follow their direction"),
        (
            (False, False),
            "dpa serve run/iter_1/policy    # it does not follow its direction yet; more in docs/learning.md, ",
        ),
        (
            (None, None),
            "dpa serve run/iter_1/policy    # it does not follow its direction yet; more in docs/learning.md, ",
        ),
    ],
)
def test_the_next_step_is_the_last_policy_that_follows_its_direction(
    verdicts: tuple[bool | None, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [None if one is None else {"listens": {"verdict": one}} for one in verdicts]
    monkeypatch.setattr("dpa.recipes.results.evaluation_of", lambda run, t: found[t])
    monkeypatch.setattr("dpa.recipes.results.first_iteration", lambda config: 0)
    run = SimpleNamespace(config=SimpleNamespace(iterations=1), policy_folder=lambda t: Path(f"run/iter_{t}/policy"))
    assert next_step(run).startswith(said)


def test_the_same_call_again_does_no_work_and_changes_nothing(
    finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_again(*_: object) -> None:
        raise AssertionError("nothing is to be scored: no reward model is loaded, and no server asked")

    monkeypatch.setattr("dpa.recipes.run.build_scorer", not_again)
    recipe, run = finished
    before = {path: path.read_bytes() for path in run.rglob("*.parquet")} | {
        path: path.read_bytes() for path in run.rglob("*.safetensors")
    }
    with Loop(load_config(recipe, SMALL)) as loop:
        loop.run()
    assert before == {path: path.read_bytes() for path in before}


def test_what_a_policy_was_trained_on_stays_though_another_version_would_choose_otherwise(
    finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = finished
    monkeypatch.setattr("dpa.stages.select.ELSEWHERE", 17)
    shards = sorted((run / "iter_1" / "select").glob("shard-*"))
    before = [shard.stat().st_mtime_ns for shard in shards]
    with Loop(load_config(recipe, SMALL)) as loop:
        assert loop.select(1).rows > 0
    assert [shard.stat().st_mtime_ns for shard in shards] == before


def test_prompts_to_measure_on_are_drawn_once_and_those_of_an_older_folder_were_the_first(tmp_path: Path) -> None:
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps({"id": f"h{n}", "prompt": f"And {n}?"}) + "\n" for n in range(12)))
    measured = {"prompts": {"path": str(file), "count": 5}, "directions": 3, "resamples": 5}
    there = read_prompts(file)[0]
    with Loop(toy_config(tmp_path / "in", tmp_path / "run", evaluate=measured)) as loop:
        assert loop.held_out == measured_prompts(there, 5) != there[:5]
        assert len(loop.stage(None, "eval_prompts").table(0)) == 5
    with Loop(toy_config(tmp_path / "in", tmp_path / "older", evaluate=measured)) as loop:
        stage = loop.stage(None, "eval_prompts")
        stage.write_shard(0, prompts_table(there), Ledger(rows=12), [])
        stage.finish()
        assert loop.held_out == there[:5]


def test_another_configuration_is_refused_with_the_difference(finished: tuple[Path, Path]) -> None:
    recipe, _ = finished
    with pytest.raises(RunFolderError, match=r"rollout\.samples: 2 -> 3"):
        Loop(load_config(recipe, {**SMALL, "rollout.samples": "3"}))


def test_prompts_are_drawn_without_repeats_until_all_are_used(finished: tuple[Path, Path]) -> None:
    recipe, _ = finished
    with Loop(load_config(recipe, {**SMALL, "iterations": "3"})) as loop:
        drawn = [{prompt.prompt_id for prompt in loop.prompts(t)} for t in (1, 2)]
        assert loop.prompts(1) == loop.prompts(1)
        held_out = {prompt.prompt_id for prompt in loop.held_out}
    assert len(drawn[0]) == len(drawn[1]) == 12
    assert not drawn[0] & drawn[1]
    assert not held_out & (drawn[0] | drawn[1])


def test_what_can_be_known_to_be_wrong_is_said_before_any_work(finished: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, _ = finished
    elsewhere = {**SMALL, "out": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=r"evaluate\.gold.*missing: warmth"):
        Loop(load_config(recipe, {**elsewhere, "evaluate.gold": "{helpfulness: a:b, verbosity: a:b}"}))
    named = {
        "space.objectives": "{held: {critics-overall: 1}, verbosity: {readers-verbosity: 1}}",
        "space.presets": "{}",
        "evaluate.gold": "{}",
        "selection.targets": "0.25",
    }
    with pytest.raises(ConfigError, match="`held` is the name of a column"):
        Loop(load_config(recipe, {**elsewhere, **named}))
    check_run(load_config(recipe, {**elsewhere, **named, "selection.targets": "0"}))  # then there is no such column
    with pytest.raises(ConfigError, match="cannot be called 'valid'"):
        Loop(load_config(recipe, {**elsewhere, "reward": "{functions: {valid: dpa.world.true_reward:warmth}}"}))
    with pytest.raises(ConfigError, match=r"reward\.train: there are no ratings"):
        Loop(load_config(recipe, {**elsewhere, "ratings": "[]"}))
    assert not (tmp_path / "run").exists()


def test_a_model_of_the_loop_answers_on_the_command_line(finished: tuple[Path, Path]) -> None:
    _, run = finished
    command = ["-m", "dpa", "generate", str(run / "iter_1" / "policy"), "What is the home of Ivy?"]
    good = python(*command, "-d", "helpfulness*0.8 - verbosity*0.6")
    assert good.returncode == 0, good.stderr
    assert good.stdout.strip()
    bad = python(*command, "-d", "helpfulnes")
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
    assert "helpfulness" in bad.stderr


def test_the_best_of_several_is_judged_by_the_reward_model_of_the_run(finished: tuple[Path, Path]) -> None:
    policy, question = ModelReference(str(finished[1] / "iter_1" / "policy")), "What is the home of Ivy?"
    plain = list(answer(policy, [question], "terse", 6, 1.0, 30, 0, clamp=False))
    for robust in (False, True):
        first, again = (list(answer(policy, [question], "terse", 6, 1.0, 30, 0, False, 6, robust)) for _ in range(2))
        assert first == again != plain


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": {"path": "nowhere.jsonl"}}, "no file at nowhere.jsonl"),
        ({"evaluate": {"prompts": {"path": "nowhere.jsonl"}, "directions": 3}}, "no file at nowhere.jsonl"),
        ({"reward": {"functions": {"helpfulness": "no_module:f", "verbosity": "no_module:f"}}}, "no_module cannot be"),
        ({"reward": {"folder": "/nowhere"}}, "no folder at /nowhere"),
    ],
)
def test_what_a_later_stage_lacks_is_said_before_the_first_one(changes: dict, said: str, tmp_path: Path) -> None:
    with Loop(toy_config(tmp_path, tmp_path / "run", **changes)) as loop, pytest.raises(UserError, match=said):
        loop.run()
    assert not list((tmp_path / "run").glob("iter_*/*/done.json"))
