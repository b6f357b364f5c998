"""A gateway without a model: the same interface as dpa.serve, canned answers whose length follows the direction.
The page's tests drive it in a real browser; `bodies` are the requests it was sent. Used by: pytest tests/test_page.py
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from dpa.core.directions import DirectionSpace
from dpa.core.errors import DirectionError
from dpa.core.targets import read_wish
from dpa.serve.gateway import PAGE_HEADERS
from dpa.serve.shapes import direction_json

PAGE = Path(__file__).parents[1] / "src" / "dpa" / "serve" / "page"

MARKUP = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script> & <b>bold</b>"


class FakeGateway:
    """Interface of the gateway over a space. A question's text chooses what happens:

    "busy" 429 (once), "broken" 500, "dies" an error event after three words, "cut" the stream just ends,
    "slow" a word every 50 ms for ever, "markup" an answer of HTML, "long" 2,000 words within two seconds, "twice" no
    word after its first two answers, "שלום" Hebrew; any other: 20 words and the leaning's worth more or fewer.
    """

    def __init__(self, space: DirectionSpace, key: str | None = None, **extra: Any) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.stopped = threading.Event()
        """Set when a slow answer was cancelled by its reader."""
        self._space, self._key, self._extra, self._was_busy = space, key, extra, set[str]()
        self.app = FastAPI(openapi_url=None)
        self.app.get("/")(lambda: self._file("index.html"))
        self.app.get("/{name}.{kind}")(lambda name, kind: self._file(f"{name}.{kind}"))
        self.app.get("/v1/dpa/space")(self._about)
        self.app.post("/v1/dpa/direction")(self._read)
        self.app.post("/v1/chat/completions")(self._chat)
        self.app.middleware("http")(self._guard)

    def front(self) -> list[dict[str, Any]]:
        """A made-up measurement: verbosity follows the direction, the first objective falls off at both ends."""
        points = []
        for weights_K in self._space.grid(9):
            objectives = {
                name: {"value": 50 + 40 * weight, "low": 49 + 40 * weight, "high": 51 + 40 * weight}
                for name, weight in zip(self._space.names, weights_K, strict=True)
            }
            direction = self._space.direction(weights_K)
            words = 20 + 20 * weights_K[1]
            points.append(
                {
                    "weights": direction.as_mapping(),
                    "text": str(direction),
                    "objectives": objectives,
                    "words": float(words),
                }
            )
        return points

    async def _guard(self, request: Request, call: Any) -> Response:
        needs_key = request.url.path.startswith("/v1") and self._key
        if needs_key and request.headers.get("authorization") != f"Bearer {self._key}":
            return _error(401, "api key: it is missing or wrong; send it as Authorization: Bearer KEY.")
        return await call(request)

    def _file(self, name: str) -> Response:
        known = {file.name: file for file in PAGE.iterdir()}
        if name not in known:
            return _error(404, f"{name} is not here.")
        return FileResponse(known[name], headers={**PAGE_HEADERS, "Cache-Control": "no-store"})

    async def _about(self) -> Any:
        space = self._space
        return {
            "model": "fake",
            "objectives": [{"name": o.name, "description": o.description} for o in space.objectives],
            "center": dict(zip(space.names, space.center_K.tolist(), strict=True)),
            "max_angle": space.max_angle,
            "template": space.template,
            "targets": space.target_template is not None,
            "target_step": space.target_step,
            "presets": {
                name: {"weights": space.parse(name).as_mapping(), "text": str(space.parse(name))}
                for name in space.presets
            },
            "default": direction_json(space.direction(space.center)),
            "front": self.front(),
            "front_reward": "gold",
            "scorer": True,
            "base": False,
            "limits": {"max_tokens": 512, "n": 8, "best_of": 16, "body_bytes": 1_000_000},
            **self._extra,
        }

    async def _read(self, request: Request) -> Any:
        asked = await request.json()
        try:
            direction = read_wish(self._space, asked["direction"], asked.get("outside", "error"))
        except DirectionError as error:
            return _error(400, str(error))
        return {**direction_json(direction), "angle": 0.0, "clamped": False}

    async def _chat(self, request: Request) -> Any:
        body = await request.json()
        self.bodies.append(body)
        preference = body.get("chat_template_kwargs", {}).get("preference", body.get("dpa"))
        direction = read_wish(self._space, preference) if preference is not None else None
        question = body["messages"][-1]["content"]
        match question:
            case "busy" if str(preference) not in self._was_busy:
                self._was_busy.add(str(preference))
                return _error(429, "queue: it is full; ask again in 3 s.", {"Retry-After": "3"})
            case "broken":
                return _error(500, "engine: it failed; look at its log.")
        leaning = direction.weights[1] if direction else 0.0
        words = [f"word{n}" for n in range(round(20 + 20 * leaning))]
        if question == "markup":
            words = [MARKUP]
        if question == "שלום":
            words = ["שלום", "עולם"]
        if question == "long":
            words = [f"{'word' if n % 9 else 'longerword'}{n}{'.' if n % 12 == 11 else ''}" for n in range(2000)]
        about = {
            "direction": str(direction) if direction else None,
            "weights": direction.as_mapping() if direction else None,
            "source": "body" if direction else "none",
            "ignored": [],
            "clamped": False,
        }
        scores = {name: 30.0 + 5 * k + len(words) for k, name in enumerate(self._space.names)}
        final = {**about, "scores": scores, "words": len(words)}
        if not body.get("stream"):
            message = {"role": "assistant", "content": " ".join(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return {
                "id": "c",
                "object": "chat.completion",
                "created": 0,
                "model": "fake",
                "choices": [choice],
                "dpa": final,
            }
        return StreamingResponse(self._stream(question, words, about, final), media_type="text/event-stream")

    async def _stream(self, question: str, words: list[str], about: dict, final: dict) -> AsyncIterator[str]:
        def event(delta: dict, finish: str | None = None, **more: Any) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "fake", "choices": [choice]}
            return f"data: {json.dumps({**chunk, **more})}\n\n"

        yield event({"role": "assistant", "content": ""}, dpa=about)
        try:
            if question == "twice" and len(self.bodies) > 2:
                await asyncio.sleep(60)
            for place, word in enumerate(words if question != "slow" else words * 10_000):
                yield event({"content": word if place == 0 else f" {word}"})
                if question == "long" and place % 8:
                    continue
                await asyncio.sleep(0.05 if question == "slow" else 0.002)
                if place == 2 and question == "dies":
                    yield f"data: {json.dumps({'error': {'message': 'engine: it died; ask again.', 'type': 'x'}})}\n\n"
                    yield "data: [DONE]\n\n"
                    return
                if place == 2 and question == "cut":
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.stopped.set()
            raise
        yield event({}, "stop")
        yield event({}, None, dpa=final)
        yield "data: [DONE]\n\n"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status, headers=headers)
