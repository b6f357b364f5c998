"""The doctor finds what is there: real locks, real ranks, and a sentence for what is not fit.
Run: pytest tests/test_doctor.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forks import python

from dpa.cli import doctor


def test_a_sound_machine_passes_and_nothing_is_left_behind(tmp_path: Path) -> None:
    checks = {check.name: check for check in doctor.examine(tmp_path / "runs")}
    assert [name for name, check in checks.items() if check.ok is False] == []
    assert checks["lock"].text == "held by one process, free as soon as it is killed"
    assert checks["all-reduce"].text.startswith("2 processes over gloo")
    assert checks["torch"].ok and ">=2.9" in checks["torch"].text
    assert list((tmp_path / "runs").iterdir()) == []


def test_versions_outside_the_tested_ranges_are_named_with_the_fix() -> None:
    found = {check.name: check for check in doctor.versions(["numpy<1", "no-such-package>=2", "ray<1; extra == 'x'"])}
    assert found["numpy"].ok is False
    assert 'outside the tested range <1; run pip install "numpy<1"' in found["numpy"].text
    assert found["no-such-package"].ok is False
    assert 'pip install "no-such-package>=2"' in found["no-such-package"].text
    assert "ray" not in found or found["ray"].ok is False, "an extra counts where it is installed"


def test_a_package_that_several_extras_ask_for_is_listed_once_with_all_that_is_asked() -> None:
    asked = ["httpx>=0.27; extra == 'serve'", "httpx<9; extra == 'judge'", "Httpx>=0.2; extra == 'http'"]
    (check,) = (check for check in doctor.versions(asked) if check.name.lower() == "httpx")
    assert check.ok and check.text.endswith("(tested: <9,>=0.2,>=0.27)")
    names = [check.name for check in doctor.versions()]
    assert len(names) == len(set(names))


def test_ranks_that_hang_are_given_up_in_time() -> None:
    """Three seconds are not enough for a rank to import torch and meet the other."""
    check = doctor.all_reduce(limit_s=0.2)
    assert check.ok is False
    assert "do not add up" in check.text


@contextmanager
def file_in_the_way(folder: Path) -> Iterator[Path]:
    (folder / "file").write_text("")
    yield folder / "file" / "runs"


def test_a_folder_that_cannot_be_written_fails_with_a_sentence_and_exit_1(tmp_path: Path) -> None:
    with file_in_the_way(tmp_path) as folder:
        done = python("-m", "dpa", "doctor", folder)
    assert done.returncode == 1
    assert "FAILED rename:" in done.stdout and "FAILED lock:" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["rename", "lock"])
def test_checks_of_a_folder_leave_nothing(tmp_path: Path, kind: str) -> None:
    assert getattr(doctor, kind)(tmp_path).ok
    assert list(tmp_path.iterdir()) == []
