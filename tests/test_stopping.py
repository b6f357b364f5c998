"""Signals: nothing begins after one, what was in hand ends at its safe point, and no thread brings the process down.
Run: pytest tests/test_stopping.py
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from forks import python
from toy_run import toy_config

from dpa.core.errors import Interrupted
from dpa.storage.stopping import SIGNALS, StopOnSignal, end_on_signal


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_after_a_signal_no_further_stage_begins(number: signal.Signals) -> None:
    """Also when the stage in hand had nothing left to do, such as a training in its last step."""
    done = []
    with (
        pytest.raises(Interrupted, match=rf"demo: stopped by {number.name}; run the same command"),
        end_on_signal("demo"),
    ):
        with StopOnSignal() as stop:
            send(number)
            done.append("finetune")
        done.append("evaluate")
    assert stop.requested
    assert done == ["finetune"]


@pytest.mark.parametrize("number", SIGNALS)
def test_between_stages_a_signal_ends_the_work_at_once(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Interrupted, match=number.name) as caught, end_on_signal("demo"):
        try:
            send(number)
        except Exception:
            pytest.fail("a library that catches everything must not swallow it")
    assert caught.value.exit_code == 130
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_stage_that_says_more_is_heard() -> None:
    with pytest.raises(Interrupted, match="3 of 10 shards"), end_on_signal("demo"), StopOnSignal() as stop:
        send(signal.SIGTERM)
        raise stop.interrupted("iter_1/rollout", 3, 10, "shards")


def test_without_an_outer_block_a_stage_that_is_finished_says_nothing() -> None:
    with StopOnSignal() as stop:
        send(signal.SIGTERM)
    assert stop.requested


def test_outside_the_main_thread_nothing_changes() -> None:
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with end_on_signal("demo"), StopOnSignal():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


LEAVES_A_THREAD = """
import time, torch
from dpa.storage.stopping import StopOnSignal, end_process, end_process_by_error
a = torch.randn(60, 60)
def work(worker, number):
    if number == 1:
        raise RuntimeError("no luck")
    until = time.monotonic() + 30
    while time.monotonic() < until:
        a @ a
try:
    with StopOnSignal() as stop:
        for _ in stop.work_through([0, 1], "ab", work):
            pass
except RuntimeError as error:
    end_process_by_error() if {unexpected} else end_process(3)
"""


@pytest.mark.parametrize(("unexpected", "code"), [(False, 3), (True, 1)])
def test_a_thread_that_still_computes_does_not_abort_the_process(unexpected: bool, code: int) -> None:
    script = LEAVES_A_THREAD.format(unexpected=unexpected)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr
    assert "terminate called" not in done.stderr
    assert ("RuntimeError: no luck" in done.stderr) is unexpected


INTERRUPTING = """
import os, pathlib, signal

def marks(messages, response):
    marker = pathlib.Path(__file__).with_name("asked")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGINT)
    return float(len(response))
"""


def test_ctrl_c_in_a_run_ends_with_130_and_the_same_command_goes_on_to_the_report(tmp_path: Path) -> None:
    config = toy_config(tmp_path, tmp_path / "run").model_dump()
    (tmp_path / "interrupting.py").write_text(INTERRUPTING)
    config["reward"] = {"functions": dict.fromkeys(("helpfulness", "verbosity"), f"{tmp_path}/interrupting.py:marks")}
    (tmp_path / "toy.yaml").write_text(json.dumps(config))
    command = ["-m", "dpa", "run", tmp_path / "toy.yaml"]
    stopped = python(*command)
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "run the same command to go on from there" in stopped.stderr
    assert (tmp_path / "run/iter_1/score").exists() and not (tmp_path / "run/iter_1/select/done.json").exists()
    for _ in range(2):  # the second time there is nothing left to do
        done = python(*command)
        assert done.returncode == 0, done.stderr
        assert f"try it: dpa serve {tmp_path / 'run' / 'iter_'}" in done.stdout
        assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
