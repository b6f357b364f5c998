"""Faults of rollout, scoring and selection: kills, signals, bad prompts, bad samplers, bad scores.
Run: pytest tests/test_faults_rollout.py

The numbers in the names are those of the project's list of faults.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes import FakeSampler, FakeScorer, all_rows, prompts_of, space_of
from forks import within

from dpa.core.errors import Interrupted, RejectRateError
from dpa.core.records import Ledger
from dpa.core.sections.rollout import RolloutConfig
from dpa.core.sections.selection import SelectionConfig
from dpa.stages.prompts import read_prompts
from dpa.stages.rollout import rollout
from dpa.stages.score import score
from dpa.stages.select import select_winners
from dpa.storage.run_folder import StageFolder
from dpa.storage.stopping import StopOnSignal

SPACE = space_of(max_angle=60)
CONFIG = RolloutConfig(directions=2, samples=2, prompts_per_shard=8, max_reject_rate=1.0)
KILLS = 15
STAGES = ("rollout", "score", "select")


def stage_rows(run: Path) -> dict[str, list[dict]]:
    return {name: all_rows(StageFolder(run / "iter_1" / name)) for name in STAGES}


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's content and time of writing."""
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_fault_01_killed_at_random_instants_and_resumed_nothing_is_lost(tmp_path: Path, fake_run: Callable) -> None:
    out, errors = fake_run(tmp_path, "--kills", KILLS, "--seconds", 0.001).communicate(timeout=400)
    assert out == f"killed {KILLS} while running\n", errors
    expected = stage_rows(tmp_path / "whole")
    assert len(expected["rollout"]) == len(expected["score"]) == 16 * 3 * 2
    assert len(expected["select"]) == 16 * 3
    for number in range(KILLS):
        assert stage_rows(tmp_path / str(number)) == expected, f"run {number}"
        assert not list((tmp_path / str(number)).rglob("*.tmp"))


def test_fault_05_workers_and_interruptions_change_no_row(tmp_path: Path) -> None:
    rows = []
    for workers in (1, 3, 7):
        stage = StageFolder(tmp_path / str(workers), "iter_1/rollout")
        samplers = [FakeSampler(seconds=0.0002 * place) for place in range(workers)]
        rollout(stage, prompts_of(40), SPACE, samplers, CONFIG, seed=3)
        rows.append(all_rows(stage))
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]) == 40 * 4


def test_fault_06_a_finished_run_is_left_as_it_is(tmp_path: Path, fake_run: Callable) -> None:
    first = fake_run(tmp_path)
    assert first.communicate(timeout=60)[0] == "done\n"
    before = files_of(tmp_path / "iter_1")
    again = fake_run(tmp_path, "--hang", "--workers", 4)  # a sampler that is asked would hang
    assert again.communicate(timeout=60)[0] == "done\n"
    assert again.returncode == 0
    assert files_of(tmp_path / "iter_1") == before


def test_fault_06_no_sampler_is_called(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "iter_1/rollout")
    ledger = rollout(stage, prompts_of(4), SPACE, [FakeSampler()], CONFIG, 0)
    idle = FakeSampler()
    assert rollout(stage, prompts_of(4), SPACE, [idle], CONFIG, 0) == ledger
    assert idle.calls == []


def test_fault_07_sigterm_finishes_the_shard_in_hand_and_says_how_to_resume(tmp_path: Path, fake_run: Callable) -> None:
    process = fake_run(tmp_path, "--seconds", 0.1)  # 1.2 s a shard, 4 shards
    assert within(60, (tmp_path / "iter_1/rollout/shard-00000.json").exists)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert process.returncode == 130
    assert "stopped by SIGTERM with" in errors
    assert "of 4 shards finished; run the same command" in errors
    assert "Traceback" not in errors
    assert fake_run(tmp_path).communicate(timeout=60)[0] == "done\n"
    assert fake_run(tmp_path / "whole").communicate(timeout=60)[0] == "done\n"
    assert stage_rows(tmp_path) == stage_rows(tmp_path / "whole")


def test_fault_07_a_second_sigterm_stops_at_once(tmp_path: Path, fake_run: Callable) -> None:
    process = fake_run(tmp_path, "--hang")
    assert within(60, (tmp_path / "iter_1/rollout/shard-00001.json").exists)  # the third shard hangs
    process.send_signal(signal.SIGTERM)
    assert within(60, lambda: "once more stops at once" in process.written()[1])  # two signals at a time would be one
    time.sleep(0.5)
    assert process.poll() is None, "the first one waits for the shard in hand"
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert process.returncode == -signal.SIGTERM


def test_fault_07_work_that_does_not_end_is_dropped() -> None:
    never = threading.Event()
    done = []
    with StopOnSignal(grace_s=0.3) as stop:
        for number, _ in stop.work_through(range(5), ["worker"], lambda _, number: number < 2 or never.wait()):
            done.append(number)
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        error = stop.interrupted("iter_1/rollout", len(done), 5, "shards")
    never.set()
    assert done == [0, 1]
    assert isinstance(error, Interrupted)
    assert "stopped by SIGTERM with 2 of 5 shards finished" in str(error)


@pytest.mark.parametrize("stage_name", ["rollout", "score"])
def test_fault_07_a_signal_during_the_last_shard_still_ends_the_run(tmp_path: Path, stage_name: str) -> None:
    class Signals(FakeSampler, FakeScorer):
        def __init__(self) -> None:
            FakeSampler.__init__(self, "both")
            FakeScorer.__init__(self, "both")

        def sample(self, requests):  # type: ignore[no-untyped-def]
            if stage_name == "rollout":
                os.kill(os.getpid(), signal.SIGINT)
            return super().sample(requests)

        def score(self, prompts, responses):  # type: ignore[no-untyped-def]
            os.kill(os.getpid(), signal.SIGINT)
            return super().score(prompts, responses)

    candidates, scores = StageFolder(tmp_path / "c"), StageFolder(tmp_path / "s")
    both = Signals()
    with pytest.raises(Interrupted, match="stopped by SIGINT with 1 of 1 shards finished"):
        rollout(candidates, prompts_of(2), SPACE, [both], CONFIG, 0)
        score(scores, candidates, prompts_of(2), both)
    assert (candidates if stage_name == "rollout" else scores).done


BAD_PROMPTS = {
    "empty": ({"prompt": ""}, "prompt is empty"),
    "null": ({"prompt": None}, "prompt is missing"),
    "absent": ({"other": "x"}, "prompt is missing"),
    "number": ({"prompt": 5}, "prompt is int, not text"),
    "surrogate": ({"prompt": "a\ud800b"}, "prompt has a lone surrogate"),
    "nul": ({"prompt": "a\x00b"}, "prompt contains NUL"),
    "megabyte": ({"prompt": "x" * 2**20}, "prompt has 1,048,576 characters"),
    "roles": ({"messages": [{"role": "assistant", "content": "x"}]}, "messages do not go user, assistant"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is 'tool'"),
    "ends": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        "messages do not go user, assistant",
    ),
    "content": ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    "no list": ({"messages": "hello"}, "messages is text, but not JSON"),
    "list": ([1, 2], "the line is list, not an object"),
    "duplicate": ({"id": "good0", "prompt": "again"}, "id 'good0' is a duplicate"),
    "long id": ({"id": "x" * 300, "prompt": "x"}, "id has 300 characters"),
    "bad id": ({"id": [1], "prompt": "x"}, "id is list"),
}


def test_fault_08_bad_prompts_are_rejected_with_their_reason_and_the_rest_finish(tmp_path: Path) -> None:
    good = [{"id": f"good{n}", "prompt": f"question{n}"} for n in range(6)]
    lines = [json.dumps(row) for row in [*good, *(row for row, _ in BAD_PROMPTS.values())]]
    file = tmp_path / "prompts.jsonl"
    file.write_bytes("\n".join(lines).encode() + b"\n{broken\n\xff\xfe\n")
    prompts, rejects = read_prompts(file, max_reject_rate=1.0)
    assert [prompt.prompt_id for prompt in prompts] == [f"good{n}" for n in range(6)]
    assert len(prompts) + len(rejects) == len(lines) + 2
    for reject, (name, (_, reason)) in zip(rejects, BAD_PROMPTS.items(), strict=False):
        assert reason in reject.reason, name
    assert all("JSON" in reject.reason for reject in rejects[-2:])
    assert rejects[0].id == "prompts.jsonl:7", "a reject says where it stands"

    stage = StageFolder(tmp_path / "stage", "iter_1/rollout")
    sampler = FakeSampler(misbehave={"question2": "empty", "question4": "surrogate"})  # empty: over the context
    ledger = rollout(stage, prompts, SPACE, [sampler], CONFIG, 0)
    assert [row["prompt_id"] for row in all_rows(stage)[::4]] == ["good0", "good1", "good3", "good5"]
    assert (ledger.rows, ledger.rejects) == (4 * 4, 2)
    written = [json.loads(line) for line in (stage.path / "rejects.jsonl").read_text().splitlines()]
    assert [(row["id"], row["stage"]) for row in written] == [("good2", "iter_1/rollout"), ("good4", "iter_1/rollout")]
    assert "longer than the policy's context" in written[0]["reason"]
    assert "not valid Unicode" in written[1]["reason"]


def test_fault_09_too_many_rejects_stop_with_a_summary_and_a_resume_asks_again(tmp_path: Path) -> None:
    """What stopped it is not kept: the sampler may have been at fault. Rejects that were put up with are."""
    stage = StageFolder(tmp_path, "iter_1/rollout")
    bad = {f"question{n}": "empty" for n in (0, 1, 3)} | {"question2": "raise"}
    strict = CONFIG.model_copy(update={"max_reject_rate": 0.05})
    with pytest.raises(
        RejectRateError, match=r"4 of 40 prompts .* more than max_reject_rate 5% \(3 x no answer"
    ) as caught:
        rollout(stage, prompts_of(40), SPACE, [FakeSampler(misbehave=bad)], strict, 0)
    assert caught.value.exit_code != 0
    assert "1 x the sampler raised RuntimeError: no luck with question2" in str(caught.value)
    with pytest.raises(RejectRateError, match="4 of 40"):
        rollout(stage, prompts_of(40), SPACE, [FakeSampler(misbehave=bad)], strict, 0)
    ledger = rollout(stage, prompts_of(40), SPACE, [FakeSampler()], strict, 0)
    assert (ledger.rows, ledger.rejects) == (40 * 4, 0), "mended, the same command goes on"

    other = StageFolder(tmp_path / "other", "iter_1/rollout")
    ledger = rollout(other, prompts_of(40), SPACE, [FakeSampler(misbehave=bad)], CONFIG, 0)
    assert (ledger.rows, ledger.rejects) == (36 * 4, 4), "a higher rate goes on"
    (other.path / "done.json").unlink()
    idle = FakeSampler()
    with pytest.raises(RejectRateError, match="4 of 40"):
        rollout(other, prompts_of(40), SPACE, [idle], strict, 0)
    assert idle.calls == []


def test_fault_10_a_request_that_raises_is_tried_alone_and_costs_only_its_own_prompt(tmp_path: Path) -> None:
    sampler = FakeSampler(misbehave={"question3": "raise", "question5": "raise-in-batch"})
    stage = StageFolder(tmp_path / "bad", "s")
    rollout(stage, prompts_of(8), SPACE, [sampler], CONFIG, 0)
    clean = StageFolder(tmp_path / "clean", "s")
    rollout(clean, prompts_of(8), SPACE, [FakeSampler()], CONFIG, 0)
    assert ["question3"] in sampler.calls
    assert all_rows(stage) == [row for row in all_rows(clean) if row["prompt_id"] != "p3"]
    assert [reject.id for reject in stage.shard_rejects(0)] == ["p3"]
    assert len(sampler.calls) < 40, "halving finds the request without asking every one alone"


def test_fault_13_missing_samples_are_detected_never_zipped_away(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    sampler = FakeSampler(misbehave={"question1": "short"})
    rollout(stage, prompts_of(3), SPACE, [sampler], CONFIG, 0)
    assert ["question1"] in sampler.calls, "it was retried alone"
    assert [(reject.id, reject.reason) for reject in stage.shard_rejects(0)] == [("p1", "1 of 2 samples came back")]
    assert [row["prompt_id"] for row in all_rows(stage)] == ["p0"] * 4 + ["p2"] * 4


def test_fault_13_missing_requests_are_detected(tmp_path: Path) -> None:
    class DropsOne(FakeSampler):
        def sample(self, requests):  # type: ignore[no-untyped-def]
            answers = super().sample(requests)
            return answers[1:] if len(answers) > 1 else answers

    stage, clean = StageFolder(tmp_path / "a", "s"), StageFolder(tmp_path / "b", "s")
    rollout(stage, prompts_of(3), SPACE, [DropsOne()], CONFIG, 0)
    rollout(clean, prompts_of(3), SPACE, [FakeSampler()], CONFIG, 0)
    assert all_rows(stage) == all_rows(clean)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["pooled", "best_mean", "per_direction", "random"])
def test_fault_14_rows_without_a_finite_score_are_counted_and_never_selected(
    tmp_path: Path, value: float, method: str
) -> None:
    candidates, scores, winners = (StageFolder(tmp_path / name, name) for name in STAGES)
    prompts = prompts_of(4)
    rollout(candidates, prompts, SPACE, [FakeSampler()], CONFIG, 0)
    first_of_p0 = all_rows(candidates)[0]["response"].split()[0]
    ledger = score(scores, candidates, prompts, FakeScorer(broken={first_of_p0: value, "question2#": value}))
    assert ledger.extra["invalid"] == 5
    invalid = {row["candidate_id"] for row in all_rows(scores) if not row["valid"]}
    assert len(invalid) == 5
    config = SelectionConfig(method=method, directions=20)
    ledger = select_winners(winners, candidates, scores, prompts, SPACE, config, 0)
    chosen = all_rows(winners)
    assert not invalid & {row["candidate_id"] for row in chosen}
    assert all(np.isfinite(row["utility"]) for row in chosen)
    assert {row["prompt_id"] for row in chosen} == {"p0", "p1", "p3"}
    assert ledger.rejects == 1
    (line,) = (winners.path / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line) == {"id": "p2", "stage": "select", "reason": "no candidate has a valid score"}


def test_fault_14_no_valid_score_at_all_stops(tmp_path: Path) -> None:
    candidates, scores, winners = (StageFolder(tmp_path / name, name) for name in STAGES)
    rollout(candidates, prompts_of(2), SPACE, [FakeSampler()], CONFIG, 0)
    score(scores, candidates, prompts_of(2), FakeScorer(broken={"question": np.nan}))
    with pytest.raises(RejectRateError, match="2 x no candidate has a valid score"):
        select_winners(winners, candidates, scores, prompts_of(2), SPACE, SelectionConfig(), 0)


@pytest.mark.parametrize("method", ["pooled", "best_mean", "per_direction", "random"])
def test_fault_15_ties_have_one_winner_and_zero_variance_divides_by_nothing(tmp_path: Path, method: str) -> None:
    class AllEqual(FakeScorer):
        def score(self, prompts, responses):  # type: ignore[no-untyped-def]
            return np.full((len(responses), 2), 50.0)

    candidates, scores = (StageFolder(tmp_path / name, name) for name in ("rollout", "score"))
    rollout(candidates, prompts_of(3), SPACE, [FakeSampler()], CONFIG, 0)
    score(scores, candidates, prompts_of(3), AllEqual())
    runs = []
    for place in ("first", "second"):
        winners = StageFolder(tmp_path / place, "iter_1/select")
        config = SelectionConfig(method=method, directions=6)
        select_winners(winners, candidates, scores, prompts_of(3), SPACE, config, 0)
        runs.append(all_rows(winners))
    assert runs[0] == runs[1]
    for row in runs[0]:
        pool = [candidate for candidate in all_rows(candidates) if candidate["prompt_id"] == row["prompt_id"]]
        if method == "per_direction":
            pool = [candidate for candidate in pool if candidate["direction"] == row["direction"]]
        if method != "random":
            assert row["candidate_id"] == pool[0]["candidate_id"], "of equal candidates the lowest wins"
        assert row["utility"] == pytest.approx(50 * sum(row["direction"]))


def test_fault_15_identical_candidates_the_lowest_wins(tmp_path: Path) -> None:
    candidates, scores = (StageFolder(tmp_path / name, name) for name in ("rollout", "score"))
    rollout(candidates, prompts_of(1), SPACE, [FakeSampler()], CONFIG, 0)
    table = candidates.table(0)
    same = table.set_column(table.column_names.index("response"), "response", pa.array(["same text"] * 4))
    candidates.write_shard(0, same, Ledger(rows=4))
    candidates.finish(shards=1)
    score(scores, candidates, prompts_of(1), FakeScorer())
    winners = StageFolder(tmp_path / "select")
    select_winners(winners, candidates, scores, prompts_of(1), SPACE, SelectionConfig(directions=9), 0)
    assert {row["candidate_id"] for row in all_rows(winners)} == {table["candidate_id"][0].as_py()}
