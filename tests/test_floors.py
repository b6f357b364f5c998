"""Imports go down only and never round in a circle, the ones hidden in functions included; stages never meet; no file
grows out of its subject.

pytest tests/test_floors.py
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "dpa"
FLOORS = [
    *("version", "core", "storage", "pages", "remote", "models", "sampling", "scoring", "training"),
    *("stages", "serve", "recipes", "world", "cli"),
]
MODULES = sorted(PACKAGE.rglob("*.py"))
TORCH_FREE = {"version", "core", "storage", "pages", "remote", "stages"}


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
def test_torch_stays_above(path: Path) -> None:
    if floor_of(path) in TORCH_FREE and path.parent.name != "stages":
        heavy = {name.split(".")[0] for name in imported(path)} & {"torch", "transformers", "trl", "peft"}
        assert not heavy, f"{path.name} imports {heavy}"


def test_a_file_has_one_subject_and_at_most_400_lines() -> None:
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name for name, count in lines.items() if count > 400} == set()


def circle_in(package: Path) -> list[str]:
    """Files of a package that import each other round in a circle, the first named again at the end; empty: none do.

    Importing `a.b.c` runs `a/b/__init__.py` too; only the outermost package's own is taken for granted.
    """
    files = {}
    for path in package.rglob("*.py"):
        place = path.relative_to(package.parent).with_suffix("")
        files[".".join(place.parent.parts if path.name == "__init__.py" else place.parts)] = path
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        names = {name if name in files else name.rpartition(".")[0] for name in (module, *imported(path))}
        parents = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count("."))}
        graph[module] = {name for name in names | parents if name in files} - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [str(files[module].relative_to(package)) for module in reversed(error.args[1])]
    return []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not (circle := circle_in(PACKAGE)), " -> ".join(circle)


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        (
            {"a.py": "from toy.b import x", "b.py": "def f():\n    from toy import c", "c.py": "import toy.a"},
            {"a", "b", "c"},
        ),
        ({"room/__init__.py": "from toy.room import b", "room/b.py": "", "c.py": ""}, {"room/__init__", "room/b"}),
        ({"a.py": "from toy.b import x", "b.py": "from toy import c", "c.py": "import os", "__init__.py": ""}, set()),
    ],
    ids=["hidden in a function", "a package and its file", "none"],
)
def test_a_circle_is_found_and_its_files_named(tmp_path: Path, files: dict[str, str], circle: set[str]) -> None:
    for name, text in files.items():
        (tmp_path / "toy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "toy" / name).write_text(text)
    found = circle_in(tmp_path / "toy")
    assert set(found) == {f"{name}.py" for name in circle}
    assert found[:1] == found[len(circle) :]
