"""Connections: how many may be open, and how long each may take to say what it wants.
Run its tests: pytest tests/test_connections.py

uvicorn closes a connection that is idle between two requests, and no other: half a header stays open for ever. Here it
has a deadline, and where too many are open the client that has kept us waiting longest gives way.
"""

import asyncio
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dpa.serve.bodies import error_body, to_json
from dpa.serve.settings import Limits


def bounded(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol within these limits: what its Config takes as `http`."""

    class Bounded(BoundedProtocol):
        _limits = limits

    return Bounded


class BoundedProtocol(H11Protocol):
    """One connection. A header that does not come in time is answered 408, and what is no HTTP 400 in OpenAI's shape;
    a connection that says nothing, or goes on with a body that nobody reads, is closed.
    """

    _limits = Limits()

    def __init__(self, config: uvicorn.Config, server_state: Any, app_state: dict[str, Any], **rest: Any) -> None:
        super().__init__(config, server_state, app_state, **rest)
        self._deadline: asyncio.TimerHandle | None = None
        """Set while no request is being answered."""
        self._since = 0.0
        """When it opened, was last answered, or had sent its header."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It opens; beyond the limit another is closed for it."""
        super().connection_made(transport)
        self._await_request()
        if len(self.connections) > self._limits.connections:
            waiting = [one for one in self.connections if isinstance(one, BoundedProtocol) and one._clients_turn()]
            slowest = min(waiting, key=lambda one: one._since)
            if slowest is self:
                self._refuse(503, "server: it answers on as many connections as it takes; ask again.", b"1")
            else:
                slowest._end()

    def data_received(self, data: bytes) -> None:
        """Some bytes; the end of a header stops the clock."""
        super().data_received(data)
        if self._deadline is not None and self._answering():
            self._stop_clock()
            self._since = self.loop.time()

    def on_response_complete(self) -> None:
        """The client has its answer, and may ask again."""
        super().on_response_complete()
        if not self._answering():  # it may have sent its next request already
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        self._stop_clock()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What was sent is no HTTP."""
        self._refuse(400, "request: it is not HTTP/1.1; send a request line, headers and the body they announce.")

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _clients_turn(self) -> bool:
        return not self._answering() or (self.cycle.more_body and not self.cycle.response_started)

    def _await_request(self) -> None:
        self._stop_clock()
        self._since = self.loop.time()
        if not self.transport.is_closing():
            self._deadline = self.loop.call_later(self._limits.header_seconds, self._late)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        if self.conn.trailing_data[0] and self.conn.their_state is h11.IDLE:
            limit = self._limits.header_seconds
            self._refuse(408, f"request: its header did not arrive within {limit:g} seconds; send it at once.")
        else:
            self._end()

    def _end(self) -> None:
        self._stop_clock()
        self.connections.discard(self)  # now: the next one that opens counts them
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # it does not read its last answer either
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str, retry_after: bytes | None = None) -> None:
        """Answer without a request, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = to_json(error_body(message, status))
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            if retry_after is not None:
                headers.append((b"retry-after", retry_after))
            reason = HTTPStatus(status).phrase.encode()
            for event in (h11.Response(status_code=status, headers=headers, reason=reason), h11.Data(data=body)):
                self.transport.write(self.conn.send(event) or b"")
            self.conn.send(h11.EndOfMessage())
        self._end()
