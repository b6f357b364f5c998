"""How a command's threads wait for each other: they spin on a quiet machine and sleep beside other work.
pytest tests/test_threads.py
"""

import os

import psutil
import pytest

from dpa.__main__ import _choose_how_threads_wait

SPIN, SLEEP = {"GOMP_SPINCOUNT": "100000"}, {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("minute", "now", "chosen"),
    [(0.1, 100.0, SPIN), (2.0, 3.0, SPIN), (2.0, 97.0, SLEEP)],
    ids=["quiet for a minute", "only just quiet: the load was the command before this one", "busy"],
)
def test_threads_sleep_beside_work_that_goes_on(
    minute: float, now: float, chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _chosen(minute, now, {}, monkeypatch) == chosen


def test_what_the_user_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": "ACTIVE"}
    assert _chosen(2.0, 97.0, asked, monkeypatch) == _chosen(0.1, 3.0, asked, monkeypatch) == asked


def _chosen(minute: float, now: float, given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (minute, 0.0, 0.0))
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: now)
    _choose_how_threads_wait()
    return environment
