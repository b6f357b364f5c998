"""Whether docs/guides/litellm.md holds for the real LiteLLM proxy: its configuration as it stands in the guide, run in
front of `dpa serve` with a small policy that obeys, and asked in every way the guide names.

    python -m venv /tmp/litellm && /tmp/litellm/bin/pip install 'litellm[proxy]'      # a place of its own: it is large
    python scripts/check_guides.py --litellm /tmp/litellm/bin/litellm [--record tests/litellm_requests.json]

Prints what each way came to, and exits 1 where one does not steer. `--record` keeps what LiteLLM sent to the gateway,
for the test that asks the gateway the same without LiteLLM (tests/test_guides.py). About a minute on two cores.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from obedient_policy import save_obedient_policy  # noqa: E402
from serving import ServeProcess  # noqa: E402

GUIDE = ROOT / "docs" / "guides" / "litellm.md"
ADDRESS = "http://127.0.0.1:8000"
QUESTION = (
    "What is the home of Ivy?\n"
    "Notes on Ivy: kind otter; home river; food fish; age four; friend Juniper; hobby singing."
)
KEY = "sk-for-this-check-alone-0123456789abcdef"
ASKED, TERSE = "helpfulness*80 + verbosity*-60 + warmth*0", "helpfulness*75 + verbosity*-66 + warmth*0"
TEXT, PREFERENCE = "helpfulness*0.8 - verbosity*0.6", {"helpfulness": 0.8, "verbosity": -0.6}
WAYS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "nothing said": ({}, {}, "helpfulness*100 + verbosity*0 + warmth*0"),
    "body: dpa": ({"dpa": TEXT}, {}, ASKED),
    "body: dpa as a mapping": ({"dpa": PREFERENCE}, {}, ASKED),
    "body: chat_template_kwargs": ({"chat_template_kwargs": {"preference": PREFERENCE}}, {}, ASKED),
    "body: extra_body": ({"extra_body": {"dpa": TEXT}}, {}, ASKED),
    "header: X-DPA-Direction": ({}, {"X-DPA-Direction": TEXT}, ASKED),
    "system: <dpa> tag": ({"system": f"<dpa>{TEXT}</dpa>"}, {}, ASKED),
    "model: demo-terse, a preset": ({"model": "demo-terse"}, {}, TERSE),
    "model: demo-brief, a direction": ({"model": "demo-brief"}, {}, ASKED),
    "model: demo:terse": ({"model": "demo:terse"}, {}, TERSE),
    "model: demo@...": ({"model": "demo@helpfulness=0.8;verbosity=-0.6"}, {}, ASKED),
    "verbosity: low": ({"verbosity": "low"}, {}, "helpfulness*71 + verbosity*-71 + warmth*0"),
    "beyond the cone": ({"dpa": "verbosity"}, {}, "400"),
    "beyond it, clamped": (
        {"dpa": "verbosity", "dpa_options": {"outside": "clamp"}},
        {},
        "helpfulness*71 + verbosity*71 + warmth*0",
    ),
    "no such objective": ({"dpa": "wit*1"}, {}, "400"),
}
"""What is asked: fields, headers, and the direction that must come out (or the status of a refusal)."""


class Recorder(ThreadingHTTPServer):
    """Between LiteLLM and the gateway: keeps every request, and sends it on."""

    daemon_threads = True

    def __init__(self, gateway: str) -> None:
        super().__init__(("127.0.0.1", 0), _Relay)
        self.gateway, self.heard = gateway, list[dict[str, Any]]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Relay(BaseHTTPRequestHandler):
    server: Recorder

    def do_GET(self) -> None:
        self._relay(b"")

    def do_POST(self) -> None:
        self._relay(self.rfile.read(int(self.headers["Content-Length"])))

    def _relay(self, body: bytes) -> None:
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "content-length")}
        if body:
            self.server.heard.append({"path": self.path, "headers": kept, "body": json.loads(body)})
        with httpx.stream(
            self.command, self.server.gateway + self.path, content=body, headers=kept, timeout=120
        ) as answer:
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "content-encoding", "connection"):
                    self.send_header(name, value)
            self.end_headers()
            for part in answer.iter_bytes():
                self.wfile.write(part)
                self.wfile.flush()

    def log_message(self, *arguments: object) -> None:
        """Nothing: the table says it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litellm", default="litellm", help="the proxy's command")
    parser.add_argument("--record", type=Path, help="where to keep what LiteLLM sent")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        server = ServeProcess(save_obedient_policy(Path(place) / "policy"), "--name", "demo", "--threads", 1)
        try:
            recorder = Recorder(server.wait().url)
            (config,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
            assert ADDRESS in config
            (Path(place) / "config.yaml").write_text(config.replace(ADDRESS, recorder.url), encoding="utf-8")
            failed = _ask_all(given.litellm, Path(place) / "config.yaml", recorder)
        finally:
            server.stop()
    if given.record:
        lines = ",\n".join(json.dumps(request) for request in _plain(recorder.heard))
        given.record.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return int(failed)


def _ask_all(litellm: str, config: Path, recorder: Recorder) -> bool:
    port = _free_port()
    log = (config.parent / "litellm.log").open("wb")
    env = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY, "PYTHONPATH": ""}
    proxy = subprocess.Popen(
        [litellm, "--config", str(config), "--port", str(port), "--host", "127.0.0.1"],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env,
    )
    url, failed = f"http://127.0.0.1:{port}", False
    try:
        _await(url, proxy, config.parent / "litellm.log")
        listed = [model["id"] for model in httpx.get(f"{url}/v1/models", headers=_signed({})).json()["data"]]
        print("models:", ", ".join(listed))
        print(f"{'way':40} {'status':>6} {'words':>5} {'direction that was applied'}")
        for name, (fields, headers, expected) in WAYS.items():
            for stream in (False, True):
                before = len(recorder.heard)
                status, direction, words, note = _ask(url, fields, headers, stream)
                for request in recorder.heard[before:]:
                    request.update(way=name, expected=expected)
                found = direction if status == 200 else str(status)
                wrong = found != expected
                failed |= wrong
                mark = f"   EXPECTED {expected}" if wrong else ""
                print(f"{name + (', streamed' if stream else ''):40} {status:6} {words:5} {found} {note}{mark}")
    finally:
        proxy.terminate()
        proxy.wait(20)
        log.close()
    return failed


def _ask(url: str, fields: Mapping[str, Any], headers: Mapping[str, str], stream: bool) -> tuple[int, str, int, str]:
    """Status, direction (of the response's header or its `dpa`), words, and what else is worth a look."""
    more = dict(fields)
    system = more.pop("system", None)
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": QUESTION}]
    body = {"model": "demo", "messages": messages, "seed": 1, "stream": stream, **more}
    if stream:
        body["stream_options"] = {"include_usage": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=_signed(headers), timeout=120) as answer:
        answer.read()
    if answer.status_code != 200:
        return answer.status_code, "", 0, answer.json()["error"]["message"][:110]
    if not stream:
        said = answer.json()
        direction = (said.get("dpa") or {}).get("direction") or answer.headers.get("llm_provider-x-dpa-direction")
        words = len(said["choices"][0]["message"]["content"].split())
        return 200, direction or "none", words, "" if "dpa" in said else "(no dpa in the answer)"
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    text = "".join(one["delta"].get("content") or "" for chunk in chunks for one in chunk["choices"])
    echoes = [chunk["dpa"]["direction"] for chunk in chunks if chunk.get("dpa")]
    direction = answer.headers.get("llm_provider-x-dpa-direction") or next(iter(echoes), None)
    usage = "" if any(chunk.get("usage") for chunk in chunks) else "(no usage)"
    return 200, direction or "none", len(text.split()), usage


def _signed(headers: Mapping[str, str]) -> dict[str, str]:
    """With the proxy's own key, which never reaches the gateway."""
    return {"Authorization": f"Bearer {KEY}", **headers}


def _await(url: str, proxy: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(600):
        if proxy.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health/liveliness", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise SystemExit(f"litellm did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _plain(heard: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a test needs of the requests: the fields, and the headers that are not of the moment."""
    kept = ("accept", "content-type", "user-agent", "x-dpa-direction")
    return [
        {**one, "headers": {name.lower(): text for name, text in one["headers"].items() if name.lower() in kept}}
        for one in heard
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
