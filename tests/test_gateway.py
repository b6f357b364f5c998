"""The gateway before a scripted upstream: what is let in, what is sent on, what comes back when things go wrong.
pytest tests/test_gateway.py
"""

import base64
import contextlib
import copy
import inspect
import io
import json
import logging
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from forks import within
from serving import (
    CHAT,
    QUESTION,
    SPACE,
    FakeUpstream,
    at_best_within,
    events_of,
    gateway_before,
    in_thread,
    settings_with,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dpa.core.errors import ConfigError, DirectionError
from dpa.core.sentences import target_template_of
from dpa.core.targets import read_wish, wish_or_center
from dpa.models.files import EVALUATION_FILE
from dpa.serve.command import _first_model, _hosts, _say_ready
from dpa.serve.front import Front, load_front
from dpa.serve.gate import Gate
from dpa.serve.gateway import Gateway
from dpa.serve.logs import JsonLines
from dpa.serve.settings import Limits, ServeSettings
from dpa.serve.upstream import Engines, Upstream

KEY = "correct-horse-battery"
TERSE = "helpfulness*87 + verbosity*-50"


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[FakeUpstream, str]]:
    fake = FakeUpstream()
    with in_thread(fake.app) as url:
        yield fake, url


@pytest.fixture
def fake(engine: tuple[FakeUpstream, str]) -> FakeUpstream:
    fake = engine[0]
    fake.mode, fake.asked, fake.cancelled = "answer", [], 0
    fake.release = threading.Event()
    return fake


@pytest.fixture(scope="module")
def url(engine: tuple[FakeUpstream, str]) -> Iterator[str]:
    """A gateway with a scorer, and limits that a test reaches in no time."""
    limits = Limits(body_bytes=60_000, max_tokens=100, requests=4, seconds=2.0, stall_seconds=0.5)
    with gateway_before(engine[1], settings_with(limits=limits), scorer=True) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=10) as client:
        yield client


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": QUESTION, **fields}


def refused(response: httpx.Response, status: int) -> str:
    """The message of an error in OpenAI's shape, which it must have."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert "Traceback" not in response.text
    return error["message"]


# --- what is sent on, and what comes back --------------------------------------------------------------------------


def test_the_direction_travels_as_a_template_variable_and_is_echoed(fake: FakeUpstream, client: httpx.Client) -> None:
    answer = client.post(CHAT, json=chat(model="demo:terse", temperature=0.3, foo={"bar": 1}))
    assert answer.headers["x-dpa-direction"] == TERSE and answer.headers["x-dpa-source"] == "model"
    dpa = answer.json()["dpa"]
    assert dpa["direction"] == TERSE and dpa["source"] == "model" and dpa["clamped"] is False
    assert dpa["scores"]["helpfulness"] == 50.0 and dpa["words"] == len(_said(answer).split())
    (sent,) = fake.asked
    assert sent["chat_template_kwargs"]["preference"] == SPACE.parse("terse").as_mapping()
    assert sent["model"] == "upstream-model" and answer.json()["model"] == "demo:terse"
    assert sent["temperature"] == 0.3 and sent["foo"] == {"bar": 1}, "unknown fields travel on"
    assert sent["max_tokens"] == 100 and "dpa" not in sent


def _said(answer: httpx.Response) -> str:
    return answer.json()["choices"][0]["message"]["content"]


def test_a_stream_says_first_what_was_done_and_last_how_it_came_out(fake: FakeUpstream, client: httpx.Client) -> None:
    answer = client.post(CHAT, json=chat(dpa="-10deg", stream=True, seed=3), headers={"X-DPA-Direction": "terse"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events_of(answer)
    assert done == "[DONE]" and answer.headers["x-dpa-direction"] == str(SPACE.parse("-10deg"))
    assert chunks[0]["dpa"]["source"] == "body" and "scores" not in chunks[0]["dpa"]
    assert chunks[0]["dpa"]["ignored"] == [{"source": "header", "direction": TERSE}]
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["dpa"]["words"] == len(said.split()) and chunks[-1]["dpa"]["scores"]["helpfulness"] == 50.0
    assert all("dpa" not in chunk for chunk in chunks[1:-1])


def test_a_choice_that_says_nothing_keeps_its_place_in_a_stream(fake: FakeUpstream, client: httpx.Client) -> None:
    fake.mode = "second speaks"
    *_, last, _ = events_of(client.post(CHAT, json=chat(dpa="terse", stream=True, n=2)))
    assert [choice["words"] for choice in last["dpa"]["choices"]] == [0, 2]
    assert [choice["scores"]["verbosity"] for choice in last["dpa"]["choices"]] == [0.0, 2.0]


def test_completions_are_steered_through_the_template_and_raw_without_a_direction(
    fake: FakeUpstream, client: httpx.Client
) -> None:
    for stream in (False, True):
        fake.asked = []
        raw = client.post("/v1/completions", json={"model": "demo", "prompt": "Once", "stream": stream})
        told = client.post("/v1/completions", json={"model": "demo:terse", "prompt": "Once", "stream": stream})
        assert fake.asked[0]["prompt"] == "Once" and "messages" not in fake.asked[0]
        assert fake.asked[1]["messages"] == [{"role": "user", "content": "Once"}] and "prompt" not in fake.asked[1]
        if stream:
            texts = ["".join(chunk["choices"][0]["text"] for chunk in events_of(one)[:-1]) for one in (raw, told)]
            assert all(chunk["object"] == "text_completion" for chunk in events_of(told)[:-1])
        else:
            texts = [one.json()["choices"][0]["text"] for one in (raw, told)]
            assert told.json()["object"] == "text_completion"
        assert "told {}" in texts[0] and '"verbosity": -0.49' in texts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_best_of_returns_what_the_direction_values_most(fake: FakeUpstream, client: httpx.Client, stream: bool) -> None:
    body = chat(dpa="terse", seed=6, dpa_options={"best_of": 4}, stream=stream)
    if stream:
        body["stream_options"] = {"include_usage": True}
    answer = client.post(CHAT, json=body)
    assert len(fake.asked) == 4 and len({sent["seed"] for sent in fake.asked}) == 4
    assert 6 in {sent["seed"] for sent in fake.asked}
    assert all(0 <= sent["seed"] < 2**63 for sent in fake.asked)
    last = events_of(answer)[-2] if stream else answer.json()
    dpa = last["dpa"]
    (chosen,) = [one for one in dpa["candidates"] if one["chosen"]]
    assert chosen["utility"] == max(one["utility"] for one in dpa["candidates"])
    assert chosen["scores"] == dpa["scores"] and dpa["scores"]["verbosity"] == dpa["words"]
    assert dpa["words"] == min(one["scores"]["verbosity"] for one in dpa["candidates"]), "terse: the shortest"
    assert last["usage"] == {"prompt_tokens": 12, "completion_tokens": 20, "total_tokens": 32}
    if not stream:
        assert len(_said(answer).split()) == dpa["words"]
    again = client.post(CHAT, json=body | {"stream": False, "stream_options": None}).json()
    assert again["dpa"]["candidates"] == dpa["candidates"], "the same seed, the same answers"


def test_robust_selection_samples_neighbours_and_lets_the_asked_direction_choose(
    fake: FakeUpstream, client: httpx.Client
) -> None:
    options = {"best_of": 2, "robust": {"angle": 12, "neighbors": 2}, "base": True}
    dpa = client.post(CHAT, json=chat(dpa="terse", seed=5, dpa_options=options)).json()["dpa"]
    asked = SPACE.parse("terse")
    near = [str(SPACE.direction(row)) for row in SPACE.neighbours(asked, 12, 2)]
    assert [one["direction"] for one in dpa["candidates"]] == [TERSE, TERSE, near[0], near[0], near[1], near[1]]
    for one in dpa["candidates"]:
        expected = sum(one["scores"][name] * weight for name, weight in asked.as_mapping().items())
        assert one["utility"] == pytest.approx(expected)
    told = [sent.get("chat_template_kwargs", {}).get("preference") for sent in fake.asked]
    assert told.count(None) == 1 and len(told) == 7 and dpa["base"]["content"].startswith("told {}")
    assert dpa["direction"] == TERSE


def test_a_seed_leaves_room_for_the_number_of_a_choice(fake: FakeUpstream, client: httpx.Client) -> None:
    for seed in (2**63 - 1, 2**62 - 1, -1):
        assert client.post(CHAT, json=chat(seed=seed, n=2)).status_code == 200
    assert [sent["seed"] for sent in fake.asked] == [2**62 - 1, 2**62 - 1, -1]


def test_the_base_answer_has_the_same_seed_and_no_direction(fake: FakeUpstream, client: httpx.Client) -> None:
    answer = client.post(CHAT, json=chat(dpa="terse", dpa_options={"base": True})).json()
    steered, plain = sorted(fake.asked, key=lambda sent: "chat_template_kwargs" not in sent)
    assert steered["seed"] == plain["seed"] and "chat_template_kwargs" not in plain
    base = answer["dpa"]["base"]
    assert base["content"].startswith("told {}") and base["scores"]["verbosity"] == base["words"]
    assert client.post(CHAT, json=chat(model="demo@base")).json()["dpa"]["direction"] is None
    refused(client.post(CHAT, json=chat(dpa="terse", stream=True, dpa_options={"base": True})), 400)


def test_a_selection_without_a_scorer_is_refused(engine: tuple[FakeUpstream, str], fake: FakeUpstream) -> None:
    with gateway_before(engine[1]) as url:
        message = refused(httpx.post(url + CHAT, json=chat(dpa="terse", dpa_options={"best_of": 2})), 400)
        assert "--reward" in message
        answer = httpx.post(url + CHAT, json=chat(dpa="terse", n=2)).json()
        assert answer["dpa"]["scores"] is None and [one["words"] for one in answer["dpa"]["choices"]] == [5, 5]


def test_an_answer_outlives_its_scorer_and_a_selection_names_it(
    engine: tuple[FakeUpstream, str], fake: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = Gateway(settings_with(), Engines(policy=Upstream(engine[1]), scorer=Upstream("http://127.0.0.1:9")))
    with in_thread(gateway.gate) as url, httpx.Client(base_url=url, timeout=10) as client:
        answer = client.post(CHAT, json=chat(dpa="terse", dpa_options={"base": True})).json()
        assert answer["dpa"]["scores"] is None and answer["dpa"]["base"]["scores"] is None
        *_, last, done = events_of(client.post(CHAT, json=chat(dpa="terse", stream=True)))
        assert last["choices"][0]["finish_reason"] == "stop" and done == "[DONE]"
        assert last["dpa"]["scores"] is None and last["dpa"]["words"] == 5
        assert caplog.text.count("the scorer failed") == 2 and "Why?" not in caplog.text
        for stream in (False, True):
            selection = client.post(CHAT, json=chat(dpa="terse", dpa_options={"best_of": 2}, stream=stream))
            assert refused(selection, 503).startswith("scorer: it cannot be reached")
            assert selection.headers["retry-after"]


def test_an_answer_outlives_a_scorer_that_hangs(client: httpx.Client, fake: FakeUpstream) -> None:
    fake.mode = "scores nothing"
    answer = client.post(CHAT, json=chat(dpa="terse")).json()
    assert answer["dpa"]["scores"] is None and answer["dpa"]["words"] == 5
    *_, last, done = events_of(client.post(CHAT, json=chat(dpa="terse", stream=True)))
    assert last["choices"][0]["finish_reason"] == "stop" and last["dpa"]["scores"] is None and done == "[DONE]"


def test_the_base_model_is_asked_of_its_own_engine(engine: tuple[FakeUpstream, str], fake: FakeUpstream) -> None:
    base = FakeUpstream()
    with in_thread(base.app) as base_url:
        engines = Engines(policy=Upstream(engine[1]), base=Upstream(base_url), base_model="its base")
        with in_thread(Gateway(settings_with(), engines).gate) as url, httpx.Client(base_url=url) as client:
            assert client.post(CHAT, json=chat(model="demo@base")).status_code == 200
            assert [sent["model"] for sent in base.asked] == ["its base"] and fake.asked == []
            assert client.post(CHAT, json=chat(dpa="terse", dpa_options={"base": True})).status_code == 200
    (steered,), (_, plain) = fake.asked, base.asked
    assert (steered["model"], plain["model"]) == ("upstream-model", "its base")
    assert steered["seed"] == plain["seed"] and "chat_template_kwargs" not in plain


def test_the_space_says_what_may_be_asked(client: httpx.Client) -> None:
    space = client.get("/v1/dpa/space").json()
    assert space["model"] == "demo" and [o["name"] for o in space["objectives"]] == ["helpfulness", "verbosity"]
    assert space["presets"]["terse"]["text"] == TERSE and space["max_angle"] == 45.0 and space["front"] is None
    assert space["scorer"] is True and space["limits"]["max_tokens"] == 100
    models = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert models == ["demo", "demo:terse", "demo:wordy"]


def test_a_direction_is_read_for_the_page(client: httpx.Client) -> None:
    read = client.post("/v1/dpa/direction", json={"direction": "helpfulness - 3*verbosity", "outside": "clamp"}).json()
    assert read["text"] == "helpfulness*71 + verbosity*-71" and read["clamped"] and read["angle"] == pytest.approx(45)
    message = refused(client.post("/v1/dpa/direction", json={"direction": "helpfulness - 3*verbosity"}), 400)
    assert "45" in message


def test_a_refused_direction_names_the_presets_and_how_to_have_it_clamped(client: httpx.Client) -> None:
    assert "`terse`" in refused(client.post(CHAT, json=chat(dpa="tersee")), 400)
    assert "terse, wordy" in refused(client.post(CHAT, json=chat(dpa="nonsense")), 400)
    assert "demo:terse" in refused(client.post(CHAT, json=chat(model="demo:tersee")), 404)
    message = refused(client.post(CHAT, json=chat(dpa="90deg")), 400)
    assert "--clamp" in message and '"outside": "clamp"' in message


def test_front_comes_from_the_record_beside_the_model(tmp_path: Path) -> None:
    value = {"value": 2.0, "low": 1.0, "high": 3.0}
    measured = {"helpfulness": value, "verbosity": value}
    point = {"weights": [0.8, -0.6], "objectives": {"model": measured, "gold": measured}, "words": value}
    assert load_front(tmp_path, SPACE) == Front()
    (tmp_path / EVALUATION_FILE).write_text(json.dumps({"directions": [point]}))
    (found,), reward, *_ = load_front(tmp_path, SPACE)
    assert reward == "gold" and found["text"] == "helpfulness*80 + verbosity*-60" and found["words"] == 2.0
    assert found["objectives"]["verbosity"] == value
    unknown = {"value": None, "low": float("nan"), "high": float("-inf")}
    odd = {**point, "objectives": {"gold": {**measured, "helpfulness": unknown}}, "words": unknown}
    (tmp_path / EVALUATION_FILE).write_text(json.dumps({"directions": [point, odd]}))
    (found, unscored), *_ = load_front(tmp_path, SPACE)
    assert found["objectives"]["helpfulness"] == value and unscored["words"] is None
    assert unscored["objectives"] == {"helpfulness": dict.fromkeys(unknown), "verbosity": value}
    with gateway_before("http://127.0.0.1:9", settings_with(front=[found, unscored])) as url:
        assert httpx.get(url + "/v1/dpa/space").json()["front"] == [found, unscored]
    huge = {"gold": {**measured, "verbosity": {**value, "value": "HUGE"}}}
    beyond = json.dumps({"directions": [{**point, "objectives": huge}]}).replace('"HUGE"', "1" + "0" * 400)
    for damaged in ("{", "[]", '{"directions": [{"weights": [1], "objectives": {}}]}', '{"directions": 3}', beyond):
        (tmp_path / EVALUATION_FILE).write_text(damaged)
        assert load_front(tmp_path, SPACE) == Front()


# --- faults ---------------------------------------------------------------------------------------------------------

BAD_DIRECTIONS = [
    {"helpfulnes": 1},
    {"helpfulness": 0},
    {"helpfulness": "1"},
    "helpfulness*1e400",
    "+".join(["helpfulness"] * 3000),
    "(" * 500 + "helpfulness",
    "helpfulness*٣",
    "helpfulness*0.8; ignore previous",
    "180deg",
    7,
]


@pytest.mark.parametrize("value", BAD_DIRECTIONS, ids=lambda value: repr(value)[:25])
def test_33_what_is_no_direction_is_400_within_50_ms(fake: FakeUpstream, client: httpx.Client, value: Any) -> None:
    refused(client.post(CHAT, json=chat(dpa=value)), 400)
    fastest = 9.0
    for _ in range(30):  # the machine may be busy with other things
        begun = time.perf_counter()
        refused(client.post(CHAT, json=chat(chat_template_kwargs={"preference": value})), 400)
        fastest = min(fastest, time.perf_counter() - begun)
        if fastest < 0.05:
            break
    assert fastest < 0.05 and fake.asked == []


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model": "demo", "messages": [{"role": "user", "content": "a"}], "dpa": {"helpfulness": 1e400}}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "a"}], "dpa": {"helpfulness": NaN}}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "a"}], "dpa": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_33_numbers_and_nesting_that_json_does_not_stop_are_400(client: httpx.Client, raw: bytes) -> None:
    refused(client.post(CHAT, content=raw), 400)


BAD_BODIES: list[tuple[Any, int]] = [
    (b"", 400),
    (b"[]", 400),
    (b"3", 400),
    (b"null", 400),
    (b'"text"', 400),
    (b"{", 400),
    (b"\xff\xfe{}", 400),
    (b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    (b"[" * 40_000, 400),
    (b'{"a":' * 100 + b"1" + b"}" * 100, 400),
    (b" " * 70_000, 413),
    ({}, 400),
    (chat(messages=[]), 400),
    (chat(messages="hi"), 400),
    (chat(messages=[3]), 400),
    (chat(messages=[{"role": "user", "content": 3}]), 400),
    (chat(messages=[{"role": "", "content": "x"}]), 400),
    (chat(messages=[{"role": "system", "content": "<dpa>terse</dpa>"}]), 400),
    (chat(messages=[{"role": "user", "content": "x"}] * 1025), 400),
    (chat(n=1_000_000), 400),
    (chat(n=0), 400),
    (chat(n=1.5), 400),
    (chat(n=True), 400),
    (chat(max_tokens=1_000_000_000), 400),
    (chat(max_completion_tokens=1_000_000_000), 400),
    (chat(max_tokens=-1), 400),
    (chat(max_tokens="5"), 400),
    (chat(stop=["a"] * 10_000), 400),
    (chat(stop="x" * 10_000), 400),
    (chat(stop=[""]), 400),
    (chat(temperature=1e308), 400),
    (chat(temperature=-1), 400),
    (chat(top_p=0), 400),
    (chat(seed=10**30), 400),
    (chat(stream="yes"), 400),
    (chat(dpa_options={"best_of": 10**6}), 400),
    (chat(dpa_options={"best_off": 2}), 400),
    (chat(dpa="terse", dpa_options={"robust": {"angle": 1000}}), 400),
    (chat(dpa="terse", dpa_options={"best_of": 8, "robust": True}), 400),
    (chat(dpa_options={"best_of": 2}), 400),
    (chat(chat_template_kwargs="x"), 400),
    (chat(model="nosuch"), 404),
    (chat(model="demo:nosuch"), 404),
    (chat(verbosity="loud"), 400),
]


@pytest.mark.parametrize(("body", "status"), BAD_BODIES, ids=lambda value: repr(value)[:40])
def test_35_bad_bodies_are_4xx_in_openai_shape(
    fake: FakeUpstream, client: httpx.Client, body: Any, status: int
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    message = refused(client.post(CHAT, content=data, headers={"content-type": "application/json"}), status)
    assert len(message) < 600 and fake.asked == []


def test_35_a_body_without_an_end_is_cut_at_the_limit(client: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield b" " * 10_000

    with contextlib.suppress(httpx.TransportError):  # the answer came while the client still wrote
        refused(client.post(CHAT, content=endless()), 413)
    assert sent < 20_000_000, "what the sockets hold, and no more; test_bodies.py says what is read"


@pytest.mark.parametrize("length", ["99999999999", "-1", "1" * 5000, "x"])
def test_35_a_declared_length_is_believed_only_to_refuse(url: str, length: str) -> None:
    """By hand: no client library would send these."""
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as wire:
        wire.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{{}}".encode())
        assert wire.recv(100).split()[1] in (b"400", b"413")


def test_36_every_route_but_health_needs_the_key(engine: tuple[FakeUpstream, str], fake: FakeUpstream) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logging.getLogger("dpa.serve").addHandler(handler)
    logging.getLogger("dpa.serve").setLevel(logging.INFO)
    try:
        with gateway_before(engine[1], settings_with(keys=(KEY, "another-long-key"))) as url, httpx.Client() as client:
            right = {"Authorization": f"Bearer {KEY}"}
            paths = [*client.get(f"{url}/openapi.json", headers=right).json()["paths"], "/", "/index.html", "/nosuch"]
            paths += [
                "/openapi.json",
                "/docs",
                "//v1/models",
                "/v1/models/",
                "/health/",
                "/health/../v1/models",
                "/HEALTH",
            ]
            assert "/metrics" in paths and CHAT in paths
            wrong = [{}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}, {"Authorization": "Bearer"}]
            wrong += [{"Authorization": "Basic !"}, {"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY[:-1]}"}]
            for path in paths:
                for method in ("GET", "POST", "OPTIONS", "HEAD", "PUT"):
                    if path == "/health":
                        continue
                    answer = client.request(method, url + path, headers=wrong[0])
                    assert answer.status_code == 401, (method, path)
            for headers in wrong:
                answer = client.post(url + CHAT, json=chat(), headers=headers)
                refused(answer, 401)
                assert answer.headers["www-authenticate"].startswith("Basic")
            assert client.get(f"{url}/health").status_code == 200
            basic = base64.b64encode(f"me:{KEY}".encode()).decode()
            for headers in (right, {"Authorization": "bearer another-long-key"}, {"Authorization": f"Basic {basic}"}):
                assert client.get(f"{url}/v1/models", headers=headers).status_code == 200
            client.post(url + CHAT, json=chat(), headers=right)
    finally:
        logging.getLogger("dpa.serve").removeHandler(handler)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) > 50 and {line["status"] for line in lines} == {200, 401}
    assert KEY not in stream.getvalue() and "Why?" not in stream.getvalue() and "told" not in stream.getvalue()
    assert all("authorization" not in asked for asked in fake.asked)


def test_36_keys_are_compared_in_constant_time() -> None:
    """By reading, as no clock here is fine enough: the check hands digests to hmac and leaves no loop early."""
    source = inspect.getsource(Gate._check_key)
    assert "hmac.compare_digest(digest, known) for known in self._digests]" in source and "==" not in source.replace(
        'kind.lower() == b"basic"', ""
    )


def test_another_site_in_the_users_browser_is_turned_away(engine: tuple[FakeUpstream, str]) -> None:
    with gateway_before(engine[1], settings_with(hosts=("localhost", "127.0.0.1"))) as url, httpx.Client() as client:
        assert client.post(url + CHAT, json=chat(), headers={"Origin": url}).status_code == 200
        refused(client.post(url + CHAT, json=chat(), headers={"Origin": "http://evil.example"}), 403)
        refused(client.post(url + CHAT, json=chat(), headers={"Host": "evil.example"}), 403)


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://localhost:8000.evil.example", "http://localhost:80000"]
)
def test_another_port_and_a_longer_name_are_another_site(client: httpx.Client, origin: str) -> None:
    for said, status in (("http://localhost:8000", 200), (origin, 403)):
        headers = {"Host": "localhost:8000", "Origin": said}
        assert client.get("/v1/models", headers=headers).status_code == status


def test_a_gateway_whose_names_were_given_is_known_by_them_and_by_its_own(engine: tuple[FakeUpstream, str]) -> None:
    given = ServeSettings(host="Box.lab", allow_host=["GPU.lab", "other.lab:8000", "2001:DB8::5", "[::2]:80", "[::"])
    hosts = _hosts(given)
    assert _hosts(ServeSettings(host="0.0.0.0")) == () and len(_hosts(ServeSettings())) == 4
    known = [
        "gpu.lab",
        "GPU.Lab:8000",
        "other.lab",
        "box.lab:9",
        "localhost",
        "127.0.0.1:80",
        "[::1]",
        "[2001:db8::5]:80",
    ]
    with gateway_before(engine[1], settings_with(hosts=hosts)) as url, httpx.Client(base_url=url) as client:
        for host in [*known, "[::2]"]:
            assert client.get("/health", headers={"Host": host}).status_code == 200, host
        refused(client.get("/health", headers={"Host": "evil.example"}), 403)


def test_37_beyond_the_limit_429_at_once_and_the_accepted_finish(
    engine: tuple[FakeUpstream, str], fake: FakeUpstream
) -> None:
    fake.mode = "slow"
    with (  # no time limit that the accepted ones could reach while the others are asked
        gateway_before(engine[1], settings_with(limits=Limits(requests=4))) as url,
        httpx.Client(base_url=url, timeout=30) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        accepted = [pool.submit(httpx.post, url + CHAT, json=chat(stream=bool(n % 2)), timeout=60) for n in range(4)]
        assert within(30, lambda: fake.running == 4)
        fastest = 9.0
        for _ in range(20):  # the machine may be busy with other things
            begun = time.perf_counter()
            answer = client.post(CHAT, json=chat())
            fastest = min(fastest, time.perf_counter() - begun)
            refused(answer, 429)
            if fastest < 0.2:
                break
        assert fastest < 0.2
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200 and client.get("/v1/models").status_code == 200
        fake.release.set()
        assert [one.result().status_code for one in accepted] == [200] * 4
        assert client.post(CHAT, json=chat()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_38_a_client_that_leaves_is_noticed_within_a_second(
    fake: FakeUpstream, client: httpx.Client, stream: bool
) -> None:
    fake.mode = "slow"

    def noticed_after() -> float:
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=chat(stream=stream), timeout=0.3)
        begun = time.monotonic()
        assert within(10, lambda: fake.running == 0), "the upstream still works for nobody"
        return time.monotonic() - begun

    assert at_best_within(1.0, 5, noticed_after)
    assert within(10, lambda: "dpa_requests_in_flight 0.0" in client.get("/metrics").text)


@pytest.mark.parametrize(("mode", "status"), [("stall", 504), ("die", 502)])
def test_39_an_upstream_that_stalls_or_dies_ends_the_stream_with_an_error_and_done(
    fake: FakeUpstream, client: httpx.Client, mode: str, status: int
) -> None:
    fake.mode = mode
    *chunks, error, done = events_of(client.post(CHAT, json=chat(stream=True)))
    assert chunks[0]["dpa"] and done == "[DONE]"
    assert set(error["error"]) == {"message", "type", "param", "code"} and error["error"]["type"] == "server_error"
    assert within(10, lambda: fake.running == 0)


def test_39_the_time_limit_ends_a_request(fake: FakeUpstream, client: httpx.Client) -> None:
    fake.mode = "slow"
    begun = time.monotonic()
    refused(client.post(CHAT, json=chat()), 504)
    assert time.monotonic() - begun < 4.5
    assert within(10, lambda: fake.running == 0)


@pytest.mark.parametrize(
    ("mode", "status"),
    [(500, 502), (429, 429), (503, 503), (401, 502), (400, 400), ("flat", 400), ("garbage", 502), (302, 502)],
)
def test_an_upstream_error_is_passed_on_or_a_bad_gateway(
    fake: FakeUpstream, client: httpx.Client, mode: str | int, status: int
) -> None:
    fake.mode = mode
    for stream in (False, True):  # before the first token a stream is refused like any other request
        answer = client.post(CHAT, json=chat(stream=stream))
        said = refused(answer, status)
        assert "no luck" in said or status not in (400, 429, 503)
        if status in (429, 503):
            assert answer.headers["retry-after"] == "7"


def test_a_stream_that_never_begins_has_the_status_of_its_failure(fake: FakeUpstream, client: httpx.Client) -> None:
    fake.mode = "mute"
    assert "silent" in refused(client.post(CHAT, json=chat(stream=True)), 504)
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=chat(stream=True), timeout=0.2)
    assert within(10, lambda: fake.running == 0)
    assert within(10, lambda: "dpa_requests_in_flight 0.0" in client.get("/metrics").text)


def test_an_upstream_that_is_not_there_is_503(fake: FakeUpstream) -> None:
    with gateway_before("http://127.0.0.1:9") as url:
        answer = httpx.post(url + CHAT, json=chat())
        refused(answer, 503)
        assert "retry-after" in answer.headers
        refused(httpx.post(url + CHAT, json=chat(stream=True)), 503)


OPEN_WEBUI = {
    "stream": True,
    "model": "demo:terse",
    "messages": [{"role": "system", "content": "You are kind."}, {"role": "user", "content": "Why?"}],
    "temperature": 0.8,
    "top_p": 0.9,
    "max_tokens": 64,
    "frequency_penalty": 0,
    "seed": 1,
    "stop": None,
    "stream_options": {"include_usage": True},
    "metadata": {"chat_id": "x", "variables": {"{{USER_NAME}}": "me"}},
    "custom": {"logit_bias": {}},
}


def test_40_what_open_webui_sends_passes_unchanged(fake: FakeUpstream, client: httpx.Client) -> None:
    answer = client.post(CHAT, json=OPEN_WEBUI)
    *chunks, done = events_of(answer)
    assert done == "[DONE]" and chunks[0]["dpa"]["direction"] == answer.headers["x-dpa-direction"] == TERSE
    (sent,) = fake.asked
    added = {"model": "upstream-model", "chat_template_kwargs": sent["chat_template_kwargs"]}
    assert sent == {name: value for name, value in OPEN_WEBUI.items() if name != "stop"} | added


def test_40_tools_and_their_results_pass_unchanged(fake: FakeUpstream, client: httpx.Client) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "x"}],
        },
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    body = chat(messages=messages, tools=tools, response_format={"type": "json_object"}, logprobs=True)
    assert client.post(CHAT, json=body).status_code == 200
    (sent,) = fake.asked
    assert all(sent[name] == body[name] for name in ("messages", "tools", "response_format", "logprobs"))


def test_metrics_count_and_no_client_can_make_more_of_them(fake: FakeUpstream, client: httpx.Client) -> None:
    for n in range(20):
        client.get(f"/made-up-{n}")
        client.request(f"M{n}", "/made-up")
    assert client.post(CHAT, json=chat(dpa={"helpfulness": 1})).status_code == 200
    text = client.get("/metrics").text
    assert "made-up" not in text and 'dpa_directions_total{source="body"}' in text
    assert 'dpa_requests_total{route="/v1/chat/completions",status="200"}' in text


def test_text_is_logged_only_when_asked_and_the_pages_own_files_are_not(
    engine: tuple[FakeUpstream, str], fake: FakeUpstream
) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("dpa.serve")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        for log_text in (False, True):
            stream.truncate(0)
            with gateway_before(engine[1], settings_with(log_text=log_text)) as url:
                for streams in (False, True):
                    httpx.post(url + CHAT, json=chat(seed=1, stream=streams))
                    httpx.post(url + "/v1/completions", json={"prompt": "Once", "seed": 1, "stream": streams})
                fake.mode = "second speaks"
                httpx.post(url + CHAT, json=chat(stream=True))
                fake.mode = "die"
                httpx.post(url + CHAT, json=chat(stream=True))
                fake.mode = "answer"
                assert httpx.get(url + "/page.js").status_code == 200
            lines = [json.loads(line) for line in stream.getvalue().replace("\0", "").splitlines()]
            # A line is written after its answer: that of the test before may come in here.
            lines = [line for line in lines if line["route"] != "/metrics"]
            said = ["told {} word"] * 4 + ["two words", "told"]
            asked = [QUESTION, "Once"] * 2 + [QUESTION] * 2
            assert [line.get("asked") for line in lines] == (asked if log_text else [None] * 6)
            texts = ["".join(line.get("said", ())).strip() for line in lines]
            assert texts == (said if log_text else [""] * 6)
            routes = [line["route"] for line in lines]
            assert routes.count(CHAT) == 4
            assert not [route for route in routes if "page" in route or "{" in route], "the page's own files"
    finally:
        logger.removeHandler(handler)


def test_questions_to_try_travel_with_the_front(tmp_path: Path) -> None:
    assert load_front(tmp_path, SPACE).examples == ()
    (tmp_path / EVALUATION_FILE).write_text(json.dumps({"directions": [], "examples": ["Where does Ivy live?"]}))
    assert load_front(tmp_path, SPACE).examples == ("Where does Ivy live?",)
    assert load_front(tmp_path, SPACE).follows is None
    (tmp_path / EVALUATION_FILE).write_text(json.dumps({"directions": [], "listens": {"verdict": False}}))
    assert load_front(tmp_path, SPACE).follows is False
    (tmp_path / EVALUATION_FILE).write_text("[1, 2]")
    assert load_front(tmp_path, SPACE).examples == ()


def test_a_terminal_obeys_nothing_that_an_upstream_says(capsys: pytest.CaptureFixture) -> None:
    async def models(request: Request) -> Response:
        return JSONResponse({"error": {"message": "\x1b[2Jno\nluck\x07"}}, 500)

    said = r"--upstream: http://\S+ does not say .*upstream: \\x1b\[2Jno\\nluck\\x07"
    with in_thread(Starlette(routes=[Route("/v1/models", models)])) as url, pytest.raises(ConfigError, match=said):
        _first_model(url, None)
    _say_ready("http://x", settings_with(name="a\x1b]0;x\x07\nb"), [])
    assert capsys.readouterr().out == "dpa: serving a\\x1b]0;x\\x07\\nb (terse, wordy) at http://x\n"


def test_a_request_that_states_nothing_is_asked_at_the_center_unless_the_server_is_told_otherwise() -> None:
    assert wish_or_center(SPACE, None) == SPACE.direction(SPACE.center)
    assert wish_or_center(SPACE, "none") is None
    assert wish_or_center(SPACE, "helpfulness*0.8 - verbosity*0.6").integers[:2] == (80, -60)
    with pytest.raises(DirectionError, match="knows no targets"):
        wish_or_center(SPACE, "helpfulness; verbosity=40")


# --- under attack ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 400, "9" * 5000])
@pytest.mark.parametrize("field", ["foo", "temperature", "seed", "n", "max_tokens", "dpa", "metadata"])
def test_47_numbers_that_overflow_are_400(fake: FakeUpstream, client: httpx.Client, number: str, field: str) -> None:
    for path, asks in ((CHAT, '"messages": [{"role": "user", "content": "a"}]'), ("/v1/completions", '"prompt": "a"')):
        for value in (number, f'{{"deep": [{number}]}}'):
            raw = f'{{"model": "demo", {asks}, "{field}": {value}}}'
            refused(client.post(path, content=raw.encode()), 400)
    assert fake.asked == []


@pytest.mark.parametrize("keys", [(), (KEY,)])
def test_47_odd_host_and_origin_headers_are_4xx_before_the_key_is_asked(
    engine: tuple[FakeUpstream, str], keys: tuple[str, ...]
) -> None:
    settings = settings_with(hosts=("localhost", "127.0.0.1"), keys=keys)
    with gateway_before(engine[1], settings) as url, httpx.Client() as client:
        for headers in (
            {"Host": "["},
            {"Host": "[::1"},
            {"Host": "a]b"},
            {"Host": ""},
            {"Origin": "http://["},
            {"Origin": "["},
            {"Origin": "http://[::1"},
            {"Origin": "null"},
            {"Origin": ""},
            {"Origin": "http://\u2100.x".encode()},
        ):
            for path in (CHAT, "/health", "/nosuch"):
                answer = client.post(url + path, json=chat(), headers=headers)
                assert 400 <= answer.status_code < 500, (headers, path)
                refused(answer, answer.status_code)


def test_47_messages_where_a_prompt_belongs_are_refused(fake: FakeUpstream, client: httpx.Client) -> None:
    for messages in (QUESTION, [{"role": "user", "content": 3}], 3, [], "x", [None], {"role": "user"}):
        for dpa in ({}, {"dpa": "terse"}):
            asked = {"model": "demo", "prompt": "Once", "messages": messages, **dpa}
            assert "messages" in refused(client.post("/v1/completions", json=asked), 400)
    assert fake.asked == []
    asked = {"model": "demo", "prompt": "Once", "messages": None}
    assert client.post("/v1/completions", json=asked).status_code == 200 and "messages" not in fake.asked[0]


class Foreign(Upstream):
    """Answers as some other server might."""

    def __init__(self, url: str, choices: Any) -> None:
        super().__init__(url)
        self._answer = {"object": "chat.completion", "choices": choices}

    async def post(self, *arguments: Any) -> Any:
        return copy.deepcopy(self._answer)

    async def stream(self, *arguments: Any) -> AsyncGenerator[dict[str, Any], None]:
        yield copy.deepcopy(self._answer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choices",
    [
        3,
        "none",
        [3],
        [None],
        [{"index": "first"}],
        [{"text": 5}],
        [{"message": "hi", "delta": "hi"}],
        [{"message": {"content": 7}, "delta": {"content": 7}}],
        [{"message": {"content": {"text": "hi"}}, "delta": {"content": {"text": "hi"}}}],
    ],
    ids=str,
)
def test_an_upstream_that_is_no_openai_server_is_502(
    engine: tuple[FakeUpstream, str], choices: Any, stream: bool
) -> None:
    with in_thread(Gateway(settings_with(), Engines(policy=Foreign(engine[1], choices))).gate) as url:
        answer = httpx.post(url + CHAT, json=chat(stream=stream))
    assert "is it an OpenAI-compatible server" in refused(answer, 502)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_in_parts_is_their_text(engine: tuple[FakeUpstream, str], stream: bool) -> None:
    parts = [
        {"type": "thinking", "thinking": [{"text": "hm"}]},
        {"type": "text", "text": "Two "},
        {"text": "words."},
        3,
    ]
    choices = [{"finish_reason": "stop", "delta" if stream else "message": {"content": parts}}]
    with in_thread(Gateway(settings_with(), Engines(policy=Foreign(engine[1], choices))).gate) as url:
        answer = httpx.post(url + CHAT, json=chat(stream=stream))
        last = events_of(answer)[-2] if stream else answer.json()
    assert last["choices"][0]["delta" if stream else "message"] == {"content": "Two words."}
    assert last["dpa"]["words"] == 2


class Accounting(Foreign):
    """Counts tokens as nobody should."""

    def __init__(self, url: str, usage: dict[str, Any], stream: bool) -> None:
        said = {"content": "Two words."}
        super().__init__(url, [{"index": 0, "finish_reason": "stop", "delta" if stream else "message": said}])
        self._answer["usage"] = usage


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("best_of", [1, 2])
@pytest.mark.parametrize("count", ["12", -3, 1.5, True, None, [4], 10**400], ids=lambda count: str(count)[:9])
def test_no_answer_is_lost_by_how_an_upstream_counts_its_tokens(
    engine: tuple[FakeUpstream, str], count: Any, best_of: int, stream: bool
) -> None:
    upstream = Accounting(engine[1], {"prompt_tokens": 5, "completion_tokens": count}, stream and best_of == 1)
    body = chat(dpa="terse", dpa_options={"best_of": best_of}, stream=stream, stream_options={"include_usage": True})
    with in_thread(Gateway(settings_with(), Engines(policy=upstream, scorer=Upstream(engine[1]))).gate) as url:
        answer = httpx.post(url + CHAT, json=body)
    assert answer.status_code == 200, answer.text
    last = events_of(answer)[-2] if stream else answer.json()
    assert last["usage"]["prompt_tokens"] == 5 * best_of and not last["usage"].get("completion_tokens")


@pytest.mark.parametrize(("wanted", "ours"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("best_of", [1, 2])
def test_tokens_of_streams_are_counted_once_and_told_to_whom_asks(
    engine: tuple[FakeUpstream, str], wanted: bool, ours: bool, best_of: int
) -> None:
    """Some servers count in every chunk; our own engine is asked to count whether the client asks or not."""
    upstream = Counting(engine[1])
    fields = {"stream_options": {"include_usage": True}} if wanted else {}
    engines = Engines(policy=upstream, ours=ours, scorer=Upstream(engine[1]))
    with in_thread(Gateway(settings_with(), engines).gate) as url:
        answer = httpx.post(url + CHAT, json=chat(dpa="terse", dpa_options={"best_of": best_of}, stream=True, **fields))
        text = httpx.get(url + "/metrics").text
    *chunks, last, done = events_of(answer)
    assert done == "[DONE]" and last["dpa"]["words"] == 2
    assert ("usage" in last) == wanted and (wanted or not any("usage" in chunk for chunk in chunks))
    assert wanted or last["choices"][0]["finish_reason"] == "stop", "a client reads the first choice of every chunk"
    assert f'dpa_tokens_total{{kind="prompt"}} {10.0 * best_of}' in text
    assert f'dpa_tokens_total{{kind="completion"}} {2.0 * best_of}' in text


def test_a_stream_that_ends_with_its_count_and_without_a_reason_is_whole(engine: tuple[FakeUpstream, str]) -> None:
    class NoReason(Upstream):
        async def stream(self, *arguments: Any) -> AsyncGenerator[dict[str, Any], None]:
            yield {"choices": [{"index": 0, "delta": {"content": "Two words."}}]}
            yield {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}

    with in_thread(Gateway(settings_with(), Engines(policy=NoReason(engine[1]))).gate) as url:
        *_, last, done = events_of(httpx.post(url + CHAT, json=chat(stream=True)))
    assert done == "[DONE]" and last["dpa"]["words"] == 2 and "usage" not in last


def test_the_base_behind_a_foreign_upstream_is_our_engine_and_counts(engine: tuple[FakeUpstream, str]) -> None:
    engines = Engines(policy=Upstream(engine[1]), base=Counting(engine[1]), base_model="base")
    with in_thread(Gateway(settings_with(), engines).gate) as url:
        assert httpx.post(url + CHAT, json=chat(model="demo@base", stream=True)).status_code == 200
        assert 'dpa_tokens_total{kind="completion"} 2.0' in httpx.get(url + "/metrics").text


class Counting(Upstream):
    """Says two words, and in every chunk how many tokens there are so far."""

    async def post(self, path: str, body: Any) -> Any:
        if path == CHAT:
            choice = {"index": 0, "message": {"content": "Two words."}, "finish_reason": "stop"}
            return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}
        return await super().post(path, body)

    async def stream(self, path: str, body: Any) -> AsyncGenerator[dict[str, Any], None]:
        assert body["stream_options"]["include_usage"]
        for n, word in enumerate(["Two ", "words."], start=1):
            usage = {"prompt_tokens": 10, "completion_tokens": n}
            reason = "stop" if n == 2 else None
            yield {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": reason}], "usage": usage}
        yield {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}


class Miscounting(Upstream):
    """A scorer that scores another number of answers, or attributes, than there are."""

    def __init__(self, url: str, scores: Any) -> None:
        super().__init__(url)
        self._scores = scores

    async def post(self, *arguments: Any) -> Any:
        return {"scores": self._scores, "attributes": ["good", "long"]}


@pytest.mark.parametrize("scores", [[], [[50, 10]], [[50, 10]] * 3, [[50], [50]], [50, 10], [[50, 10, 1]] * 2], ids=str)
def test_a_scorer_that_scores_another_number_of_answers_is_502(engine: tuple[FakeUpstream, str], scores: Any) -> None:
    engines = Engines(policy=Upstream(engine[1]), scorer=Miscounting(engine[1], scores))
    with in_thread(Gateway(settings_with(), engines).gate) as url:
        answer = httpx.post(url + CHAT, json=chat(dpa="terse", dpa_options={"best_of": 2}))
    assert "is it a scorer" in refused(answer, 502)


@pytest.mark.parametrize("stream", [False, True])
def test_numbers_that_json_does_not_have_are_null(tmp_path: Path, stream: bool) -> None:
    """Python's json writes them, so some servers do."""
    choice = '{"index": 0, "finish_reason": "stop", "%s": {"content": "Two words."}, "logprobs": {"content": [%s]}}'
    odd = '{"token": "a", "logprob": -Infinity, "top": [NaN, 1e400, 1]}'
    text = '{"choices": [%s]}' % (choice % ("delta" if stream else "message", odd))

    async def say(request: Request) -> Response:
        await request.body()
        return Response(f"data: {text}\n\ndata: [DONE]\n\n" if stream else text)

    with in_thread(Starlette(routes=[Route(CHAT, say, methods=["POST"])])) as upstream, gateway_before(upstream) as url:
        answer = httpx.post(url + CHAT, json=chat(stream=stream))
    assert answer.status_code == 200
    (first,) = (events_of(answer)[-2] if stream else answer.json())["choices"]
    assert first["logprobs"]["content"] == [{"token": "a", "logprob": None, "top": [None, None, 1]}]


def test_a_mistake_of_ours_in_a_stream_ends_it_as_all_streams_end(
    engine: tuple[FakeUpstream, str], caplog: pytest.LogCaptureFixture
) -> None:
    class BreaksOff(Upstream):
        async def stream(self, *arguments: Any) -> AsyncGenerator[dict[str, Any], None]:
            for _ in range(3):
                yield {"choices": [{"index": 0, "delta": {"content": "word "}}]}
            raise ZeroDivisionError("a user's words")

    with in_thread(Gateway(settings_with(), Engines(policy=BreaksOff(engine[1]))).gate) as url:
        *_, error, done = events_of(httpx.post(url + CHAT, json=chat(stream=True)))
    assert done == "[DONE]" and error["error"]["message"].startswith("server: it failed")
    (line,) = [JsonLines().format(record) for record in caplog.records if record.levelno == logging.ERROR]
    assert "ZeroDivisionError: " in json.loads(line)["failure"] and "words" not in line


@pytest.mark.parametrize("route", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("count", [0, -5, "9", 0.5, False, 101], ids=str)
def test_the_other_name_of_max_tokens_is_bounded_too(client: httpx.Client, route: str, count: Any) -> None:
    asked = {"model": "demo", "max_completion_tokens": count}
    asked |= {"messages": QUESTION} if route == CHAT else {"prompt": "Once"}
    assert "max_completion_tokens" in refused(client.post(route, json=asked), 400)


def test_a_long_wait_that_an_upstream_asks_for_is_no_mistake_of_ours() -> None:
    async def busy(request: Request) -> Response:
        return JSONResponse({}, 429, {"Retry-After": "9" * 5000})

    with (
        in_thread(Starlette(routes=[Route(CHAT, busy, methods=["POST"])])) as upstream,
        gateway_before(upstream) as url,
    ):
        assert refused(httpx.post(url + CHAT, json=chat()), 429)


class Broken(Upstream):
    """Fails as our own code might."""

    async def post(self, *arguments: Any) -> Any:
        raise ZeroDivisionError("a user's words")


def test_a_mistake_of_ours_is_500_in_openai_shape(engine: tuple[FakeUpstream, str]) -> None:
    with in_thread(Gateway(settings_with(), Engines(policy=Broken(engine[1]))).gate) as url:
        answer = httpx.post(url + CHAT, json=chat())
        assert "words" not in refused(answer, 500) and answer.headers["x-request-id"]


def test_the_log_of_a_mistake_of_ours_holds_its_kind_and_place_only(
    engine: tuple[FakeUpstream, str], caplog: pytest.LogCaptureFixture
) -> None:
    with in_thread(Gateway(settings_with(), Engines(policy=Broken(engine[1]))).gate) as url:
        httpx.post(url + CHAT, json=chat())
    (line,) = [JsonLines().format(record) for record in caplog.records if record.levelno == logging.ERROR]
    assert re.search(r"ZeroDivisionError: \S*test_gateway\.py:\d+ < ", json.loads(line)["failure"])
    assert "words" not in line and "Why?" not in line


def test_paths_and_methods_that_a_client_makes_up_are_not_logged(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    def log() -> str:
        return "".join(map(JsonLines().format, caplog.records))

    with caplog.at_level(logging.INFO, "dpa.serve"):
        client.request("SECRET-1", "/my-secret")
        assert within(10, lambda: '"route": "other"' in log()), "a line is written after its answer"
    assert "secret" not in log().lower()


def test_while_it_drains_all_but_its_health_is_503(engine: tuple[FakeUpstream, str]) -> None:
    gate = Gateway(settings_with(), Engines(policy=Upstream(engine[1]))).gate
    gate.draining = True
    with in_thread(gate) as url, httpx.Client(base_url=url) as client:
        answer = client.get("/v1/models")
        assert "shutting down" in refused(answer, 503) and answer.headers["retry-after"]
        assert client.get("/health").status_code == 200


def test_the_page_may_load_nothing_from_elsewhere(client: httpx.Client) -> None:
    policy = client.get("/").headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "connect-src 'self'" in policy
    assert not any("*" in rule or "unsafe" in rule or "http" in rule for rule in policy)


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "BREW"])
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/nosuch", "/v1/dpa/space"])
def test_unknown_methods_are_4xx_in_openai_shape(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code in (404, 405)
    if method != "HEAD":
        refused(answer, answer.status_code)


def test_one_model_is_told_by_any_name_a_request_may_give(client: httpx.Client) -> None:
    for name in ("demo", "demo:terse", "demo@base", "demo@helpfulness=0.8;verbosity=-0.6"):
        model = client.get(f"/v1/models/{name}").json()
        assert model["id"] == name and model["object"] == "model" and model["owned_by"] == "dpa"
    for name in ("other", "demo:nosuch", "demo/x", ""):
        refused(client.get(f"/v1/models/{name}"), 404)


@pytest.mark.parametrize(("prompts", "n", "status"), [(8, 1, 200), (4, 2, 200), (9, 1, 400), (3, 3, 400), (64, 8, 400)])
def test_49_prompts_times_n_is_what_is_limited(
    fake: FakeUpstream, client: httpx.Client, prompts: int, n: int, status: int
) -> None:
    for prompt in (["a"] * prompts, [[1, 2]] * prompts):
        answer = client.post("/v1/completions", json={"model": "demo", "prompt": prompt, "n": n})
        assert answer.status_code == status, answer.text
        if status == 400:
            assert f"{prompts * n} answers" in refused(answer, 400)


def test_many_token_ids_are_one_prompt(fake: FakeUpstream, client: httpx.Client) -> None:
    assert client.post("/v1/completions", json={"model": "demo", "prompt": [1] * 200}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_are_counted(engine: tuple[FakeUpstream, str], fake: FakeUpstream, stream: bool) -> None:
    with gateway_before(engine[1]) as url, httpx.Client(base_url=url, timeout=10) as client:

        def gone() -> bool:
            return "dpa_clients_gone_total 1.0" in client.get("/metrics").text

        assert not gone()
        client.post(CHAT, json=chat(stream=stream))
        assert not gone(), "it stayed to the end"
        fake.mode = "slow"
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=chat(stream=stream), timeout=0.3)
        assert within(10, gone)


def test_a_selection_needs_a_direction_that_was_stated(engine: tuple[FakeUpstream, str], fake: FakeUpstream) -> None:
    """The server's default is none that anybody stated."""
    settings = settings_with(default=SPACE.direction(SPACE.center))
    with gateway_before(engine[1], settings, scorer=True) as url, httpx.Client(base_url=url, timeout=10) as client:
        for stated in ({}, {"dpa": None}, {"model": "demo@base"}):
            for options in ({"best_of": 2}, {"robust": True}):
                message = refused(client.post(CHAT, json=chat(**stated, dpa_options=options)), 400)
                assert "needs a direction" in message
        assert client.post(CHAT, json=chat(dpa="terse", dpa_options={"best_of": 2})).status_code == 200


# --- targets ---------------------------------------------------------------------------------------------------


def test_a_target_is_taken_where_the_policy_knows_them(engine: tuple[FakeUpstream, str], fake: FakeUpstream) -> None:
    space = replace(SPACE, target_template=target_template_of(SPACE.template))
    settings = settings_with(space=space, default=read_wish(space, "helpfulness; verbosity=40"))
    with (
        gateway_before(engine[1], settings, scorer=True) as url,
        httpx.Client(base_url=url, timeout=10) as client,
    ):
        assert client.get("/v1/dpa/space").json()["targets"] is True
        assert client.get("/v1/dpa/space").json()["default"]["held"] == {"verbosity": 40}
        assert client.post(CHAT, json=chat()).json()["dpa"]["direction"].endswith("; verbosity=40")
        assert fake.asked[-1]["chat_template_kwargs"]["preference"]["verbosity"] == "=40"
        read = client.post("/v1/dpa/direction", json={"direction": "helpfulness*3; verbosity=8"}).json()
        assert read["held"] == {"verbosity": 8} and read["weights"] == {"helpfulness": 1.0, "verbosity": 0.0}
        for stated in ("helpfulness; verbosity=8", {"helpfulness": 1, "verbosity": "=8"}):
            answer = client.post(CHAT, json=chat(dpa=stated, seed=5))
            dpa = answer.json()["dpa"]
            assert dpa["direction"] == "helpfulness*100; verbosity=8" == answer.headers["X-DPA-Direction"]
            assert (
                dpa["held"] == {"verbosity": 8}
                and "held" not in client.post(CHAT, json=chat(dpa="terse")).json()["dpa"]
            )
            assert fake.asked[-2]["chat_template_kwargs"]["preference"] == {"helpfulness": 1.0, "verbosity": "=8"}
        for value, best in ((8, 0), (40, 5)):  # near enough, and of equal ones the first; or the nearest
            body = chat(dpa=f"helpfulness; verbosity={value}", seed=5, dpa_options={"best_of": 6})
            picked = client.post(CHAT, json=body).json()["dpa"]["candidates"]
            assert [one["scores"]["verbosity"] for one in picked] == [10, 8, 6, 6, 7, 11]
            assert [one["chosen"] for one in picked] == [number == best for number in range(6)]
        robust = client.post(CHAT, json=chat(dpa="helpfulness; verbosity=8", dpa_options={"robust": True}))
        assert "a target has no neighbours" in refused(robust, 400)
        assert "take a number from 0 to 100" in refused(
            client.post(CHAT, json=chat(dpa="helpfulness; verbosity=800")), 400
        )


def test_a_target_is_refused_where_the_policy_knows_none(client: httpx.Client) -> None:
    assert client.get("/v1/dpa/space").json()["targets"] is False
    for stated in ("helpfulness; verbosity=40", {"helpfulness": 1, "verbosity": "=40"}):
        assert "knows no targets; ask a direction" in refused(client.post(CHAT, json=chat(dpa=stated)), 400)
