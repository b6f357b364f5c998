"""A small HTTP server of OpenAI's chat API that misbehaves on demand, in this process or as a command of its own.
Used by: pytest tests/test_http_pool.py tests/test_http_sampler.py tests/test_server_process.py

    python tests/fake_server.py PORT POLICY [--die-at-start | --die-after N | --unwell]
"""

import argparse
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any, dict[str, str]]
"""Status, payload (bytes are sent as they are), headers."""


class FakeServer(ThreadingHTTPServer):
    """Listens on loopback until `stop`. Every POST is kept in `asked` with its time, and answered by `answer(body)`.

    `answer` returns a Reply, "hang" (silence until the server stops) or "reset" (the connection is torn down).
    `pages` are what GET gives, perhaps with a status. `busy_s` is spent on each answer; more than `room` at a time get
    429.
    """

    daemon_threads = True
    request_queue_size = 200

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Reply | str] | None = None,
        pages: dict[str, Any] | None = None,
        busy_s: float = 0.0,
        room: int = 10**6,
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.asked: list[tuple[float, str, dict[str, Any]]] = []
        self.at_once = self.most_at_once = 0
        self.answer = answer or (lambda body: (200, {"echo": body}, {}))
        self.pages = {"/health": {}, **(pages or {})}
        self.busy_s, self.room = busy_s, room
        self.headers_seen: list[dict[str, str]] = []
        self.lock, self.stopped = threading.Lock(), threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, _, body in self.asked]

    def stop(self) -> None:
        """Stop listening; answers under way are cut off."""
        self.stopped.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away are part of the game."""

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.stopped.is_set():
            self.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeServer

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path)
        status, payload = page if isinstance(page, tuple) else (404, {}) if page is None else (200, page)
        self._send((status, payload, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            server.asked.append((time.monotonic(), self.path, body))
            server.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            crowded = server.at_once > server.room
        try:
            reply = (429, {"error": {"message": "busy"}}, {}) if crowded else server.answer(body)
            if not crowded:
                server.stopped.wait(server.busy_s)
        finally:
            with server.lock:
                server.at_once -= 1
        if reply == "hang":
            server.stopped.wait()
        if reply == "reset" or server.stopped.is_set():
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            self._send(reply)

    def _send(self, reply: Reply) -> None:
        status, payload, headers = reply
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


class ChatServer:
    """Answers of OpenAI's chat API: a pure function of seed, preference and question, with the true prompt length.

    `count` gives the tokens of (messages, preference). `changes` say what is wrong with it: "ignores-preference",
    "no-usage", "greedy", "no-choice", "two-choices", "reasoning", "reasoning_content",
    "tool"; `refuses`: text of a question it answers 400.
    `many`: what it makes of `n`: "" gives one choice all the same, "seeds" a seed more for each (as vLLM does), "ids"
    their tokens too, "same" the same words again, "refused" is 400.
    """

    def __init__(
        self,
        count: Callable[[list[dict[str, str]], dict[str, float] | None], int],
        wrong: str = "",
        refuses: str | None = None,
        many: str = "",
    ) -> None:
        self._count, self._wrong, self._refuses, self._many = count, wrong, refuses, many

    def __call__(self, body: dict[str, Any]) -> Reply:
        question = body["messages"][-1]["content"]
        if self._refuses is not None and self._refuses in question:
            return 400, {"error": {"message": "I do not answer that"}}, {}
        preference = (body.get("chat_template_kwargs") or {}).get("preference")
        preference = None if self._wrong == "ignores-preference" else preference
        text = f"{question[-12:]} {json.dumps(preference)} {0 if self._wrong == 'greedy' else body['seed']}"
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self._wrong in ("reasoning", "reasoning_content"):  # vLLM's name for it, and the others'
            message |= {"content": None, self._wrong: text}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if self._wrong == "tool" else "stop"}
        choices = {"no-choice": [], "two-choices": [choice, choice]}.get(self._wrong, [choice])
        if body.get("n", 1) > 1 and self._many == "refused":
            return 400, {"error": {"message": "n must be 1"}}, {}
        if self._many in ("seeds", "ids", "same"):
            stem = text.rsplit(" ", 1)[0]
            step = 0 if self._many == "same" else 1
            says = [f"{stem} {body['seed'] + step * number}" for number in range(body.get("n", 1))]
            choices = [{**choice, "index": k, "message": {**message, "content": said}} for k, said in enumerate(says)]
            if self._many == "ids" and body.get("return_token_ids"):
                choices = [{**one, "token_ids": [0] * (one["index"] + 3)} for one in choices]
            choices.reverse()
        payload: dict[str, Any] = {"choices": choices}
        if self._wrong != "no-usage":
            payload["usage"] = {"prompt_tokens": self._count(body["messages"], preference), "completion_tokens": 7}
        return 200, payload, {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("policy")
    parser.add_argument("--die-at-start", action="store_true")
    parser.add_argument("--die-after", type=int, default=10**9)
    parser.add_argument("--unwell", action="store_true")
    given = parser.parse_args()
    print("loading", given.policy, flush=True)
    if given.die_at_start:
        sys.exit("no card found")
    child = subprocess.Popen(["sleep", "600"])  # an engine process of its own
    left = given.die_after

    def answer(body: dict[str, Any]) -> Reply:
        nonlocal left
        if given.unwell:
            return 503, {"error": {"message": "no worker is left"}}, {}
        left -= 1
        if left < 0:
            os._exit(9)
        return 200, {"echo": body, "pids": [os.getpid(), child.pid], "policy": given.policy}, {}

    FakeServer(answer, port=given.port)
    threading.Event().wait()


if __name__ == "__main__":
    main()
