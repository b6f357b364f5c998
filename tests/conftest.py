"""What every test may use: one thread per process, the same examples in every run, and a process runner for the tests
that kill and resume.
"""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Process, share_forks, start
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # also written into the tokenizer's files, and so part of a revision

gc.disable()  # until all is imported: hardly any of it is garbage, and it is gone over again and again

settings.register_profile("dpa", deadline=None, derandomize=True)  # a busy machine fails no test; every run is the same
settings.load_profile("dpa")

TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or config.getoption("numprocesses", None):  # pytest-xdist's processes
        share_forks()


def pytest_collection_finish() -> None:
    """What was imported stays: a Trainer collects garbage twice, which else goes over a million objects each time."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def fake_run() -> Callable[..., Process]:
    """Start tests/fake_run.py with these arguments; processes still alive at the end of the test are killed."""
    started: list[Process] = []

    def begin(*arguments: object) -> Process:
        started.append(start(TESTS / "fake_run.py", *arguments))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
