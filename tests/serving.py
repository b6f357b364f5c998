"""What the server's tests stand on: a scripted upstream, a gateway in a thread, and `dpa serve` as a real process.
Used by: pytest tests/test_gateway.py tests/test_serve.py
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from forks import fork_of, interpreter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dpa.core.directions import DirectionSpace
from dpa.core.objective import Objective
from dpa.serve.connections import bounded
from dpa.serve.gateway import Gateway
from dpa.serve.http import Server
from dpa.serve.settings import Limits, Served
from dpa.serve.upstream import Engines, Upstream

SOURCE = Path(__file__).parents[1] / "src"
CHAT = "/v1/chat/completions"
SPACE = DirectionSpace(
    objectives=(Objective("helpfulness", {"good": 1.0}), Objective("verbosity", {"long": 1.0})),
    presets={"terse": "-30deg", "wordy": "30deg"},
)
QUESTION = [{"role": "user", "content": "Why?"}]


class FakeUpstream:
    """An OpenAI-compatible server that keeps what it was asked and answers as it is told.

    An answer says which direction it was asked with, and has seed modulo 7 more words. `mode`: "answer", "slow" (until
    `release` is set), "stall" (a stream goes silent), "mute" (it never speaks), "die" (it breaks off),
    "garbage" (no JSON), "flat" (400, SGLang's way), "second speaks" (of two choices of a stream), a number (a status).
    It scores too, unless "scores nothing": "good" is 50, "long" the number of the response's words.
    """

    def __init__(self) -> None:
        self.mode: str | int = "answer"
        self.asked: list[dict[str, Any]] = []
        self.cancelled = 0
        self.running = 0
        self.release = threading.Event()
        routes = [
            Route("/v1/models", self._models),
            Route(CHAT, self._answer, methods=["POST"]),
            Route("/v1/completions", self._answer, methods=["POST"]),
            Route("/dpa/score", self._score, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "upstream-model"}]})

    async def _score(self, request: Request) -> Response:
        body = await request.json()
        while self.mode == "scores nothing" and not await request.is_disconnected():
            await asyncio.sleep(0.01)
        scores = [[50.0, float(len(text.split()))] for text in body["responses"]]
        return JSONResponse({"attributes": ["good", "long"], "scores": scores})

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        if isinstance(self.mode, int):
            return JSONResponse({"error": {"message": "no luck", "type": "x"}}, self.mode, {"Retry-After": "7"})
        if self.mode == "flat":
            return JSONResponse({"object": "error", "message": "no luck", "code": 400}, 400)
        if "stream_options" in body and not body.get("stream"):  # OpenAI and vLLM do so
            return JSONResponse({"error": {"message": "stream_options: only with stream", "type": "x"}}, 400)
        if self.mode == "garbage":
            return Response("<html>", media_type="text/html")
        chat = request.url.path == CHAT
        preference = body.get("chat_template_kwargs", {}).get("preference", {})
        words = f"told {json.dumps(preference)} " + "word " * ((body.get("seed") or 0) % 7)
        if body.get("stream"):
            return StreamingResponse(self._stream(words, chat), media_type="text/event-stream")
        self.running += 1
        try:
            while self.mode == "slow" and not self.release.is_set():
                await asyncio.sleep(0.01)
                if await request.is_disconnected():
                    self.cancelled += 1
                    break
        finally:
            self.running -= 1
        said = {"message": {"role": "assistant", "content": words}} if chat else {"text": words}
        choices = [{"index": n, **said, "finish_reason": "stop"} for n in range(body.get("n") or 1)]
        usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        return JSONResponse({"id": "x", "object": "o", "model": "upstream-model", "choices": choices, "usage": usage})

    async def _stream(self, words: str, chat: bool) -> AsyncIterator[bytes]:
        self.running += 1
        try:
            yield b": a comment, as our engine writes while a stream waits its turn\n\n"
            if self.mode == "second speaks":
                words = ""
                choices = [
                    {"index": 1, "delta": {"content": text}, "finish_reason": None} for text in ("two ", "words")
                ]
                for choice in choices:
                    yield _event({"id": "x", "object": "o", "choices": [choice]})
            for number, word in enumerate(words.split()):
                if (self.mode, number) in (("stall", 1), ("mute", 0)):
                    await asyncio.sleep(3600)
                if self.mode == "die" and number == 1:
                    raise RuntimeError("the engine is gone")
                while self.mode == "slow" and number == 1 and not self.release.is_set():
                    await asyncio.sleep(0.01)
                delta = {"delta": {"content": word + " "}} if chat else {"text": word + " "}
                yield _event({"id": "x", "object": "o", "choices": [{"index": 0, **delta, "finish_reason": None}]})
            end = {"delta": {}} if chat else {"text": ""}
            yield _event({"id": "x", "object": "o", "choices": [{"index": 0, **end, "finish_reason": "stop"}]})
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\r\n\r\n"


@contextmanager
def in_thread(app: Any, limits: Limits | None = None) -> Iterator[str]:
    """Serve an ASGI application on a free port of this machine, its connections within `limits`; yields its URL."""
    how: dict[str, Any] = {} if limits is None else {"http": bounded(limits), "h11_max_incomplete_event_size": 64_000}
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1, **how)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        up = threading.Event()
        server = Server(config, up.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert up.wait(60)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(5)


@contextmanager
def gateway_before(upstream_url: str, settings: Served | None = None, scorer: bool = False) -> Iterator[str]:
    """A gateway in front of an upstream, both in this process; yields the gateway's URL."""
    settings = settings or settings_with()
    stall_s = settings.limits.stall_seconds
    engines = Engines(policy=Upstream(upstream_url, stall_s=stall_s), scorer=Upstream(upstream_url) if scorer else None)
    with in_thread(Gateway(settings, engines).gate, settings.limits) as url:
        yield url


def settings_with(**changes: Any) -> Served:
    """Settings of a model called demo."""
    return Served(**{"name": "demo", "upstream_model": "upstream-model", "space": SPACE, **changes})


def events_of(response: httpx.Response) -> list[Any]:
    """The data of each server-sent event, `[DONE]` as text."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


class ServeProcess:
    """`dpa serve` with these arguments on a free port. `wait` until it says that it serves; `stop` sends a signal."""

    def __init__(self, *arguments: object, env: dict[str, str] | None = None, log: Path | None = None) -> None:
        self.log = log
        self._stderr = log.open("wb") if log is not None else subprocess.PIPE
        self.process = subprocess.Popen(
            [interpreter(), "-m", "dpa", "serve", *map(str, arguments), "--port", "0"],
            env={**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self.url = ""

    def wait(self) -> "ServeProcess":
        """Until it is ready; its URL is then known."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if " at " not in line:
            raise AssertionError(f"dpa serve ended: {self.process.wait(10)}")
        self.url = line.rpartition(" at ")[2].strip()
        return self

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        """Send the signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout)
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self._stderr is not subprocess.PIPE:
            self._stderr.close()
        return code


def children_of(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(fork_of(pid))], capture_output=True, text=True).stdout
    return [int(line) for line in found.split()]


def at_best_within(seconds: float, tries: int, seconds_of: Callable[[], float]) -> bool:
    """Whether a measurement keeps a limit in one of so many tries: on a machine that others use too, not in all."""
    return any(seconds_of() < seconds for _ in range(tries))
