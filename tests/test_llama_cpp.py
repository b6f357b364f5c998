"""A policy behind a real llama.cpp server: steered, refused, sampled from, and behind the gateway.
pytest tests/test_llama_cpp.py
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import CHAT, gateway_before, settings_with
from tiny_models import SPACE
from transformers import AutoTokenizer

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
from gguf_files import write_gguf

from dpa.core.records import SampleRequest
from dpa.core.sections.rollout import EngineConfig, HttpEngineConfig, RolloutConfig
from dpa.models.gguf import dequantise
from dpa.models.policy import load_policy, save_policy
from dpa.remote.http_exchange import brief
from dpa.remote.server_process import ServerProcess
from dpa.sampling.engines import build_samplers

SERVER = Path(__file__).with_name("llama_cpp_server.py")
QUESTION = [{"role": "user", "content": "Why?"}]
PREFERENCES = [
    None,
    {"helpfulness": 0.8, "verbosity": -0.6},
    {"helpfulness": 1},
    {"helpfulness": 3e5, "verbosity": -1e-3},
    {"helpfulness": 0.70710678, "verbosity": 0.70710678},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, and beside it `steered.gguf`: what llama.cpp's converter makes of it."""
    folder = tmp_path_factory.mktemp("llama")
    write_gguf(folder / "start.gguf")
    dequantise(folder / "start.gguf", folder / "start")
    save_policy(*load_policy(folder / "start"), folder / "policy", SPACE, {})
    write_gguf(folder / "steered.gguf", template=(folder / "policy" / "chat_template.jinja").read_text())
    return folder


def command(folder: Path) -> str:
    return f"{sys.executable} {SERVER} {folder / 'steered.gguf'} {{policy}} {{port}}"


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    process = ServerProcess(command(folder), str(folder / "policy"))
    process.start()
    try:
        yield process.wait_until_healthy()
    finally:
        process.close()


@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize("preference", PREFERENCES)
def test_its_prompt_is_the_one_that_was_trained_on(
    folder: Path, address: str, preference: dict | None, system: str | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    messages = [*([{"role": "system", "content": system}] if system else []), *QUESTION]
    ours = tokenizer.apply_chat_template(messages, preference=preference, add_generation_prompt=True, tokenize=False)
    body = {"messages": messages, "max_tokens": 1, "chat_template_kwargs": {"preference": preference}}
    assert httpx.post(address + "/apply-template", json=body).json()["prompt"] == ours
    tokens = httpx.post(address + CHAT, json=body).json()["usage"]["prompt_tokens"]
    assert tokens == len(tokenizer(ours, add_special_tokens=False)["input_ids"])


def test_it_is_sampled_from_with_a_direction(folder: Path) -> None:
    http = HttpEngineConfig(command=command(folder), in_flight=4)
    config = RolloutConfig(max_new_tokens=8, temperature=2.0, engine=EngineConfig(kind="http", http=http))
    requests = [SampleRequest(QUESTION, direction, (1, 2)) for direction in ((0.8, -0.6), (1.0, 0.0), None)]
    with build_samplers(folder / "policy", config) as samplers:
        answers = samplers[0].sample(requests)
    assert [len(samples) for samples in answers] == [2, 2, 2]
    assert all(1 <= sample.tokens <= 9 for samples in answers for sample in samples)
    assert len({sample.text for samples in answers for sample in samples}) > 1


def test_the_gateway_before_it_steers_and_passes_its_refusals_on(folder: Path, address: str) -> None:
    settings = settings_with(upstream_model=str(folder / "policy"))
    with gateway_before(address, settings) as url:
        asked = {"model": "demo", "messages": QUESTION, "max_tokens": 4}
        answer = httpx.post(url + CHAT, json={**asked, "dpa": "helpfulness*0.8 - verbosity*0.6"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["dpa"]["direction"] == "helpfulness*80 + verbosity*-60"
        refusal = httpx.post(url + CHAT, json={**asked, "n": 5})  # of 4 slots
        assert refusal.status_code == 400 and "n" in refusal.json()["error"]["message"]


def test_a_refused_preference_is_the_templates_own_sentence(address: str) -> None:
    body = {"messages": QUESTION, "chat_template_kwargs": {"preference": {"warmth": 1}}}
    answer = httpx.post(address + CHAT, json=body)
    assert answer.status_code == 400
    assert brief(answer.content) == "preference: unknown objective `warmth`; known: helpfulness, verbosity."
