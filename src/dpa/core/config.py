"""Configuration: YAML checked by typed classes. Fields are documented once, here; docs/configuration.md is generated.

    config = load_config("recipes/demo.yaml", {"iterations": "2", "rollout.samples": "8"})

An unknown key is an error that names the nearest known one; flags override the file.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpa.core.directions import PUBLISHED_TEMPLATE, DirectionSpace, Objective
from dpa.core.errors import ConfigError
from dpa.core.records import stable_hash


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SpaceConfig(_Section):
    """The direction space: what a user can weigh, and how far."""

    objectives: dict[str, dict[str, float] | None] = Field(
        description="Objective -> weights of the attributes it is made of; null means the attribute of the same name."
    )
    center: dict[str, float] | None = Field(
        None, description="Axis of the cone of directions, objective -> weight. Default: the first objective."
    )
    max_angle: float = Field(45.0, gt=0, le=180, description="Half-angle of the trained cone, in degrees.")
    template: str = Field(
        PUBLISHED_TEMPLATE, description="System sentence; {weighted_rating} becomes `helpfulness*97 + verbosity*-26`."
    )
    presets: dict[str, str | dict[str, float]] = Field(
        default_factory=dict, description="Name -> direction, in any form a direction can be written."
    )

    def build(self) -> DirectionSpace:
        """Make the DirectionSpace this section describes."""
        objectives = tuple(Objective(name, dict(parts or {name: 1.0})) for name, parts in self.objectives.items())
        return DirectionSpace(
            objectives=objectives,
            center=self.center,
            max_angle=self.max_angle,
            template=self.template,
            presets=self.presets,
        )


class RatingsConfig(_Section):
    """Rated rows: they train the reward model and are the offline data of t = 0."""

    path: str = Field(description="File (.jsonl, .parquet, .csv), folder of them, or a Hub dataset id.")
    format: Literal["helpsteer", "helpsteer2", "ultrafeedback", "generic"] = Field(
        "generic", description="How the rows are laid out; see docs/data.md."
    )
    split: str = Field("train", description="Split, for a Hub dataset.")
    attributes: list[str] | None = Field(
        None, description="Generic form: columns that are marks. Default: those named in `scales`."
    )
    columns: dict[Literal["prompt", "response", "messages", "source"], str] = Field(
        default_factory=dict,
        description="Generic form: what we call `prompt`, `response`, `messages`, `source` -> the file's own column.",
    )
    scales: dict[str, tuple[float, float]] = Field(
        default_factory=dict,
        description="Generic form: attribute -> [lowest, highest] of its own scale. Default: [0, 100], kept as it is.",
    )
    max_reject_rate: float = Field(0.05, ge=0, le=1, description="Stop when more than this share of rows is bad.")
    drop_overall_score_trap: bool = Field(
        True,
        description="UltraFeedback: drop an overall_score of 10 that may be a 1 (OpenBMB issue 8; see docs/data.md).",
    )


class LoraConfig(_Section):
    """Low-rank adapters (PEFT) instead of all weights."""

    rank: int = Field(16, ge=1, description="Rank r.")
    alpha: int = Field(32, ge=1, description="Scale alpha.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")


class RewardTrainConfig(_Section):
    """Training of the multi-objective reward model: one linear output per attribute, masked least squares."""

    backbone: str = Field(description="Model folder or Hub id whose features are read.")
    method: Literal["full", "lora", "ridge"] = Field(
        "full", description="Train all weights, adapters, or only a ridge head on frozen features (minutes)."
    )
    attributes: list[str] | None = Field(None, description="Outputs, in order. Default: every attribute rated.")
    template: str | None = Field(
        None, description="Text shown to the model, with {prompt} and {response}. Default: the chat template."
    )
    learning_rate: float = Field(1e-5, gt=0, description="AdamW step size (our choice; the paper does not say).")
    epochs: float = Field(1.0, gt=0, description="Passes over the rated rows.")
    batch_size: int = Field(32, ge=1, description="Rows per optimizer step.")
    max_length: int = Field(2048, ge=8, description="Longest input in tokens; longer ones are rejected and counted.")
    ridge_penalty: float = Field(1.0, gt=0, description="L2 penalty of `method: ridge`, on standardised features.")
    held_out: float = Field(0.1, gt=0, lt=1, description="Share of PROMPTS held out to measure quality.")
    lora: LoraConfig = Field(LoraConfig(), description="Adapters, for `method: lora`.")  # type: ignore[call-arg]


class RewardConfig(_Section):
    """Where scores come from. Several sources are mixed: their attributes stand side by side."""

    train: RewardTrainConfig | None = Field(None, description="Train a reward model on the ratings, then use it.")
    folder: str | None = Field(None, description="A trained reward model folder (or Hub id).")
    functions: dict[str, str] = Field(
        default_factory=dict,
        description="Attribute -> Python function `module:name` or `file.py:name`, called as f(messages, response).",
    )

    @model_validator(mode="after")
    def _some_source(self) -> "RewardConfig":
        if self.train is None and self.folder is None and not self.functions:
            raise ValueError("give at least one of train, folder, functions")
        return self


class PromptsConfig(_Section):
    """Questions asked in the loop, or held out to measure it."""

    path: str = Field(description="File of prompts (.jsonl, .parquet, .csv): text or `messages`, optional `id`.")
    column: str = Field("prompt", description="Column of the prompt's text, where there is no `messages` column.")
    count: int | None = Field(
        None,
        ge=1,
        description="Prompts drawn for each iteration (no repeats until all are used) or measurement. Default: all.",
    )


class RolloutConfig(_Section):
    """Sampling from the current policy."""

    directions: int = Field(4, ge=1, description="D: directions drawn for each prompt.")
    samples: int = Field(4, ge=1, description="N: samples for each prompt and direction.")
    temperature: float = Field(1.0, gt=0, description="Softmax temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling mass.")
    max_new_tokens: int = Field(256, ge=1, description="Longest response, in tokens.")
    prompts_per_shard: int = Field(64, ge=1, description="Prompts in one shard: the unit of work and of resuming.")
    batch_size: int = Field(256, ge=1, description="Sequences decoded together in one worker.")
    workers: int = Field(1, ge=1, description="Sampling processes on this machine; results do not depend on it.")
    max_reject_rate: float = Field(0.05, ge=0, le=1, description="Stop when more than this share of prompts fails.")


class SelectionConfig(_Section):
    """Which candidate each direction keeps."""

    method: Literal["pooled", "per_direction", "random"] = Field(
        "pooled",
        description="pooled: best of all candidates of a prompt for each direction; per_direction: best of those made "
        "under that direction (the paper read literally); random: the control.",
    )
    directions: int = Field(
        4, ge=1, description="Directions served by each prompt's pool (pooled, random); per_direction uses rollout's."
    )


class FinetuneConfig(_Section):
    """Finetuning on (direction, prompt, winner), completion-only loss, through TRL."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak step size.")
    epochs: float = Field(1.0, gt=0, description="Passes over the winners.")
    max_length: int = Field(2048, ge=16, description="Packed row length in tokens; longer examples are rejected.")
    packed_rows_per_step: int = Field(8, ge=1, description="Packed rows in one optimizer step, over all devices.")
    rows_per_device: int = Field(1, ge=1, description="Packed rows in one forward pass; the rest accumulates.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of steps with rising learning rate.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "cosine", description="Learning rate after the warm-up."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonalised momentum on the 2-D weights, AdamW on the rest."
    )
    lora: LoraConfig | None = Field(None, description="Train adapters and merge them after every iteration.")
    save_steps: int = Field(200, ge=1, description="Optimizer steps between checkpoints.")
    bf16: bool = Field(False, description="Mixed bf16 (on by itself where a GPU supports it).")


class EvaluateConfig(_Section):
    """Measuring a policy on held-out prompts over a fixed grid of directions."""

    prompts: PromptsConfig = Field(description="Held-out prompts; never used in training.")
    directions: int = Field(9, ge=3, description="Grid points on each arc from the centre towards an objective.")
    samples: int = Field(1, ge=1, description="Responses for each prompt and direction.")
    temperature: float = Field(0.7, gt=0, description="Softmax temperature (the published policy uses 0.7).")
    gold: dict[str, str] = Field(
        default_factory=dict,
        description="Attribute -> function of a known true reward, measured beside the model's, never trained on.",
    )
    reference: float = Field(0.0, description="Reference point of the hypervolume, on every objective.")
    resamples: int = Field(1000, ge=1, description="Bootstrap resamples over prompts.")


class ClusterConfig(_Section):
    """Where the work runs. Results do not depend on it, beyond the rounding of other devices or batch shares."""

    engine: Literal["local", "ray"] = Field(
        "local", description="Who runs rollout.workers and scorers: this machine, or a Ray cluster (`dpa[ray]`)."
    )
    address: str | None = Field(
        None, description="Ray cluster: `auto` (the one this machine is in) or HOST:PORT. Default: one of this machine."
    )
    cpus_per_worker: float = Field(1, ge=0, description="CPUs Ray sets aside for each worker; torch uses as many.")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs Ray sets aside for each worker.")
    start_timeout_s: float = Field(
        300, gt=0, description="Give up when the Ray cluster has had no working worker for this long, in seconds."
    )
    scorers: int = Field(1, ge=1, description="Scoring workers of the Ray engine.")
    processes: int = Field(
        1, ge=1, description="Training processes on this machine, through `accelerate launch`; 1: no launch."
    )
    accelerate: str | None = Field(
        None, description="Configuration of `accelerate launch` (recipes/accelerate/*.yaml); implies a launch."
    )


class RunConfig(_Section):
    """One run of the whole loop."""

    name: str = Field("run", description="Title in reports.")
    out: str = Field(description="Run folder. The same command resumes it.")
    seed: int = Field(0, ge=0, description="Every random choice derives from it.")
    iterations: int = Field(3, ge=0, description="T: online iterations after t = 0.")
    policy: str = Field(description="Start policy: a model folder or Hub id.")
    remote_code_revision: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{40}$",
        description="Opt in to a Hub model's own code, pinned to this 40-hex commit. Default: refused.",
    )
    space: SpaceConfig
    ratings: list[RatingsConfig] = Field(default_factory=list, description="Rated data; none skips t = 0.")
    reward: RewardConfig
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()  # type: ignore[call-arg]
    selection: SelectionConfig = SelectionConfig()  # type: ignore[call-arg]
    finetune: FinetuneConfig = FinetuneConfig()  # type: ignore[call-arg]
    evaluate: EvaluateConfig
    cluster: ClusterConfig = ClusterConfig()  # type: ignore[call-arg]


DOES_NOT_CHANGE_RESULTS = frozenset(
    {"name", "out", "iterations", "rollout.workers", "rollout.max_reject_rate"}
    | {f"cluster.{field}" for field in ClusterConfig.model_fields}
)
"""Fields a resumed run may change: they name, place, extend or pace the work, and alter no finished row."""


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides, check every field.

    Relative paths inside the file are taken from the working directory. Raises ConfigError.
    """
    file = Path(path)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config: no file at {file}; give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config: {file} is not readable YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"config: {file} must be a mapping of fields, not {type(data).__name__}.")
    for key, value in (overrides or {}).items():
        _set_dotted(data, key, value)
    return parse_config(data)


def parse_config(data: Mapping[str, Any]) -> RunConfig:
    """Check a mapping against RunConfig; ConfigError names the field, the value and the fix."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, RunConfig) for item in error.errors())) from None


def resolved(config: BaseModel) -> dict[str, Any]:
    """The configuration as plain data, every default filled in."""
    return json.loads(config.model_dump_json())


def fingerprint(config: RunConfig) -> str:
    """Hash of every field that changes results."""
    kept = {k: v for k, v in flatten(resolved(config)) if k not in DOES_NOT_CHANGE_RESULTS}
    return stable_hash(json.dumps(kept, sort_keys=True))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per field that changes results: `rollout.samples: 4 -> 8`; a field that comes or goes is `(absent)`."""
    before, after = ({key: repr(leaf) for key, leaf in flatten(data)} for data in (old, new))
    keys = sorted((before.keys() | after.keys()) - DOES_NOT_CHANGE_RESULTS)
    pairs = [(key, before.get(key, "(absent)"), after.get(key, "(absent)")) for key in keys]
    return [f"{key}: {was} -> {now}" for key, was, now in pairs if was != now]


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, leaf) pairs; lists and empty mappings are leaves."""
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{dotted}.")
        else:
            yield dotted, value


def _set_dotted(data: dict[str, Any], dotted: str, text: str) -> None:
    node, keys = data, dotted.split(".")
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted}: `{key}` is not a section; check the dotted name.")
        node = child
    try:
        node[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{dotted}: {text!r} is not a YAML value; quote it.") from None


def _explain(item: Any, root: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = list(_section_at(root, item["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}."
        return f"{where}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{where}: this field is required; add it."
    message = item["msg"].removeprefix("Value error, ")
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
