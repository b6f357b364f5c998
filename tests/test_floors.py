"""Imports go down only, the ones hidden in functions included; stages never meet.

pytest tests/test_floors.py
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "dpa"
FLOORS = ["version", "core", "storage", "models", "stages", "serve", "recipes", "world", "cli"]
MODULES = sorted(PACKAGE.rglob("*.py"))
TORCH_FREE = {"version", "core", "storage", "stages"}


def floor_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    floor = floor_of(path)
    if floor in {"__init__", "__main__"}:
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "dpa" or len(parts) < 2:
            continue
        assert FLOORS.index(parts[1]) <= FLOORS.index(floor), f"{path.name} imports {name}, a floor above"
        if floor == parts[1] == "stages":
            raise AssertionError(f"{path.name} imports {name}: stages meet in a run folder, not in code")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_stays_in_models(path: Path) -> None:
    if floor_of(path) in TORCH_FREE and path.parent.name != "stages":
        heavy = {name.split(".")[0] for name in imported(path)} & {"torch", "transformers", "trl", "peft"}
        assert not heavy, f"{path.name} imports {heavy}"
