"""A pool of HTTP servers behind a synchronous `ask`: back-pressure, retries, time limits, and servers that die.
Run its tests: pytest tests/test_http_pool.py

What happens to a request (faults 10 to 12):

    2xx                         answered
    429, or any Retry-After     the server rests that long and is asked less at once; no try counts while others pass
    408, 502, 503, 504,         the server rests, twice as long each time, and is then tried with one request;
      no connection               the request goes on elsewhere
    500, an unreadable answer   the request is tried again after a while
    no answer within the limit  tried once more, elsewhere where there is one
    400, 413, 422               refused: never tried again
    401, 403, 404 and the rest  EngineError: the settings are wrong, so the run stops

A request whose tries are used up is refused when others were answered meanwhile, or when the pool's touchstone (a
question that was answered before) is answered now: the fault is its own. Else no server is left, and EngineError stops
the run, which the same command resumes.
"""

import asyncio
import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from dpa.core.errors import ConfigError, EngineError
from dpa.models.server_process import ServerProcess

MAX_ANSWER_BYTES = 16_000_000
"""A longer answer is not read."""

BACKOFF_S, LONGEST_REST_S = 0.5, 30.0
"""First rest after a failure, doubled each time up to the longest; each is cut by up to half at random."""

_CONNECT_S = 10.0
_REFUSED = frozenset({400, 413, 422})
_UNWELL = frozenset({408, 502, 503, 504})


@dataclass(frozen=True)
class Answer:
    """What a server said: the JSON object or list, and the headers (lower-case names)."""

    payload: Any
    headers: dict[str, str]


@dataclass(frozen=True)
class Refusal:
    """Why a request got no answer."""

    reason: str
    status: int | None = None
    """The HTTP status where one said so."""


class HttpPool:
    """Servers of one kind at `addresses`, or started as `processes`, that share the requests.

    Each has at most `in_flight` requests at a time; the one with the fewest gets the next. `request_s` bounds a request
    from its first byte to its last, `attempts` its tries, `max_restarts` the deaths in a row of a started process.
    Thread-safe. `close` (or leaving the `with` block) drops what is in flight and ends the processes.
    """

    def __init__(
        self,
        addresses: Sequence[str] = (),
        processes: Sequence[ServerProcess] = (),
        in_flight: int = 32,
        request_s: float = 600.0,
        attempts: int = 6,
        max_restarts: int = 3,
        key: str | None = None,
        backoff_s: float = BACKOFF_S,
    ) -> None:
        try:
            import httpx
        except ImportError:
            raise ConfigError("httpx is not installed; `pip install 'dpa[http]'` brings it.") from None
        self._httpx, self._key = httpx, key
        self._servers = [_Server(address.rstrip("/"), in_flight, in_flight) for address in addresses]
        self._servers += [_Server("", in_flight, in_flight, process) for process in processes]
        self._request_s, self._attempts, self._max_restarts = request_s, attempts, max_restarts
        self._backoff_s, self._processes = backoff_s, tuple(processes)
        self._waiting: deque[_Job] = deque()
        self._serving: set[_Job] = set()
        self._doubted: set[_Job] = set()
        self._touchstone: tuple[str, bytes] | None = None
        self._answered = 0
        self._broken: EngineError | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._random = random.Random()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dpa-http", daemon=True)
        self._thread.start()
        self._wake = asyncio.Event()
        self._closed = False
        try:
            for process in processes:
                process.start()
            for server in self._servers:
                if server.process is not None:
                    server.address = server.process.wait_until_healthy()
            self._run(self._open())
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> list[str]:
        """Where the servers are now."""
        return [server.address for server in self._servers]

    def ask(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[Answer | Refusal]:
        """POST each body to `path` on some server; answers in the order of the bodies. Raises EngineError."""
        return self._run(self._ask([_Job(path, json.dumps(body).encode()) for body in bodies]))

    def ask_every_server(self, path: str, body: dict[str, Any] | None) -> list[Answer | Refusal]:
        """POST the body (GET where it is None) to each server, which is how servers are got to know.

        Raises EngineError.
        """
        content = None if body is None else json.dumps(body).encode()
        return self._run(self._ask([_Job(path, content, only=server) for server in self._servers]))

    def set_touchstone(self, path: str, body: dict[str, Any]) -> None:
        """A question that any server that works answers: it tells a bad request from a bad server."""
        self._touchstone = path, json.dumps(body).encode()

    def close(self) -> None:
        """Drop what is in flight, close the connections, end the processes."""
        if self._closed:
            return
        try:
            self._run(self._close())
        finally:
            self._closed = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            for process in self._processes:
                process.close()

    def __enter__(self) -> "HttpPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- on the loop's thread from here on ---------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self._closed:
            work.close()
            raise EngineError("the pool of servers is closed.")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> None:
        headers = {"content-type": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        unlimited = self._httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = self._httpx.Timeout(None, connect=_CONNECT_S)
        self._client = self._httpx.AsyncClient(headers=headers, limits=unlimited, timeout=timeout)
        self._start(self._dispatch())

    async def _close(self) -> None:
        self._fail(EngineError("the pool of servers was closed."))
        for task in list(self._tasks):
            task.cancel()
        # Those who ask are told before the loop stops.
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
        if hasattr(self, "_client"):
            await self._client.aclose()

    def _start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(
                EngineError(f"the pool of servers failed ({error!r}); this is a mistake in dpa, please report it.")
            )

    async def _ask(self, jobs: "list[_Job]") -> list[Answer | Refusal]:
        if self._broken:
            raise self._broken
        for job in jobs:
            job.future = self._loop.create_future()
        self._waiting.extend(jobs)
        self._wake.set()
        results = await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)
        answers: list[Answer | Refusal] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            answers.append(result)
        return answers

    async def _dispatch(self) -> None:
        """Give waiting requests to the least loaded servers that are up; sleep until something changes."""
        while True:
            self._wake.clear()
            now, later = time.monotonic(), float("inf")
            held: list[_Job] = []
            while self._waiting:
                job = self._waiting.popleft()
                if job.future.done():
                    continue
                server = self._server_for(job, now) if job.not_before <= now else None
                if server is None:
                    held.append(job)
                    if job.not_before <= now and job.only is None:
                        break  # no server is free: nobody behind in the queue gets one either
                    continue
                server.in_flight += 1
                self._serving.add(job)
                self._start(self._serve(server, job))
            self._waiting.extendleft(reversed(held))
            for moment in (*(job.not_before for job in held), *(server.not_before for server in self._servers)):
                later = min(later, moment) if moment > now else later
            try:
                async with asyncio.timeout(None if later == float("inf") else later - now):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _server_for(self, job: "_Job", now: float) -> "_Server | None":
        free = [
            server
            for server in self._servers
            if server.up
            and server.not_before <= now
            and server.in_flight < (1 if server.failures else server.limit)  # one request tries a server that failed
            and job.only in (None, server)
        ]
        free = [server for server in free if server is not job.avoid] or free
        return min(free, key=lambda server: server.in_flight, default=None)

    async def _serve(self, server: "_Server", job: "_Job") -> None:
        sent = time.monotonic()
        if job.begun is None:
            job.begun = self._answered
        try:
            async with asyncio.timeout(self._request_s):
                status, headers, content = await self._exchange(server, job)
        except TimeoutError:
            job.timeouts += 1
            if server.answered_at < sent:  # else the server is well and the request is not
                self._server_failed(server)
            self._again(job, f"no answer within {self._request_s:g} s", server, give_up=job.timeouts > 1)
        except (self._httpx.ConnectError, self._httpx.ConnectTimeout) as error:
            self._unwell(server, job, f"{server.address}: {type(error).__name__}: {error}")
        except (self._httpx.TransportError, OSError) as error:
            # It may be this very request that breaks servers, so it has half as many tries.
            self._unwell(server, job, f"{server.address}: {type(error).__name__}: {error}", tries=2)
        except self._httpx.HTTPError as error:  # an answer that cannot be decoded
            self._again(job, f"{server.address}: {type(error).__name__}: {error}", server)
        except _TooLong:
            self._resolve(job, Refusal(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes"))
        else:
            self._judge(server, job, status, headers, content)
        finally:
            self._serving.discard(job)
            server.in_flight -= 1
            self._wake.set()

    async def _exchange(self, server: "_Server", job: "_Job") -> tuple[int, dict[str, str], bytes]:
        method = "GET" if job.content is None else "POST"
        async with self._client.stream(method, server.address + job.path, content=job.content) as response:
            parts, size = [], 0
            async for part in response.aiter_bytes():
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    raise _TooLong
                parts.append(part)
            return response.status_code, dict(response.headers), b"".join(parts)

    def _judge(self, server: "_Server", job: "_Job", status: int, headers: dict[str, str], content: bytes) -> None:
        said = f"{status} {_brief(content)}"
        rest = _retry_after(headers)
        if 200 <= status < 300:
            try:
                payload = json.loads(content)
            except (ValueError, RecursionError):
                self._again(job, f"an answer that is no JSON ({_brief(content)})", server)
                return
            server.failures = server.restarts = 0
            server.answered_at = time.monotonic()
            server.limit = min(server.in_flight_limit, server.limit + 1)
            self._answered += 1
            self._resolve(job, Answer(payload, headers))
        elif status == 429 or (rest is not None and status >= 500):
            server.limit = max(1, min(server.limit, server.in_flight) - 1)
            wait = self._rest(job.crowded) if rest is None else min(rest, self._request_s)
            server.not_before = time.monotonic() + wait * self._random.uniform(1.0, 1.1)
            job.crowded = 0 if self._answered > job.answered_before else job.crowded + 1
            job.answered_before = self._answered
            # Being crowded out is no fault of the request, but servers that say 429 and nothing else must end the run.
            self._again(job, said, tries=0, give_up=job.crowded >= self._attempts)
        elif status in _UNWELL:
            self._unwell(server, job, f"{server.address}: {said}")
        elif status == 500:
            self._again(job, f"{server.address}: {said}", server)
        elif status in _REFUSED:
            self._resolve(job, Refusal(f"the server answered {said}", status))
        elif job.only is not None and status == 404:
            self._resolve(job, Refusal(said, status))  # a question that not every kind of server knows
        else:
            hint = {401: "check api_key_env", 403: "check api_key_env", 404: "check the address and the model's name"}
            self._fail(
                EngineError(f"{server.address}{job.path} answered {said}; {hint.get(status, 'check the address')}.")
            )

    def _unwell(self, server: "_Server", job: "_Job", reason: str, tries: int = 1) -> None:
        """A server cannot serve now. The request waits for it or another, unless all have failed too often."""
        self._server_failed(server)
        job.tries += tries
        if job.tries >= self._attempts and self._others_answered(job):
            self._give_up(job, reason)
        elif all(one.process is None and one.failures >= self._attempts for one in self._servers):
            self._fail(_nobody(reason))
        else:
            job.avoid = server
            self._waiting.append(job)

    def _again(
        self, job: "_Job", reason: str, avoid: "_Server | None" = None, tries: int = 1, give_up: bool = False
    ) -> None:
        """Put the request back into the queue, or give it up."""
        job.tries += tries
        if give_up or job.tries >= self._attempts:
            self._give_up(job, reason)
        elif avoid is None:
            self._waiting.appendleft(job)
        else:
            job.avoid, job.not_before = avoid, time.monotonic() + self._rest(job.tries - 1)
            self._waiting.append(job)

    def _give_up(self, job: "_Job", reason: str) -> None:
        if self._others_answered(job):
            self._resolve(job, Refusal(f"{reason}, after {max(job.tries, 1)} tries"))
        elif self._touchstone is None or job.is_touchstone:
            self._fail(_nobody(reason))
        else:
            self._doubted.add(job)
            self._start(self._try_touchstone(job, reason, self._touchstone))

    async def _try_touchstone(self, job: "_Job", reason: str, touchstone: tuple[str, bytes]) -> None:
        test = _Job(*touchstone, is_touchstone=True)
        test.future = self._loop.create_future()
        test.tries, test.timeouts = self._attempts - 1, 1  # it has one try
        self._waiting.appendleft(test)
        self._wake.set()
        try:
            if isinstance(await test.future, Answer) or self._others_answered(job):
                self._give_up(job, reason)
            else:
                self._fail(_nobody(reason))
        except EngineError:
            pass  # all have been told
        finally:
            self._doubted.discard(job)

    def _others_answered(self, job: "_Job") -> bool:
        """Whether the pool answered anything since the request was first tried: then the fault is its own."""
        return job.begun is not None and self._answered > job.begun

    def _server_failed(self, server: "_Server") -> None:
        now = time.monotonic()
        if server.not_before <= now:  # else it rests already: those who failed together are one failure
            server.not_before = now + self._rest(server.failures)
            server.failures += 1
        if server.process is not None and server.up:
            server.up = False
            self._start(self._revive(server, server.process))

    async def _revive(self, server: "_Server", process: ServerProcess) -> None:
        """Look whether a started server lives; start it again, after a rest, where it does not."""
        try:
            while not await asyncio.to_thread(process.healthy):
                server.restarts += 1
                if server.restarts > self._max_restarts:
                    raise EngineError(f"a server died {server.restarts} times in a row; {process.last_words()}")
                await asyncio.sleep(self._rest(server.restarts - 1))
                try:
                    await asyncio.to_thread(process.start)
                    server.address = await asyncio.to_thread(process.wait_until_healthy)
                except EngineError:
                    continue  # it died while it started, or was closed
            server.up = True
        except EngineError as error:
            self._servers.remove(server)
            await asyncio.to_thread(process.close)
            for job in [job for job in self._waiting if job.only is server]:
                self._resolve(job, Refusal(str(error)))
            if not self._servers:
                self._fail(error)
        finally:
            self._wake.set()

    def _rest(self, failures: int) -> float:
        return min(LONGEST_REST_S, self._backoff_s * 2.0 ** max(failures, 0)) * self._random.uniform(0.5, 1.0)

    def _resolve(self, job: "_Job", result: Answer | Refusal) -> None:
        if not job.future.done():
            job.future.set_result(result)

    def _fail(self, error: EngineError) -> None:
        """No request can be served any more: those under way and all later ones raise this."""
        self._broken = self._broken or error
        for job in (*self._waiting, *self._serving, *self._doubted):
            if not job.future.done():
                job.future.set_exception(error)
        self._waiting.clear()


def key_in(variable: str | None, field: str) -> str | None:
    """The key an environment variable holds. Raises ConfigError that names the `field` when it is not set."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"{field}: {variable!r} is not set in the environment; set it.")
    return key


@dataclass(eq=False)
class _Server:
    address: str
    limit: int
    """Requests it may have now: fewer after a 429, one more after each answer."""
    in_flight_limit: int
    process: ServerProcess | None = None
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    restarts: int = 0
    not_before: float = 0.0
    answered_at: float = 0.0
    up: bool = True


@dataclass(eq=False)
class _Job:
    path: str
    content: bytes | None
    only: _Server | None = None
    is_touchstone: bool = False
    future: Any = None
    """asyncio.Future of Answer or Refusal, made on the loop's thread."""
    tries: int = 0
    timeouts: int = 0
    crowded: int = 0
    answered_before: int = 0
    begun: int | None = None
    """How many requests the pool had answered when this one was first tried."""
    avoid: _Server | None = None
    not_before: float = 0.0


class _TooLong(Exception):
    pass


def _nobody(reason: str) -> EngineError:
    return EngineError(f"no server answers ({reason}); see that they run, then run the same command to go on.")


def _retry_after(headers: dict[str, str]) -> float | None:
    """Seconds a server asks to be left alone: a number or a date (RFC 9110, 10.2.3)."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _brief(content: bytes) -> str:
    """What a server said, short enough for one sentence."""
    text = content[:2000].decode("utf-8", "replace")
    try:
        said = json.loads(text)
        said = said.get("error", said.get("detail", said)) if isinstance(said, dict) else said
        text = str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, RecursionError):
        pass
    return " ".join(text.split())[:200]
