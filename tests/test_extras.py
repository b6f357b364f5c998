"""Extras that users install together: what they ask for. Whether an index has it: scripts/check_extras.py.
pytest tests/test_extras.py
"""

import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def checker():
    spec = importlib.util.spec_from_file_location("check_extras", ROOT / "scripts/check_extras.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_serving_allows_the_fastapi_that_vllm_pins(project: dict) -> None:
    """vLLM 0.23 to 0.33: fastapi < 0.137."""
    asked = {Requirement(line).name: Requirement(line).specifier for line in project["optional-dependencies"]["serve"]}
    assert asked["fastapi"].contains("0.136.3") and asked["fastapi"].contains("0.165.0")
    assert asked["starlette"].contains("1.0.1") and asked["uvicorn"].contains("0.54.0")


def test_every_set_that_is_checked_is_of_this_project(project: dict, checker) -> None:
    for extras, also in checker.SETS:
        lines = checker.requirements(extras, also, project)
        names = {Requirement(line).name for line in lines}
        assert {"torch", "transformers"} <= names
        assert set(also) <= set(lines)
    assert {also for extras, also in checker.SETS if "serve" in extras and "vllm" in extras} >= {
        (f"vllm=={version}",) for version in ("0.23.0", "0.30.0", "0.33.0")
    }
    with pytest.raises(SystemExit, match="no extra nonsense"):
        checker.requirements(["nonsense"], [], project)
