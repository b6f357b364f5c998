"""`prompts` and `rollout`: what is asked, and which engine samples.
Run its tests: pytest tests/test_config.py tests/test_engines.py
"""

import re
import shlex
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dpa.core.sections.section import MixedBf16, PathText, Section, ServersConfig, expand_home


class PromptsConfig(Section):
    """Questions asked in the loop, or held out to measure it."""

    path: PathText = Field(
        description="File of prompts (.jsonl, .parquet, .csv): text or `messages`, optional `id`; or a Hub dataset id."
    )
    split: str = Field("train", description="Split, for a Hub dataset; only its `column` is read.")
    column: str = Field("prompt", description="Column of the prompt's text, where there is no `messages` column.")
    count: int | None = Field(
        None,
        ge=1,
        description="Prompts drawn for each iteration (no repeats until all are used), or to measure on (always the "
        "same). Default: all.",
    )


class HttpEngineConfig(ServersConfig):
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
        "messages, where the template would, for servers that hand the template no variables.",
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


class VllmEngineConfig(Section):
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


class EngineConfig(Section):
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


class RolloutConfig(Section):
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
