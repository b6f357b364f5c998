"""The public surface, and what `import dpa` costs.
Run: pytest tests/test_import.py
"""

import subprocess
import sys

import pytest

import dpa

PUBLIC = [
    "Direction",
    "DirectionSpace",
    "DpaError",
    "Loop",
    "Objective",
    "Prompt",
    "RunConfig",
    "Sample",
    "SampleRequest",
    "Sampler",
    "Scorer",
    "UserError",
    "__version__",
    "cone_hypervolume",
    "hypervolume",
    "load_config",
    "measure",
    "open_policy",
    "pareto_front",
    "select",
]

HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "pyarrow", "pydantic", "numpy", "scipy", "moocore"}


def run_python(code: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True)


def test_the_public_names():
    """A new name is a promise: add it here, with its line in the changelog."""
    assert sorted(dpa.__all__) == PUBLIC == dir(dpa)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name):
    assert getattr(dpa, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Directoin'"):
        _ = dpa.Directoin


def test_import_loads_nothing_heavy():
    loaded = run_python("import sys, dpa; print(*sys.modules)").stdout.split()
    assert not HEAVY & set(loaded)


def test_directions_and_selection_need_no_torch():
    code = "import sys, dpa; dpa.DirectionSpace; dpa.select; dpa.measure; print(*sys.modules)"
    loaded = run_python(code).stdout.split()
    assert not {"torch", "transformers", "pydantic"} & set(loaded)


def test_import_takes_under_a_third_of_a_second():
    """Best of five of the interpreter's own account (-X importtime, cumulative microseconds): 0.3 s is promised."""
    seconds = []
    for _ in range(5):
        lines = run_python("import dpa", "-X", "importtime").stderr.splitlines()
        seconds.append(next(int(line.split("|")[1]) / 1e6 for line in lines if line.split("|")[-1].strip() == "dpa"))
    assert min(seconds) < 0.3
