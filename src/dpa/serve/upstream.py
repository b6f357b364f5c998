"""An OpenAI-compatible server asked over HTTP: our own engine on a Unix socket, or vLLM, SGLang, llama.cpp at a URL.
Run its tests: pytest tests/test_gateway.py
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx
from pydantic_core import from_json

from dpa.serve.bodies import RefusedError, to_json

MAX_ANSWER = 64_000_000
"""Bytes of one answer, or of one event of a stream, that are read before the upstream is taken for broken."""

RETRY_AFTER_S = 2


class UpstreamError(RefusedError):
    """The upstream cannot be reached, broke off, took too long or failed: 502, 503 or 504."""


class Upstream:
    """`url` ends before `/v1`; `socket` is the path of a Unix socket to reach it by. `key` goes with every request.

    `stall_s` is the longest silence within a stream. Close it with `aclose`.
    """

    def __init__(self, url: str, key: str | None = None, socket: str | None = None, stall_s: float = 30.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(stall_s, connect=5.0, pool=None),
            transport=httpx.AsyncHTTPTransport(uds=socket, limits=limits) if socket else None,
            limits=limits,
            trust_env=False,
            follow_redirects=False,
        )

    async def aclose(self) -> None:
        """Let the connections go."""
        await self._client.aclose()

    async def get(self, path: str) -> Any:
        """A JSON answer. Raises UpstreamError or RefusedError."""
        return await self._whole(self._client.build_request("GET", path))

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """A JSON answer, however long it takes: the caller's time limit ends it. Raises as `get` does."""
        timeout = httpx.Timeout(None, connect=5.0)
        return await self._whole(self._client.build_request("POST", path, content=to_json(body), timeout=timeout))

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a stream, until `[DONE]`. Raises UpstreamError or RefusedError; a stream without `[DONE]` too.

        Closing the generator closes the connection, which is how an engine learns that nobody waits any more.
        """
        response = await self._send(self._client.build_request("POST", path, content=to_json(body)))
        try:
            if response.status_code != 200:
                raise _failure(response.status_code, await _read(response), response.headers)
            rest = b""
            async for data in response.aiter_raw():
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
            return await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise _trouble(error) from None


async def _read(response: httpx.Response) -> bytes:
    data = bytearray()
    async for part in response.aiter_raw():
        data += part
        if len(data) > MAX_ANSWER:
            raise UpstreamError("upstream: its answer is too large.", 502)
    return bytes(data)


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = from_json(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UpstreamError("upstream: its answer is not a JSON object; is it an OpenAI-compatible server?", 502)
    return value


def _failure(status: int, data: bytes, headers: Mapping[str, str]) -> RefusedError:
    """An upstream's error: a client's mistake is passed on as it was said, anything else is a bad gateway."""
    try:
        said = from_json(data)
    except ValueError:
        said = None
    detail = said.get("error", said.get("detail")) if isinstance(said, dict) else None
    fields = detail if isinstance(detail, dict) else {"message": detail}
    message = str(fields.get("message") or f"it answered {status}")[:1000]
    if status == 429 or status == 503:
        after = headers.get("retry-after", "")
        return UpstreamError(f"upstream: {message}", status, retry_after_s=int(after) if after.isdecimal() else 2)
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
