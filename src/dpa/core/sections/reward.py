"""`reward`: where scores come from.
Run its tests: pytest tests/test_config.py tests/test_scorers.py
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dpa.core.sections.section import MixedBf16, PathText, Section, ServersConfig
from dpa.core.sections.training import AdapterConfig


class RewardTrainConfig(Section):
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


class HttpRewardConfig(ServersConfig):
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


class JudgeConfig(ServersConfig):
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


class RewardConfig(Section):
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
