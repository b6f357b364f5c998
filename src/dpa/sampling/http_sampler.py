"""A policy that is asked over HTTP: any server of OpenAI's chat API (vLLM, SGLang, llama.cpp, transformers, dpa serve).
Run its tests: pytest tests/test_http_sampler.py

Where a server gives `n` choices of one seed that differ (vLLM; SGLang where it does), the samples of a prompt and
direction are one request with the first one's seed; elsewhere every sample is a request of its own with its own seed
(`transformers serve` refuses more). The direction goes to the policy's own chat template, as
`chat_template_kwargs.preference`. A server whose template ignores it would answer plausibly and unsteered, so every
answer's `usage.prompt_tokens` must be what the policy's own tokenizer makes of the prompt and the direction.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, EngineError
from dpa.core.records import Messages, Sample, Sampler, SampleRequest
from dpa.core.reference import Model
from dpa.core.sections.rollout import RolloutConfig
from dpa.core.targets import preference_of, sentence, wish_of
from dpa.models.chat_template import has_system_role, with_sentence
from dpa.models.files import folder_revision, resolve_model
from dpa.remote.http_exchange import Answer, Refusal, key_in
from dpa.remote.http_pool import HttpPool
from dpa.remote.server_process import ServerProcess
from dpa.sampling.engine import SamplingEngine
from dpa.sampling.prompting import Prompting

SHARDS_IN_FLIGHT = 2
"""While the last answers of one shard come in, the next shard keeps the servers busy."""

_CHAT = "/v1/chat/completions"
_PROBE_SEEDS, _PROBE_TOKENS, _PROBE_TEMPERATURE = 8, 32, 2.0
_PROBE_TEXT = "Say anything."
_SEEDS = 2**31
"""Servers take seeds of different widths (llama.cpp: 32 bits); all take these."""


class HttpSampler:
    """A policy behind a pool of servers; `sample` may be called from several threads.

    The servers are got to know when it is made: which fields they take, under what name they serve the policy, whether
    they read the direction and a seed. `policy` is its folder. Raises EngineError when a server cannot be trusted with
    it.
    """

    def __init__(self, pool: HttpPool, prompting: Prompting, policy: str, config: RolloutConfig, revision: str) -> None:
        self.revision = revision
        self._pool, self._prompting, self._rollout, self._config = pool, prompting, config, config.engine.http
        self._has_system_role = has_system_role(prompting.tokenizer.get_chat_template())
        self._refused: dict[tuple[int, str], str] = {}
        """Why a sample was refused, by its seed and prompt: it is not asked of a server again."""
        self._many = False
        """Whether a request may be of several samples; _probe finds out."""
        self._kind, self._model, longest = self._meet(policy)
        self._prompting = replace(prompting, context=min(prompting.context, longest or prompting.context))
        self._probe()

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """One Sample per seed of each request (core.records.Sampler).

        A request any of whose samples is refused gets none; asked for alone, it raises RuntimeError with the reason.
        Raises EngineError.
        """
        prompts, config = [self._prompt(request) for request in requests], self._rollout
        asks = [
            (i, j, count, self._body(prompt, request.seeds[j], config.temperature, config.max_new_tokens, count))
            for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
            if prompt is not None and not self._reasons(request, prompt)
            for j, count in self._shares(len(request.seeds))
        ]
        answers = self._pool.ask(_CHAT, [body for *_, body in asks])
        samples: dict[tuple[int, int], Sample] = {}
        for (i, j, count, _), answer in zip(asks, answers, strict=True):
            prompt = prompts[i]
            assert prompt is not None
            read = self._read(prompt, answer, count)
            if isinstance(read, Refusal):
                self._refused[requests[i].seeds[j], prompt.key] = read.reason
            else:
                samples.update({(i, j + number): sample for number, sample in enumerate(read)})
        return [
            self._collect(i, request, prompt, samples, len(requests))
            for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
        ]

    def _collect(
        self,
        i: int,
        request: SampleRequest,
        prompt: "_Prompt | None",
        samples: dict[tuple[int, int], Sample],
        asked: int,
    ) -> list[Sample]:
        if prompt is None:
            return []
        reasons = self._reasons(request, prompt)
        if reasons and asked == 1:
            raise RuntimeError(reasons[0])
        return [] if reasons else [samples[i, j] for j in range(len(request.seeds))]

    def _reasons(self, request: SampleRequest, prompt: "_Prompt") -> list[str]:
        """Why samples of a request were refused: where one was, the others are of no use."""
        return [self._refused[seed, prompt.key] for seed in request.seeds if (seed, prompt.key) in self._refused]

    def _shares(self, seeds: int) -> list[tuple[int, int]]:
        """How `seeds` samples are asked for: the place of the first of each request, and their number."""
        return [(0, seeds)] if self._many and seeds else [(place, 1) for place in range(seeds)]

    # --- one request -------------------------------------------------------------------------------------------

    def _prompt(self, request: SampleRequest) -> "_Prompt | None":
        """What is sent, and how long the policy's own template makes it; None where that fails or fills the context."""
        ids = self._prompting.encode(request.messages, request.direction, request.held)
        if not ids:
            return None
        chat = [{"role": message["role"], "content": message["content"]} for message in request.messages]
        key = json.dumps([chat, request.direction, request.held])
        if request.direction is None:
            return _Prompt(chat, None, len(ids), request.messages, key)
        space = self._prompting.space
        if self._config.steer == "system":
            stated = sentence(space, wish_of(space, request.direction, request.held))
            stated_chat = with_sentence(chat, stated, space.placement, self._has_system_role)
            return _Prompt(stated_chat, None, len(ids), request.messages, key)
        preference = preference_of(space.names, request.direction, request.held)
        return _Prompt(chat, preference, len(ids), request.messages, key)

    def _body(
        self, prompt: "_Prompt", seed: int, temperature: float, max_new_tokens: int, count: int = 1
    ) -> dict[str, Any]:
        longest = self._prompting.room(prompt.tokens, max_new_tokens)
        body: dict[str, Any] = {
            "model": self._model,
            "messages": prompt.messages,
            "temperature": temperature,
            "top_p": self._rollout.top_p,
            "max_tokens": longest,
            "seed": seed % _SEEDS,
        }
        if count > 1:
            body["n"] = count
            if self._kind == "vllm":
                body["return_token_ids"] = True  # else nobody counts the tokens of each
        if prompt.preference is not None:
            body["chat_template_kwargs"] = {"preference": prompt.preference}
        match self._kind:
            # Else a generation_config.json or the server's own defaults would narrow the distribution.
            case "vllm" | "sglang":
                body |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
            case "llama.cpp":
                # Its name for the penalty is another one; told no format it may cut an answer's reasoning out.
                body |= {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "reasoning_format": "none"}
            case "transformers":
                # It knows no other way to be told to sample, and not from the 50 likeliest tokens only.
                config = {
                    "do_sample": True,
                    "temperature": temperature,
                    "top_p": self._rollout.top_p,
                    "top_k": 0,
                    "max_new_tokens": longest,
                    "eos_token_id": list(self._prompting.end_ids),
                    "pad_token_id": self._prompting.tokenizer.pad_token_id,
                }
                body["generation_config"] = json.dumps(config)
        return body

    def _read(self, prompt: "_Prompt", answer: Answer | Refusal, count: int = 1) -> list[Sample] | Refusal:
        """The `count` samples of an answer. Raises EngineError when it shows that the prompt was not the policy's."""
        if isinstance(answer, Refusal):
            return answer
        found: list[tuple[str, Any, Any]] = []
        try:
            choices = sorted(answer.payload["choices"], key=lambda choice: choice.get("index") or 0)
            usage = answer.payload.get("usage") or {}
            prompt_tokens = usage.get("prompt_tokens")
            for choice in choices:
                message, finish = choice["message"], choice.get("finish_reason")
                text = message.get("content") or ""
                if not isinstance(text, str) or finish not in ("stop", "length"):
                    raise TypeError
                # `reasoning` is what vLLM 0.23 to 0.33 call it, `reasoning_content` what others do
                if any(message.get(name) for name in ("tool_calls", "reasoning", "reasoning_content")):
                    return Refusal(
                        "the server parsed the answer into tool calls or reasoning; start it without a parser"
                    )
                ids = choice.get("token_ids")
                tokens = usage.get("completion_tokens") if count == 1 else len(ids) if isinstance(ids, list) else None
                found.append((text, tokens, finish))
            if len(found) != count:
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            wanted = "one finished choice" if count == 1 else f"{count} finished choices"
            return Refusal(f"the server's answer has not exactly {wanted}")
        if self._config.verify and prompt_tokens != prompt.tokens:
            raise EngineError(self._complaint(prompt, prompt_tokens))
        return [Sample(text, self._tokens(text, tokens, finish), finish) for text, tokens, finish in found]

    def _tokens(self, text: str, said: Any, finish: str) -> int:
        """Tokens of an answer: as the server counts them, else as the policy's tokenizer writes it."""
        if isinstance(said, int) and not isinstance(said, bool) and said >= 0:
            return said
        return self._prompting.count(text) + (finish == "stop")

    def _complaint(self, prompt: "_Prompt", said: Any) -> str:
        if not isinstance(said, int):
            return (
                "the server reports no usage.prompt_tokens, so that nobody can see whether it reads the direction; "
                "take another server, or set rollout.engine.http.verify to false."
            )
        if said == len(self._prompting.encode(prompt.plain, None)):
            return (
                f"the server's chat template ignores `preference`: a prompt of {prompt.tokens} tokens came out as the "
                f"{said} it has without a direction; serve the policy's own folder, or set rollout.engine.http.steer "
                "to system."
            )
        return (
            f"the server makes {said} tokens of a prompt that the policy's own chat template makes {prompt.tokens} of; "
            "it serves another model or template; serve the policy's own folder."
        )

    # --- getting to know the servers ---------------------------------------------------------------------------

    def _meet(self, policy: str) -> tuple[str, str, int | None]:
        """What the servers are, the name of the policy there, and their longest context where they say it."""
        listings = [_list_of(payload, "data") for payload in self._payloads("/v1/models")]
        kinds: list[str] = [self._config.server for _ in listings]
        if self._config.server == "auto":
            routes = map(_paths_of, self._payloads("/openapi.json", needed=False))
            kinds = [_kind_of(listed, paths) for listed, paths in zip(listings, routes, strict=True)]
        named = [self._name_of(listed, policy, kind) for listed, kind in zip(listings, kinds, strict=True)]
        names = {name for name, _ in named}
        if len(set(kinds)) > 1 or len(names) > 1:
            raise ConfigError(
                f"rollout.engine.http: its servers differ ({', '.join(sorted({*kinds, *names}))}); give servers of one "
                "kind that serve the policy under one name."
            )
        return kinds[0], names.pop(), min((length for _, length in named if length), default=None)

    def _payloads(self, path: str, needed: bool = True) -> list[Any]:
        """What each server says there; None from one that has no such page, or where it is not `needed`."""
        answers = self._pool.ask_every_server(path, None, needed)
        for answer in answers:
            if needed and isinstance(answer, Refusal) and answer.status != 404:
                raise EngineError(f"a server does not answer GET {path} ({answer.reason}); mend it, or leave it out.")
        return [answer.payload if isinstance(answer, Answer) else None for answer in answers]

    def _name_of(self, listed: list[dict[str, Any]], policy: str, kind: str) -> tuple[str, int | None]:
        """The name of the policy at one server, and the context that was started with."""
        folder = Path(policy).resolve()
        for model in listed:
            name, root = model.get("id"), model.get("root")
            if not isinstance(name, str) or not name:
                continue
            places = [Path(text).resolve() for text in (name, root) if isinstance(text, str) and text]
            if name == self._config.model or (self._config.model is None and folder in places):
                more = model.get("meta")  # where llama.cpp says it
                length = model.get("max_model_len") or (more.get("n_ctx") if isinstance(more, dict) else None)
                return name, length if isinstance(length, int) and length > 0 else None
        if self._config.model is not None:
            return self._config.model, None  # a server need not list every name it answers to
        if kind == "transformers":
            return str(folder), None  # it loads the folder it is asked for, or refuses
        serves = ", ".join(str(model.get("id"))[:200] for model in listed[:5]) or "nothing"
        raise EngineError(
            f"the servers do not list the policy {policy} (they list {serves}); start them with that folder, use "
            "rollout.engine.http.command, or name the policy's alias in rollout.engine.http.model."
        )

    def _probe(self) -> None:
        """Refuse servers that ignore the direction, or answer the same whatever the seed."""
        question: Messages = [{"role": "user", "content": _PROBE_TEXT}]
        edges = [tuple(self._prompting.space.arc(name, 2)[-1].tolist()) for name in self._prompting.space.arc_names]
        for direction in [*edges, None]:
            prompt = self._prompt(SampleRequest(question, direction, ()))
            if prompt is None:
                raise EngineError("the policy's context does not hold a direction and a short question; take another.")
            for read in self._ask_each(prompt, self._body(prompt, 0, self._rollout.temperature, 1)):
                if isinstance(read, Refusal):
                    raise EngineError(f"a server refuses a plain question: {read.reason}.")
        assert prompt is not None
        self._pool.set_touchstone(_CHAT, self._body(prompt, 0, self._rollout.temperature, 1))
        bodies = [self._body(prompt, seed, _PROBE_TEMPERATURE, _PROBE_TOKENS) for seed in range(_PROBE_SEEDS)]
        for of_one_server in zip(*(self._ask_each(prompt, body) for body in bodies), strict=True):
            if len({read[0].text for read in of_one_server if not isinstance(read, Refusal)}) == 1:
                raise EngineError(
                    f"a server says the same to {_PROBE_SEEDS} seeds at temperature {_PROBE_TEMPERATURE:g}: it decodes "
                    "greedily or ignores the seed; set rollout.engine.http.server to what it is."
                )

        if self._kind in ("vllm", "sglang"):
            body = self._body(prompt, 0, _PROBE_TEMPERATURE, _PROBE_TOKENS, _PROBE_SEEDS)
            choices = self._ask_each(prompt, body, _PROBE_SEEDS)
            self._many = all(
                not isinstance(read, Refusal) and len({sample.text for sample in read}) > 1 for read in choices
            )

    def _ask_each(self, prompt: "_Prompt", body: dict[str, Any], count: int = 1) -> list[list[Sample] | Refusal]:
        return [self._read(prompt, answer, count) for answer in self._pool.ask_every_server(_CHAT, body)]


class HttpEngine(SamplingEngine):
    """Servers that run already, or are started for each policy and ended after its rollout.

    The policy's folder is read here for its tokenizer, its context and its revision; its weights are not loaded.
    """

    def wants_card(self, config: RolloutConfig) -> bool:
        return config.engine.http.command is not None and super().wants_card(config)

    def check(self, config: RolloutConfig) -> None:
        http = config.engine.http
        key_in(http.api_key_env, "rollout.engine.http.api_key_env")
        if http.servers and http.model is not None:
            raise ConfigError(
                f"rollout.engine.http.model: {http.model!r} is one name at servers that stay the same, while every "
                "iteration has another policy; give `command`, or run the stages one by one."
            )

    @contextmanager
    def samplers(self, policy: Model, space: DirectionSpace, config: RolloutConfig) -> Iterator[list[Sampler]]:
        """One, named twice, so that two shards are in flight (SHARDS_IN_FLIGHT)."""
        http, safe = config.engine.http, resolve_model(policy)
        prompting = Prompting.of(safe, space)
        folder = str(Path(safe.path).resolve())
        processes: list[ServerProcess] = []
        if http.command is not None:
            processes = [ServerProcess(http.command, folder, index, http.start_s) for index in range(http.replicas)]
        with HttpPool(
            [server.rstrip("/").removesuffix("/v1") for server in http.servers],
            processes,
            in_flight=http.in_flight,
            request_s=http.request_s,
            attempts=http.attempts,
            key=key_in(http.api_key_env, "rollout.engine.http.api_key_env"),
        ) as pool:
            sampler = HttpSampler(pool, prompting, folder, config, folder_revision(safe.path))
            yield [sampler] * SHARDS_IN_FLIGHT


@dataclass(frozen=True)
class _Prompt:
    """What is sent for one request, and how many tokens the policy's own template makes of it."""

    messages: list[dict[str, str]]
    preference: dict[str, float | str] | None
    """For the chat template; None where no direction is stated, or where it stands in the messages."""
    tokens: int
    plain: Messages
    """The messages as they were asked."""
    key: str


def _list_of(payload: Any, name: str) -> list[dict[str, Any]]:
    found = payload.get(name) if isinstance(payload, dict) else None
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _paths_of(payload: Any) -> set[str]:
    found = payload.get("paths") if isinstance(payload, dict) else None
    return set(found) if isinstance(found, dict) else set()


def _kind_of(listed: list[dict[str, Any]], paths: set[str]) -> str:
    """What a server says it is in /v1/models, or by its routes: `transformers serve` names the model's owner there."""
    owners = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
    for model in listed:
        if model.get("owned_by") in owners:
            return owners[model["owned_by"]]
    return "transformers" if "/load_model" in paths else "openai"
