"""The gateway's routes: OpenAI's, our own, the page. A request walks down once.
Run its tests: pytest tests/test_gateway.py

    gate -> route -> understanding (with steering) -> answering (with selection) -> upstream -> shapes -> client
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import generate_latest
from starlette.responses import Response

from dpa.core.targets import angle_to_center
from dpa.serve.answering import Answering
from dpa.serve.bodies import ChatBody, CompletionBody, DirectionBody, RefusedError, check_body, error_body, read_body
from dpa.serve.gate import Gate, Metrics
from dpa.serve.http import DONE, EventStream, Json, event, or_gone
from dpa.serve.logs import places
from dpa.serve.settings import Served
from dpa.serve.shapes import ERRORS, HANDLERS, direction_json, request_schema, said_in, texts_of, too_slow
from dpa.serve.steering import HEADER, read_direction, read_model
from dpa.serve.understanding import CHAT, COMPLETIONS, Asked, understand
from dpa.serve.upstream import Engines

_MODEL_PARAMETER = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
_PAGE_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""What the page may load and where it may be shown: nothing from elsewhere, and nowhere else."""


class Gateway:
    """`is_ready` says whether the engines are up. `app` is the FastAPI application, `gate` the ASGI entrance to it."""

    def __init__(self, served: Served, engines: Engines, is_ready: Callable[[], bool] = lambda: True) -> None:
        self.metrics = Metrics()
        self._served, self._engines, self._is_ready = served, engines, is_ready
        self._answering = Answering(served, engines)
        self._created = int(time.time())
        self.app = self._build()
        routes = [path for route in self.app.routes if (path := getattr(route, "path", None))]
        self.gate = Gate(self.app, served, self.metrics, routes)

    # --- routes ------------------------------------------------------------------------------------------------

    def _build(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            await self._engines.aclose()

        app = FastAPI(
            title="dpa gateway",
            summary="OpenAI's API with a direction in every request.",
            version="1",
            docs_url=None,  # its pages load scripts from elsewhere
            redoc_url=None,
            lifespan=lifespan,
            redirect_slashes=False,
        )
        app.add_api_route("/health", self._health, response_model=None)
        app.add_api_route("/metrics", self._metrics_text, response_model=None)
        app.add_api_route("/v1/models", self._models, response_model=None)
        app.add_api_route(
            "/v1/models/{model:path}",
            self._model,
            response_model=None,
            responses={404: ERRORS[404]},
            openapi_extra={"parameters": [_MODEL_PARAMETER]},
        )
        app.add_api_route("/v1/dpa/space", self._space, response_model=None)
        for path, endpoint, kind in (
            ("/v1/dpa/direction", self._direction, DirectionBody),
            (CHAT, self._chat, ChatBody),
            (COMPLETIONS, self._completions, CompletionBody),
        ):
            said: dict[str, Any] = {"openapi_extra": request_schema(kind), "responses": ERRORS}
            app.add_api_route(path, endpoint, methods=["POST"], response_model=None, **said)
        for file in (resources.files("dpa.serve") / "page").iterdir():
            if kind_of_file := _PAGE_TYPES.get(Path(file.name).suffix):
                for path in (f"/{file.name}", *(["/"] if file.name == "index.html" else [])):
                    page = _page(file.read_bytes(), kind_of_file)
                    app.add_api_route(path, page, response_model=None, include_in_schema=False)
        for error, handler in HANDLERS.items():
            app.add_exception_handler(error, handler)
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
        served = self._served
        names = [served.name, *(f"{served.name}:{preset}" for preset in served.space.presets)]
        about = {"object": "model", "created": self._created, "owned_by": "dpa"}
        return Json({"object": "list", "data": [{"id": name, **about} for name in names]})

    async def _model(self, request: Request) -> Response:
        """Any name that a request may give as `model`."""
        name = request.path_params["model"]
        read_model(name, self._served.name, self._served.space)
        return Json({"id": name, "object": "model", "created": self._created, "owned_by": "dpa"})

    async def _space(self) -> Response:
        served, space, limits = self._served, self._served.space, self._served.limits
        presets = {name: direction_json(space.parse(name)) for name in space.presets}
        return Json(
            {
                "model": served.name,
                "objectives": [{"name": o.name, "description": o.description} for o in space.objectives],
                "center": dict(zip(space.names, map(float, space.center_K), strict=True)),
                "max_angle": space.max_angle,
                "template": space.template,
                "placement": space.placement,
                "zero_padded": space.zero_padded,
                "targets": space.target_template is not None,
                "target_step": space.target_step,
                "presets": presets,
                "default": direction_json(served.default) if served.default else None,
                "front": served.front,
                "front_reward": served.front_reward,
                "front_follows": served.front_follows,
                "examples": list(served.examples),
                "parameters": served.parameters,
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
        space = self._served.space
        direction, clamped = read_direction(asked.direction, space, asked.outside, "direction")
        assert direction is not None
        return Json({**direction_json(direction), "angle": angle_to_center(space, direction), "clamped": clamped})

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    # --- one request -------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, chat: bool) -> Response:
        stated = request.headers.getlist(HEADER)
        asked = understand(await self._body(request), stated, chat, self._served, self._engines)
        request.scope["dpa.enter"]()
        steering = asked.steering
        self.metrics.directions.labels(steering.source).inc()
        request.scope["dpa"].update(
            source=steering.source, direction=str(steering.direction) if steering.direction else None
        )
        if self._served.log_text:
            body = steering.body
            request.scope["dpa"]["asked"] = body["messages"] if "messages" in body else body["prompt"]
        headers = {"X-DPA-Direction": str(steering.direction or "none"), "X-DPA-Source": steering.source}
        if asked.body.stream:
            events = self._events(asked, request)
            # A refusal before the first chunk has its own status, as without a stream: clients ask again by it.
            return EventStream(events, headers, await or_gone(request.receive, anext(events)))
        limit = self._served.limits.seconds
        try:
            async with asyncio.timeout(limit):
                answer = await or_gone(request.receive, self._answering.answer(asked))
        except TimeoutError:
            raise too_slow(limit) from None
        usage = answer.get("usage") or {}
        self._count(usage)
        request.scope["dpa"]["tokens"] = usage.get("completion_tokens")
        if self._served.log_text:
            request.scope["dpa"]["said"] = texts_of(answer)
        return Json(answer, headers=headers)

    # --- streams -----------------------------------------------------------------------------------------------

    async def _events(self, asked: Asked, request: Request) -> AsyncGenerator[bytes, None]:
        """Server-sent events. Whatever goes wrong after the first is an error event, and `[DONE]` ends them; before it
        RefusedError is raised.
        """
        limit = self._served.limits.seconds
        begun, first = time.monotonic(), True
        facts = request.scope["dpa"]
        said: dict[int, list[str]] = {}
        usage: dict[str, Any] = {}
        try:
            async with aclosing(self._answering.stream(asked)) as chunks:
                # Around each chunk: a limit around the yields would end the client's part of the work, not ours.
                while (chunk := await _next_before(begun + limit, chunks)) is not None:
                    if first:
                        self.metrics.first_token.observe(time.monotonic() - begun)
                        first = False
                    for index, text in said_in(chunk) if self._served.log_text else ():
                        said.setdefault(index, []).append(text)
                    usage = chunk.get("usage") or usage  # some servers count in every chunk
                    if not asked.wants_usage:
                        chunk.pop("usage", None)
                    yield event(chunk)
        except (TimeoutError, RefusedError) as failure:
            error = failure if isinstance(failure, RefusedError) else too_slow(limit)
            if first:
                raise error from None
            facts["broken"] = error.status
            yield event(error_body(str(error), error.status, error.param, error.code))
        except Exception as failure:  # a mistake of ours: as in the gate, but the answer has begun
            if first:
                raise
            facts["failure"] = places(failure)
            yield event(error_body("server: it failed; its log has the request's id.", 500))
        finally:
            if usage:
                self._count(usage)
                facts["tokens"] = usage.get("completion_tokens")
            if said:
                facts["said"] = ["".join(said[index]) for index in sorted(said)]
        yield DONE

    async def _body(self, request: Request) -> dict[str, Any]:
        limits = self._served.limits
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


def _page(data: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(data, media_type=kind, headers=PAGE_HEADERS)

    return page


async def _next_before(deadline: float, chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any] | None:
    """The next chunk, None at the end. Raises TimeoutError at the deadline, a time of `time.monotonic`."""
    async with asyncio.timeout(deadline - time.monotonic()):
        return await anext(chunks, None)
