"""The gateway: OpenAI's routes, each request steered, bounded, sent on to an engine, and its answer told what was done.
Run its tests: pytest tests/test_gateway.py

    answer -> read and check the body -> steer (serve/steering.py) -> plain | selected -> engine -> echo
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from dpa.core.directions import Direction
from dpa.core.errors import DirectionError
from dpa.serve.bodies import (
    TOGETHER,
    ChatBody,
    CompletionBody,
    DirectionBody,
    Options,
    RefusedError,
    Robust,
    Sampling,
    check_body,
    error_body,
    read_body,
)
from dpa.serve.gate import Gate, Metrics
from dpa.serve.http import DONE, EventStream, Json, event, failed, http_error, or_gone, refusal
from dpa.serve.seeds import nth_seed
from dpa.serve.settings import Settings
from dpa.serve.steering import HEADER, Steering, UnknownModelError, neighbourhood, read_direction, read_model, steer
from dpa.serve.upstream import Upstream, UpstreamError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_PAGE_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Engines:
    """Who answers: the policy, what it is compared with (None: the policy itself, told no direction), who scores."""

    policy: Upstream
    ours: bool = False
    """Whether the policy is behind our own engine, which tells its load."""
    base: Upstream | None = None
    base_model: str = ""
    scorer: Upstream | None = None


@dataclass(frozen=True)
class Asked:
    """One request, understood."""

    chat: bool
    """Whether the client speaks chat completions (else completions)."""
    body: Sampling
    options: Options
    steering: Steering
    to: str
    """The engine's route: a steered completion is asked as a chat, whose template states the direction."""


class Gateway:
    """`is_ready` says whether the engines are up. `app` is the FastAPI application, `gate` the ASGI entrance to it."""

    def __init__(self, settings: Settings, engines: Engines, is_ready: Callable[[], bool] = lambda: True) -> None:
        self.metrics = Metrics()
        self._settings, self._engines, self._is_ready = settings, engines, is_ready
        self._created = int(time.time())
        self.app = self._build()
        routes = [path for route in self.app.routes if (path := getattr(route, "path", None))]
        self.gate = Gate(self.app, settings, self.metrics, routes)

    # --- routes ------------------------------------------------------------------------------------------------

    def _build(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            for upstream in (self._engines.policy, self._engines.base, self._engines.scorer):
                if upstream is not None:
                    await upstream.aclose()

        app = FastAPI(
            title="dpa gateway",
            summary="OpenAI's API with a direction in every request.",
            version="1",
            docs_url=None,  # its pages load scripts from elsewhere
            redoc_url=None,
            lifespan=lifespan,
            redirect_slashes=False,
        )
        errors: dict[int | str, dict[str, Any]] = {
            status: {"description": text, "content": _ERROR_CONTENT} for status, text in _STATUSES.items()
        }
        app.add_api_route("/health", self._health, response_model=None)
        app.add_api_route("/metrics", self._metrics_text, response_model=None)
        app.add_api_route("/v1/models", self._models, response_model=None)
        app.add_api_route(
            "/v1/models/{model:path}",
            self._model,
            response_model=None,
            responses={404: errors[404]},
            openapi_extra={"parameters": [_MODEL_PARAMETER]},
        )
        app.add_api_route("/v1/dpa/space", self._space, response_model=None)
        for path, endpoint, kind in (
            ("/v1/dpa/direction", self._direction, DirectionBody),
            (CHAT, self._chat, ChatBody),
            (COMPLETIONS, self._completions, CompletionBody),
        ):
            app.add_api_route(
                path,
                endpoint,
                methods=["POST"],
                response_model=None,
                openapi_extra=_request_schema(kind),
                responses=errors,
            )
        for name, (data, media_type) in _page_files().items():
            page = _Page(data, media_type)
            app.add_api_route(f"/{name}", page, response_model=None, include_in_schema=False)
            if name == "index.html":
                app.add_api_route("/", page, response_model=None, include_in_schema=False)
        app.add_exception_handler(RefusedError, _refused)
        app.add_exception_handler(DirectionError, _bad_direction)
        app.add_exception_handler(UnknownModelError, _unknown_model)
        app.add_exception_handler(HTTPException, http_error)
        app.add_exception_handler(RequestValidationError, _bad_request)
        app.add_exception_handler(Exception, failed)
        return app

    async def _health(self) -> Response:
        ready = self._is_ready()
        return Json({"status": "ok" if ready else "starting"}, 200 if ready else 503)

    async def _metrics_text(self) -> Response:
        if self._engines.ours:
            with suppress(RefusedError):  # it is starting
                about = await self._engines.policy.get("/dpa/engine")
                for state in ("running", "waiting"):
                    self.metrics.engine.labels(state).set(about[state])
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def _models(self) -> Response:
        settings = self._settings
        names = [settings.name, *(f"{settings.name}:{preset}" for preset in settings.space.presets)]
        about = {"object": "model", "created": self._created, "owned_by": "dpa"}
        return Json({"object": "list", "data": [{"id": name, **about} for name in names]})

    async def _model(self, request: Request) -> Response:
        """Any name that a request may give as `model`."""
        name = request.path_params["model"]
        read_model(name, self._settings.name, self._settings.space)
        return Json({"id": name, "object": "model", "created": self._created, "owned_by": "dpa"})

    async def _space(self) -> Response:
        settings, space, limits = self._settings, self._settings.space, self._settings.limits
        presets = {name: _direction_json(space.parse(name)) for name in space.presets}
        return Json(
            {
                "model": settings.name,
                "objectives": [{"name": o.name, "description": o.description} for o in space.objectives],
                "center": dict(zip(space.names, map(float, space.center_K), strict=True)),
                "max_angle": space.max_angle,
                "template": space.template,
                "presets": presets,
                "default": _direction_json(settings.default) if settings.default else None,
                "front": settings.front,
                "front_reward": settings.front_reward,
                "examples": list(settings.examples),
                "scorer": self._engines.scorer is not None,
                "base": True,
                "limits": {
                    "max_tokens": limits.max_tokens,
                    "n": limits.n,
                    "best_of": limits.best_of,
                    "body_bytes": limits.body_bytes,
                },
            }
        )

    async def _direction(self, request: Request) -> Response:
        asked = check_body(DirectionBody, await self._body(request))
        space = self._settings.space
        direction, clamped = read_direction(asked.direction, space, asked.outside, "direction")
        assert direction is not None
        angle = float(space.angle_to_center(np.array([direction.weights]))[0])
        return Json({**_direction_json(direction), "angle": angle, "clamped": clamped})

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    # --- one request -------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, chat: bool) -> Response:
        asked = self._understand(await self._body(request), request.headers.getlist(HEADER), chat)
        request.scope["dpa.enter"]()
        steering = asked.steering
        self.metrics.directions.labels(steering.source).inc()
        request.scope["dpa"].update(
            source=steering.source, direction=str(steering.direction) if steering.direction else None
        )
        headers = {"X-DPA-Direction": str(steering.direction or "none"), "X-DPA-Source": steering.source}
        selecting = asked.options.best_of > 1 or asked.options.robust
        if asked.body.stream:
            chunks = self._selected_stream(asked) if selecting else self._plain_stream(asked)
            return EventStream(self._events(chunks, request), headers)
        limit = self._settings.limits.seconds
        try:
            async with asyncio.timeout(limit):
                work = self._selected(asked) if selecting else self._plain(asked)
                answer = await or_gone(request.receive, work)
        except TimeoutError:
            raise _too_slow(limit) from None
        usage = answer.get("usage") or {}
        self._count(usage)
        request.scope["dpa"]["tokens"] = usage.get("completion_tokens")
        if self._settings.log_text:
            request.scope["dpa"].update(asked=steering.body.get("messages"), said=_texts(answer))
        return Json(answer, headers=headers)

    def _understand(self, raw: dict[str, Any], headers: list[str], chat: bool) -> Asked:
        """Check every field, find the direction, and bound what is asked. Raises RefusedError or DirectionError."""
        settings, limits = self._settings, self._settings.limits
        body: Sampling = check_body(ChatBody if chat else CompletionBody, raw)
        options = body.dpa_options or Options()
        outside = options.outside or settings.outside
        steering = steer(raw, headers, settings.space, settings.name, outside, settings.default)
        for field in ("max_tokens", "max_completion_tokens"):
            value = getattr(body, field, None)
            if value is not None and value > limits.max_tokens:
                raise _beyond(field, value, limits.max_tokens)
        sampled = getattr(body, "best_of", None)  # OpenAI's own, which travels on
        if sampled is not None and sampled > limits.best_of:
            raise _beyond("best_of", sampled, limits.best_of)
        n, prompts = body.n or 1, _prompt_count(body)
        if n > limits.n:
            raise _beyond("n", n, limits.n)
        if n * prompts > limits.n:
            raise RefusedError(
                f"prompt: {prompts} prompts with n = {n} are {n * prompts} answers, more than {limits.n}, this "
                "server's limit for one request; send fewer at once.",
                param="prompt",
            )
        samples = options.best_of
        if options.robust:
            samples *= 1 + _robust(options).neighbors
        if samples > 1:
            if samples > limits.best_of:
                raise _beyond("dpa_options", samples, limits.best_of, "answers sampled for one")
            if steering.direction is None or steering.source == "default":
                raise RefusedError("dpa_options: a selection needs a direction to choose by; state one.", param="dpa")
            if self._engines.scorer is None:
                raise RefusedError("dpa_options: no scorer is loaded; start the gateway with --reward FOLDER.")
            if (body.n or 1) > 1:
                raise RefusedError("n: a selection returns one answer; leave n out.", param="n")
        if options.base and body.stream:
            raise RefusedError("dpa_options.base: not in a stream; ask MODEL@base in a second request.")
        sent = steering.body
        if not chat and (steering.direction is not None or samples > 1 or options.base):
            prompt = sent.pop("prompt")
            text = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
            if not isinstance(text, str):
                raise RefusedError("prompt: with a direction it must be one text; send the others by themselves.")
            sent["messages"] = [{"role": "user", "content": text}]
        if steering.base and self._engines.base is not None:
            sent["model"] = self._engines.base_model
        else:
            sent["model"] = settings.upstream_model
        if getattr(body, "max_completion_tokens", None) is None and body.max_tokens is None:
            sent["max_tokens"] = limits.max_tokens
        if body.seed is None and options.base:
            sent["seed"] = secrets.randbits(48)
        for field in ("seed", "n", "stop", "stream_options", "best_of", "messages"):  # null: nothing is meant by it
            if sent.get(field, 0) is None:
                del sent[field]
        if not chat and "messages" not in sent:
            messages_to = COMPLETIONS
        else:
            if not sent["messages"]:
                raise RefusedError("messages: nothing but a direction is in them; ask something.", param="messages")
            messages_to = CHAT
        return Asked(chat, body, options, steering, messages_to)

    async def _plain(self, asked: Asked) -> dict[str, Any]:
        """One answer (or n), beside it the base model's where that was asked."""
        sent = {**asked.steering.body, "stream": False}
        if not asked.options.base:
            answer = await self._upstream(asked).post(asked.to, sent)
            return await self._echoed(asked, answer)
        async with asyncio.TaskGroup() as tasks:
            steered = tasks.create_task(_one_error(self._upstream(asked).post(asked.to, sent)))
            plain = tasks.create_task(_one_error(self._base_answer(sent)))
        return await self._echoed(asked, _result(steered), _result(plain))

    async def _base_answer(self, sent: dict[str, Any]) -> dict[str, Any]:
        """The answer to the same question and seed, with no preference stated."""
        kwargs = {name: value for name, value in sent.get("chat_template_kwargs", {}).items() if name != "preference"}
        body = {name: value for name, value in sent.items() if name != "chat_template_kwargs"}
        if kwargs:
            body["chat_template_kwargs"] = kwargs
        if self._engines.base is None:
            return await self._engines.policy.post(CHAT, body)
        return await self._engines.base.post(CHAT, {**body, "model": self._engines.base_model})

    async def _selected(self, asked: Asked) -> dict[str, Any]:
        """The answer the asked direction values most, of several under it or (robust) under its neighbours too."""
        direction = asked.steering.direction
        assert direction is not None
        directions = [direction]
        if asked.options.robust:
            robust = _robust(asked.options)
            directions += neighbourhood(self._settings.space, direction, robust.angle, robust.neighbors)
        seed = asked.body.seed if asked.body.seed is not None else secrets.randbits(48)
        together = {TOGETHER: secrets.token_hex(8)} if self._engines.ours else {}
        asked_base = None
        bodies: list[dict[str, Any]] = []
        for under in directions:
            for _ in range(asked.options.best_of):
                kwargs = {**asked.steering.body.get("chat_template_kwargs", {}), "preference": under.as_mapping()}
                # OpenAI's seeds are 64-bit and signed.
                bodies.append(
                    {
                        **asked.steering.body,
                        **together,
                        "chat_template_kwargs": kwargs,
                        "seed": nth_seed(seed, len(bodies)) % 2**63 if bodies else seed,
                        "stream": False,
                    }
                )
        async with asyncio.TaskGroup() as tasks:
            upstream = self._engines.policy
            answers = [tasks.create_task(_one_error(upstream.post(CHAT, body))) for body in bodies]
            if asked.options.base:
                asked_base = tasks.create_task(_one_error(self._base_answer({**bodies[0], "seed": seed})))
        candidates = [_result(answer) for answer in answers]
        texts = [_texts(candidate)[0] for candidate in candidates]
        scores_NK = await self._scores(asked, texts)
        utility_N = scores_NK @ np.array(direction.weights)
        if not np.isfinite(utility_N).any():
            raise UpstreamError("scorer: it could score none of the answers; ask again.", 502)
        best = int(np.nanargmax(utility_N))
        chosen = candidates[best]
        usage = [candidate.get("usage") or {} for candidate in candidates]
        chosen["usage"] = {
            **usage[best],
            **{
                name: sum(one.get(name) or 0 for one in usage)
                for name in ("prompt_tokens", "completion_tokens", "total_tokens")
            },
        }
        answer = await self._echoed(asked, chosen, _result(asked_base) if asked_base else None, scores_NK[best])
        answer["dpa"]["candidates"] = [
            {
                "direction": body_direction,
                "scores": _named(self._settings.space.names, row_K),
                "utility": None if not np.isfinite(utility) else float(utility),
                "chosen": n == best,
            }
            for n, (body_direction, row_K, utility) in enumerate(
                zip(
                    [str(under) for under in directions for _ in range(asked.options.best_of)],
                    scores_NK,
                    utility_N,
                    strict=True,
                )
            )
        ]
        return answer

    async def _echoed(
        self,
        asked: Asked,
        answer: dict[str, Any],
        base: dict[str, Any] | None = None,
        scores_K: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """The client's answer: its shape, its model's name, and what was done."""
        said = _texts(answer)
        plain = _texts(base)[:1] if base is not None else []
        names = self._settings.space.names
        rows: list[dict[str, float] | None] = [None] * (len(said) + len(plain))
        if scores_K is not None:  # a selection has scored its answer
            rows[0] = _named(names, scores_K)
            if plain and asked.options.scores:
                rows[1:] = await self._named_scores(asked, plain)
        elif self._wants_scores(asked):
            rows = await self._named_scores(asked, [*said, *plain])
        dpa: dict[str, Any] = {
            **_echo(asked.steering),
            "scores": rows[0] if rows else None,
            "words": len(said[0].split()) if said else 0,
        }
        if len(said) > 1:
            dpa["choices"] = [
                {"scores": row, "words": len(text.split())} for row, text in zip(rows, said, strict=False)
            ]
        if base is not None:
            content = plain[0] if plain else ""
            dpa["base"] = {"content": content, "scores": rows[-1] if plain else None, "words": len(content.split())}
        if not asked.chat and asked.to == CHAT:
            answer = _as_completion(answer)
        return {**answer, "model": asked.body.model or self._settings.name, "dpa": dpa}

    # --- streams -----------------------------------------------------------------------------------------------

    async def _events(
        self, chunks: AsyncGenerator[dict[str, Any], None], request: Request
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events; whatever goes wrong in the middle is an error event, and `[DONE]` always ends them."""
        limit = self._settings.limits.seconds
        begun, first = time.monotonic(), True
        facts = request.scope["dpa"]
        try:
            async with aclosing(chunks):
                # Around each chunk: a limit around the yields would end the client's part of the work, not ours.
                while (chunk := await _next_before(begun + limit, chunks)) is not None:
                    if first:
                        self.metrics.first_token.observe(time.monotonic() - begun)
                        first = False
                    if chunk.get("usage"):
                        self._count(chunk["usage"])
                        facts["tokens"] = chunk["usage"].get("completion_tokens")
                    yield event(chunk)
        except TimeoutError:
            error = _too_slow(limit)
            yield event(error_body(str(error), error.status))
            facts["broken"] = error.status
        except RefusedError as error:
            yield event(error_body(str(error), error.status, error.param, error.code))
            facts["broken"] = error.status
        yield DONE

    async def _plain_stream(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks as they come. The first says what was done, the last how it came out."""
        echo = _echo(asked.steering)
        said: dict[int, list[str]] = {}
        first = True
        held: dict[str, Any] | None = None
        async with aclosing(self._upstream(asked).stream(asked.to, {**asked.steering.body, "stream": True})) as chunks:
            async for chunk in chunks:
                chunk["model"] = asked.body.model or self._settings.name
                ending = not chunk.get("choices")
                for choice in chunk.get("choices") or ():
                    text = choice.get("text") or (choice.get("delta") or {}).get("content")
                    if text:
                        said.setdefault(choice.get("index", 0), []).append(text)
                    ending = ending or choice.get("finish_reason") is not None
                if not asked.chat and asked.to == CHAT:
                    chunk = _as_completion(chunk)
                if first:
                    chunk["dpa"] = echo
                    first = False
                if held is not None:
                    yield held
                    held = None
                if ending:  # it may be the last one, which tells more
                    held = chunk
                elif not (chunk["object"] == "text_completion" and _silent(chunk) and "dpa" not in chunk):
                    yield chunk
        texts = ["".join(said[index]) for index in sorted(said)]
        rows: list[dict[str, float] | None] = [None] * len(texts)
        if texts and self._wants_scores(asked):
            rows = await self._named_scores(asked, texts)
        last = {**echo, "scores": rows[0] if rows else None, "words": len(texts[0].split()) if texts else 0}
        if len(texts) > 1:
            last["choices"] = [
                {"scores": row, "words": len(text.split())} for row, text in zip(rows, texts, strict=True)
            ]
        if held is None:
            raise UpstreamError("upstream: its stream ended without an end; ask again.", 502)
        yield {**held, "dpa": last}

    async def _selected_stream(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        """A selection knows its answer only when all are in: it comes as a stream of few chunks."""
        answer = await self._selected(asked)
        dpa, usage = answer.pop("dpa"), answer.pop("usage", None)
        choices = answer.pop("choices")
        for choice in choices:
            message = choice.pop("message", None)
            choice.pop("logprobs", None)
            choice.update({"delta": message} if message is not None else {})
            reason, choice["finish_reason"] = choice.get("finish_reason"), None
        head = {**answer, "object": "chat.completion.chunk" if asked.chat else "text_completion"}
        yield {**head, "choices": choices, "dpa": _echo(asked.steering)}
        ends = [
            {
                "index": choice.get("index", 0),
                **({"delta": {}} if asked.chat else {"text": ""}),
                "finish_reason": reason,
            }
            for choice in choices
        ]
        last = {**head, "choices": ends, "dpa": dpa}
        if usage and (asked.body.stream_options or {}).get("include_usage"):
            yield {**head, "choices": ends}
            last = {**head, "choices": [], "usage": usage, "dpa": dpa}
        yield last

    # --- inside ------------------------------------------------------------------------------------------------

    def _upstream(self, asked: Asked) -> Upstream:
        return self._engines.base if asked.steering.base and self._engines.base is not None else self._engines.policy

    def _wants_scores(self, asked: Asked) -> bool:
        return asked.options.scores and self._engines.scorer is not None and asked.to == CHAT

    async def _scores(self, asked: Asked, texts: list[str]) -> np.ndarray:
        """scores_NK of the objectives; NaN where the scorer could not score."""
        assert self._engines.scorer is not None
        messages = [
            {"role": message["role"], "content": _plain_text(message.get("content"))}
            for message in asked.steering.body["messages"]
            if message.get("role") in ("system", "developer", "user", "assistant")
        ]
        said = await self._engines.scorer.post("/dpa/score", {"messages": messages, "responses": texts})
        scores_NM = np.array(
            [[np.nan if value is None else value for value in row] for row in said["scores"]], dtype=np.float64
        )
        return self._settings.space.combine(scores_NM, said["attributes"])

    async def _named_scores(self, asked: Asked, texts: list[str]) -> list[dict[str, float] | None]:
        return [_named(self._settings.space.names, row_K) for row_K in await self._scores(asked, texts)]

    async def _body(self, request: Request) -> dict[str, Any]:
        limits = self._settings.limits
        try:
            async with asyncio.timeout(limits.body_seconds):
                declared = request.headers.get("content-length")
                return await read_body(request.stream(), declared, limits.body_bytes)
        except TimeoutError:
            late = f"body: it did not arrive within {limits.body_seconds:g} seconds; send it at once."
            raise RefusedError(late, 408) from None

    def _count(self, usage: dict[str, Any]) -> None:
        for kind in ("prompt", "completion"):
            count = usage.get(f"{kind}_tokens")
            if isinstance(count, int):
                self.metrics.tokens.labels(kind).inc(count)


class _Page:
    """One file of the page."""

    def __init__(self, data: bytes, kind: str) -> None:
        self._data, self._kind = data, kind

    async def __call__(self) -> Response:
        return Response(self._data, media_type=self._kind, headers=_PAGE_HEADERS)


def _page_files() -> dict[str, tuple[bytes, str]]:
    folder = resources.files("dpa.serve") / "page"
    if not folder.is_dir():
        return {}
    found = {}
    for file in folder.iterdir():
        kind = _PAGE_TYPES.get(f".{file.name.rpartition('.')[2]}")
        if kind:
            found[file.name] = file.read_bytes(), kind
    return found


def _direction_json(direction: Direction) -> dict[str, Any]:
    return {"weights": direction.as_mapping(), "text": str(direction)}


def _echo(steering: Steering) -> dict[str, Any]:
    direction = steering.direction
    return {
        "direction": None if direction is None else str(direction),
        "weights": None if direction is None else direction.as_mapping(),
        "source": steering.source,
        "ignored": [asdict(one) for one in steering.ignored],
        "clamped": steering.clamped,
    }


def _prompt_count(body: Sampling) -> int:
    """How many texts are to be continued."""
    prompt = body.prompt if isinstance(body, CompletionBody) else ""
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def _robust(options: Options) -> Robust:
    return options.robust if isinstance(options.robust, Robust) else Robust()


def _named(names: tuple[str, ...], row_K: np.ndarray) -> dict[str, float] | None:
    return dict(zip(names, map(float, row_K), strict=True)) if np.isfinite(row_K).all() else None


def _texts(answer: dict[str, Any]) -> list[str]:
    """What the choices say, in order."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UpstreamError("upstream: its answer has no choices; is it an OpenAI-compatible server?", 502)
    return [choice.get("text") or (choice.get("message") or {}).get("content") or "" for choice in choices]


def _plain_text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""


def _as_completion(answer: dict[str, Any]) -> dict[str, Any]:
    """A chat answer, or a chunk of one, in the shape of completions."""
    choices = []
    for choice in answer.get("choices") or ():
        text = (choice.get("message") or choice.get("delta") or {}).get("content") or ""
        rest = {name: value for name, value in choice.items() if name not in ("message", "delta")}
        choices.append({**rest, "text": text})
    return {**answer, "object": "text_completion", "choices": choices}


def _silent(chunk: dict[str, Any]) -> bool:
    return all(not choice.get("text") for choice in chunk.get("choices") or ())


async def _next_before(deadline: float, chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any] | None:
    """The next chunk, None at the end. Raises TimeoutError at the deadline, a time of `time.monotonic`."""
    async with asyncio.timeout(deadline - time.monotonic()):
        return await anext(chunks, None)


async def _one_error(work: Any) -> Any:
    """The result, or the refusal as a value: a TaskGroup would wrap it."""
    try:
        return await work
    except RefusedError as error:
        return error


def _result(task: "asyncio.Task[Any]") -> dict[str, Any]:
    result = task.result()
    if isinstance(result, RefusedError):
        raise result
    return result


def _beyond(field: str, value: int, limit: int, what: str = "this server's limit for one") -> RefusedError:
    return RefusedError(f"{field}: {value} is more than {limit}, {what} request; ask for less.", param=field)


def _too_slow(limit: float) -> UpstreamError:
    return UpstreamError(f"server: the answer took longer than {limit:g} seconds; ask for less.", 504)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return refusal(error)


async def _bad_direction(request: Request, error: Exception) -> Response:
    return Json(error_body(str(error), 400, "dpa", "invalid_direction"), 400)


async def _unknown_model(request: Request, error: Exception) -> Response:
    return Json(error_body(str(error), 404, "model", "model_not_found"), 404)


async def _bad_request(request: Request, error: Exception) -> Response:
    return Json(error_body("request: it cannot be read; see /openapi.json.", 422), 422)


_STATUSES = {
    400: "The request cannot be used; the message names the field",
    401: "The key is missing or wrong",
    403: "Another site's page may not use this gateway",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "Too many requests in flight; Retry-After says when to ask again",
    502: "The engine failed",
    503: "The engine is starting, or the gateway is shutting down",
    504: "The engine took too long",
}
_MODEL_PARAMETER = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
_ERROR_CONTENT = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["error"],
            "properties": {
                "error": {
                    "type": "object",
                    "required": ["message", "type", "param", "code"],
                    "properties": {
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                        "param": {"type": ["string", "null"]},
                        "code": {"type": ["string", "null"]},
                    },
                }
            },
        }
    }
}


def _request_schema(kind: type[DirectionBody] | type[ChatBody] | type[CompletionBody]) -> dict[str, Any]:
    """The body's description for OpenAPI; it is read by `read_body`, which bounds it first."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    inlined = _inline(schema, definitions)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined}}}}


def _inline(value: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_inline(item, definitions) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _inline(definitions[value["$ref"].rpartition("/")[2]], definitions)
    return {name: _inline(item, definitions) for name, item in value.items()}
