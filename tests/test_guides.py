"""The guides do what they say: their Python blocks are run as they stand, against real servers of a policy that obeys.

pytest tests/test_guides.py
"""

import importlib.util
import json
import os
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server's libraries are not installed: pip install 'dpa[serve]'")
from forks import interpreter
from obedient_policy import QUESTIONS, SPACE, save_obedient_policy
from serving import FakeUpstream, ServeProcess, events_of, gateway_before, in_thread, settings_with

for _client in ("openai", "litellm"):  # importing them takes seconds, which only the process that runs the guide pays
    if importlib.util.find_spec(_client) is None:
        pytest.skip(f"{_client} is not installed: pip install 'dpa[dev]'", allow_module_level=True)

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else importing it asks the network for prices

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
TERSE = "helpfulness*80 + verbosity*-60 + warmth*0"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_obedient_policy(tmp_path_factory.mktemp("guides") / "policy")


@pytest.fixture(scope="module")
def gateway(policy: Path) -> Iterator[str]:
    server = ServeProcess(policy, "--name", "demo", "--threads", 1)
    try:
        yield server.wait().url
    finally:
        server.stop()


def run_guide(name: str, tmp_path: Path, **replaced: str) -> dict[str, Any]:
    """The names its Python blocks leave behind, run in order with these texts replaced."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (GUIDES / name).read_text(encoding="utf-8"), re.S))
    assert code
    for old, new in replaced.items():
        assert old in code, f"{name} no longer says {old}"
        code = code.replace(old, new)
    file = tmp_path / "guide.py"
    file.write_text(code, encoding="utf-8")
    return runpy.run_path(str(file))


def words(answer: Any) -> int:
    return len((answer if isinstance(answer, str) else answer.choices[0].message.content).split())


def test_the_openai_client_steers_through_every_form(gateway: str, tmp_path: Path) -> None:
    found = run_guide("openai.md", tmp_path, **{"http://127.0.0.1:8000": gateway})
    assert found["terse"].dpa["direction"] == TERSE
    assert [answer.dpa["source"] for answer in found["same"]] == ["body", "body", "header", "tag", "model"]
    for answer in found["same"]:
        assert answer.dpa["direction"] == TERSE
        assert answer.choices[0].message.content == found["terse"].choices[0].message.content
    assert found["preset"].dpa["direction"] == "helpfulness*75 + verbosity*-66 + warmth*0"
    assert found["low"].dpa["source"] == "verbosity"
    assert words(found["terse"]) < words(found["wordy"])
    assert found["applied"] == "helpfulness*75 + verbosity*66 + warmth*0"
    assert "trained up to 45 degrees" in found["refused"]
    assert found["clamped"].dpa["clamped"] is True


def test_litellm_steers_and_sees_the_echo(gateway: str, tmp_path: Path) -> None:
    found = run_guide("litellm.md", tmp_path, **{"http://127.0.0.1:8000": gateway})
    assert found["terse"].dpa["direction"] == TERSE
    assert found["terse"]._hidden_params["additional_headers"]["llm_provider-x-dpa-direction"] == TERSE
    assert found["in_the_name"].choices[0].message.content == found["terse"].choices[0].message.content
    assert found["preset"].dpa["direction"] == "helpfulness*75 + verbosity*-66 + warmth*0"
    assert words(found["terse"]) < words(found["wordy"])


def test_stock_transformers_serve_is_steered_by_the_template_alone(policy: Path, tmp_path: Path) -> None:
    stock = ["transformers.cli.transformers", "serve", str(policy), "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(
        [interpreter(), "-m", *stock],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        address = next(line.split(" on ")[1].split()[0] for line in server.stdout if "running on http" in line)
        folders = {"http://127.0.0.1:8001": address, "runs/demo/iter_3/policy": str(policy)}
        found = run_guide("transformers-serve.md", tmp_path, **folders)
    finally:
        server.kill()
        server.communicate()
    assert 5 < words(found["terse"]) < words(found["wordy"]) - 15


def test_open_webui_lists_the_presets_and_its_filter_writes_the_direction(gateway: str) -> None:
    import httpx

    listed = httpx.get(f"{gateway}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["demo", "demo:terse", "demo:wordy"]

    spec = importlib.util.spec_from_file_location("open_webui_direction", GUIDES / "open_webui_direction.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    direction_filter = module.Filter()

    def ask(model: str = "demo", valves: Any = None, **fields: Any) -> dict[str, Any]:
        # As Open WebUI sends it: what it knows beside the messages, streamed or not, and the filter's additions.
        body = {"model": model, "messages": [{"role": "user", "content": QUESTIONS[0].text}], "stream": False, **fields}
        body = direction_filter.inlet(body, {"id": "u", "role": "user", "valves": valves})
        answer = httpx.post(f"{gateway}/v1/chat/completions", json={**body, "seed": 3}, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    valves = module.Filter.UserValves
    less = ask(valves=valves(verbosity="Less"))
    assert less["dpa"]["direction"] == "helpfulness*75 + verbosity*-66 + warmth*0"
    both = ask(valves=valves(verbosity="More", warmth="More"))
    assert (both["dpa"]["direction"], both["dpa"]["clamped"]) == ("helpfulness*71 + verbosity*50 + warmth*50", True)
    assert both["dpa"]["words"] > less["dpa"]["words"]
    assert ask(valves=valves())["dpa"]["source"] == "default"
    assert ask(model="demo:wordy", valves=valves(verbosity="Less"))["dpa"]["source"] == "model"
    chat = ask(valves=valves(verbosity="Less"), dpa="helpfulness*0.8 + verbosity*0.6")
    assert chat["dpa"]["direction"] == "helpfulness*80 + verbosity*60 + warmth*0"


def test_open_webuis_own_requests_are_answered_steered_or_not(gateway: str) -> None:
    """The fields that open-webui 0.12.4 leaves in a request when it has taken its own out (read in its main.py,
    utils/middleware.py, utils/payload.py, routers/openai.py and routers/tasks.py): streams, the tools that it offers
    with every chat, custom parameters as text or JSON, and its own tasks."""
    import httpx

    question = [{"role": "user", "content": QUESTIONS[0].text}]
    offered = {"type": "function", "function": {"name": "search_chats", "parameters": {"type": "object"}}}
    usual = {"stream": True, "stream_options": {"include_usage": True}, "tools": [offered]}
    center, asked = "helpfulness*100 + verbosity*0 + warmth*0", "helpfulness*0.8 - verbosity*0.6"
    weights = {"helpfulness": 0.8, "verbosity": -0.6}
    chats: list[tuple[dict[str, Any], str]] = [
        (usual, center),
        ({**usual, "temperature": 0.5, "top_p": 0.9, "max_tokens": 40, "seed": 3, "stop": ["\n"]}, center),
        ({**usual, "dpa": asked}, TERSE),
        ({**usual, "dpa": weights}, TERSE),
        ({**usual, "chat_template_kwargs": {"preference": weights}}, TERSE),
        ({**usual, "messages": [{"role": "system", "content": f"<dpa>{asked}</dpa>"}, *question]}, TERSE),
        (
            {**usual, "messages": [{"role": "user", "content": [{"type": "text", "text": question[0]["content"]}]}]},
            center,
        ),
        ({"stream": False, "max_tokens": 1000}, center),  # its task of writing a title
    ]
    who = {"Authorization": "Bearer none", "X-OpenWebUI-User-Name": "Ada", "X-OpenWebUI-User-Role": "admin"}
    with httpx.Client(base_url=gateway, headers=who, timeout=60) as client:
        for fields, direction in chats:
            body = {"model": "demo", "messages": question, **fields}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.headers["X-DPA-Direction"] == direction
            if body["stream"]:
                assert answer.headers["Content-Type"].startswith("text/event-stream")
                *chunks, done = events_of(answer)
                assert done == "[DONE]" and chunks[-1]["usage"]["completion_tokens"] > 0
                assert "".join(one["delta"].get("content") or "" for chunk in chunks for one in chunk["choices"])
        refused = client.post("/v1/chat/completions", json={"model": "demo", "messages": question, "dpa": "wit"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_direction")


def test_what_the_litellm_proxy_sends_is_understood() -> None:
    """Its requests as scripts/check_guides.py kept them from a real proxy (litellm 1.108.7)."""
    import httpx

    sent = json.loads((Path(__file__).parent / "litellm_requests.json").read_text(encoding="utf-8"))
    assert {request["body"].get("stream", False) for request in sent} == {False, True}
    settings = settings_with(space=SPACE, default=SPACE.direction(SPACE.center))
    with in_thread(FakeUpstream().app) as upstream, gateway_before(upstream, settings) as url, httpx.Client() as client:
        for request in sent:
            answer = client.post(url + request["path"], headers=request["headers"], json=request["body"])
            if request["expected"] == "400":
                assert answer.status_code == 400, request["way"]
            else:
                assert answer.headers["X-DPA-Direction"] == request["expected"], request["way"]


def test_every_guide_is_listed_and_every_link_leads_somewhere() -> None:
    index = (GUIDES / "README.md").read_text(encoding="utf-8")
    for page in GUIDES.glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
