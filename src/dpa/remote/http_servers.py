"""The servers of a pool and the requests that wait for them: how each fares, and who gets which.
Run its tests: pytest tests/test_http_pool.py
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpa.core.errors import EngineError
from dpa.remote.server_process import ServerProcess


@dataclass(eq=False)
class Server:
    """A server of a pool, and how it fares."""

    address: str
    limit: int
    """Requests it may have now: fewer after a 429, one more after each answer."""
    in_flight_limit: int
    process: ServerProcess | None = None
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    useless: int = 0
    """Answers in a row that were 500 or could not be read."""
    restarts: int = 0
    not_before: float = 0.0
    answered_at: float = 0.0
    up: bool = True

    def answered(self) -> None:
        """It works."""
        self.failures = self.restarts = self.useless = 0
        self.answered_at = time.monotonic()
        self.limit = min(self.in_flight_limit, self.limit + 1)

    def failed(self, rest_s: float) -> None:
        """It rests; if it rests already, then those who failed together are one failure."""
        now = time.monotonic()
        if self.not_before <= now:
            self.not_before = now + rest_s
            self.failures += 1

    def is_gone(self, attempts: int, max_restarts: int) -> bool:
        """Whether it has failed too often; one that we start may die first."""
        return self.failures >= (attempts if self.process is None else max(attempts, max_restarts + 1))


@dataclass(eq=False)
class Request:
    """A request of a pool, and what it has been through."""

    path: str
    content: bytes | None
    only: Server | None = None
    is_touchstone: bool = False
    needed: bool = True
    """Whether a server that has no answer to it is of no use."""
    future: Any = None
    """asyncio.Future of Answer or Refusal, made on the loop's thread."""
    tries: int = 0
    timeouts: int = 0
    crowded: int = 0
    answered_before: int = 0
    """How many requests the pool had answered when this one last failed."""
    begun: int | None = None
    """How many requests the pool had answered when this one was first tried."""
    avoid: Server | None = None
    not_before: float = 0.0


def least_loaded(servers: Sequence[Server], request: Request, now: float) -> Server | None:
    """The server that is up and has the fewest requests, another than the one to avoid where there is one.

    None while none is free; also while only the one to avoid is, and another is well but full.
    """
    free = [
        server
        for server in servers
        if server.up
        and server.not_before <= now
        and server.in_flight < (1 if server.failures else server.limit)  # one request tries a server that failed
        and request.only in (None, server)
    ]
    others = [server for server in servers if server is not request.avoid and request.only in (None, server)]
    elsewhere = [server for server in free if server in others]
    if elsewhere or any(server.up and not server.failures for server in others):
        free = elsewhere
    return min(free, key=lambda server: server.in_flight, default=None)


async def revive(server: Server, process: ServerProcess, max_restarts: int, rest: Callable[[int], float]) -> None:
    """Look whether a started server lives; start it again, after a rest, where it does not. Raises EngineError."""
    while not await asyncio.to_thread(process.healthy):
        server.restarts += 1
        if server.restarts > max_restarts:
            raise EngineError(f"a server died {server.restarts} times in a row; {process.last_words()}")
        await asyncio.sleep(rest(server.restarts - 1))
        try:
            await asyncio.to_thread(process.start)
            server.address = await asyncio.to_thread(process.wait_until_healthy)
        except EngineError:
            continue  # it died while it started, or was closed
    server.up = True


def nobody(reason: str) -> EngineError:
    """What is raised when no server is left."""
    return EngineError(f"no server answers ({reason}); see that they run, then run the same command to go on.")
