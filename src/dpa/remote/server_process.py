"""A server started from a command template for one policy, looked after, and ended with everything it started.
Run its tests: pytest tests/test_server_process.py
"""

import http.client
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from dpa.core.errors import ConfigError, EngineError

_GUARD = Path(__file__).with_name("guard.py")
_LOOK_S = 0.1
_LAST_BYTES = 1000
_PORTS = 3
"""So many are tried where another process takes the port that was free before the server does."""
_PORT_TAKEN = ("address already in use", "couldn't bind http server socket")
"""What uvicorn and llama.cpp say of that."""


class ServerProcess:
    """`command` with {policy}, {port} (a free one) and {index} filled in; the words are a shell's, but there is none.

    It listens on `host`. It is healthy when GET /health, or /v1/models where there is no /health, answers 200.
    `start_s` seconds are its time to become so, `health_s` those a busy one has to say it is well, `stop_s` those it
    has to end before it is killed. It ends with this process, kill -9 included (remote/guard.py). What it says is kept
    in `log`, where that is given.
    Raises ConfigError when the template cannot be filled in.
    """

    def __init__(
        self,
        command: str,
        policy: str,
        index: int = 0,
        start_s: float = 900.0,
        health_s: float = 15.0,
        stop_s: float = 10.0,
        host: str = "127.0.0.1",
        log: Path | None = None,
    ) -> None:
        self._command, self._policy, self._index = command, policy, index
        self._start_s, self._health_s, self._stop_s, self._host = start_s, health_s, stop_s, host
        # Appending: reading must not move the writer.
        self._log = tempfile.TemporaryFile("a+b") if log is None else log.open("a+b")  # noqa: SIM115
        self._guard: subprocess.Popen | None = None
        self._port = 0
        self._lock = threading.Lock()
        self._closed = False
        self._words()

    @property
    def address(self) -> str:
        """Where it listens: http://host:port."""
        return f"http://{self._host}:{self._port}"

    @property
    def running(self) -> bool:
        """Whether the command has not ended."""
        return self._guard is not None and self._guard.poll() is None

    def start(self) -> None:
        """Start it on a free port, after ending what may be left of the one before. Raises EngineError."""
        self.stop()
        with self._lock:
            if self._closed:
                raise EngineError("the server is closed.")
            with socket.socket() as probe:
                probe.bind((self._host, 0))
                self._port = probe.getsockname()[1]
            self._log.seek(0)
            self._log.truncate()
            # -P: nothing of the guard's folder is imported; psutil may lie in the user's site or on PYTHONPATH
            words = [sys.executable, "-P", str(_GUARD), str(self._stop_s), *self._words()]
            self._guard = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
            )
            self._deadline = time.monotonic() + self._start_s

    def wait_until_healthy(self) -> str:
        """Its address, once it answers. One that ends because its port was taken meanwhile is started on another.
        Raises EngineError when it ends for another reason, or takes longer than `start_s`."""
        ports = 1
        while not self.healthy(seconds=2.0):
            if not self.running:
                said = self.last_words()
                if ports == _PORTS or not any(words in said.lower() for words in _PORT_TAKEN):
                    raise EngineError(f"the server ended while it started; {said}")
                ports += 1
                self.start()
            elif time.monotonic() > self._deadline:
                self.stop()
                raise EngineError(f"the server was not healthy after {self._start_s:g} s; {self.last_words()}")
            time.sleep(_LOOK_S)
        return self.address

    def healthy(self, seconds: float | None = None) -> bool:
        """Whether it runs and says it is well, within `seconds` (default: `health_s`)."""
        if not self.running:
            return False
        for path in ("/health", "/v1/models"):
            try:
                with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                    self.address + path, timeout=seconds or self._health_s
                ) as answer:
                    return answer.status == 200
            except urllib.error.HTTPError as error:
                if error.code != 404:
                    return error.code in (401, 403)  # it is there, and wants a key
            except (OSError, ValueError, http.client.HTTPException):  # the last: what listens there speaks no HTTP
                return False
        return False

    def last_words(self) -> str:
        """How it was started and the end of what it said."""
        said = ""
        if not self._log.closed:
            size = self._log.seek(0, 2)
            self._log.seek(max(0, size - _LAST_BYTES))
            said = " ".join(self._log.read().decode("utf-8", "replace").split())
        return f"it was `{shlex.join(self._words())}` and said: {said or '(nothing)'}"

    def stop(self) -> None:
        """End it and all it started; it may be started again."""
        with self._lock:
            if self._guard is not None:
                assert self._guard.stdin is not None
                self._guard.stdin.close()  # what the guard waits for
                try:
                    self._guard.wait(self._stop_s + 5)
                except subprocess.TimeoutExpired:
                    self._guard.kill()
                    self._guard.wait()
                self._guard = None

    def close(self) -> None:
        """End it for good."""
        self._closed = True
        self.stop()
        self._log.close()

    def _words(self) -> list[str]:
        places = {"policy": self._policy, "port": str(self._port), "index": str(self._index)}
        try:
            return [word.format_map(places) for word in shlex.split(self._command)]
        except (ValueError, KeyError, IndexError) as error:
            raise ConfigError(
                f"rollout.engine.http.command: {self._command!r} cannot be filled in ({error!r}); only {{policy}}, "
                "{port} and {index} are known, and a brace is written twice."
            ) from None
