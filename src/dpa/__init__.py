"""Directional Preference Alignment: one language model that follows a user's numeric preference direction.

The public names below load on first use (PEP 562), so that `import dpa` needs neither torch nor pydantic.
Run its tests: pytest tests/test_import.py
"""

from importlib import import_module
from typing import Any

from dpa.version import __version__

_HOME = {
    "DpaError": "dpa.core.errors",
    "UserError": "dpa.core.errors",
    "Objective": "dpa.core.objective",
    "Direction": "dpa.core.direction",
    "DirectionSpace": "dpa.core.directions",
    "select": "dpa.core.selection",
    "pareto_front": "dpa.core.measures",
    "hypervolume": "dpa.core.measures",
    "cone_hypervolume": "dpa.core.measures",
    "measure": "dpa.core.measures",
    "Prompt": "dpa.core.records",
    "Sample": "dpa.core.records",
    "SampleRequest": "dpa.core.records",
    "Sampler": "dpa.core.records",
    "Scorer": "dpa.core.records",
    "open_policy": "dpa.sampling.samplers",
    "Loop": "dpa.recipes.dpa",
    "RunConfig": "dpa.core.config",
    "load_config": "dpa.core.config",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dpa' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
