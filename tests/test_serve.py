"""`dpa serve` as a user meets it: real processes, a real model, and the stock clients.
pytest tests/test_serve.py
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from forks import alive, interpreter, within
from hypothesis import HealthCheck, Phase, given, settings
from serving import CHAT, FakeUpstream, ServeProcess, at_best_within, children_of, in_thread
from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from dpa.cli.commands import app
from dpa.core.directions import DirectionSpace
from dpa.core.errors import UserError
from dpa.core.objective import Objective
from dpa.core.sections.reward import RewardTrainConfig
from dpa.models.policy import load_policy, save_policy
from dpa.sampling.drawing import uniforms
from dpa.serve.command import _server
from dpa.serve.settings import ServeSettings
from dpa.training.reward_rows import RatedExample
from dpa.training.reward_training import train_reward_model
from dpa.world.demo import START_MODEL

SPACE = DirectionSpace(
    objectives=(Objective("helpfulness", {"good": 1.0}), Objective("verbosity", {"long": 1.0})),
    presets={"terse": {"helpfulness": 0.8, "verbosity": -0.6}},
)
QUESTION: Any = [{"role": "user", "content": "What is the home of Ivy?"}]
ASKED = {"helpfulness": 0.8, "verbosity": -0.6}
TEXT = "helpfulness*80 + verbosity*-60"
SAMPLING: dict[str, Any] = {"seed": 5, "temperature": 0.9, "max_tokens": 24}
FORMS: dict[str, dict[str, Any]] = {
    "body mapping": {"extra_body": {"dpa": ASKED}},
    "body text": {"extra_body": {"dpa": "helpfulness*0.8 - verbosity*0.6"}},
    "template variable": {"extra_body": {"chat_template_kwargs": {"preference": ASKED}}},
    "header": {"extra_headers": {"X-DPA-Direction": "0.8*helpfulness - 0.6*verbosity"}},
    "tag": {"messages": [{"role": "system", "content": f"<dpa>{TEXT}</dpa>"}, *QUESTION]},
    "preset": {"model": "demo:terse"},
    "model": {"model": "demo@helpfulness=0.8;verbosity=-0.6"},
}
needs = {name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
         for name in ("openai", "litellm", "schemathesis")}  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's start model, made steerable."""
    folder = tmp_path_factory.mktemp("serve") / "policy"
    model, tokenizer = load_policy(START_MODEL)
    save_policy(model, tokenizer, folder, SPACE, {})
    return folder


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that learned that long is long."""
    folder = tmp_path_factory.mktemp("reward")
    draws = np.random.default_rng(0).integers(1, 20, 40)
    asked: Any = [{"role": "user", "content": "q"}]
    rows = [
        RatedExample(f"p{n}", asked, "ab " * int(words), (90.0 - 4 * words, 4.0 * words))
        for n, words in enumerate(draws)
    ]
    config = RewardTrainConfig(backbone=str(save_tiny_model(folder / "backbone")), method="ridge", max_length=256)
    train_reward_model(rows, ("good", "long"), {"good": (0.0, 4.0), "long": (0.0, 4.0)}, config, folder / "reward")
    return folder / "reward"


@pytest.fixture(scope="module")
def server(policy: Path, reward: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    log = tmp_path_factory.mktemp("log") / "log"
    how = ["--name", "demo", "--reward", reward, "--max-tokens", 64, "--threads", 1, "--header-timeout", 3]
    server = ServeProcess(policy, *how, log=log)
    try:
        yield server.wait()
    finally:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def told(server: ServeProcess) -> str:
    """What the model answers under ASKED; without a direction it says something else."""
    answers = [
        httpx.post(
            server.url + CHAT, json={"model": "demo", "messages": QUESTION, **SAMPLING, **dpa}, timeout=30
        ).json()
        for dpa in ({"dpa": ASKED}, {})
    ]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0] != texts[1]
    return texts[0]


# --- stock clients --------------------------------------------------------------------------------------------------


@needs["openai"]
@pytest.mark.parametrize("form", FORMS)
def test_40_the_openai_client_steers_in_every_form(server: ServeProcess, told: str, form: str) -> None:
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "demo", "messages": QUESTION, **SAMPLING, **FORMS[form]}
        raw = client.chat.completions.with_raw_response.create(**asked)
        answer = raw.parse()
        assert raw.headers["x-dpa-direction"] == answer.model_extra["dpa"]["direction"] == TEXT
        assert answer.choices[0].message.content == told
        stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        assert stream.response.headers["x-dpa-direction"] == chunks[0].model_extra["dpa"]["direction"] == TEXT
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == told
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
        assert chunks[-1].model_extra["dpa"]["words"] == len(told.split())


@needs["openai"]
def test_40_the_openai_client_understands_refusals_models_and_completions(server: ServeProcess) -> None:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["demo", "demo:terse"]
        with pytest.raises(openai.BadRequestError, match="nosuch"):
            client.chat.completions.create(model="demo", messages=QUESTION, extra_body={"dpa": {"nosuch": 1}})
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-4", messages=QUESTION)
        low = client.chat.completions.create(model="demo", messages=QUESTION, verbosity="low", max_tokens=2)
        assert low.model_extra["dpa"]["source"] == "verbosity"
        assert low.model_extra["dpa"]["direction"] == "helpfulness*71 + verbosity*-71"
        raw = client.completions.create(model="demo", prompt="Once", max_tokens=3)
        assert raw.object == "text_completion" and raw.usage.completion_tokens <= 3


@needs["litellm"]
def test_40_litellm_steers_in_every_form(server: ServeProcess, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    for form, fields in FORMS.items():
        asked = {"messages": QUESTION, **SAMPLING, **fields, "model": f"openai/{fields.get('model', 'demo')}"}
        where = {"api_base": f"{server.url}/v1", "api_key": "none"}
        answer = litellm.completion(**asked, **where)
        assert answer.choices[0].message.content == told, form
        assert answer._hidden_params["additional_headers"]["llm_provider-x-dpa-direction"] == TEXT
        chunks = litellm.completion(**asked, **where, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == told, form


def test_the_same_folder_is_steered_by_stock_transformers_without_a_gateway(policy: Path, server: ServeProcess) -> None:
    """Greedy, as its seeds are not honoured: what it says under a direction is what the gateway's engine says."""
    stock = subprocess.Popen(
        [
            interpreter(),
            Path(sys.executable).with_name("transformers"),
            "serve",
            str(policy),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert stock.stdout is not None
    try:
        address = next(line.split(" on ")[1].split()[0] for line in stock.stdout if "running on http" in line)
        asked = {"messages": QUESTION, "max_tokens": 24, "temperature": 0}
        texts = {}
        for name, kwargs in {"told": {"preference": ASKED}, "not told": {}}.items():
            body = {**asked, "chat_template_kwargs": kwargs}
            theirs = httpx.post(address + CHAT, json={**body, "model": str(policy)}, timeout=60)
            stated = {} if kwargs else {"dpa": None}  # the gateway would ask at the center
            ours = httpx.post(server.url + CHAT, json={**body, **stated, "model": "demo"}, timeout=60)
            texts[name] = theirs.json()["choices"][0]["message"]["content"]
            assert texts[name] == ours.json()["choices"][0]["message"]["content"]
        assert texts["told"] != texts["not told"]
    finally:
        stock.kill()
        stock.communicate()


def _serves(server: ServeProcess) -> bool:
    try:
        return httpx.get(f"{server.url}/v1/models", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


# --- options, and what a stranger may send ----------------------------------------------------------------------------


def test_a_selection_is_made_by_the_real_reward_model(server: ServeProcess) -> None:
    options = {"best_of": 3, "robust": {"neighbors": 2}, "base": True}
    body = {"model": "demo", "messages": QUESTION, **SAMPLING, "dpa": ASKED, "dpa_options": options}
    dpa = httpx.post(server.url + CHAT, json=body, timeout=60).json()["dpa"]
    utilities = [one["utility"] for one in dpa["candidates"]]
    (chosen,) = [one for one in dpa["candidates"] if one["chosen"]]
    assert len(utilities) == 9 and chosen["utility"] == max(utilities) > min(utilities)
    assert set(dpa["scores"]) == set(dpa["base"]["scores"]) == {"helpfulness", "verbosity"}


@needs["schemathesis"]
def test_35_schemathesis_finds_no_5xx_from_the_servers_own_description(server: ServeProcess) -> None:
    """Bounded: a few dozen generated requests, valid and not, to every operation."""
    import schemathesis
    from schemathesis import GenerationMode

    tried: set[int] = set()
    for found in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():
        operation = found.ok()
        positive = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
        negative = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
        cases = positive | negative if operation.method == "post" else positive

        @settings(
            max_examples=25 if operation.method == "post" else 3,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def call(case: Any) -> None:
            response = case.call(timeout=30)
            tried.add(response.status_code)
            assert response.status_code < 500, (case.method, case.path, response.status_code, response.text[:300])
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        call()
    assert {200, 400} <= tried
    valid = {"model": "demo", "messages": QUESTION, "max_tokens": 2}
    assert httpx.post(server.url + CHAT, json=valid, timeout=30).status_code == 200, "it still serves"


# --- starting and stopping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a MODEL"),
        (["nowhere"], "no folder"),
        (["--upstream", "http://127.0.0.1:9"], "--space"),
        (["--upstream", "localhost:8001", "--space", "POLICY"], "--upstream: 'localhost:8001' is no address; write"),
        (["--upstream", "http://localhost:99999", "--space", "POLICY"], "99999' is no address; write"),
        (["POLICY", "--host", "0.0.0.0"], "key is needed"),
        (["POLICY", "--direction", "helpfulnes"], "helpfulness"),
        (["POLICY", "--reward", "nowhere"], "--reward: model: no folder at nowhere"),
        (["--upstream", "http://127.0.0.1:9", "--space", "POLICY"], "--upstream-model"),
    ],
)
def test_36_a_users_mistake_is_one_sentence_and_exit_code_2(policy: Path, arguments: list[str], message: str) -> None:
    given = [str(policy) if argument == "POLICY" else argument for argument in arguments]
    result = CliRunner().invoke(app, ["serve", *given, "--port", "0"])
    assert isinstance(result.exception, UserError) and result.exception.exit_code == 2
    assert message in str(result.exception) and "\n" not in str(result.exception)


def test_a_policy_of_the_hub_is_served_under_its_ids_name(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpa.serve.logs.log_json", lambda: None)
    engine: Any = SimpleNamespace(socket="nowhere", ready=threading.Event())
    served, _ = _server(ServeSettings(model="me/pol-7b"), (), str(policy), SPACE, None, {"policy": engine})
    assert served.name == "pol-7b"


def test_41_tokens_that_cannot_be_read_end_no_engine(server: ServeProcess) -> None:
    (engine,) = [child for child in children_of(server.process.pid) if alive(child)]
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for prompt in ([True], [], [10**9], [1.5], [[]], ""):
            answer = client.post("/v1/completions", json={"prompt": prompt, "dpa": None, "max_tokens": 1})
            assert answer.status_code == 400 and "prompt" in answer.json()["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": [5, 6], "dpa": None, "max_tokens": 1}).status_code == 200
    assert engine in children_of(server.process.pid)


def test_48_half_a_header_is_answered_in_time(server: ServeProcess) -> None:
    place = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.create_connection(place, timeout=30) as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\nHo")
        assert b" 408 " in wire.recv(1000)


def test_an_engine_that_cannot_load_its_model_ends_the_server_with_its_sentence(policy: Path, tmp_path: Path) -> None:
    """What only the engine finds out: the weights are not those of the configuration."""
    broken = tmp_path / "broken"
    shutil.copytree(policy, broken)
    (broken / "config.json").write_text('{"model_type": "unheard-of"}')
    server = ServeProcess(broken, log=tmp_path / "log")
    assert server.process.wait(120) == 2
    server.stop()
    assert server.log is not None
    (line,) = [line for line in server.log.read_text().splitlines() if line.startswith("dpa:")]
    assert "does not load" in line


def test_36_it_listens_on_this_machine_only_and_logs_no_text(server: ServeProcess, told: str) -> None:
    port = int(server.url.rpartition(":")[2])
    assert server.url.startswith("http://127.0.0.1:")
    addresses = {
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    }
    assert f"0100007F:{port:04X}" in addresses and f"00000000:{port:04X}" not in addresses
    assert server.log is not None
    log = server.log.read_text()
    assert '"route": "/v1/chat/completions"' in log and "Ivy" not in log and told not in log
    assert all(json.loads(line) for line in log.splitlines())


def test_the_base_model_answers_from_an_engine_of_its_own(policy: Path, tmp_path: Path) -> None:
    how = ["--base", save_tiny_model(tmp_path / "base"), "--name", "demo", "--direction", "none", "--threads", 1]
    server = ServeProcess(policy, *how, log=tmp_path / "log")
    try:
        server.wait()
        assert len(children_of(server.process.pid)) == 2
        texts = []
        for model in ("demo", "demo@base"):
            body = {"model": model, "messages": QUESTION, **SAMPLING}
            answer = httpx.post(server.url + CHAT, json=body, timeout=30).json()
            texts.append(answer["choices"][0]["message"]["content"])
        assert texts[0] != texts[1], "neither is told a direction"
    finally:
        server.stop(signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_39_a_second_signal_ends_at_once(policy: Path, tmp_path: Path, number: signal.Signals) -> None:
    fake = FakeUpstream()
    fake.mode = "slow"
    with in_thread(fake.app) as upstream, ThreadPoolExecutor() as pool:
        server = ServeProcess("--upstream", upstream, "--space", policy, log=tmp_path / "log").wait()
        try:
            answer = pool.submit(httpx.post, server.url + CHAT, json={"messages": QUESTION}, timeout=60)
            assert within(20, lambda: fake.running == 1)
            server.process.send_signal(signal.SIGTERM)
            assert within(20, lambda: not _serves(server)), "the first signal has arrived"
            assert not within(0.5, lambda: server.process.poll() is not None), "it waits for what it accepted"
            server.process.send_signal(number)
            assert server.process.wait(15) == 128 + number
            assert isinstance(answer.exception(), httpx.TransportError)
        finally:
            server.stop(signal.SIGKILL)


def test_39_sigterm_drains_refuses_new_work_exits_0_and_leaves_no_child(tmp_path: Path) -> None:
    """An engine whose answers take seconds: one is being written when the signal comes, and it is finished.

    The model finds all 261 tokens as likely, and the seed is one that does not draw the end token for long.
    """
    folder = tmp_path / "slow"
    model = tiny_model(context=4096)
    model.lm_head.weight.data.zero_()
    save_policy(model, tiny_tokenizer(), folder, SPACE, {})
    seed = next(seed for seed in count() if not (np.floor(uniforms(seed, 2000) * 261) == 1).any())
    server = ServeProcess(folder, "--name", "slow", "--threads", 1, log=tmp_path / "log").wait()
    try:
        (engine,) = children_of(server.process.pid)
        metrics = f"{server.url}/metrics"
        body = {"model": "slow", "messages": QUESTION, "temperature": 1, "seed": seed, "max_tokens": 2000}

        def noticed_after() -> float:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(server.url + CHAT, json=body, timeout=0.5)
            begun = time.monotonic()
            assert within(10, lambda: 'dpa_engine_answers{state="running"} 0.0' in httpx.get(metrics).text)
            return time.monotonic() - begun

        assert at_best_within(1.0, 5, noticed_after)  # fault 38, through both processes
        accepted: list[httpx.Response] = []
        work = threading.Thread(
            target=lambda: accepted.append(httpx.post(server.url + CHAT, json={**body, "max_tokens": 1500}, timeout=60))
        )
        work.start()
        assert within(20, lambda: re.search(r'answers{state="running"} [1-9]', httpx.get(metrics).text))
        server.process.send_signal(signal.SIGTERM)
        assert within(20, lambda: not _serves(server))
        assert server.process.poll() is None, "it waits for what it accepted"
        work.join()
        assert accepted[0].status_code == 200 and accepted[0].json()["usage"]["completion_tokens"] == 1500
        assert server.process.wait(60) == 0
        assert not alive(engine)
    finally:
        server.stop(signal.SIGKILL)
