"""What every test may use: one thread per process, the same examples in every run, and a process runner for the tests
that kill and resume.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # also written into the tokenizer's files, and so part of a revision

settings.register_profile("dpa", deadline=None, derandomize=True)  # a busy machine fails no test; every run is the same
settings.load_profile("dpa")

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src"


def pytest_collection_finish() -> None:
    """What was imported stays: a Trainer collects garbage twice, which else goes over a million objects each time."""
    gc.freeze()


@pytest.fixture
def fake_run() -> Callable[..., subprocess.Popen]:
    """Start tests/fake_run.py with these arguments; processes still alive at the end of the test are killed."""
    started: list[subprocess.Popen] = []

    def start(*arguments: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, str(TESTS / "fake_run.py"), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{TESTS}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
