"""The gate every request passes: who may enter, how many at once, what is counted and what is logged.
Run its tests: pytest tests/test_gateway.py
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpa.serve.bodies import RefusedError
from dpa.serve.http import ClientGoneError, refusal
from dpa.serve.logs import places
from dpa.serve.settings import Served

OPEN_PATH = "/health"
"""The one path that needs no key."""

COUNTED = ("/v1/chat/completions", "/v1/completions")
"""The paths that hold an engine: these are limited, and timed as answers."""

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Prometheus metrics of one gateway; their labels come from fixed sets, so a client cannot make more of them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("dpa_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "dpa_request_seconds", "From first byte to last", ["route"], buckets=_BUCKETS, registry=self.registry
        )
        self.first_token = Histogram(
            "dpa_first_token_seconds", "To the first chunk of a stream", buckets=_BUCKETS, registry=self.registry
        )
        self.in_flight = Gauge("dpa_requests_in_flight", "Requests that hold the engine", registry=self.registry)
        self.gone = Counter("dpa_clients_gone", "Clients that hung up before the end", registry=self.registry)
        self.tokens = Counter("dpa_tokens", "Tokens, as the engine counts them", ["kind"], registry=self.registry)
        self.engine = Gauge("dpa_engine_answers", "Answers in the engine", ["state"], registry=self.registry)
        self.directions = Counter("dpa_directions", "Where directions came from", ["source"], registry=self.registry)


class Gate:
    """ASGI middleware around the application. `routes` are the paths that are labelled by their name in metrics.

    It answers 401 without a key (constant-time comparison, every path but /health), 403 to another site's page, 429
    at once beyond `limits.requests` in flight, 503 while draining, and 500 in OpenAI's shape where the code fails.
    A request is in flight once the application, which has read its body, calls `scope["dpa.enter"]`.
    """

    def __init__(self, app: ASGIApp, served: Served, metrics: Metrics, routes: Iterable[str]) -> None:
        self.draining = False
        self._app, self._served, self._metrics = app, served, metrics
        self._routes = frozenset(routes)
        self._digests = [hashlib.sha256(key.encode()).digest() for key in served.keys]
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        request_id = secrets.token_hex(8)
        facts: dict[str, Any] = {}
        scope["dpa"] = facts
        status = 0
        entered = False

        def enter() -> None:
            nonlocal entered
            self._check_room()
            entered = True
            self._in_flight += 1
            self._metrics.in_flight.set(self._in_flight)

        def leave() -> None:
            nonlocal entered
            if entered:
                entered = False
                self._in_flight -= 1
                self._metrics.in_flight.set(self._in_flight)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.body" and not message.get("more_body"):
                leave()  # before the client reads the end: it may ask again at once
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            try:
                async with asyncio.timeout(self._served.limits.stall_seconds):
                    await send(message)
            except TimeoutError:  # it reads nothing of its answer
                raise ClientGoneError from None

        scope["dpa.enter"] = enter
        try:
            self._admit(scope)
            await self._app(scope, receive, answer)
        except RefusedError as error:
            response = refusal(error)
            if _long_body(_headers(scope)):  # it has not been read
                response.headers["Connection"] = "close"
            await response(scope, receive, answer)
        except (ClientGoneError, ClientDisconnect):
            facts["gone"], status = True, status if status == 200 else 499
        except Exception as error:  # a mistake of ours: the client gets its shape, the log the place
            facts["failure"] = places(error)
            if not status:  # the application has not answered it itself
                await refusal(RefusedError("server: it failed; its log has the request's id.", 500))(
                    scope, receive, answer
                )
        finally:
            leave()
            if facts.get("gone"):
                self._metrics.gone.inc()
            seconds = time.monotonic() - begun
            route = scope["path"] if scope["path"] in self._routes else "other"
            counted = 500 if "failure" in facts else facts.get("broken", status)  # a stream has sent 200 by then
            self._metrics.requests.labels(route, str(counted)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            level = logging.ERROR if "failure" in facts else logging.INFO
            if status == 200 and scope["path"].endswith((".js", ".css")):
                level = logging.DEBUG  # the page's own files, twenty of them whenever it is opened
            logging.getLogger("dpa.serve").log(
                level,
                "request",
                extra={
                    "facts": {
                        "id": request_id,
                        "method": scope["method"] if scope["method"].isalpha() else "?",
                        "route": route,
                        "status": status,
                        "ms": round(1000 * seconds, 1),
                        **facts,
                    }
                },
            )

    def _admit(self, scope: Scope) -> None:
        headers = _headers(scope)
        self._check_site(headers)
        if scope["path"] != OPEN_PATH:
            self._check_key(headers.get(b"authorization", b""))
        if self.draining and scope["path"] != OPEN_PATH:
            raise RefusedError("server: it is shutting down; ask another.", 503, retry_after_s=5)
        if scope["method"] == "POST" and scope["path"] in COUNTED:
            self._check_room()  # before the body is read, and again when it is there

    def _check_room(self) -> None:
        if self._in_flight >= self._served.limits.requests:
            raise RefusedError(
                f"server: {self._in_flight} requests are in flight, as many as it takes; ask again.",
                429,
                code="too_many_requests",
                retry_after_s=1,
            )

    def _check_key(self, authorization: bytes) -> None:
        """`Bearer KEY`, or Basic with the key as password, which a browser asks its user for."""
        if not self._digests:
            return
        kind, _, given = authorization.partition(b" ")
        if kind.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                given = b""
        elif kind.lower() != b"bearer":
            given = b""
        digest = hashlib.sha256(given.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise RefusedError(
                "key: it is missing or wrong; send `Authorization: Bearer KEY`.", 401, code="invalid_api_key"
            )

    def _check_site(self, headers: dict[bytes, bytes]) -> None:
        """A page of another site, open in the user's browser, must not ask in the user's name."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        hosts = self._served.hosts
        if hosts and _host_name(f"//{host}") not in hosts:
            raise RefusedError("host: this gateway is not known by that name; start it with --allow-host NAME.", 403)
        origin = headers.get(b"origin")
        if origin is not None and _net_location(origin.decode("latin-1").lower()) != host:
            raise RefusedError("origin: another site's page may not use this gateway.", 403)


def _host_name(url: str) -> str:
    """Empty where the address cannot be read."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _net_location(url: str) -> str | None:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(reversed(scope["headers"]))  # of two the first


def _long_body(headers: dict[bytes, bytes]) -> bool:
    """Whether more of the request may follow than came with its head."""
    return b"transfer-encoding" in headers or len(headers.get(b"content-length", b"")) > 4
