"""Engine processes: started again a bounded number of times, then a clear failure; no orphan is left, kill -9 included.
pytest tests/test_supervisor.py
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forks import alive, within
from serving import SOURCE, children_of

from dpa.core.errors import DpaError, EngineError, ModelFileError
from dpa.serve.supervisor import EngineProcess

TESTS = Path(__file__).parent


class Failures:
    """What `failed` was told."""

    def __init__(self) -> None:
        self.errors: list[DpaError] = []
        self.came = threading.Event()

    def __call__(self, error: DpaError) -> None:
        self.errors.append(error)
        self.came.set()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[EngineProcess, Failures]]]:
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}{os.pathsep}{TESTS}")
    started: list[EngineProcess] = []

    def begin(*arguments: str) -> tuple[EngineProcess, Failures]:
        failures = Failures()
        started.append(EngineProcess(arguments, failures, max_restarts=2, backoff_s=0.05, module="fake_engine"))
        return started[-1], failures

    yield begin
    for engine in started:
        engine.close()


def test_11_a_killed_engine_is_started_again(start: Callable) -> None:
    engine, failures = start()
    assert engine.ready.wait(60)
    first = engine.pid
    os.kill(first, signal.SIGKILL)
    assert within(60, lambda: engine.pid != first and engine.ready.is_set())
    assert not failures.errors


def test_11_an_engine_that_keeps_dying_is_a_clear_failure(start: Callable) -> None:
    engine, failures = start("--die")
    assert failures.came.wait(60)
    (error,) = failures.errors
    assert isinstance(error, EngineError) and "3 times in a row (exit code 3)" in str(error)
    assert not alive(engine.pid) and not engine.ready.is_set()


def test_a_model_that_cannot_be_served_is_said_once_and_not_tried_again(start: Callable) -> None:
    _, failures = start("--refuse")
    assert failures.came.wait(60)
    assert [type(error) for error in failures.errors] == [ModelFileError]
    assert str(failures.errors[0]) == "model: it is no model; give one."


def test_closing_ends_it_even_if_it_does_not_listen(start: Callable) -> None:
    engine, _ = start("--deaf")
    assert engine.ready.wait(60)
    pid, folder = engine.pid, Path(engine.socket).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    engine.close(grace_s=0.2)
    assert not alive(pid) and not folder.exists()


def test_39_kill_9_of_the_gateway_leaves_no_orphan() -> None:
    """The real child, at its first moment: torch is still to be loaded."""
    script = (
        "import sys, time; from dpa.serve.supervisor import EngineProcess\n"
        "engine = EngineProcess(['--model', 'nowhere'], print); print(engine.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert child in children_of(parent.pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert within(30, lambda: not alive(child)), "the engine outlives its gateway"
