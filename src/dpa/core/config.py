"""Configuration: YAML checked by typed classes. Fields are documented once, here; docs/configuration.md is generated.

    config = load_config("my.yaml", {"iterations": "2", "rollout.samples": "8"})

An unknown key is an error that names the nearest known one; flags override the file.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError
from dpa.core.lookup import nearest
from dpa.core.objective import Objective, range_of_sum
from dpa.core.presets import SPACES
from dpa.core.records import SCALE, stable_hash
from dpa.core.reference import ModelReference
from dpa.core.sentences import PUBLISHED_TEMPLATE, checked_target_template, target_template_of
from dpa.core.yaml_text import parse_yaml


def expand_home(text: str) -> str:
    """A path, or a Hub id, with the home folder written out for a leading `~`. ValueError where it can be no path."""
    if not text.strip():
        raise ValueError("give a path")
    if "\x00" in text:
        raise ValueError("a path holds no NUL")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError("no home folder is known for it; write the whole path, or ./ before a name with ~") from None


PathText = Annotated[str, AfterValidator(expand_home)]
"""A field that may hold a path: `~` is written out here, once, so that nothing below the configuration meets it."""
MixedBf16 = Annotated[
    bool | Literal["auto"],
    Field(
        description="Compute in bf16: on a card that supports it always; on a processor false: never; true: yes; "
        "auto: where it has units for it, since others are many times slower with it."
    ),
]


def _read_as_numbers(given: Any, found: Any) -> Any:
    """The first true or false of what was given that became a number; None where there is none."""
    if isinstance(given, bool):
        return given if isinstance(found, int | float) and not isinstance(found, bool) else None
    pairs: list[tuple[Any, Any]] = []
    if isinstance(given, Mapping) and isinstance(found, Mapping):
        pairs = [(value, found.get(name)) for name, value in given.items()]
    elif isinstance(given, list | tuple) and isinstance(found, list | tuple):
        pairs = list(zip(given, found, strict=False))
    return next((odd for pair in pairs if (odd := _read_as_numbers(*pair)) is not None), None)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_truth_for_a_number(cls, given: Any, read: ValidatorFunctionWrapHandler) -> Any:
        """YAML makes true of `yes` and `on`; it is not 1."""
        found = read(given)
        if (odd := _read_as_numbers(given, found)) is not None:
            raise ValueError(f"write a number, not {odd} (YAML reads yes, no, on and off as true and false)")
        return found


class _ServersConfig(_Section):
    servers: list[str] = Field(default_factory=list, description="Base addresses, such as http://gpu1:8000/v1.")
    in_flight: int = Field(8, ge=1, description="Requests in flight at each server.")
    request_s: float = Field(120.0, gt=0, description="Seconds one request may take.")
    attempts: int = Field(6, ge=1, description="Tries of one request, with back-off between them.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the servers' key.")

    @model_validator(mode="after")
    def _addresses(self) -> Self:
        for server in self.servers:
            if not server.startswith(("http://", "https://")):
                raise ValueError(f"servers: {server!r} is no http:// or https:// address")
        return self


class SpaceConfig(_Section):
    """The direction space: what a user can weigh, and how far. `space: dpa-v1` is that of the published policy."""

    objectives: dict[str, dict[str, float] | None] = Field(
        description="Objective -> weights of the attributes it is made of; null means the attribute of the same name."
    )
    center: dict[str, float] | None = Field(
        None, description="Axis of the cone of directions, objective -> weight. Default: the first objective."
    )
    max_angle: float = Field(45.0, gt=0, le=180, description="Half-angle of the cone a user may ask in, in degrees.")
    training_angle: float | None = Field(
        None,
        gt=0,
        le=180,
        description="Half-angle of the cone training draws directions from; a wider one than max_angle keeps what is "
        "asked off the edge of what was learned. Default: max_angle.",
    )
    training_ends: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the directions drawn in training that is moved out to the outer fifth of that cone.",
    )
    training_arcs: float = Field(
        0.0,
        ge=0,
        le=1,
        description="With three or more objectives: share of the directions drawn in training that lie on the arc of "
        "one objective, where the others weigh exactly 0, as most requests have it; drawn freely, a `warmth*0` is "
        "hardly ever read.",
    )
    template: str = Field(
        PUBLISHED_TEMPLATE, description="System sentence; {weighted_rating} becomes `helpfulness*97 + verbosity*-26`."
    )
    target_template: str | None = Field(
        None,
        description="System sentence of a target, where selection.targets trains some; {weighted_rating} as above, "
        "{values} becomes `verbosity = 40`. Default: `template` with {weighted_rating} followed by ` with {values}`.",
    )
    target_step: Literal[1, 2, 4, 5, 10, 20, 25, 50] = Field(
        5,
        description="Values of targets are rounded to multiples of it, in training and when one is asked: the fewer "
        "values there are, the more often each has been read.",
    )
    presets: dict[str, str | dict[str, float]] = Field(
        default_factory=dict, description="Name -> direction, in any form a direction can be written."
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """A published space's name becomes its fields, so that the resolved configuration names every choice."""
        if not isinstance(data, str):
            return data
        if data not in SPACES:
            raise ValueError(f"give the fields of a space, or the name of a published one: {', '.join(SPACES)}")
        space = SPACES[data]
        return {
            "objectives": {objective.name: dict(objective.attributes) for objective in space.objectives},
            "max_angle": space.max_angle,
            "template": space.template,
            "presets": dict(space.presets),
        }

    def build(self, targets: bool = False) -> DirectionSpace:
        """Make the DirectionSpace this section describes; with `targets`, one that states them."""
        objectives = tuple(Objective(name, dict(parts or {name: 1.0})) for name, parts in self.objectives.items())
        stated = checked_target_template(self.target_template) or target_template_of(self.template)
        return DirectionSpace(
            objectives=objectives,
            center=self.center,
            max_angle=self.max_angle,
            template=self.template,
            presets=self.presets,
            training_angle=self.training_angle,
            training_ends=self.training_ends,
            training_arcs=self.training_arcs,
            target_template=stated if targets else None,
            target_step=self.target_step if targets else 1,
        )


TextColumn = Literal["prompt", "response", "messages", "source"]
TEXT_COLUMNS: tuple[TextColumn, ...] = get_args(TextColumn)


class RatingsConfig(_Section):
    """Rated rows: they train the reward model and are the offline data of t = 0."""

    path: PathText = Field(description="File (.jsonl, .parquet, .csv), folder of them, or a Hub dataset id.")
    format: Literal["helpsteer", "helpsteer2", "ultrafeedback", "generic"] = Field(
        "generic", description="How the rows are laid out; see docs/data.md."
    )
    split: str = Field("train", description="Split, for a Hub dataset.")
    attributes: list[str] | None = Field(
        None, description="Generic form: columns that are marks. Default: those named in `scales`."
    )
    columns: dict[TextColumn, str] = Field(
        default_factory=dict,
        description="Generic form: what we call `prompt`, `response`, `messages`, `source` -> the file's own column.",
    )
    scales: dict[str, tuple[float, float]] = Field(
        default_factory=dict,
        description="Generic form: attribute -> [lowest, highest] of its own scale. Default: [0, 100], kept as it is.",
    )
    count: int | None = Field(
        None,
        ge=1,
        description="Prompts whose rows are used, all rows of each; which ones only their text decides. Default: all.",
    )
    max_reject_rate: float = Field(0.05, ge=0, le=1, description="Stop when more than this share of rows is bad.")
    drop_overall_score_trap: bool = Field(
        True,
        description="UltraFeedback: drop an overall_score of 10 that may be a 1 (OpenBMB issue 8; see docs/data.md).",
    )

    @model_validator(mode="after")
    def _of_the_generic_form(self) -> "RatingsConfig":
        for name in ("attributes", "columns", "scales"):
            if self.format != "generic" and getattr(self, name):
                raise ValueError(f"{name}: format {self.format} has its own, so leave it out, or write format: generic")
        read = {name: self.columns.get(name, name) for name in TEXT_COLUMNS}
        for name, column in self.columns.items():
            if not column.strip():
                raise ValueError(f"columns.{name}: give the name of a column of the file")
            other = next((other for other in read if other != name and read[other] == column), None)
            if other is not None:
                raise ValueError(f"columns.{name}: {column!r} is read as {other} too; give each a column of its own")
        return self


class AdapterConfig(_Section):
    """Low-rank adapters (PEFT) instead of all weights."""

    rank: int = Field(16, ge=1, description="Rank r.")
    alpha: int = Field(32, ge=1, description="Scale alpha.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")


class RewardTrainConfig(_Section):
    """Training of the multi-objective reward model: one linear output per attribute, masked least squares."""

    backbone: PathText = Field(
        description="Model folder or Hub id whose features are read; a GGUF file where `policy` is the same."
    )
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
    max_length: int = Field(2048, ge=8, description="Longest input in tokens.")
    too_long: Literal["leave_out", "cut_prompt"] = Field(
        "leave_out",
        description="Rated rows longer than max_length. leave_out: they train nothing and are counted; cut_prompt: "
        "they lose their oldest turns, then the beginning of the oldest one left, but nothing of the response.",
    )
    max_left_out: float = Field(
        0.2, ge=0, le=1, description="Stop before training when more than this share of the rated rows is too long."
    )
    ridge_penalty: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="L2 penalty of `method: ridge`, on standardised features. auto: for each attribute the best in "
        "cross-validation over the training prompts, always saying the mean being one of the choices.",
    )
    held_out: float = Field(0.1, gt=0, lt=1, description="Share of PROMPTS held out to measure quality.")
    allow_worse_than_mean: bool = Field(
        False,
        description="Go on with a reward model that predicts an attribute of an objective no better than always saying "
        "the mean, on held-out prompts. Otherwise nothing is scored with it.",
    )
    gradient_checkpointing: bool | None = Field(
        None, description="Compute activations twice to save memory. Default: where memory asks for it."
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compile the layers (torch.compile): about twice as fast where a small model trains on a fast "
        "card, and the same but for rounding. auto: on a card, for 200 optimizer steps or more (and not where "
        "activations are computed twice); scoring with the trained model: for 5,000 rows or more. Where compiling "
        "fails, the work goes on without.",
    )
    bf16: MixedBf16 = False
    report_to: list[str] = Field(default_factory=list, description="Trackers, such as tensorboard, wandb, trackio.")
    lora: AdapterConfig = Field(AdapterConfig(), description="Adapters, for `method: lora`.")  # type: ignore[call-arg]


class HttpRewardConfig(_ServersConfig):
    """Servers of a reward model that answer with a vector; docs/engines.md."""

    servers: list[str] = Field(min_length=1, description="Base addresses, such as http://gpu1:8000.")
    folder: PathText = Field(
        description="The model's folder here too: dpa_reward.json says what it rates, the tokenizer how it is asked."
    )
    api: Literal["classify", "predict"] = Field(
        "classify",
        description="classify: vLLM's, over token ids; predict: text-embeddings-inference's, over text.",
    )
    model: str | None = Field(None, description="Name the servers know it by. Default: `folder`.")
    batch: int = Field(16, ge=1, description="Rows in one request.")


class JudgeConfig(_ServersConfig):
    """A language model behind servers of OpenAI's chat API that rates responses by a rubric each; docs/engines.md."""

    attributes: dict[str, str] = Field(
        min_length=1, description="Attribute -> rubric: what it is, what 0 and 100 mean. One request asks for all."
    )
    model: str = Field(description="Name the servers know it by.")
    servers: list[str] = Field(
        default_factory=list,
        description="Base addresses, such as http://gpu1:8000/v1. Default: only the cache answers.",
    )
    template: str | None = Field(
        None,
        description="What it is asked, with {rubrics}, {prompt} and {response}; the last two are put between marks, "
        "and the form of the reply follows. Default: that of scoring/judge_scorer.py.",
    )
    max_tokens: int = Field(256, ge=1, description="Longest reply; a model that reasons first needs thousands.")
    ask_again: int = Field(
        2, ge=0, description="Times a reply that cannot be read is asked for again before the response goes unscored."
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of each request, beside `temperature: 0`, such as `reasoning_effort: low`; null "
        "leaves one out.",
    )
    cache: PathText | None = Field(
        None, description="File of every reply, so that none is paid for twice. Default: judge.jsonl in the run folder."
    )

    @model_validator(mode="after")
    def _can_ask(self) -> "JudgeConfig":
        for name, rubric in self.attributes.items():
            if not name.strip() or not rubric.strip():
                raise ValueError(f"attributes: {name!r} needs a name and a rubric; say what 0 and 100 mean")
        for part in ("{rubrics}", "{prompt}", "{response}"):
            if self.template is not None and part not in self.template:
                raise ValueError(f"template: it lacks {part}; add it where that text belongs")
        return self


class RewardConfig(_Section):
    """Where scores come from. Several sources are mixed: their attributes stand side by side."""

    train: RewardTrainConfig | None = Field(None, description="Train a reward model on the ratings, then use it.")
    folder: PathText | None = Field(None, description="A trained reward model folder (or Hub id).")
    http: HttpRewardConfig | None = Field(None, description="A finished reward model behind servers.")
    judge: JudgeConfig | None = Field(None, description="A language model that rates by rubrics.")
    preset: Literal["dpa-v1"] | None = Field(
        None,
        description="`folder` is a copy of the published reward model, which has no dpa_reward.json: its order, "
        "template and golden vector are known here. By its Hub id it is recognised anyway.",
    )
    functions: dict[str, PathText] = Field(
        default_factory=dict,
        description="Attribute -> Python function `module:name` or `file.py:name`, called as f(messages, response).",
    )
    sources: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Further sources, by their names in the table of scoring/scorers.py -> their settings.",
    )

    @model_validator(mode="after")
    def _some_source(self) -> "RewardConfig":
        if not any((self.train, self.folder, self.http, self.judge, self.functions, self.sources)):
            raise ValueError("give at least one of train, folder, http, judge, functions, sources")
        return self

    def within(self, run: Path) -> "RewardConfig":
        """The same, what is kept being kept in the run's folder where no other place is named."""
        if self.judge is None or self.judge.cache is not None:
            return self
        return self.model_copy(update={"judge": self.judge.model_copy(update={"cache": str(run / "judge.jsonl")})})


class PromptsConfig(_Section):
    """Questions asked in the loop, or held out to measure it."""

    path: PathText = Field(
        description="File of prompts (.jsonl, .parquet, .csv): text or `messages`, optional `id`; or a Hub dataset id."
    )
    split: str = Field("train", description="Split, for a Hub dataset; only its `column` is read.")
    column: str = Field("prompt", description="Column of the prompt's text, where there is no `messages` column.")
    count: int | None = Field(
        None,
        ge=1,
        description="Prompts drawn for each iteration (no repeats until all are used) or measurement. Default: all.",
    )


class HttpEngineConfig(_ServersConfig):
    """Servers that speak OpenAI's chat API; docs/engines.md says how each is told the direction and what is checked."""

    servers: list[str] = Field(
        default_factory=list,
        description="Base addresses, such as http://gpu1:8000/v1; they must serve the policy asked.",
    )
    command: str | None = Field(
        None,
        description="Instead of `servers`: starts one for each policy and stops it after its rollout, such as "
        "`vllm serve {policy} --port {port}`; {index} is the number of the replica. No shell.",
    )
    replicas: int = Field(1, ge=1, description="Servers that `command` starts.")
    start_s: float = Field(900.0, gt=0, description="Seconds a started server has until it is healthy.")
    model: str | None = Field(
        None, description="Name to ask for. Default: the one under which a server lists the policy's own folder."
    )
    server: Literal["auto", "vllm", "sglang", "llama.cpp", "transformers", "openai"] = Field(
        "auto", description="What the servers are: which fields beyond OpenAI's they take. auto: found out by asking."
    )
    steer: Literal["template", "system"] = Field(
        "template",
        description="template: the policy's chat template reads `preference`; system: the sentence is written into the "
        "system message, for servers that hand the template no variables.",
    )
    verify: bool = Field(
        True, description="Refuse a server whose prompts are not as long as the policy's own template makes them."
    )
    in_flight: int = Field(32, ge=1, description="Requests in flight at each server.")
    request_s: float = Field(600.0, gt=0, description="Seconds one request may take.")

    @field_validator("command")
    @classmethod
    def _home_in_command(cls, command: str | None) -> str | None:
        """No shell reads it, so `~/` at the start of a word is written out here."""
        return command and re.sub(r"(?<!\S)~(?=/)", lambda _: shlex.quote(expand_home("~")), command)

    @model_validator(mode="after")
    def _one_source(self) -> "HttpEngineConfig":
        if self.command is not None and self.servers:
            raise ValueError("give servers or command, not both")
        if self.command is not None and not ("{policy}" in self.command and "{port}" in self.command):
            raise ValueError("command: it must say where {policy} and {port} go")
        return self


class VllmEngineConfig(_Section):
    """vLLM in this process (it runs its engine in processes of its own)."""

    tensor_parallel: int = Field(1, ge=1, description="Cards one copy of the policy is spread over.")
    memory: float = Field(0.9, gt=0, le=1, description="Share of a card's memory it may take.")
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of `vllm.LLM`, such as `max_num_seqs: 2048`, `enforce_eager: true` (a start "
        "without CUDA graphs) or `enable_sleep_mode: false` (a new engine for each rollout).",
    )

    @field_validator("arguments")
    @classmethod
    def _home_in_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Which of them are paths is vLLM's to know; none of its other texts begins with `~/`."""
        paths = {name: value for name, value in arguments.items() if isinstance(value, str) and value.startswith("~/")}
        return {**arguments, **{name: expand_home(path) for name, path in paths.items()}}


class EngineConfig(_Section):
    """What samples from the policy."""

    kind: str = Field(
        "auto",
        description="An engine: transformers, in this process or `workers` of its own; vllm; http, servers. auto: vllm "
        "where it is installed and there is a CUDA card, else transformers (on a Ray cluster too).",
    )
    http: HttpEngineConfig = HttpEngineConfig()  # type: ignore[call-arg]
    vllm: VllmEngineConfig = VllmEngineConfig()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _servers(self) -> "EngineConfig":
        if self.kind == "http" and not (self.http.servers or self.http.command):
            raise ValueError("http: give servers or command")
        return self


class RolloutConfig(_Section):
    """Sampling from the current policy."""

    directions: int = Field(4, ge=1, description="D: directions drawn for each prompt.")
    samples: int = Field(4, ge=1, description="N: samples for each prompt and direction.")
    temperature: float = Field(1.0, gt=0, description="Softmax temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling mass.")
    max_new_tokens: int = Field(256, ge=1, description="Longest response, in tokens.")
    prompts_per_shard: int = Field(64, ge=1, description="Prompts in one shard: the unit of work and of resuming.")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Sequences decoded together in one worker. auto: as many as fit in the memory that is free, on a "
        "processor 256 at most. Where they turn out not to fit, half of them, and so on.",
    )
    workers: int = Field(1, ge=1, description="Sampling processes on this machine; results do not depend on it.")
    bf16: MixedBf16 = False
    max_reject_rate: float = Field(0.05, ge=0, le=1, description="Stop when more than this share of prompts fails.")
    engine: EngineConfig = EngineConfig()  # type: ignore[call-arg]


class SelectionConfig(_Section):
    """Which candidate each direction keeps."""

    method: Literal["pooled", "per_direction", "random"] = Field(
        "pooled",
        description="pooled: best of all candidates of a prompt for each direction; per_direction: best of those made "
        "under that direction (the paper read literally); random: the control.",
    )
    utility: Literal["linear", "ray", "chebyshev"] = Field(
        "linear",
        repr=False,  # what was selected before there was a choice keeps its identity (stages/select.py)
        description="What makes a candidate the best under a direction v. linear: v . r, the paper's, which never "
        "keeps what lies inside the convex hull of a pool; ray: how far it comes along v in every objective "
        "(Pascoletti and Serafini); chebyshev: the weighted distance to the best of the pool in each objective.",
    )
    augmentation: float = Field(
        0.01,
        ge=0,
        repr=False,
        description="ray, chebyshev: how much of v . r is added. A little tells candidates apart that are equal in "
        "their weakest objective; 1 mixes the two.",
    )
    directions: int = Field(
        4,
        ge=1,
        description="Directions served by each prompt's pool (pooled, random): first those it was asked under, then "
        "new ones; per_direction serves those it was asked under.",
    )
    standardise: bool = Field(
        False,
        description="Divide each objective by its standard deviation over the iteration's candidates before weighing, "
        "so that an objective that varies little counts as much. A constant one is left as it is.",
    )
    rejected: Literal["worst", "random", "other_direction"] = Field(
        "worst",
        description="learner: dpo. What the winner is compared with: the worst of the same pool under the direction, "
        "a random one below the winner, or the winner of another direction of the pool, so that every pair occurs in "
        "both orders and only the direction explains it (keep quality with dpo.sft_weight).",
    )
    ends_until: int = Field(
        0,
        ge=0,
        description="Iterations t below this one draw all their directions from the outer fifth of the training cone, "
        "where winners differ most; later ones from the whole cone.",
    )
    targets: float = Field(
        0.0,
        ge=0,
        le=1,
        repr=False,  # in the identity of a shard only where there are some
        description="Share of the winners of each prompt that are those of a target instead of a direction, such as "
        "`helpfulness; verbosity=40` (docs/method.md); the policy then takes both. method pooled only; with another "
        "learner than sft only t = 0, which is always sft, holds some.",
    )

    @property
    def target_share(self) -> float:
        """`targets`, where the method keeps winners of targets."""
        return self.targets if self.method == "pooled" else 0.0


class TrainingConfig(_Section):
    """What every training of a policy has."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak step size.")
    epochs: float = Field(1.0, gt=0, description="Passes over the rows.")
    max_length: int = Field(2048, ge=16, description="Longest example in tokens; longer ones are rejected.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of steps with rising learning rate.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "cosine", description="Learning rate after the warm-up."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonalised momentum on the 2-D weights, AdamW on the rest."
    )
    lora: AdapterConfig | None = Field(None, description="Train adapters and merge them after every iteration.")
    save_steps: int = Field(200, ge=1, description="Optimizer steps between checkpoints.")
    replay: float = Field(
        0.0,
        ge=0,
        description="Rows selected in earlier iterations that are trained on again, drawn anew each iteration, as a "
        "share of this iteration's rows.",
    )
    bf16: MixedBf16 = False
    gradient_checkpointing: bool | None = Field(
        None, description="Compute activations twice to save memory. Default: where memory asks for it."
    )
    report_to: list[str] = Field(default_factory=list, description="Trackers, such as tensorboard, wandb, trackio.")

    def of_iteration(self, t: int) -> Self:
        """The settings of iteration t, which may have a rate of its own."""
        return self


class _SelectedRowsConfig(TrainingConfig):
    """What every training on selected rows has."""

    listening_rows: int | None = Field(
        None,
        ge=0,
        description="Selected rows kept out of training, by whole prompts, to measure on them whether the policy reads "
        "its direction (docs/learning.md). Default: 64, but at most a fiftieth of the rows, and none where that is "
        "fewer than 8.",
    )
    listening_steps: int = Field(
        250, ge=1, description="Optimizer steps between two of these measurements; the last one is after the last step."
    )
    min_listening: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Stop before any rollout when a smaller share of these rows than this is likelier under its own "
        "direction than under another. Default: warn where it may be chance.",
    )


class FinetuneConfig(_SelectedRowsConfig):
    """Finetuning on (direction, prompt, winner), completion-only loss, through TRL (`learner: sft`)."""

    online_learning_rate: float | None = Field(
        None,
        gt=0,
        repr=False,  # in the identity of a run only where there is one
        description="Peak step size of the online iterations, t >= 1, which move a policy that already reads its "
        "direction. Default: learning_rate.",
    )
    max_length: int = Field(2048, ge=16, description="Packed row length in tokens; longer examples are rejected.")
    packed_rows_per_step: int = Field(8, ge=1, description="Packed rows in one optimizer step, over all devices.")
    rows_per_device: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Packed rows in one forward pass, at most; the rest accumulates. auto: as many as fit on a card, "
        "one on a CPU. Fewer are taken where memory asks for it; the result is the same.",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compile the layers (torch.compile): about twice as fast where a small model trains on a fast "
        "card, and the same but for rounding. auto: on a card, for 200 optimizer steps or more. Not where "
        "activations are computed twice, nor on several cards; where compiling fails, training goes on without.",
    )
    contrastive: float = Field(
        0.0,
        ge=0,
        description="Weight of the contrastive term: a winner must be likelier under its own direction than under "
        "others that do not choose it (docs/learning.md). 0: the paper's loss alone.",
    )
    contrastive_negatives: int = Field(
        1, ge=1, description="Other directions a winner is contrasted with. Each costs as many tokens as the row."
    )

    def of_iteration(self, t: int) -> Self:
        """The same with the rate of iteration t as `learning_rate`."""
        online = self.online_learning_rate if t > 0 else None
        return self if online is None else self.model_copy(update={"learning_rate": online})


class PreferenceConfig(_SelectedRowsConfig):
    """Finetuning on (direction, prompt, chosen, rejected): DPO through TRL (`learner: dpo`)."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size (TRL's; a tenth of what SFT takes, or less).")
    beta: float = Field(
        0.1, gt=0, description="Strength of the pull to the policy that training starts from (arXiv 2305.18290)."
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of the chosen responses' own loss per token, added to DPO's (arXiv 2404.19733)."
    )
    pairs_per_step: int = Field(32, ge=1, description="Pairs in one optimizer step, over all devices.")
    pairs_per_device: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Pairs in one forward pass, halved where memory runs out; the rest accumulates. auto: as many as "
        "fit on a card, 4 on a CPU.",
    )


class GrpoConfig(TrainingConfig):
    """Learning from the policy's own answers, rewarded by v.r: GRPO through TRL (`learner: grpo`). How it samples is
    said in `rollout`: directions for each prompt, samples (a group), temperature, top_p, max_new_tokens."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size (TRL's; a tenth of what SFT takes, or less).")
    beta: float = Field(
        0.0, ge=0, description="Weight of the KL divergence from the policy that training starts from (TRL's: none)."
    )
    prompts_per_step: int = Field(
        8,
        ge=1,
        description="Prompts, each under one direction, in one optimizer step; what is left of a pass is not used.",
    )
    answers_per_device: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Answers in one forward pass, halved where memory runs out; the rest accumulates. auto: as many as "
        "fit on a card, 4 on a CPU.",
    )


class EvaluateConfig(_Section):
    """Measuring a policy on held-out prompts over a fixed grid of directions."""

    prompts: PromptsConfig = Field(description="Held-out prompts; never used in training.")
    directions: int = Field(
        9,
        ge=3,
        description="Grid points on each arc from the centre towards an objective; an odd number, so that the centre "
        "is one of them.",
    )
    samples: int = Field(1, ge=1, description="Responses for each prompt and direction.")
    temperature: float = Field(0.7, gt=0, description="Softmax temperature (the published policy uses 0.7).")
    gold: dict[str, PathText] = Field(
        default_factory=dict,
        description="Attribute -> function of a known true reward, measured beside the model's, never trained on.",
    )
    reference: float = Field(0.0, description="Reference point of the hypervolume, on every objective.")
    resamples: int = Field(1000, ge=1, description="Bootstrap resamples over prompts.")

    @field_validator("directions")
    @classmethod
    def _with_the_centre(cls, directions: int) -> int:
        if directions % 2 == 0:
            raise ValueError("take an odd number, such as 9, so that the centre of each arc is measured too")
        return directions


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
    accelerate: PathText | None = Field(
        None, description="Configuration of `accelerate launch` (recipes/accelerate/*.yaml); implies a launch."
    )


class RewardRunConfig(_Section):
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

_TRAINING_PACE = (
    *("report_to", "gradient_checkpointing", "save_steps", "rows_per_device", "pairs_per_device", "answers_per_device"),
    "compile",
    *("listening_steps", "min_listening", "max_left_out", "allow_worse_than_mean"),
)
"""Fields of a training section that alter no result: what is told, kept, computed at once or put up with."""

_TRAININGS: dict[str, type[BaseModel]] = {
    "finetune": FinetuneConfig,
    "dpo": PreferenceConfig,
    "grpo": GrpoConfig,
    "reward.train": RewardTrainConfig,
}

_PACE = {
    *("name", "out", "iterations", "rollout.workers", "rollout.batch_size", "rollout.bf16", "rollout.max_reject_rate"),
    *("rollout.engine.kind", *(f"rollout.engine.vllm.{field}" for field in VllmEngineConfig.model_fields)),
    *(f"rollout.engine.http.{field}" for field in HttpEngineConfig.model_fields if field != "steer"),
    *(f"reward.http.{field}" for field in HttpRewardConfig.model_fields if field != "folder"),
    *(f"reward.judge.{field}" for field in ("servers", "cache", "in_flight", "request_s", "attempts", "api_key_env")),
    *(
        f"{name}.{field}"
        for name, section in _TRAININGS.items()
        for field in _TRAINING_PACE
        if field in section.model_fields
    ),
    *(f"cluster.{field}" for field in ClusterConfig.model_fields),
}
DOES_NOT_CHANGE_RESULTS = frozenset(_PACE)
"""Fields a resumed run may change: they name, place, extend or pace the work, and alter no finished row."""


def of_results(config: BaseModel) -> str:
    """The text of a training section without what alters no result, such as trackers, or the rate of other iterations
    (FinetuneConfig.of_iteration)."""
    return config.model_dump_json(exclude={*_TRAINING_PACE, "online_learning_rate"})


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


def resolved(config: BaseModel) -> dict[str, Any]:
    """The configuration as plain data, every default filled in."""
    return json.loads(config.model_dump_json())


def fingerprint(config: BaseModel) -> str:
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
