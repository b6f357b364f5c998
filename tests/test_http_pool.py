"""A pool of servers: shared load, back-pressure, retries, time limits, and which failures end what.
pytest tests/test_http_pool.py

Faults 10 to 12 of the project's list, over real sockets; the servers misbehave, nothing is patched.
"""

import threading
import time
from collections.abc import Iterator

import pytest
from fake_server import FakeServer
from forks import within

from dpa.core.errors import EngineError
from dpa.remote.http_exchange import MAX_ANSWER_BYTES, Answer, Refusal, retry_after
from dpa.remote.http_pool import HttpPool

QUICK = {"backoff_s": 0.01, "request_s": 20.0}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def numbered(count: int) -> list[dict]:
    return [{"number": number} for number in range(count)]


def echoes(answers: list) -> list[int]:
    return [answer.payload["echo"]["number"] for answer in answers]


def failing_first(times: int, reply, numbers: range = range(10**6)):
    """Answers that go wrong `times` times for each of these numbers, and then right."""
    failed: dict[int, int] = {}

    def answer(body: dict):
        number = body["number"]
        if number in numbers and failed.setdefault(number, 0) < times:
            failed[number] += 1
            return reply
        return 200, {"echo": body}, {}

    return answer


def test_answers_come_in_the_order_of_the_questions(server: FakeServer) -> None:
    with HttpPool([server.address], in_flight=8) as pool:
        assert echoes(pool.ask("/x", numbered(50))) == list(range(50))
        assert pool.ask("/x", []) == []
    assert [path for _, path, _ in server.asked] == ["/x"] * 50


def test_each_server_has_at_most_so_many_requests_and_the_least_loaded_gets_the_next() -> None:
    with (
        FakeServer(busy_s=0.02) as quick,
        FakeServer(busy_s=0.5) as slow,
        HttpPool([quick.address, slow.address], in_flight=3) as pool,
    ):
        assert echoes(pool.ask("/", numbered(40))) == list(range(40))
        assert quick.most_at_once == slow.most_at_once == 3
        assert len(quick.asked) > 2 * len(slow.asked)


def test_the_key_is_sent_and_several_threads_may_ask(server: FakeServer) -> None:
    with HttpPool([server.address], key="sesame", in_flight=4) as pool:
        found: list[list[int]] = []
        threads = [threading.Thread(target=lambda: found.append(echoes(pool.ask("/", numbered(20))))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [list(range(20))] * 3
    assert {headers["authorization"] for headers in server.headers_seen} == {"Bearer sesame"}


def test_servers_of_this_machine_are_not_asked_through_a_proxy(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with FakeServer(lambda body: (200, {"asked of": "the proxy"}, {})) as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)
        port = server.server_address[1]
        with HttpPool([server.address, f"http://localhost:{port}"], in_flight=1) as pool:
            assert echoes(pool.ask("/", numbered(4))) == list(range(4))
        with HttpPool(["http://elsewhere.invalid"]) as pool:
            assert pool.ask("/", numbered(1))[0].payload == {"asked of": "the proxy"}
    assert len(server.asked) == 4


@pytest.mark.parametrize("reply", [(500, {}, {}), (503, {}, {}), (200, b"<html>", {}), "reset"], ids=str)
def test_fault_12_passing_failures_are_tried_again_and_lose_nothing(server: FakeServer, reply) -> None:
    server.answer = failing_first(2, reply, range(3, 6))
    with HttpPool([server.address], in_flight=4, **QUICK) as pool:
        assert echoes(pool.ask("/", numbered(12))) == list(range(12))
    numbers = [body["number"] for body in server.bodies()]
    assert [numbers.count(number) for number in (2, 3, 5, 6)] == [1, 3, 3, 1]


def test_fault_12_retry_after_is_honoured(server: FakeServer) -> None:
    server.answer = failing_first(1, (429, {}, {"retry-after": "1"}), range(1))
    with HttpPool([server.address], in_flight=1, **QUICK) as pool:
        assert echoes(pool.ask("/", numbered(3))) == [0, 1, 2]
    times = [when for when, _, _ in server.asked]
    assert times[1] - times[0] >= 1.0, "nothing at all is asked of it meanwhile"
    assert [body["number"] for body in server.bodies()] == [0, 0, 1, 2]


def test_fault_12_a_server_that_says_429_is_asked_less_at_once_and_loses_nothing() -> None:
    with FakeServer(busy_s=0.01, room=2) as server, HttpPool([server.address], in_flight=16, **QUICK) as pool:
        assert echoes(pool.ask("/", numbered(60))) == list(range(60))
        assert len(server.asked) < 60 * 3


def test_retry_after_may_be_a_date() -> None:
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 90))
    assert 80 < (retry_after({"retry-after": soon}) or 0) <= 90
    assert retry_after({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}) == 0
    assert [retry_after({"retry-after": text}) for text in ("7", "soon", "-3", "1 h")] == [
        7,
        None,
        None,
        None,
    ]
    assert retry_after({}) is None
    assert retry_after({"retry-after": "900"}) == 900, "however long a request may take"
    assert retry_after({"retry-after": "99999"}) == 3600


def test_fault_12_rests_grow_and_are_capped_and_random(server: FakeServer) -> None:
    with HttpPool([server.address], backoff_s=0.5) as pool:
        rests = [[pool._rest(failures) for _ in range(50)] for failures in range(12)]
    for failures, drawn in enumerate(rests):
        longest = min(30.0, 0.5 * 2**failures)
        assert longest / 2 <= min(drawn) < max(drawn) <= longest


@pytest.mark.parametrize("status", [400, 413, 422])
def test_fault_12_a_refused_request_is_not_tried_again_and_neighbours_are_served(
    server: FakeServer, status: int
) -> None:
    server.answer = failing_first(99, (status, {"error": {"message": "too long"}}, {}), range(2, 3))
    with HttpPool([server.address], **QUICK) as pool:
        answers = pool.ask("/", numbered(5))
    assert answers[2] == Refusal(f"the server answered {status} too long", status)
    assert echoes(answers[:2] + answers[3:]) == [0, 1, 3, 4]
    assert [body["number"] for body in server.bodies()].count(2) == 1


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "api_key_env"), (403, "api_key_env"), (404, "name"), (302, "address")]
)
def test_fault_12_wrong_settings_stop_at_once(server: FakeServer, status: int, hint: str) -> None:
    server.answer = lambda body: (status, {"detail": "no"}, {})
    with HttpPool([server.address], in_flight=1, key="secret-key", **QUICK) as pool:
        with pytest.raises(EngineError, match=f"answered {status} no.*{hint}") as caught:
            pool.ask("/", numbered(5))
        with pytest.raises(EngineError):
            pool.ask("/", numbered(1))
    assert len(server.asked) == 1
    assert "secret-key" not in str(caught.value)


def test_fault_10_a_request_that_hangs_is_tried_once_more_and_neighbours_do_not_wait(server: FakeServer) -> None:
    server.answer = failing_first(99, "hang", range(1))
    with HttpPool([server.address], in_flight=4, request_s=1.5, backoff_s=0.01) as pool:
        begun = time.monotonic()
        answers = pool.ask("/", numbered(30))
        assert time.monotonic() - begun < 10
    assert isinstance(answers[0], Refusal)
    assert "no answer within 1.5 s" in answers[0].reason
    assert echoes(answers[1:]) == list(range(1, 30))
    assert [body["number"] for body in server.bodies()].count(0) == 2


def test_fault_10_a_request_that_always_fails_is_given_up_alone(server: FakeServer) -> None:
    server.answer = failing_first(99, (500, {"error": "boom"}, {}), range(1))
    with HttpPool([server.address], attempts=3, **QUICK) as pool:
        answers = pool.ask("/", numbered(10))
    assert isinstance(answers[0], Refusal)
    assert "500 boom, after 3 tries" in answers[0].reason
    assert echoes(answers[1:]) == list(range(1, 10))


def test_fault_10_a_request_that_fails_before_any_other_is_answered_waits_for_their_answers(server: FakeServer) -> None:
    failed = threading.Event()

    def answer(body: dict) -> tuple:
        if body["number"] == 0:
            if server.bodies().count(body) == 3:
                failed.set()
            return 500, {"error": "boom"}, {}
        assert failed.wait(10)
        time.sleep(0.1)
        return 200, {"echo": body}, {}

    server.answer = answer
    with HttpPool([server.address], attempts=3, **QUICK) as pool:
        refused, *answers = pool.ask("/", numbered(4))
    assert isinstance(refused, Refusal) and "500 boom, after 3 tries" in refused.reason
    assert echoes(answers) == [1, 2, 3] and server.bodies().count({"number": 0}) == 3


def test_fault_11_a_server_that_dies_hands_its_requests_to_the_others(server: FakeServer) -> None:
    """It dies with requests in its hands, on its fifth."""
    dying = FakeServer(busy_s=0.05)
    dying.answer = lambda body: "hang" if len(dying.asked) < 5 or dying.stop() else "reset"
    with HttpPool([server.address, dying.address], in_flight=5, **QUICK) as pool:
        assert echoes(pool.ask("/", numbered(60))) == list(range(60))
    assert len(dying.asked) == 5
    assert len(server.asked) == 60


def test_fault_10_a_touchstone_tells_a_bad_request_from_a_bad_server(server: FakeServer) -> None:
    """Nothing else is in flight: only a question known to be good can tell."""
    server.answer = failing_first(99, (500, {}, {}), range(1))
    with HttpPool([server.address], attempts=3, **QUICK) as pool:
        pool.set_touchstone("/", {"number": 7})
        (answer,) = pool.ask("/", numbered(1))
        assert isinstance(answer, Refusal) and "after 3 tries" in answer.reason
        server.answer = lambda body: (500, {}, {})
        with pytest.raises(EngineError, match="no server answers"):
            pool.ask("/", numbered(1))
    assert [body["number"] for body in server.bodies()] == [0, 0, 0, 7] * 2


@pytest.mark.parametrize("how", ["gone", "hangs", "busy"])
def test_fault_11_no_server_left_is_a_clear_error_and_soon(server: FakeServer, how: str) -> None:
    server.answer = lambda body: "hang" if how == "hangs" else (429, {}, {"retry-after": "0"})
    if how == "gone":
        server.stop()
    with HttpPool([server.address], attempts=3, backoff_s=0.01, request_s=0.3) as pool:
        begun = time.monotonic()
        with pytest.raises(EngineError, match=r"no server answers .* run the same command to go on"):
            pool.ask("/", numbered(20))
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize("reply", [(500, {}, {}), (200, b"<html>", {})], ids=str)
def test_fault_12_a_server_that_answers_nothing_of_use_rests_and_costs_no_request(reply) -> None:
    """It is the quickest and so the least loaded; the good one is full."""
    with (
        FakeServer(lambda body: reply) as broken,
        FakeServer(busy_s=0.02) as good,
        HttpPool([broken.address, good.address], in_flight=2, backoff_s=0.1) as pool,
    ):
        assert echoes(pool.ask("/", numbered(60))) == list(range(60))
        assert len(broken.asked) < 10
        assert len(good.asked) == 60


def test_fault_12_servers_that_all_begin_to_answer_nothing_of_use_end_the_run_soon(server: FakeServer) -> None:
    """Also where requests were under way when others were still answered: they are not to blame."""
    server.answer = lambda body: (200, {}, {}) if len(server.asked) < 9 else (500, {}, {})
    with HttpPool([server.address], in_flight=8, attempts=4, **QUICK) as pool:
        pool.set_touchstone("/", {"number": 99})
        begun = time.monotonic()
        with pytest.raises(EngineError, match="no server answers"):
            pool.ask("/", numbered(40))
        assert time.monotonic() - begun < 10
    assert len(server.asked) < 9 + 4 * 8


def test_fault_12_the_last_request_is_not_to_blame_for_servers_that_all_went_away(server: FakeServer) -> None:
    """What they answered before says nothing of them now."""
    heard: list[int] = []

    def answer(body: dict):
        if body["number"] < 3 and len(server.asked) < 5:
            return 200, {}, {}
        assert within(10, lambda: len(heard) == 3), "the others are answered before it fails for the first time"
        return "reset"

    server.answer = answer
    with HttpPool([server.address], in_flight=4, attempts=4, **QUICK) as pool:
        pool.set_touchstone("/", {"number": 99})
        with pytest.raises(EngineError, match="no server answers"):
            pool.ask("/", numbered(4), lambda place, answer: heard.append(place))


def test_fault_10_the_last_request_is_to_blame_where_servers_answer_others(server: FakeServer) -> None:
    server.answer = lambda body: "reset" if body["number"] == 3 else (200, {"echo": body}, {})
    with HttpPool([server.address], in_flight=4, attempts=4, **QUICK) as pool:
        pool.set_touchstone("/", {"number": 99})
        *others, last = pool.ask("/", numbered(4))
    assert echoes(others) == [0, 1, 2] and isinstance(last, Refusal)


KEY = "sk-a-secret-of-many-letters-" + 100 * "x"


@pytest.mark.parametrize(
    "reply",
    [
        (400, {"error": {"message": 170 * "." + KEY}}, {}),  # cut within the key
        (200, f"<html>authorization: Bearer {KEY}</html>".encode(), {}),
        (503, {"error": {"message": KEY}}, {}),
    ],
    ids=["400", "no JSON", "503"],
)
def test_the_key_is_in_no_reason(server: FakeServer, reply) -> None:
    server.answer = lambda body: reply if body["number"] == 0 else (200, {}, {})
    with HttpPool([server.address], attempts=2, key=KEY, **QUICK) as pool:
        pool.set_touchstone("/", {"number": 1})
        try:
            said = str(pool.ask("/", numbered(2)))
        except EngineError as error:
            said = str(error)
    assert "***" in said and "sk-a" not in said


def test_an_endless_answer_is_not_read(server: FakeServer) -> None:
    server.answer = lambda body: (200, b"1" * (MAX_ANSWER_BYTES + 1), {})
    with HttpPool([server.address]) as pool:
        (answer,) = pool.ask("/", numbered(1))
    assert isinstance(answer, Refusal) and "more than 16,000,000 bytes" in answer.reason


def test_every_server_can_be_asked(server: FakeServer) -> None:
    with FakeServer(pages={"/page": [2]}) as other, HttpPool([server.address, other.address]) as pool:
        missing, page = pool.ask_every_server("/page", None)
        assert isinstance(missing, Refusal) and missing.status == 404
        assert isinstance(page, Answer) and page.payload == [2]
        assert len(pool.ask_every_server("/", {"number": 1})) == 2
        assert len(server.asked) == len(other.asked) == 1


def test_a_server_that_is_down_is_said_though_another_answers(server: FakeServer) -> None:
    with FakeServer() as other:
        down = other.address
    with HttpPool([server.address, down], attempts=3, **QUICK) as pool:
        answered, refused = pool.ask_every_server("/", {"number": 1})
        assert isinstance(answered, Answer)
        assert isinstance(refused, Refusal) and down in refused.reason


def test_an_address_that_is_none_is_one_sentence() -> None:
    with (
        HttpPool(["http://10.0.0.256:8000"], **QUICK) as pool,
        pytest.raises(EngineError, match=r"http://10\.0\.0\.256:8000: .*; check the address"),
    ):
        pool.ask("/", numbered(2))


def test_a_touchstone_that_one_server_cannot_answer_waits_for_the_other() -> None:
    """A broken server is free first; the one that works has its hands full."""
    begun = threading.Event()

    def slow(body: dict):
        begun.wait(10)
        time.sleep(0.2)
        return 200, {"echo": body}, {}

    with FakeServer() as broken, FakeServer(slow) as works:
        with HttpPool([broken.address, works.address], in_flight=1, attempts=2, **QUICK) as pool:
            pool.set_touchstone("/", {"number": 99})
            broken.answer = lambda body: begun.set() or (500, {}, {})
            answers = pool.ask("/", numbered(2))
        assert works.asked and all(isinstance(answer, Answer | Refusal) for answer in answers)
        assert any(isinstance(answer, Answer) for answer in answers)


def test_closing_drops_what_is_in_flight_at_once(server: FakeServer) -> None:
    server.answer = lambda body: "hang"
    pool = HttpPool([server.address])
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            pool.ask("/", numbered(3))
        except EngineError as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while len(server.asked) < 3:
        time.sleep(0.01)
    begun = time.monotonic()
    pool.close()
    pool.close()
    thread.join(5)
    assert len(raised) == 1 and "closed" in str(raised[0])
    assert time.monotonic() - begun < 5
    with pytest.raises(EngineError, match="closed"):
        pool.ask("/", numbered(1))
