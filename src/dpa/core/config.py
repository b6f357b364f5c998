"""Configuration: YAML checked by typed classes, of which `sections/` has one for each section.
Run its tests: pytest tests/test_config.py

    config = load_config("my.yaml", {"iterations": "2", "rollout.samples": "8"})

An unknown key is an error that names the nearest known one; flags override the file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError
from dpa.core.lookup import nearest
from dpa.core.objective import range_of_sum
from dpa.core.records import SCALE
from dpa.core.reference import ModelReference
from dpa.core.sections.cluster import ClusterConfig
from dpa.core.sections.evaluate import EvaluateConfig
from dpa.core.sections.ratings import RatingsConfig
from dpa.core.sections.reward import RewardConfig
from dpa.core.sections.rollout import PromptsConfig, RolloutConfig
from dpa.core.sections.section import PathText, Section
from dpa.core.sections.selection import SelectionConfig
from dpa.core.sections.space import SpaceConfig
from dpa.core.sections.training import FinetuneConfig, GrpoConfig, PreferenceConfig
from dpa.core.yaml_text import parse_yaml


class RewardRunConfig(Section):
    """A run that ends with its reward model: it has no `policy`, `prompts` and `evaluate`."""

    name: str = Field("run", description="Title in reports.")
    out: PathText = Field(description="Run folder. The same command resumes it.")
    seed: int = Field(0, ge=0, description="Every random choice derives from it.")
    remote_code_revision: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{40}$",
        description="Opt in to a Hub model's own code, pinned to this 40-hex commit. Default: refused.",
    )
    space: SpaceConfig
    ratings: list[RatingsConfig] = Field(default_factory=list, description="Rated data; none skips t = 0.")
    reward: RewardConfig

    def reference(self, model: str | Path) -> ModelReference:
        """A model of this run with what the run opts in to."""
        return ModelReference(str(model), self.remote_code_revision)

    def direction_space(self) -> DirectionSpace:
        """The space of the run."""
        return self.space.build()


class RunConfig(RewardRunConfig):
    """One run of the whole loop.

    A run without `policy`, `prompts` and `evaluate` ends with its reward model: `dpa ratings`, `dpa train-reward` and
    `dpa run` need no more than `out`, `space`, `ratings` and `reward`.
    """

    policy: PathText = Field(
        description="Start policy: a model folder, a Hub id, or a GGUF file (`dpa[gguf]`), which is "
        "dequantised once into the run folder."
    )
    iterations: int = Field(3, ge=0, description="T: online iterations after t = 0.")
    learner: str = Field(
        "sft",
        description="What online iterations learn from: sft, the winner of each direction (the paper); dpo, the winner "
        "against a loser of the same pool (arXiv 2503.00295); grpo, its own answers while it learns, rewarded by v.r "
        "(arXiv 2402.03300). t = 0 is always sft: a direction must first be read.",
    )
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()  # type: ignore[call-arg]
    selection: SelectionConfig = SelectionConfig()  # type: ignore[call-arg]
    finetune: FinetuneConfig = FinetuneConfig()  # type: ignore[call-arg]
    dpo: PreferenceConfig = PreferenceConfig()  # type: ignore[call-arg]
    grpo: GrpoConfig = GrpoConfig()  # type: ignore[call-arg]
    evaluate: EvaluateConfig
    cluster: ClusterConfig = ClusterConfig()  # type: ignore[call-arg]

    def direction_space(self) -> DirectionSpace:
        """The space of the run; one that trains targets states them."""
        return self.space.build(targets=self.selection.target_share > 0)

    @model_validator(mode="after")
    def _winners_of_one_pool(self) -> "RunConfig":
        if self.selection.rejected == "other_direction" and self.selection.method == "per_direction":
            raise ValueError("selection.rejected other_direction takes winners of one pool; take method pooled")
        return self

    @model_validator(mode="after")
    def _advantages_of_means(self) -> "RunConfig":
        share, method = self.selection.advantage_share, self.selection.method
        if share < 1 and method != "best_mean":
            raise ValueError(
                f"selection.advantage_share {share:g}: method {method} has no advantages; take method best_mean, or 1"
            )
        if share < 1 and self.rollout.directions < 2:
            raise ValueError(
                f"selection.advantage_share {share:g} needs candidates of 2 directions or more to a prompt; raise "
                f"rollout.directions ({self.rollout.directions})"
            )
        return self

    @model_validator(mode="after")
    def _objectives_on_the_scale(self) -> "RunConfig":
        """Values of targets, and where rays start, are those of the scale."""
        rays = "selection.utility ray" if self.selection.utility == "ray" else ""
        asking = "selection.targets" if self.selection.target_share > 0 else rays
        for name, parts in self.space.objectives.items() if asking else ():
            low, high = range_of_sum((parts or {name: 1.0}).values())
            if low < SCALE[0] or high > SCALE[1] * (1 + 1e-6):
                raise ValueError(
                    f"space.objectives: `{name}` goes from {low:g} to {high:g}, and {asking} needs {SCALE[0]:g} to "
                    f"{SCALE[1]:g}; weigh its attributes by positive numbers that add up to 1"
                )
        return self


RUN_FILE = "config.yaml"
"""What a run folder calls its configuration."""
OF_A_POLICY = ("policy", "prompts", "evaluate")
"""Fields that a run has together, to go on after its reward model."""


Config = TypeVar("Config", bound=BaseModel)


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides, check every field.

    Relative paths inside the file are taken from the working directory. Raises ConfigError.
    """
    data = read_yaml(path, overrides)
    if not trains_policy(data):
        raise ConfigError(
            f"{', '.join(OF_A_POLICY)}: {path} has none of them, so its run ends with the reward model (`dpa run`, "
            "`dpa train-reward`); add all three to train a policy."
        )
    return parse_config(data)


def load_run(path: str | Path, overrides: Mapping[str, str] | None = None) -> RunConfig | RewardRunConfig:
    """The same, where a run that ends with its reward model will do as well. Raises ConfigError."""
    data = read_yaml(path, overrides)
    return parse_config(data) if trains_policy(data) else parse_config(data, RewardRunConfig)


def run_named(text: str) -> RunConfig | RewardRunConfig | None:
    """The configuration of a run named by its folder or by its YAML file; None where it is neither. Raises
    ConfigError."""
    inside = Path(text, RUN_FILE)
    if inside.is_file():
        return load_run(inside)
    return load_run(text) if text.endswith((".yaml", ".yml")) else None


def trains_policy(data: Mapping[str, Any]) -> bool:
    """Whether the fields of a configuration are those of a run that goes on after its reward model."""
    return any(name in data for name in OF_A_POLICY) or "ratings" not in data


def read_yaml(path: str | Path, overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, `a.b=value` overrides applied, no field checked. Raises ConfigError."""
    file = Path(path)
    try:
        data = parse_yaml(file.read_text(encoding="utf-8"), f"config: {file}")
    except FileNotFoundError:
        raise ConfigError(f"config: no file at {file}; give the path of a YAML file.") from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # no UTF-8, or a path with a NUL
        raise ConfigError(f"config: {file} is not readable YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"config: {file} must be a mapping of fields, not {type(data).__name__}.")
    for key, value in (overrides or {}).items():
        set_dotted(data, key, value)
    return data


def parse_config(data: Mapping[str, Any], kind: type[Config] = RunConfig) -> Config:  # type: ignore[assignment]
    """Check a mapping against `kind`; ConfigError names the field, the value and the fix."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, kind) for item in error.errors())) from None


def set_dotted(data: dict[str, Any], dotted: str, text: str) -> None:
    """Set the field `a.b`, or `a.0.b` inside a list, of nested mappings to a YAML value, written as text. Raises
    ConfigError."""
    node: Any = data
    keys = dotted.split(".")
    for key in keys[:-1]:
        place: Any = _place(node, key, dotted) if isinstance(node, list) else key
        child = node[place] if isinstance(node, list) else node.get(place)
        if child is None:  # `lora: null` has fields as soon as one is given
            child = node[place] = {}
        if not isinstance(child, dict | list):
            raise ConfigError(
                f"{dotted}: `{key}` is {child!r} here, which has no fields; check the dotted name, or write `{key}` "
                "out in the file first."
            )
        node = child
    last = _place(node, keys[-1], dotted) if isinstance(node, list) else keys[-1]
    node[last] = parse_yaml(text, f"{dotted}: {text if len(text) < 80 else text[:77] + '...'!r}")


def _place(items: list[Any], key: str, dotted: str) -> int:
    """Which one of a list a part of a dotted name means: 0, 1, ... Raises ConfigError."""
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    within = "it is empty" if not items else f"number one of its parts, 0 to {len(items) - 1}"
    raise ConfigError(f"{dotted}: `{key}` is asked of a list; {within}.")


def _explain(item: Any, root: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = list(_section_at(root, item["loc"][:-1]).model_fields)
        if root is RewardRunConfig and where in RunConfig.model_fields:
            return f"{where}: belongs to a run that trains a policy; add {', '.join(OF_A_POLICY)}, or leave it out."
        return f"{where}: unknown key; {nearest(str(item['loc'][-1]), known)}"
    if item["type"] == "missing":
        return f"{where}: this field is required; add it."
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and isinstance(item["input"], Mapping):  # what fields of a section say together
        return f"{where}: {message}." if where else f"{message}."
    shown = repr(item["input"])
    shown = shown if len(shown) < 80 else f"{shown[:77]}..."
    return f"{where}: {shown} is not accepted; {message[0].lower()}{message[1:]}."


def _section_at(root: type[BaseModel], loc: tuple[Any, ...]) -> type[BaseModel]:
    section = root
    for part in loc:
        if part not in section.model_fields:
            continue  # a list index or a mapping key
        annotation = section.model_fields[str(part)].annotation
        for candidate in (annotation, *get_args(annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return section
