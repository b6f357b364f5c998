"""An OpenAI-compatible server asked over HTTP: our own engine on a Unix socket, or vLLM, SGLang, llama.cpp at a URL.
Run its tests: pytest tests/test_gateway.py
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic_core import from_json

from dpa.remote.http_exchange import error_fields, own_words
from dpa.serve.bodies import RefusedError, to_json
from dpa.serve.steering import Steering

MAX_ANSWER = 64_000_000
"""Bytes of one answer, or of one event of a stream, that are read before the upstream is taken for broken."""

RETRY_AFTER_S = 2
KEEP_ALIVE_S = 3.0
CONNECT_S = 5.0


class UpstreamError(RefusedError):
    """The upstream cannot be reached, broke off, took too long or failed: 502, 503 or 504."""


class Upstream:
    """`url` ends before `/v1`; `socket` is the path of a Unix socket to reach it by. `key` goes with every request.

    `stall_s` is the longest silence within a stream. Close it with `aclose`.
    """

    def __init__(self, url: str, key: str | None = None, socket: str | None = None, stall_s: float = 30.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        # The transport alone: a client's cookies, redirects and proxies would double what a request costs.
        # Idle connections go before the server's own limit, 5 s for many: one that it closes just now answers nothing.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_S)
        self._transport = httpx.AsyncHTTPTransport(uds=socket, limits=limits, trust_env=False)
        self._stall_s = stall_s

    async def aclose(self) -> None:
        """Let the connections go."""
        await self._transport.aclose()

    async def get(self, path: str) -> Any:
        """A JSON answer. Raises UpstreamError or RefusedError."""
        return await self._whole(self._request("GET", path, None, self._stall_s))

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """A JSON answer, however long it takes: the caller's time limit ends it. Raises as `get` does."""
        return await self._whole(self._request("POST", path, body, None))

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a stream, until `[DONE]`. Raises UpstreamError or RefusedError; a stream without `[DONE]` too.

        Closing the generator closes the connection, which is how an engine learns that nobody waits any more.
        """
        response = await self._send(self._request("POST", path, body, self._stall_s))
        try:
            if response.status_code != 200:
                raise _failure(response.status_code, await _read(response), response.headers)
            rest = b""
            async for data in _bytes(response):
                *lines, rest = (rest + data).split(b"\n")
                if len(rest) > MAX_ANSWER:
                    raise UpstreamError("upstream: one event of its stream is too large.", 502)
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue
                    payload = line[5:].strip()
                    if payload == b"[DONE]":
                        return
                    chunk = _object(payload)
                    if "error" in chunk:
                        raise _failure(502, payload, {})
                    yield chunk
            raise UpstreamError("upstream: it broke off in the middle of an answer; ask again.", 502)
        except httpx.HTTPError as error:
            raise _trouble(error) from None
        finally:
            await asyncio.shield(response.aclose())

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, silence_s: float | None
    ) -> httpx.Request:
        timeout = httpx.Timeout(silence_s, connect=CONNECT_S, pool=None)
        content = None if body is None else to_json(body)
        return httpx.Request(
            method, self.url + path, headers=self._headers, content=content, extensions={"timeout": timeout.as_dict()}
        )

    async def _whole(self, request: httpx.Request) -> Any:
        response = await self._send(request)
        try:
            data = await _read(response)
        except httpx.HTTPError as error:
            raise _trouble(error) from None
        finally:
            await asyncio.shield(response.aclose())
        if response.status_code != 200:
            raise _failure(response.status_code, data, response.headers)
        return _object(data)

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            return await self._transport.handle_async_request(request)
        except httpx.HTTPError as error:
            raise _trouble(error) from None


@dataclass(frozen=True)
class Engines:
    """Who answers: the policy, what it is compared with (None: the policy itself, told no direction), who scores."""

    policy: Upstream
    ours: bool = False
    """Whether the policy is behind our own engine, which tells its load."""
    base: Upstream | None = None
    base_model: str = ""
    scorer: Upstream | None = None

    def asked_by(self, steering: Steering) -> Upstream:
        """Who answers a request that was steered so."""
        return self.base if steering.base and self.base is not None else self.policy

    async def aclose(self) -> None:
        """Let all connections go."""
        for upstream in (self.policy, self.base, self.scorer):
            if upstream is not None:
                await upstream.aclose()


async def _read(response: httpx.Response) -> bytes:
    data = bytearray()
    async for part in _bytes(response):
        data += part
        if len(data) > MAX_ANSWER:
            raise UpstreamError("upstream: its answer is too large.", 502)
    return bytes(data)


def _bytes(response: httpx.Response) -> AsyncIterator[bytes]:
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return aiter(response.stream)


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = from_json(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UpstreamError("upstream: its answer is not a JSON object; is it an OpenAI-compatible server?", 502)
    return _finite(value)


def _finite(value: Any) -> Any:
    """NaN and infinities, which JSON does not have and some servers write, as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value


def _failure(status: int, data: bytes, headers: Mapping[str, str]) -> RefusedError:
    """An upstream's error: a client's mistake is passed on as it was said, anything else is a bad gateway."""
    try:
        said = from_json(data)
    except ValueError:
        said = None
    fields = error_fields(said)
    message = own_words(str(fields.get("message") or f"it answered {status}"))[:1000]
    if status == 429 or status == 503:
        after = headers.get("retry-after", "")
        wait_s = int(after[:9]) if after.isdecimal() else RETRY_AFTER_S
        return UpstreamError(f"upstream: {message}", status, retry_after_s=wait_s)
    if status in (401, 403):  # ours to mend, not the client's: its key was accepted here
        return UpstreamError("upstream: it does not accept this gateway's key; set DPA_UPSTREAM_KEY.", 502)
    if 400 <= status < 500:
        param, code = fields.get("param"), fields.get("code")
        return RefusedError(
            message, status, param if isinstance(param, str) else None, None if code is None else str(code)
        )
    return UpstreamError(f"upstream: {message}", 502)


def _trouble(error: httpx.HTTPError) -> UpstreamError:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return UpstreamError("upstream: it cannot be reached just now; ask again.", 503, retry_after_s=RETRY_AFTER_S)
    if isinstance(error, httpx.TimeoutException):
        return UpstreamError("upstream: it fell silent in the middle of an answer; ask again.", 504)
    return UpstreamError("upstream: it broke off in the middle of an answer; ask again.", 502)
