"""Clients that connect and do not ask: each has a time of its own, takes no slot, and the others are served meanwhile.
pytest tests/test_connections.py
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from forks import within
from serving import (
    CHAT,
    QUESTION,
    FakeUpstream,
    at_best_within,
    gateway_before,
    in_thread,
    settings_with,
)

from dpa.serve.settings import Limits

HALF_HEADER = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Le".encode()
HALF_BODY = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode()
CHUNK = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{{\r\n".encode()
LIMITS = Limits(requests=2, connections=12, header_seconds=0.6, body_seconds=0.9)


@pytest.fixture(scope="module")
def upstream() -> Iterator[tuple[FakeUpstream, str]]:
    fake = FakeUpstream()
    with in_thread(fake.app) as url:
        yield fake, url


@pytest.fixture
def url(upstream: tuple[FakeUpstream, str]) -> Iterator[str]:
    upstream[0].mode = "answer"
    with gateway_before(upstream[1], settings_with(limits=LIMITS)) as url:
        yield url


def opened(url: str, sent: bytes = b"") -> socket.socket:
    wire = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30)
    with contextlib.suppress(OSError):  # who is refused in the middle may find the other side gone
        wire.sendall(sent)
    return wire


def everything(wire: socket.socket) -> bytes:
    """What comes until the other side closes."""
    data = b""
    try:
        while part := wire.recv(10_000):
            data += part
    except ConnectionResetError:
        pass
    return data


def ask(url: str) -> int:
    return httpx.post(url + CHAT, json={"model": "demo", "messages": QUESTION}, timeout=30).status_code


@pytest.mark.parametrize(
    ("sent", "status"), [(b"", 0), (b"GE", 408), (HALF_HEADER, 408), (HALF_BODY, 408), (CHUNK, 408)]
)
def test_48_a_request_that_does_not_come_is_ended_in_time(url: str, sent: bytes, status: int) -> None:
    answer = b""

    def ended_after() -> float:
        nonlocal answer
        begun = time.monotonic()
        with opened(url, sent) as wire:
            answer = everything(wire)
        spent = time.monotonic() - begun
        assert spent > 0.5
        return spent

    assert at_best_within(3.0, 3, ended_after)
    if not status:
        assert answer == b""
        return
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status and b"connection: close" in head.lower()
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_48_dripping_bytes_do_not_win_time(url: str) -> None:
    """Neither of a header, nor of a body whose request was answered already."""
    unread = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n"
    for start in (HALF_HEADER, unread):

        def ended_after(start: bytes = start) -> float:
            begun = time.monotonic()
            with opened(url, start) as wire, pytest.raises(OSError):
                while time.monotonic() - begun < 20:
                    wire.sendall(b"x")
                    time.sleep(0.05)
            return time.monotonic() - begun

        assert at_best_within(3.0, 3, ended_after)


def test_48_bodies_that_do_not_come_hold_no_slot(url: str) -> None:
    with ExitStack() as held:
        for _ in range(6):  # two requests may be in flight
            held.enter_context(opened(url, HALF_BODY))
        time.sleep(0.1)
        assert "dpa_requests_in_flight 0.0" in httpx.get(f"{url}/metrics").text
        assert ask(url) == 200


def test_48_beyond_the_connections_the_one_that_waits_longest_gives_way(url: str) -> None:
    with ExitStack() as held:
        for sent in (HALF_HEADER, HALF_BODY, b""):
            wires = [held.enter_context(opened(url, sent)) for _ in range(20)]
        assert ask(url) == 200
        del wires


def test_48_connections_that_are_answered_are_not_closed_for_new_ones(
    upstream: tuple[FakeUpstream, str],
) -> None:
    fake, upstream_url = upstream
    limits = Limits(connections=3, header_seconds=5)
    with gateway_before(upstream_url, settings_with(limits=limits)) as url, ExitStack() as held:
        fake.mode = "slow"
        fake.release.clear()
        body = json.dumps({"model": "demo", "messages": QUESTION}).encode()
        request = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        asking = [held.enter_context(opened(url, request)) for _ in range(3)]
        assert within(10, lambda: fake.running == 3)
        late = everything(held.enter_context(opened(url)))
        assert b" 503 " in late and b"retry-after: 1" in late.lower() and b'"error"' in late
        fake.release.set()
        assert all(b" 200 " in wire.recv(100) for wire in asking)
        fake.mode = "answer"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 66_000,  # no more than is read before it is refused
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{{}}".encode(),
    ],
)
def test_47_what_is_no_http_is_400_in_openai_shape(url: str, sent: bytes) -> None:
    with opened(url, sent) as wire:
        head, _, body = everything(wire).partition(b"\r\n\r\n")
    assert head.split()[1] == b"400" and set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
