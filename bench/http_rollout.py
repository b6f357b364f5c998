"""What the loop over HTTP costs beyond the server: the rollout stage against a bare asyncio client, in one run.

    python bench/http_rollout.py [--prompts 48] [--repeats 3] [--in-flight 16] [--server instant|transformers]

Both send the same chat requests (the same bodies, seeds and directions) to one server, at the same concurrency. The
bare client has its bodies ready, reads the JSON and drops it. The rollout stage draws directions, renders and counts
every prompt, checks every answer, retries, and writes its shards. They take turns; the best of each counts.
`transformers` is `transformers serve` with the demo's start model; `instant` answers at once without a model, in a
process of its own, so that its figure is the most requests a second that either client can make on this machine.
The CPU time a request costs on the client's side is printed too: it means the same on a machine that is not quiet.

On a quiet machine of two cores, `--server transformers --prompts 8 --directions 3 --samples 2 --longest 30 --repeats 2`
(48 requests a turn): 1.07 and 0.98, best of each 0.98 (2.55 s and 2.60 s); 2.18 ms of CPU a request against 1.84.
`--server instant --prompts 24` on a busy one (load 14, 384 requests a turn): the stage 38 requests/s, the bare client
43; 0.3 ms of CPU a request more. So the stage costs at most 10% wherever a server spends 3 ms or more on a request.
"""

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import httpx
import torch

from dpa.core.directions import DirectionSpace
from dpa.core.objective import Objective
from dpa.core.records import Prompt
from dpa.core.sections.rollout import EngineConfig, HttpEngineConfig, RolloutConfig
from dpa.models.policy import load_policy, save_policy
from dpa.remote.http_pool import HttpPool
from dpa.remote.server_process import ServerProcess
from dpa.sampling.engines import build_samplers
from dpa.stages.rollout import rollout
from dpa.storage.run_folder import StageFolder

START_MODEL = Path(__file__).parents[1] / "src" / "dpa" / "world" / "assets" / "start_model"
SPACE = DirectionSpace(tuple(Objective(name, {name: 1.0}) for name in ("helpfulness", "verbosity", "warmth")))
NAMES = ("Ivy", "Olive", "Poppy", "Hazel", "Fern", "Rowan")
_INSTANT = """
import json, sys
from fastapi import FastAPI, Request
from transformers import AutoTokenizer
import uvicorn
port, policy = int(sys.argv[1]), sys.argv[2]
tokenizer, app, known = AutoTokenizer.from_pretrained(policy), FastAPI(), {}
@app.get("/health")
def health(): return {}
@app.get("/v1/models")
def models(): return {"data": [{"id": policy, "owned_by": "vllm"}]}
@app.post("/v1/chat/completions")
async def chat(request: Request):
    body = await request.json()
    kwargs = body.get("chat_template_kwargs", {})
    key = json.dumps([body["messages"], kwargs])
    if key not in known:
        ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, **kwargs)["input_ids"]
        known[key] = len(ids)
    choice = {"message": {"role": "assistant", "content": f"It is {body['seed']}."}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": known[key], "completion_tokens": 8}}
uvicorn.run(app, port=port, log_level="critical")
"""


class Recorder(HttpPool):
    """The pool, which keeps the bodies it is asked: what the bare client then sends."""

    bodies: list[dict] = []  # noqa: RUF012  one run, one list

    def ask(self, path: str, bodies: list[dict]) -> list:  # type: ignore[override]
        """As HttpPool.ask."""
        self.bodies.extend(bodies)
        return super().ask(path, bodies)


async def bare_client(address: str, contents: list[bytes], in_flight: int) -> int:
    """Tokens generated."""
    waiting, tokens = iter(contents), 0
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None) as client:

        async def work() -> None:
            nonlocal tokens
            for content in waiting:
                answer = await client.post(
                    f"{address}/v1/chat/completions", content=content, headers={"content-type": "application/json"}
                )
                tokens += answer.json()["usage"]["completion_tokens"]

        await asyncio.gather(*(work() for _ in range(in_flight)))
    return tokens


def main() -> None:
    """Print the time of each, their requests a second, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", choices=["instant", "transformers"], default="transformers")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--directions", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--longest", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = [
        Prompt(
            f"p{n}",
            [{"role": "user", "content": f"What is the home of {NAMES[n % 6]}?\nNotes {n}: home hill; food nuts."}],
        )
        for n in range(args.prompts)
    ]
    with tempfile.TemporaryDirectory() as place:
        policy = Path(place, "policy")
        save_policy(*load_policy(START_MODEL), policy, SPACE, {})
        Path(place, "instant.py").write_text(_INSTANT, encoding="utf-8")
        commands = {
            "instant": [sys.executable, f"{place}/instant.py", "{port}", "{policy}"],
            "transformers": [
                str(Path(sys.executable).with_name("transformers")),
                *["serve", "{policy}", "--port", "{port}", "--device", "cpu"],
            ],
        }
        server = ServerProcess(" ".join(map(shlex.quote, commands[args.server])), str(policy))
        server.start()
        try:
            compare(args, server.wait_until_healthy(), policy, prompts, Path(place))
        finally:
            server.close()


def compare(args: argparse.Namespace, address: str, policy: Path, prompts: list[Prompt], place: Path) -> None:
    """Alternate the two and print what they took."""
    config = RolloutConfig(
        directions=args.directions,
        samples=args.samples,
        prompts_per_shard=16,
        max_new_tokens=args.longest,
        engine=EngineConfig(kind="http", http=HttpEngineConfig(servers=[address], in_flight=args.in_flight)),
    )
    times: dict[str, list[float]] = {"rollout stage": [], "bare client": []}
    cpu: dict[str, list[float]] = {"rollout stage": [], "bare client": []}
    with build_samplers(policy, config, SPACE) as samplers:
        pool = samplers[0]._pool  # type: ignore[attr-defined]
        pool.__class__ = Recorder
        for turn in range(args.repeats + 1):
            Recorder.bodies.clear()
            begun, worked = time.perf_counter(), time.process_time()
            ledger = rollout(StageFolder(place / str(turn), "iter_1/rollout"), prompts, SPACE, samplers, config, 0)
            stage_s, stage_cpu_s = time.perf_counter() - begun, time.process_time() - worked
            contents = [json.dumps(body).encode() for body in Recorder.bodies]
            assert len(contents) == len(prompts) * args.directions * args.samples == ledger.rows
            begun, worked = time.perf_counter(), time.process_time()
            tokens = asyncio.run(bare_client(address, contents, args.in_flight))
            bare_s, bare_cpu_s = time.perf_counter() - begun, time.process_time() - worked
            if turn:  # the first turn warms the server up
                times["rollout stage"].append(stage_s)
                times["bare client"].append(bare_s)
                cpu["rollout stage"].append(stage_cpu_s)
                cpu["bare client"].append(bare_cpu_s)
                print(
                    f"turn {turn}: stage {stage_s:.2f} s, {ledger.tokens_generated} tokens; "
                    f"bare {bare_s:.2f} s, {tokens} tokens; ratio {stage_s / bare_s:.3f}",
                    flush=True,
                )
    for name, taken in times.items():
        print(
            f"{name:13s} best {min(taken):.2f} s   {len(contents) / min(taken):.1f} requests/s   "
            f"{1000 * min(cpu[name]) / len(contents):.2f} ms of this process's CPU a request"
        )
    print(f"the stage takes {min(times['rollout stage']) / min(times['bare client']):.3f} of the bare client's time")


if __name__ == "__main__":
    main()
