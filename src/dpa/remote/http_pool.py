"""A pool of HTTP servers behind a synchronous `ask`: back-pressure, retries, time limits, and servers that die.
Run its tests: pytest tests/test_http_pool.py

What happens to a request (faults 10 to 12):

    2xx                         answered
    429, or any Retry-After     the server rests that long and is asked less at once; no try counts while others pass
    408, 502, 503, 504,         the server rests, twice as long each time, and is then tried with one request;
      no connection               the request goes on elsewhere
    500, an unreadable answer   the request is tried again after a while; the server rests from the third in a row on
    no answer within the limit  tried once more, elsewhere where there is one
    400, 413, 422               refused: never tried again
    401, 403, 404 and the rest  EngineError: the settings are wrong, so the run stops

A request whose tries are used up is refused when others are being answered, or when the pool's touchstone (a
question that was answered before) is answered now: the fault is its own. Without a touchstone, one that was answered
with nothing of use waits for what becomes of those under way. Else no server is left, and EngineError stops the run,
which the same command resumes.
"""

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from dpa.core.closing import Closing
from dpa.core.errors import ConfigError, EngineError
from dpa.remote.http_exchange import MAX_ANSWER_BYTES, Answer, Refusal, TooLong, brief, client_of, exchange, retry_after
from dpa.remote.http_servers import Request, Server, least_loaded, nobody, revive
from dpa.remote.loop_thread import LoopThread
from dpa.remote.server_process import ServerProcess

BACKOFF_S, LONGEST_REST_S = 0.5, 30.0
"""First rest after a failure, doubled each time up to the longest; each is cut by up to half at random."""

_REFUSED = frozenset({400, 413, 422})
_UNWELL = frozenset({408, 502, 503, 504})
_USELESS_IN_A_ROW = 3
"""So many answers of no use, with none between that was, are taken for the server's fault."""

Heard = Callable[[int, Answer | Refusal], None]


class HttpPool(Closing):
    """Servers of one kind at `addresses`, or started as `processes`, that share the requests.

    Each has at most `in_flight` requests at a time; the one with the fewest gets the next. `request_s` bounds a request
    from its first byte to its last, `attempts` its tries, `max_restarts` the deaths in a row of a started process;
    `key_from` names where the key was read, for a server that refuses it.
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
        key_from: str = "api_key_env",
    ) -> None:
        try:
            import httpx
        except ImportError:
            raise ConfigError("httpx is not installed; `pip install 'dpa[http]'` brings it.") from None
        self._httpx, self._key, self._key_from = httpx, key, key_from
        self._servers = [Server(address.rstrip("/"), in_flight, in_flight) for address in addresses]
        self._servers += [Server("", in_flight, in_flight, process) for process in processes]
        self._request_s, self._attempts, self._max_restarts = request_s, attempts, max_restarts
        self._backoff_s, self._processes = backoff_s, tuple(processes)
        self._waiting: deque[Request] = deque()
        self._serving: set[Request] = set()
        self._undecided: dict[Request, str] = {}
        self._touchstone: tuple[str, bytes] | None = None
        self._answered = 0
        self._broken: EngineError | None = None
        self._random = random.Random()
        self._thread = LoopThread("dpa-http", self._mistake)
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

    def ask(self, path: str, bodies: Sequence[dict[str, Any]], heard: Heard | None = None) -> list[Answer | Refusal]:
        """POST each body to `path` on some server; answers in the order of the bodies. Raises EngineError.

        `heard(place, answer)` is called on the pool's thread as each comes in; what it raises is raised here, and what
        was not sent yet never is.
        """
        return self._run(self._ask([Request(path, json.dumps(body).encode()) for body in bodies], heard))

    def ask_every_server(self, path: str, body: dict[str, Any] | None, needed: bool = True) -> list[Answer | Refusal]:
        """POST the body (GET where it is None) to each server, which is how servers are got to know; what is not
        `needed` may be answered by anything, once. Raises EngineError.
        """
        content = None if body is None else json.dumps(body).encode()
        asked = [Request(path, content, only=server, needed=needed) for server in self._servers]
        return self._run(self._ask(asked))

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
            self._thread.stop()
            for process in self._processes:
                process.close()

    # --- on the loop's thread from here on ---------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self._closed:
            work.close()
            raise EngineError("the pool of servers is closed.")
        return self._thread.run(work)

    async def _open(self) -> None:
        self._client = client_of(self._httpx, self._key)
        self._thread.start(self._dispatch())

    async def _close(self) -> None:
        self._fail(EngineError("the pool of servers was closed."))
        await self._thread.drop()  # those who ask are told before the loop stops
        if hasattr(self, "_client"):
            await self._client.aclose()

    async def _ask(self, requests: list[Request], heard: Heard | None = None) -> list[Answer | Refusal]:
        if self._broken:
            raise self._broken
        for request in requests:
            request.future = self._thread.loop.create_future()
        self._waiting.extend(requests)
        self._wake.set()

        async def answer_to(place: int, request: Request) -> Answer | Refusal:
            answer = await request.future
            if heard is not None:
                heard(place, answer)
            return answer

        try:
            return await asyncio.gather(*(answer_to(place, request) for place, request in enumerate(requests)))
        except BaseException:
            for request in requests:
                request.future.cancel()
            raise

    async def _dispatch(self) -> None:
        """Give waiting requests to the least loaded servers that are up; sleep until something changes."""
        while True:
            self._wake.clear()
            now, later = time.monotonic(), float("inf")
            held: list[Request] = []
            while self._waiting:
                request = self._waiting.popleft()
                if request.only is not None and request.only not in self._servers:
                    self._resolve(request, Refusal("it was given up"))
                if request.future.done():
                    continue
                server = least_loaded(self._servers, request, now) if request.not_before <= now else None
                if server is None:
                    held.append(request)
                    if request.not_before <= now and request.only is None and request.avoid is None:
                        break  # no server is free: nobody behind in the queue gets one either
                    continue
                server.in_flight += 1
                self._serving.add(request)
                self._thread.start(self._serve(server, request))
            self._waiting.extendleft(reversed(held))
            self._decide()
            for moment in (*(request.not_before for request in held), *(server.not_before for server in self._servers)):
                later = min(later, moment) if moment > now else later
            try:
                async with asyncio.timeout(None if later == float("inf") else later - now):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _serve(self, server: Server, request: Request) -> None:
        sent = time.monotonic()
        if request.begun is None:
            request.begun = self._answered
        try:
            async with asyncio.timeout(self._request_s):
                status, headers, content = await exchange(self._client, server.address + request.path, request.content)
        except TimeoutError:
            request.timeouts += 1
            if server.answered_at < sent:  # else the server is well and the request is not
                self._server_failed(server)
            self._again(request, f"no answer within {self._request_s:g} s", server, give_up=request.timeouts > 1)
        except (self._httpx.ConnectError, self._httpx.ConnectTimeout) as error:
            self._unwell(server, request, f"{server.address}: {type(error).__name__}: {error}")
        except (self._httpx.TransportError, OSError) as error:
            # It may be this very request that breaks servers, so it has half as many tries.
            self._unwell(server, request, f"{server.address}: {type(error).__name__}: {error}", tries=2)
        except self._httpx.InvalidURL as error:
            self._fail(EngineError(f"{server.address}: {error}; check the address."))
        except self._httpx.HTTPError as error:  # an answer that cannot be decoded
            self._useless(server, request, f"{server.address}: {type(error).__name__}: {error}")
        except TooLong:
            self._resolve(request, Refusal(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes"))
        except Exception as error:
            self._mistake(error)  # while the request is among those that are told
        else:
            self._judge(server, request, status, headers, content)
        finally:
            self._serving.discard(request)
            server.in_flight -= 1
            self._wake.set()

    def _judge(self, server: Server, request: Request, status: int, headers: dict[str, str], content: bytes) -> None:
        if self._key:  # a server may say back what it was sent, and what it says is kept
            content = content.replace(self._key.encode(), b"***")
        said = f"{status} {brief(content)}"
        rest = retry_after(headers)
        if 200 <= status < 300:
            try:
                payload = json.loads(content)
            except (ValueError, RecursionError):
                if not request.needed:
                    self._resolve(request, Refusal("an answer that is no JSON", status))
                    return
                self._useless(server, request, f"an answer that is no JSON ({brief(content)})")
                return
            server.answered()
            self._answered += 1
            self._resolve(request, Answer(payload, headers))
        elif not request.needed and status not in _UNWELL and status != 429:
            self._resolve(request, Refusal(said, status))
        elif status == 429 or (rest is not None and status >= 500):
            server.limit = max(1, min(server.limit, server.in_flight) - 1)
            wait = self._rest(request.crowded) if rest is None else rest
            until = time.monotonic() + wait * self._random.uniform(1.0, 1.1)
            server.not_before = max(server.not_before, until)
            request.crowded = 0 if self._answered > request.answered_before else request.crowded + 1
            request.answered_before = self._answered
            # Being crowded out is no fault of the request, but servers that say 429 and nothing else must end the run.
            self._again(request, said, tries=0, give_up=request.crowded >= self._attempts)
        elif status in _UNWELL:
            self._unwell(server, request, f"{server.address}: {said}")
        elif status == 500:
            self._useless(server, request, f"{server.address}: {said}")
        elif status in _REFUSED:
            self._resolve(request, Refusal(f"the server answered {said}", status))
        elif request.only is not None and status == 404:
            self._resolve(request, Refusal(said, status))  # a question that not every kind of server knows
        else:
            hint = {401: self._key_from, 403: self._key_from, 404: "the address and the model's name"}
            check = hint.get(status, "the address")
            self._fail(EngineError(f"{server.address}{request.path} answered {said}; check {check}."))

    def _unwell(self, server: Server, request: Request, reason: str, tries: int = 1) -> None:
        """A server cannot serve now. The request waits for it or another, unless all have failed too often."""
        self._server_failed(server)
        request.tries += tries
        others, request.answered_before = self._answered > request.answered_before, self._answered
        if request.tries >= self._attempts and others and self._others_answered(request):
            self._give_up(request, reason)
        elif self._none_left():
            self._give_up(request, reason, none_left=True)
        elif request.only is not None and request.tries >= self._attempts:
            self._resolve(request, Refusal(reason))  # others may answer for ever
        else:
            request.avoid = server
            self._waiting.append(request)

    def _none_left(self) -> bool:
        return all(server.is_gone(self._attempts, self._max_restarts) for server in self._servers)

    def _useless(self, server: Server, request: Request, reason: str) -> None:
        """A 500, or an answer that cannot be read: the fault of the request, or of a server that gives nothing else."""
        server.useless += 1
        if server.useless >= _USELESS_IN_A_ROW:
            self._server_failed(server)
        request.tries += 1
        if (none_left := self._none_left()) or request.tries >= self._attempts:
            self._give_up(request, reason, none_left, may_wait=not none_left)
        else:
            self._again(request, reason, server, tries=0)

    def _again(
        self, request: Request, reason: str, avoid: Server | None = None, tries: int = 1, give_up: bool = False
    ) -> None:
        """Put the request back into the queue, or give it up."""
        request.tries += tries
        if give_up or request.tries >= self._attempts:
            self._give_up(request, reason)
        elif avoid is None:
            self._waiting.appendleft(request)
        else:
            request.avoid, request.not_before = avoid, time.monotonic() + self._rest(request.tries - 1)
            self._waiting.append(request)

    def _give_up(self, request: Request, reason: str, none_left: bool = False, may_wait: bool = False) -> None:
        """`may_wait`: for the answers to others that are under way; `none_left`: what all servers answered before they
        failed says nothing of them now."""
        if none_left:
            request.begun = self._answered
        if self._others_answered(request) or (request.is_touchstone and may_wait):
            self._resolve(request, Refusal(f"{reason}, after {max(request.tries, 1)} tries"))
        elif request.future.done():
            return
        elif request.is_touchstone or (self._touchstone is None and not may_wait):
            self._fail(nobody(reason))
        else:
            self._undecided[request] = reason
            if self._touchstone is not None:  # asked again, once; nobody waits for its own answer
                test = Request(*self._touchstone, is_touchstone=True, tries=self._attempts - 1, timeouts=1)
                test.future = self._thread.loop.create_future()
                test.future.add_done_callback(asyncio.Future.exception)
                self._waiting.appendleft(test)

    def _decide(self) -> None:
        """On those whose tries were used up before any other request was answered."""
        for request, reason in list(self._undecided.items()):
            if self._others_answered(request):
                self._give_up(request, reason)
            if request.future.done():
                del self._undecided[request]
        if self._undecided and not self._serving and not self._waiting:
            self._fail(nobody(next(iter(self._undecided.values()))))

    def _others_answered(self, request: Request) -> bool:
        """Whether the pool answered anything since the request was first tried: then the fault is its own."""
        return request.begun is not None and self._answered > request.begun

    def _server_failed(self, server: Server) -> None:
        server.failed(self._rest(server.failures))
        if server.process is not None and server.up:
            server.up = False
            self._thread.start(self._revive(server, server.process))

    async def _revive(self, server: Server, process: ServerProcess) -> None:
        """Wait until a started server lives again; where it does not, do without it."""
        try:
            await revive(server, process, self._max_restarts, self._rest)
        except EngineError as error:
            self._servers.remove(server)
            await asyncio.to_thread(process.close)
            for request in [request for request in self._waiting if request.only is server]:
                self._resolve(request, Refusal(str(error)))
            if not self._servers:
                self._fail(error)
        finally:
            self._wake.set()

    def _rest(self, failures: int) -> float:
        return min(LONGEST_REST_S, self._backoff_s * 2.0 ** max(failures, 0)) * self._random.uniform(0.5, 1.0)

    def _resolve(self, request: Request, result: Answer | Refusal) -> None:
        if not request.future.done():
            request.future.set_result(result)

    def _mistake(self, error: BaseException) -> None:
        self._fail(EngineError(f"the pool of servers failed ({error!r}); this is a mistake in dpa, please report it."))

    def _fail(self, error: EngineError) -> None:
        """No request can be served any more: those under way and all later ones raise this."""
        self._broken = self._broken or error
        for request in (*self._waiting, *self._serving, *self._undecided):
            if not request.future.done():
                request.future.set_exception(error)
        self._waiting.clear()
        self._undecided.clear()
