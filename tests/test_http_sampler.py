"""Sampling over HTTP: the same records, a direction that arrives, servers that must not be trusted, and a real server.
pytest tests/test_http_sampler.py

The last tests start `transformers serve` on loopback (twice, about 10 s each); skipped where it is not installed.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_server import ChatServer, FakeServer
from fakes import all_rows, prompts_of, space_of
from forks import interpreter
from tiny_models import CHAT_TEMPLATE, SPACE, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from dpa.core.config import parse_config
from dpa.core.errors import ConfigError, EngineError
from dpa.core.records import Sample, SampleRequest
from dpa.core.sections.rollout import EngineConfig, HttpEngineConfig, RolloutConfig
from dpa.models.files import folder_revision
from dpa.models.policy import encode_prompt, load_policy, make_steerable, save_policy
from dpa.remote.server_process import ServerProcess
from dpa.sampling.engines import build_samplers
from dpa.sampling.http_sampler import HttpEngine
from dpa.stages.rollout import rollout
from dpa.storage.run_folder import StageFolder

START_MODEL = Path(__file__).parents[1] / "src" / "dpa" / "world" / "assets" / "start_model"
QUESTIONS = ["Why?", "What is this long thing over there, and who made it?", "Hello there"]
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
PROBES = 8 + 2 + 1
"""Requests by which vLLM is got to know: the edge of the cone, no direction, eight seeds, eight choices of one."""


def asked(seeds: tuple[int, ...] = (5, 2**62), direction: tuple[float, float] | None = (0.8, -0.6)) -> list:
    return [SampleRequest([{"role": "user", "content": text}], direction, seeds) for text in QUESTIONS]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("http") / "policy"
    save_policy(tiny_model(), tiny_tokenizer(), folder, SPACE, {})
    return folder


@pytest.fixture
def serve(policy: Path) -> Iterator[Callable[..., FakeServer]]:
    """Servers of the policy that say they are vLLM; arguments go to ChatServer."""
    started: list[FakeServer] = []

    def start(
        owned_by: str = "vllm", listed: dict | None = None, pages: dict | None = None, **wrong: str
    ) -> FakeServer:
        tokenizer = AutoTokenizer.from_pretrained(policy)

        def count(messages: list, preference: dict | None) -> int:
            text = tokenizer.apply_chat_template(
                messages, preference=preference, tokenize=False, add_generation_prompt=True
            )
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        models = {"data": [listed or {"id": str(policy), "owned_by": owned_by, "max_model_len": 200}]}
        started.append(FakeServer(ChatServer(count, **wrong), {"/v1/models": models, **(pages or {})}))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def config_of(*servers: FakeServer | str, **http: Any) -> RolloutConfig:
    addresses = [server if isinstance(server, str) else server.address for server in servers]
    how = HttpEngineConfig(servers=addresses, **{"attempts": 3, **http})
    return RolloutConfig(
        directions=2,
        samples=2,
        prompts_per_shard=4,
        max_new_tokens=24,
        temperature=0.9,
        top_p=0.95,
        max_reject_rate=1.0,
        engine=EngineConfig(kind="http", http=how),
    )


# What is asked and what comes back


def test_every_sample_is_a_request_of_its_own_with_its_seed_and_direction(policy: Path, serve: Callable) -> None:
    server = serve()
    with build_samplers(policy, config_of(server)) as samplers:
        answers = samplers[0].sample(asked())
        assert {sampler.revision for sampler in samplers} == {folder_revision(policy)}
    preference = {"helpfulness": 0.8, "verbosity": -0.6}
    for question, samples in zip(QUESTIONS, answers, strict=True):
        texts = [f"{question[-12:]} {json.dumps(preference)} {seed % 2**31}" for seed in (5, 2**62)]
        assert samples == [Sample(text, 7, "stop") for text in texts]
    body = next(body for body in server.bodies()[PROBES:] if body["messages"][0]["content"] == "Why?")
    assert body == {
        "model": str(policy),
        "messages": [{"role": "user", "content": "Why?"}],
        "temperature": 0.9,
        "top_p": 0.95,
        "max_tokens": 24,
        "seed": body["seed"],
        "chat_template_kwargs": {"preference": preference},
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert len(server.asked) == PROBES + 6


@pytest.mark.parametrize(("kind", "many"), [("vllm", "ids"), ("sglang", "seeds")])
def test_samples_of_a_prompt_are_one_request_where_the_server_gives_choices_that_differ(
    policy: Path, serve: Callable, kind: str, many: str
) -> None:
    server = serve(owned_by=kind, many=many, refuses="a")
    server.answer._refuses = None
    with build_samplers(policy, config_of(server)) as samplers:
        answers = samplers[0].sample(asked())
        server.answer._refuses = QUESTIONS[0]
        with pytest.raises(RuntimeError, match="I do not answer that"):
            samplers[0].sample([SampleRequest(asked()[0].messages, (0.8, -0.6), (77, 78))])
    preference = {"helpfulness": 0.8, "verbosity": -0.6}
    for question, samples in zip(QUESTIONS, answers, strict=True):
        assert [sample.text for sample in samples] == [
            f"{question[-12:]} {json.dumps(preference)} {5 + number}" for number in range(2)
        ]
        counted = [3, 4] if many == "ids" else [len(sample.text) + 1 for sample in samples]  # one token is one byte
        assert [sample.tokens for sample in samples] == counted
    assert [body["n"] for body in server.bodies()[PROBES:]] == [2, 2, 2, 2]


@pytest.mark.parametrize("many", ["same", "refused"])
def test_choices_that_do_not_differ_are_asked_for_one_by_one(policy: Path, serve: Callable, many: str) -> None:
    server = serve(owned_by="sglang", many=many)
    with build_samplers(policy, config_of(server)) as samplers:
        answers = samplers[0].sample(asked())
    assert all("n" not in body for body in server.bodies()[PROBES:])
    assert len(server.asked) == PROBES + 6 and all(len({s.text for s in samples}) == 2 for samples in answers)


def test_without_a_direction_no_preference_is_sent(policy: Path, serve: Callable) -> None:
    server = serve()
    with build_samplers(policy, config_of(server)) as samplers:
        samplers[0].sample(asked(direction=None))
    assert all("chat_template_kwargs" not in body for body in server.bodies()[PROBES:])


@pytest.mark.parametrize(
    ("kind", "pages", "extra"),
    [
        ("sglang", {}, {"top_k", "min_p", "repetition_penalty"}),
        ("llamacpp", {}, {"top_k", "min_p", "repeat_penalty", "reasoning_format"}),
        ("somebody", {}, set()),
        ("somebody", {"/openapi.json": {"paths": {"/load_model": {}}}}, {"generation_config"}),
        ("dpa", {"/openapi.json": {"paths": {"/v1/dpa/space": {}}}}, set()),
        ("somebody", {"/openapi.json": b"<html>no such page</html>"}, set()),
        ("somebody", {"/openapi.json": (403, {"error": "closed"})}, set()),
    ],
    ids=["sglang", "llama.cpp", "unknown", "transformers", "dpa", "a page of its own", "a closed page"],
)
def test_each_kind_of_server_gets_the_fields_it_knows(
    policy: Path, serve: Callable, kind: str, pages: dict, extra: set
) -> None:
    server = serve(owned_by=kind, pages=pages)
    with build_samplers(policy, config_of(server)) as samplers:
        samplers[0].sample(asked())
    common = {"model", "messages", "temperature", "top_p", "max_tokens", "seed", "chat_template_kwargs"}
    body = server.bodies()[-1]
    assert set(body) == common | extra
    if "generation_config" in extra:
        how = json.loads(body["generation_config"])
        assert (how["do_sample"], how["top_k"], how["temperature"], how["eos_token_id"]) == (True, 0, 0.9, [1])


@pytest.mark.parametrize(
    "started_with",
    [{"owned_by": "vllm", "max_model_len": 200}, {"owned_by": "llamacpp", "meta": {"n_ctx": 200}}],
    ids=["vllm", "llama.cpp"],
)
def test_the_context_bounds_a_response_and_a_prompt_that_fills_it_gets_nothing(
    policy: Path, serve: Callable, started_with: dict
) -> None:
    """The server was started with 200 tokens; the policy has 256. One token is one byte."""
    server = serve(listed={"id": str(policy), **started_with})
    long, too_long = "x" * 180, "x" * 199
    with build_samplers(policy, config_of(server)) as samplers:
        requests = [
            SampleRequest([{"role": "user", "content": text}], None, (1,)) for text in (long, too_long, "\ud800")
        ]
        answers = samplers[0].sample(requests)
    assert [len(samples) for samples in answers] == [1, 0, 0]
    tokenizer = tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    room = 200 - len(encode_prompt(tokenizer, SPACE, requests[0].messages, None))
    assert server.bodies()[-1]["max_tokens"] == min(24, room)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_SYSTEM], ids=["system", "no-system"])
@pytest.mark.parametrize("system", [None, "", "Be kind."])
def test_steered_by_the_system_message_the_server_sees_the_same_prompt(
    tmp_path: Path, template: str, system: str | None
) -> None:
    """A server that knows nothing of `preference` and renders the messages by the policy's own template."""
    save_policy(tiny_model(), tiny_tokenizer(template), tmp_path / "policy", SPACE, {})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    seen: list[str] = []

    def count(messages: list, preference: dict | None) -> int:
        seen.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return len(tokenizer(seen[-1], add_special_tokens=False)["input_ids"])

    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": "Why?"})
    direction = (0.8, -0.6)
    pages = {"/v1/models": {"data": [{"id": "alias"}]}}
    with (
        FakeServer(ChatServer(count), pages) as server,
        build_samplers(tmp_path / "policy", config_of(server, steer="system", model="alias")) as samplers,
    ):
        (samples,) = samplers[0].sample([SampleRequest(messages, direction, (1,))])
    assert len(samples) == 1
    ids = encode_prompt(tokenizer, SPACE, messages, direction)
    assert tokenizer(seen[-1], add_special_tokens=False)["input_ids"] == ids
    assert "chat_template_kwargs" not in server.bodies()[-1]


# Servers that must not be trusted


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("ignores-preference", "chat template ignores `preference`.*steer to system"),
        ("no-usage", "reports no usage.prompt_tokens"),
        ("greedy", "says the same to 8 seeds"),
        ("no-choice", "has not exactly one finished choice"),
        ("two-choices", "has not exactly one finished choice"),
        ("tool", "has not exactly one finished choice"),
        ("reasoning", "tool calls or reasoning"),
        ("reasoning_content", "tool calls or reasoning"),
    ],
)
def test_a_server_that_cannot_be_trusted_is_refused_before_anything_is_sampled(
    policy: Path, serve: Callable, wrong: str, message: str
) -> None:
    with (
        pytest.raises(EngineError, match=message) as caught,
        build_samplers(policy, config_of(serve(), serve(wrong=wrong))),
    ):
        raise AssertionError("never entered")
    assert "\n" not in str(caught.value)


def test_a_server_of_another_template_is_refused(policy: Path, serve: Callable) -> None:
    server = serve()
    right = server.answer
    server.answer = lambda body: right({**body, "messages": [*body["messages"], {"role": "user", "content": "more"}]})
    with (
        pytest.raises(EngineError, match="serves another model or template"),
        build_samplers(policy, config_of(server)),
    ):
        raise AssertionError("never entered")


def test_a_server_of_another_policy_is_refused_and_an_alias_must_be_named(policy: Path, serve: Callable) -> None:
    server = serve(listed={"id": "my-model", "root": "/elsewhere/iter_1/policy", "owned_by": "vllm"})
    with (
        pytest.raises(EngineError, match=r"do not list the policy .*they list my-model"),
        build_samplers(policy, config_of(server)),
    ):
        raise AssertionError("never entered")
    with build_samplers(policy, config_of(server, model="my-model")) as samplers:
        assert all(samplers[0].sample(asked()))
    rooted = serve(listed={"id": "my-model", "root": str(policy), "owned_by": "vllm"})
    with build_samplers(policy, config_of(rooted)) as samplers:
        assert all(samplers[0].sample(asked()))
    assert {body["model"] for body in server.bodies() + rooted.bodies()} == {"my-model"}


def test_servers_that_differ_are_refused(policy: Path, serve: Callable) -> None:
    with (
        pytest.raises(ConfigError, match=r"its servers differ \(.*sglang, vllm\)"),
        build_samplers(policy, config_of(serve(), serve(owned_by="sglang"))),
    ):
        raise AssertionError("never entered")


def test_unverified_servers_are_sampled_when_the_user_says_so(policy: Path, serve: Callable) -> None:
    with build_samplers(policy, config_of(serve(wrong="no-usage"), verify=False)) as samplers:
        (first, *_) = samplers[0].sample(asked())
    assert first[0].tokens == len(first[0].text.encode()) + 1, "counted here: one token a byte, and the end"


def test_the_key_comes_from_the_environment(policy: Path, serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setenv("DPA_TEST_KEY", "sesame")
    with build_samplers(policy, config_of(server, api_key_env="DPA_TEST_KEY")):
        assert {headers.get("authorization") for headers in server.headers_seen} == {"Bearer sesame"}
    monkeypatch.delenv("DPA_TEST_KEY")
    with (
        pytest.raises(ConfigError, match="'DPA_TEST_KEY' is not set"),
        build_samplers(policy, config_of(server, api_key_env="DPA_TEST_KEY")),
    ):
        raise AssertionError("never entered")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "http"}, "give servers or command"),
        ({"kind": "http", "http": {"servers": ["gpu1:8000"]}}, "is no address; write for example"),
        ({"kind": "http", "http": {"command": "serve {policy}"}}, "{policy} and {port}"),
        ({"kind": "http", "http": {"command": "{policy} {port}", "servers": ["http://a"]}}, "not both"),
        ({"http": {"in_fligt": 3}}, "did you mean `in_flight`"),
    ],
)
def test_settings_are_checked(engine: dict, message: str) -> None:
    data = {
        "out": "runs/x",
        "policy": "p",
        "space": {"objectives": {"helpfulness": None}},
        "reward": {"folder": "r"},
        "prompts": {"path": "p.jsonl"},
        "evaluate": {"prompts": {"path": "e.jsonl"}},
    }
    with pytest.raises(ConfigError, match=message):
        parse_config({**data, "rollout": {"engine": engine}})


@pytest.mark.parametrize(
    "fields, message",
    [({"api_key_env": "DPA_NO_SUCH_KEY"}, "'DPA_NO_SUCH_KEY' is not set"), ({"model": "m"}, "every iteration has")],
)
def test_what_cannot_work_is_said_before_hours_are_spent(fields: dict, message: str) -> None:
    http = HttpEngineConfig(servers=["http://localhost:1"], **fields)
    with pytest.raises(ConfigError, match=message):
        HttpEngine().check(RolloutConfig(engine=EngineConfig(kind="http", http=http)))


# The rollout stage over HTTP


def test_rows_do_not_depend_on_the_pool_and_two_shards_are_in_flight(
    policy: Path, serve: Callable, tmp_path: Path
) -> None:
    rows = []
    for number, servers in enumerate([[serve()], [serve(), serve()]]):
        for server in servers:
            server.busy_s = 0.01
        stage = StageFolder(tmp_path / str(number), "iter_1/rollout")
        config = config_of(*servers, in_flight=3)
        with build_samplers(policy, config) as samplers:
            assert len(samplers) == 2
            rollout(stage, prompts_of(10), SPACE, samplers, config, 0)
        rows.append(all_rows(stage))
        assert sum(len(server.asked) for server in servers) == 10 * 4 + PROBES * len(servers)
    assert rows[0] == rows[1]
    assert len(rows[0]) == 10 * 4


def test_fault_12_a_prompt_that_is_refused_is_asked_once_and_rejected_with_the_reason(
    policy: Path, serve: Callable, tmp_path: Path
) -> None:
    server = serve(refuses="question3")
    config = config_of(server)
    stage, clean = StageFolder(tmp_path / "a", "iter_1/rollout"), StageFolder(tmp_path / "b", "iter_1/rollout")
    with build_samplers(policy, config) as samplers:
        rollout(stage, prompts_of(8), SPACE, samplers, config, 0)
        assert [body["messages"][-1]["content"] for body in server.bodies()].count("question3") == 2 * 2
        rollout(clean, [prompt for prompt in prompts_of(8) if prompt.prompt_id != "p3"], SPACE, samplers, config, 0)
    (reject,) = stage.shard_rejects(0)
    assert reject.id == "p3" and "the server answered 400 I do not answer that" in reject.reason
    assert all_rows(stage) == all_rows(clean)


def test_fault_12_siblings_of_a_refused_sample_are_not_paid_again(policy: Path, serve: Callable) -> None:
    server = serve()
    right = server.answer
    server.answer = lambda body: (400, {"error": "not this one"}, {}) if body["seed"] == 5 else right(body)
    request = SampleRequest([{"role": "user", "content": "Why?"}], (0.8, -0.6), (4, 5, 6))
    with build_samplers(policy, config_of(server)) as (sampler, _):
        assert sampler.sample([request, asked()[1]])[0] == []
        paid = len(server.asked)
        with pytest.raises(RuntimeError, match="400 not this one"):
            sampler.sample([request])
    assert len(server.asked) == paid


def test_fault_10_a_prompt_that_hangs_costs_only_itself(policy: Path, serve: Callable, tmp_path: Path) -> None:
    server = serve()
    right = server.answer
    server.answer = lambda body: "hang" if "question3" in body["messages"][-1]["content"] else right(body)
    config = config_of(server, request_s=2.0)
    stage = StageFolder(tmp_path, "iter_1/rollout")
    with build_samplers(policy, config) as samplers:
        begun = time.monotonic()
        rollout(stage, prompts_of(8), SPACE, samplers, config, 0)
        assert time.monotonic() - begun < 20
    (reject,) = stage.shard_rejects(0)
    assert reject.id == "p3" and "no answer within 2 s" in reject.reason
    assert len(all_rows(stage)) == 7 * 4


def test_fault_11_a_run_whose_servers_are_gone_stops_and_the_same_call_goes_on(
    policy: Path, serve: Callable, tmp_path: Path
) -> None:
    """The server dies in the middle and another takes its place at another address; the rows are those of one run."""
    first, second = serve(), serve()
    right = first.answer
    first.answer = lambda body: right(body) if len(first.asked) < PROBES + 40 or first.stop() else "reset"
    stage = StageFolder(tmp_path / "a", "iter_1/rollout")
    config = config_of(first, in_flight=4)
    with build_samplers(policy, config) as samplers, pytest.raises(EngineError, match="no server answers"):
        rollout(stage, prompts_of(20), SPACE, samplers, config, 0)
    finished = [number for number in range(5) if stage.shard(number) is not None]
    assert 0 < len(finished) < 5
    config = config_of(second)
    with build_samplers(policy, config) as samplers:
        rollout(stage, prompts_of(20), SPACE, samplers, config, 0)
    assert len(second.asked) == PROBES + 16 * (5 - len(finished)), "what was finished is not asked again"
    whole = StageFolder(tmp_path / "b", "iter_1/rollout")
    with build_samplers(policy, config) as samplers:
        rollout(whole, prompts_of(20), SPACE, samplers, config, 0)
    assert all_rows(stage) == all_rows(whole)


# A real server


WORLD_SPACE = space_of("helpfulness", "verbosity", "warmth")
TRANSFORMERS = Path(sys.executable).with_name("transformers")


@pytest.fixture(scope="module")
def start_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's start model, made steerable."""
    folder = tmp_path_factory.mktemp("real") / "policy"
    save_policy(*load_policy(START_MODEL), folder, WORLD_SPACE, {})
    return folder


@pytest.fixture(scope="module")
def real_server(start_policy: Path) -> Iterator[ServerProcess]:
    """`transformers serve` on loopback."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    if not TRANSFORMERS.exists():
        pytest.skip("transformers' command is not installed")
    process = ServerProcess(
        f"'{interpreter()}' '{TRANSFORMERS}' serve {{policy}} --port {{port}} --device cpu", str(start_policy)
    )
    process.start()
    process.wait_until_healthy()
    yield process
    process.close()


def real_config(address: str, **changes: Any) -> RolloutConfig:
    return config_of(address, **changes).model_copy(update={"max_new_tokens": 12, "prompts_per_shard": 2})


def test_a_real_server_gives_the_records_of_the_sampler_in_process(
    start_policy: Path, real_server: ServerProcess
) -> None:
    """At a temperature near 0 both say what is likeliest, so they must say the same, whatever the direction."""
    config = real_config(f"{real_server.address}/v1").model_copy(update={"temperature": 1e-4, "top_p": 1.0})
    requests = [
        SampleRequest([{"role": "user", "content": text}], direction, (1, 2))
        for text in ("What is the home of Ivy?\nNotes on Ivy: home hill; food nuts.", "Who?")
        for direction in ((0.6, 0.8, 0.0), (0.6, -0.8, 0.0), None)
    ]
    with build_samplers(start_policy, config) as over_http:
        there = over_http[0].sample(requests)
    with build_samplers(start_policy, config.model_copy(update={"engine": EngineConfig()})) as in_process:
        here = in_process[0].sample(requests)
    assert there == here
    assert over_http[0].revision == in_process[0].revision


def test_fault_11_a_real_server_killed_in_mid_run_and_started_again(
    start_policy: Path, real_server: ServerProcess, tmp_path: Path
) -> None:
    stage = StageFolder(tmp_path, "iter_1/rollout")
    (server,) = psutil.Process(real_server._guard.pid).children()

    def kill_after_the_first_shard() -> None:
        while not list(tmp_path.rglob("shard-*.json")):
            time.sleep(0.01)
        server.kill()

    thread = threading.Thread(target=kill_after_the_first_shard)
    thread.start()
    config = real_config(real_server.address, in_flight=4)
    with build_samplers(start_policy, config) as samplers, pytest.raises(EngineError, match="no server answers"):
        rollout(stage, prompts_of(12), WORLD_SPACE, samplers, config, 0)
    thread.join()
    assert 0 < sum(stage.shard(number) is not None for number in range(6)) < 6

    real_server.start()
    config = real_config(real_server.wait_until_healthy(), in_flight=4)
    with build_samplers(start_policy, config) as samplers:
        rollout(stage, prompts_of(12), WORLD_SPACE, samplers, config, 0)
    rows = all_rows(stage)
    assert len({row["candidate_id"] for row in rows}) == len(rows) == 12 * 4
    assert [row["prompt_id"] for row in rows] == [f"p{n}" for n in range(12) for _ in range(4)]
    assert all(0 < row["tokens"] <= 12 and row["finish_reason"] in ("stop", "length") for row in rows)
    assert len({row["response"] for row in rows}) > 12, "it samples"
