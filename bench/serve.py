"""The server under load: 64 clients for 60 seconds, what the gateway adds to a request, and memory over time.

    python bench/serve.py [MODEL] [--clients 64] [--seconds 60]

MODEL is a policy folder (default: the demo's start model, made steerable on the spot). Overhead is measured first: one
client, the same request alternately to the gateway and to the engine behind it, and the difference of the medians. On a
busy machine those are noise; the processor time each process spends on a request is printed beside them.

Measured on two shared cores, load average 6 to 10 from other work, the demo's start model, 2026-11-25: overhead 3.2 ms
(median 31.8 through the gateway, 28.6 straight; 3.5 ms of processor time); 64 clients for 60 s: 1,205 answers, no
error and no 429, 866 tokens/s, gateway 87.7 -> 87.9 MB, engine 596 -> 593 MB. At load average 3 the same run, before a
slot was freed with the last byte, gave 33.7 requests/s, 85 of 2,023 of them 429. Ready after 4.5 s at load average 3.
"""

import argparse
import asyncio
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil

CHAT = "/v1/chat/completions"
QUESTIONS = ("What is the home of Ivy?", "How old is Tansy?", "Who is the friend of Fern?", "What colour is Ivy?")


def body_of(number: int, tokens: int) -> dict:
    """A request whose direction, question and seed change with its number."""
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
        "chat_template_kwargs": {"preference": {"helpfulness": 1.0, "verbosity": (number % 7 - 3) / 4}},
        "seed": number,
        "temperature": 0.7,
        "max_tokens": tokens,
    }


def spent(process: psutil.Process) -> float:
    """Milliseconds of processor time so far."""
    times = process.cpu_times()
    return 1000 * (times.user + times.system)


def overhead(url: str, socket: str, count: int) -> tuple[float, float]:
    """Median milliseconds of one small request through the gateway, and straight to the engine."""
    times: dict[str, list[float]] = {"gateway": [], "engine": []}
    transport = httpx.HTTPTransport(uds=socket)
    with (
        httpx.Client(base_url=url, timeout=60) as gateway,
        httpx.Client(base_url="http://engine", transport=transport, timeout=60) as engine,
    ):
        for number in range(count):
            for name, client in (("gateway", gateway), ("engine", engine)):
                begun = time.perf_counter()
                assert client.post(CHAT, json=body_of(number, 16)).status_code == 200
                times[name].append(1000 * (time.perf_counter() - begun))
    return statistics.median(times["gateway"][5:]), statistics.median(times["engine"][5:])


async def load(url: str, clients: int, seconds: float, processes: list[psutil.Process]) -> None:
    """Every client asks again as soon as it is answered; half of them stream."""
    # One for all: each client's own takes 77 ms of processor time, and 64 of them keep the first answers waiting here.
    quick = ssl.create_default_context()
    statuses: Counter[str] = Counter()
    latencies: list[float] = []
    deadline = time.monotonic() + seconds

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120, verify=quick) as http:
            asked = number
            while time.monotonic() < deadline:
                asked += clients
                body = {**body_of(asked, 60), "stream": bool(number % 2), "stream_options": {"include_usage": True}}
                begun = time.monotonic()
                try:
                    answer = await http.post(CHAT, json=body)
                except httpx.HTTPError as error:
                    statuses[type(error).__name__] += 1
                    continue
                if answer.status_code == 200:
                    latencies.append(time.monotonic() - begun)
                cut = answer.status_code == 200 and number % 2 and not answer.text.rstrip().endswith("[DONE]")
                failed = answer.status_code == 200 and '"error"' in answer.text[-400:]
                statuses[f"broken {answer.status_code}" if cut or failed else str(answer.status_code)] += 1

    async def watch() -> None:
        while time.monotonic() < deadline:
            await asyncio.sleep(seconds / 6)
            sizes = " ".join(f"{process.memory_info().rss / 1e6:6.1f}" for process in processes)
            print(f"  {seconds - (deadline - time.monotonic()):5.1f} s   {sizes}", flush=True)

    print("  time      MB: gateway, engine")
    await asyncio.gather(watch(), *(client(number) for number in range(clients)))
    metrics = httpx.get(f"{url}/metrics").text
    tokens = sum(float(line.split()[1]) for line in metrics.splitlines() if line.startswith('dpa_tokens_total{kind="c'))
    latencies.sort()
    print(
        f"{clients} clients, {seconds:g} s: {dict(statuses)}; {sum(statuses.values()) / seconds:.1f} requests/s, "
        f"{tokens / seconds:.0f} tokens/s; latency median {latencies[len(latencies) // 2]:.2f} s, "
        f"p99 {latencies[int(0.99 * len(latencies))]:.2f} s"
    )


def steerable_start_model(folder: Path) -> Path:
    """The demo's start model with a direction space."""
    from dpa.core.directions import DirectionSpace
    from dpa.core.objective import Objective
    from dpa.models.policy import load_policy, save_policy
    from dpa.world.demo import START_MODEL

    model, tokenizer = load_policy(START_MODEL)
    space = DirectionSpace((Objective("helpfulness", {"a": 1.0}), Objective("verbosity", {"b": 1.0})))
    save_policy(model, tokenizer, folder, space, {})
    return folder


def main() -> None:
    """Start the server, measure, stop it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=200, help="pairs of requests for the overhead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or str(steerable_start_model(Path(scratch) / "policy"))
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "dpa", "serve", model, "--name", "demo", "--port", "0", "--threads", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            text=True,
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().rpartition(" at ")[2].strip()
            print(f"ready after {time.monotonic() - begun:.1f} s (load average {os.getloadavg()[0]:.1f})")
            gateway = psutil.Process(process.pid)
            (engine,) = gateway.children()
            line = engine.cmdline()
            before = spent(gateway), spent(engine)
            through, straight = overhead(url, line[line.index("--uds") + 1], args.requests)
            print(f"median ms: gateway {through:.2f}, engine alone {straight:.2f}, overhead {through - straight:.2f}")
            gateway_ms = (spent(gateway) - before[0]) / args.requests
            engine_ms = (spent(engine) - before[1]) / (2 * args.requests)
            print(f"processor ms a request: gateway {gateway_ms:.2f}, engine {engine_ms:.2f}")
            asyncio.run(load(url, args.clients, args.seconds, [gateway, engine]))
        finally:
            process.terminate()
            print(f"exit code {process.wait(30)}")


if __name__ == "__main__":
    main()
