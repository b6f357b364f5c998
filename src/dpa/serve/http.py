"""What the gateway and its engine share of HTTP: errors, event streams, and noticing that a client has gone.
Run its tests: pytest tests/test_gateway.py
"""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dpa.serve.bodies import RefusedError, error_body, to_json

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client hung up before it was answered."""


class Json(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Compact UTF-8."""
        return to_json(content)


def refusal(error: RefusedError) -> Json:
    """The answer to a request that is refused. A body that is not read to its end must not be sent on for ever: then
    the connection is closed."""
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    if error.status in (408, 413):
        headers["Connection"] = "close"
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="dpa", charset="UTF-8"'  # a browser asks its user for the key
    return Json(error_body(str(error), error.status, error.param, error.code), error.status, headers)


async def refused(request: Request, error: Exception) -> Response:
    """`refusal` as a handler."""
    assert isinstance(error, RefusedError)
    return refusal(error)


async def http_error(request: Request, error: Exception) -> Json:
    """The answer where there is no such path, or where it does not take this method."""
    assert isinstance(error, HTTPException)
    words = {404: "path: there is nothing here", 405: "method: this path does not take it"}
    message = words.get(error.status_code, str(error.detail))
    return Json(error_body(f"{message}; see /openapi.json.", error.status_code), error.status_code, error.headers)


async def failed(request: Request, error: Exception) -> Json:
    """The answer to a request over which our own code failed."""
    return Json(error_body("server: it failed; its log says where.", 500), 500)


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


async def or_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """Await the work, unless the client hangs up first: then it is cancelled and ClientGoneError raised.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.wait({task, watch})


class EventStream(Response):
    """Server-sent events, after `first` if that was taken already. When the client hangs up, before the first of them
    too, the generator is closed at once.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str], first: bytes = b"") -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._events, self._first = events, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send each event as it comes."""
        try:
            await or_gone(receive, self._send(send))
        except (ClientGoneError, OSError):
            scope.setdefault("dpa", {})["gone"] = True
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if self._first:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Server(uvicorn.Server):
    """uvicorn that calls `started_up` once it listens, and leaves with exit code 0 when it was asked to stop.

    The first SIGTERM or SIGINT closes the socket and lets what was accepted finish; the second ends at once.
    """

    def __init__(self, config: uvicorn.Config, started_up: Callable[[], None] = lambda: None) -> None:
        super().__init__(config)
        self._started_up = started_up

    async def startup(self, sockets: Any = None) -> None:
        """Listen."""
        await super().startup(sockets=sockets)
        if self.started:
            self._started_up()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again at the end, which would end the process by it."""
        if threading.current_thread() is not threading.main_thread():  # signals are for the main thread
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _asked_to_stop(self, number: int) -> None:
        if self.should_exit:
            os._exit(128 + number)  # children see the end of their pipe and leave
        self.should_exit = True


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
