"""Configuration of a comparison: which methods, which seeds, which budget, over one configuration of the loop.
Run its tests: pytest tests/test_compare.py

    config = load_comparison("compare.yaml", {"seeds": "[0, 1]"})
    config.run_config(seed=1, out=Path("runs/compare/seed_1/sft"), method="sft")
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator

from dpa.core.config import RunConfig, parse_config, read_yaml, set_dotted
from dpa.core.errors import ConfigError
from dpa.core.sections.section import PathText, Section

SEED = "{seed}"


class CompareConfig(Section):
    """One comparison (docs/comparison.md): the file that `dpa compare` takes."""

    name: str = Field("comparison", description="Title of the report.")
    out: PathText = Field(description="Results folder. The same command resumes it.")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="Each seed is a world, or a run, of its own.")
    methods: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="What is compared (docs/comparison.md names them); null: all but those that need an instruct model "
        "or people's own answers, or were not tuned.",
    )
    workers: int = Field(
        2,
        ge=1,
        description="Processes that work side by side, one torch thread each; 1: one job at a time, on all cores.",
    )
    budget: int = Field(
        ge=1000,
        description="Tokens generated plus tokens trained on that a method may spend on its policies; methods that are "
        "the ordinary loop spend what `run` makes them, the others spend exactly this.",
    )
    tolerance: float = Field(0.1, gt=0, description="Largest difference of spending from the budget, as a share of it.")
    resamples: int = Field(400, ge=1, description="Bootstrap resamples, over seeds and over prompts in each.")
    run: dict[str, Any] = Field(
        description="The loop every method shares: the fields of docs/configuration.md but `name`, `out` and `seed`. "
        "`{seed}` in any text stands for the seed."
    )
    changes: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Method -> dotted field of `run` -> its value for that method.",
    )

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("give different seeds of 0 or more")
        return seeds

    def identity(self) -> "CompareConfig":
        """What a results folder belongs to: more seeds, methods or workers extend it, or pace it."""
        return self.model_copy(update={"seeds": [], "methods": [], "workers": 1, "resamples": 1, "tolerance": 1})

    def run_config(
        self, seed: int, out: Path, method: str | None = None, changes: Mapping[str, Any] | None = None
    ) -> RunConfig:
        """The configuration of the loop for one seed (and method, by default with the changes of its name), in the
        folder `out`. Raises ConfigError."""
        for field in ("name", "out", "seed"):
            if field in self.run:
                raise ConfigError(f"run.{field}: the comparison sets it; leave it out.")
        data: dict[str, Any] = _with_seed(deepcopy(self.run), seed)
        changes = self.changes.get(method or "", {}) if changes is None else changes
        for field, value in changes.items():
            set_dotted(data, field, yaml.safe_dump(_with_seed(value, seed)))
        try:
            return parse_config({**data, "name": method or self.name, "out": str(out), "seed": seed})
        except ConfigError as error:
            raise ConfigError("\n".join(f"run.{line}" for line in str(error).split("\n"))) from None


def load_comparison(path: str | Path, overrides: Mapping[str, str] | None = None) -> CompareConfig:
    """Read a YAML file, apply `a.b=value` overrides, check every field, those of `run` included. Raises ConfigError."""
    config = parse_config(read_yaml(path, overrides), CompareConfig)
    if not config.run.get("ratings"):
        raise ConfigError("run.ratings: a comparison needs rated data; most of its methods begin with it.")
    for method in (None, *config.changes):
        config.run_config(config.seeds[0], Path(config.out), method)
    return config


def _with_seed(value: Any, seed: int) -> Any:
    if isinstance(value, str):
        return value.replace(SEED, str(seed))
    if isinstance(value, Mapping):
        return {key: _with_seed(item, seed) for key, item in value.items()}
    return [_with_seed(item, seed) for item in value] if isinstance(value, list) else value
