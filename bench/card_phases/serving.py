"""Over HTTP: stock `vllm serve` steered by its request, the gateway before it, a reward model behind /classify.

What a part costs: a start of vLLM each, a minute or two; then `serve` 576 answers of at most 256 tokens, `gateway` six
rounds of 512 answers of 32 tokens, and six before a server that answers at once, `classify` 2,000 rows on either side:
10 to 30 s each.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from card_phases.common import Absent, Card, need_vllm, timed

CHAT = "/v1/chat/completions"
MEMORY = ("--gpu-memory-utilization", "0.25", "--kv-cache-memory-bytes", "8G")
"""For a server of a small model, so that the three phases may run side by side. The size of the cache is said, because
what vLLM measures it by is the card's free memory before and after, which the other two change meanwhile: a server
would refuse to start."""
STAND_IN = """
import sys, uvicorn
from fastapi import FastAPI, Request
app, policy = FastAPI(), sys.argv[2]
@app.get("/health")
def health(): return {}
@app.get("/v1/models")
def models(): return {"object": "list", "data": [{"id": policy, "object": "model", "owned_by": "vllm"}]}
@app.post("/v1/chat/completions")
async def chat(request: Request):
    body = await request.json()
    choice = {"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": policy, "choices": [choice], "usage": usage}
uvicorn.run(app, port=int(sys.argv[1]), log_level="critical")
"""


def has(name: str) -> bool:
    """Whether a module is installed, without importing it."""
    return importlib.util.find_spec(name) is not None


@contextmanager
def vllm_server(card: Card, model: Path, *more: str) -> Iterator[str]:
    """Address of a stock `vllm serve`, whose log stays beside the result: an engine's cause of death stands there."""
    from dpa.remote.server_process import ServerProcess

    need_vllm()
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "{policy}", "--port", "{port}", *more]
    server = ServerProcess(" ".join(words), str(model), start_s=150, log=card.out / f"{card.phase}.vllm.log")
    try:
        server.start()
        yield server.wait_until_healthy()
    finally:
        server.close()


def body_of(card: Card, place: int, longest: int, model: str) -> dict[str, Any]:
    """A chat request whose prompt, direction and seed change with its number."""
    angle = (place % 5 - 2) / 2
    return {
        "model": model,
        "messages": card.asked(place + 1)[place].messages,
        "chat_template_kwargs": {"preference": {"quality": 1.0, "verbosity": 0.8 * angle}},
        "seed": place, "temperature": 1.0, "max_tokens": longest,
    }  # fmt: skip


def first_model(address: str) -> str:
    """The name a server knows its model by."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/v1/models") as answer:
        return json.load(answer)["data"][0]["id"]


async def ask_all(address: str, bodies: list[dict[str, Any]], clients: int) -> tuple[list[dict[str, Any]], list[float]]:
    """The answers and the seconds of each, `clients` asking at once."""
    import httpx

    waiting, answers, seconds = iter(enumerate(bodies)), [{}] * len(bodies), [0.0] * len(bodies)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120, trust_env=False) as http:

        async def client() -> None:
            for place, body in waiting:
                begun = time.perf_counter()
                answer = await http.post(CHAT, json=body)
                answer.raise_for_status()
                answers[place], seconds[place] = answer.json(), time.perf_counter() - begun

        await asyncio.gather(*(client() for _ in range(clients)))
    return answers, seconds


def serve(card: Card) -> None:
    """Tokens/s of `vllm serve` at 64 clients, and whether the direction in a request reaches the prompt."""
    with vllm_server(card, card.steerable(), *MEMORY) as address:
        model, count, longest = first_model(address), (8 if card.tiny else 512), (6 if card.tiny else 256)
        bodies = [body_of(card, place, longest, model) for place in range(count)]
        asyncio.run(ask_all(address, bodies[:64], 64))
        found = timed(lambda: asyncio.run(ask_all(address, bodies, 64)))
        answers, seconds = found.result
        tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
        card.row("vllm serve, 64 clients", tokens / found.seconds, "tokens/s", p50_s=statistics.median(seconds))
        one = {**bodies[0], "temperature": 0.0}
        bare = {name: value for name, value in one.items() if name != "chat_template_kwargs"}
        (steered, plain), _ = asyncio.run(ask_all(address, [one, bare], 1))
        read = [answer["usage"]["prompt_tokens"] for answer in (steered, plain)]
        card.row("vllm serve, prompt tokens with a direction", read[0], "tokens", read[1], "without")
        if read[0] <= read[1]:
            raise RuntimeError("vllm serve did not hand chat_template_kwargs to the template")


def gateway(card: Card) -> None:
    """Milliseconds the gateway adds to the median request of 64 clients, in front of a stand-in and of vLLM."""
    for name in ("fastapi", "uvicorn", "httpx", "prometheus_client"):
        if not has(name):
            raise Absent(f"{name} is not installed (extra serve)")
    policy, count, longest = card.steerable(), (16 if card.tiny else 512), 32
    # A server that answers at once: what is added there is the gateway's own work and nothing else.
    from dpa.remote.server_process import ServerProcess

    card.folder.mkdir(parents=True, exist_ok=True)
    (card.folder / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    command = f"{sys.executable} {card.folder / 'stand_in.py'} {{port}} {{policy}}"
    server = ServerProcess(command, str(policy), start_s=60)
    try:
        server.start()
        measure_gateway(card, policy, server.wait_until_healthy(), count, longest, "a server that answers at once")
    finally:
        server.close()
    with contextlib.suppress(Absent), vllm_server(card, policy, *MEMORY) as address:
        measure_gateway(card, policy, address, count, longest, "vllm serve")


def measure_gateway(card: Card, policy: Path, address: str, count: int, longest: int, what: str) -> None:
    """The same requests to the gateway and straight to the server, in turn, twice; the better of each counts."""
    command = [sys.executable, "-m", "dpa", "serve", "--upstream", address, "--space", str(policy), "--name", "m"]
    with (card.folder.parent / f"{card.phase}.gateway.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--port", "0", "--max-requests", "128"], stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        url = said.rpartition(" at ")[2].strip()
        if not url.startswith("http"):
            raise RuntimeError(f"dpa serve did not start: {said!r}; see {card.phase}.gateway.log")
        there = {"gateway": (url, "m"), "straight": (address, first_model(address))}
        medians: dict[str, list[float]] = {"gateway": [], "straight": []}
        rates: dict[str, list[float]] = {"gateway": [], "straight": []}
        for turn in range(3):
            for name, (where, model) in there.items():
                bodies = [body_of(card, place, longest, model) for place in range(count)]
                found = timed(lambda where=where, bodies=bodies: asyncio.run(ask_all(where, bodies, 64)))
                if turn:  # the first warms both up
                    medians[name].append(1000 * statistics.median(found.result[1]))
                    rates[name].append(count / found.seconds)
        best = {name: min(values) for name, values in medians.items()}
        card.row(f"gateway before {what}, median at 64 clients", best["gateway"], "ms", best["straight"], "straight",
                 added_ms=best["gateway"] - best["straight"], requests_per_s=max(rates["gateway"]),
                 straight_requests_per_s=max(rates["straight"]))  # fmt: skip
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def classify(card: Card) -> None:
    """Rows/s of a reward model behind vLLM's /classify against this process, and how far their scores lie apart."""
    need_vllm()

    import numpy as np

    from dpa.core.sections.reward import HttpRewardConfig
    from dpa.models.memory import free_memory
    from dpa.scoring.http_scorer import http_scorer
    from dpa.scoring.reward_scorer import RewardModelScorer

    rows, folder = card.rated(8 if card.tiny else 2000), card.reward_model()
    prompts, responses = [row.messages for row in rows], [row.response for row in rows]

    def in_process() -> Any:
        scorer = RewardModelScorer(folder, card.reward_spec())
        scorer.score(prompts[:64], responses[:64])
        return timed(lambda: scorer.score(prompts, responses))

    plain = in_process()
    free_memory()  # the server wants the card
    with vllm_server(card, folder, "--runner", "pooling", *MEMORY) as address:
        config = HttpRewardConfig(servers=[address], folder=str(folder), api="classify")
        over_http = http_scorer(config)
        over_http.score(prompts[:64], responses[:64])
        found = timed(lambda: over_http.score(prompts, responses))
        apart = float(np.nanmax(np.abs(found.result - plain.result)))
        card.row("scoring through /classify", len(rows) / found.seconds, "rows/s", len(rows) / plain.seconds,
                 "in process", largest_difference=apart)  # fmt: skip
