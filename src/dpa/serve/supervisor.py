"""Child engines: started, watched, started again a bounded number of times, and never left behind.
Run its tests: pytest tests/test_supervisor.py
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dpa.core.errors import DpaError, EngineError, ModelFileError

HEALTHY_S = 60.0
"""Seconds after which an engine's earlier deaths are forgotten."""

_log = logging.getLogger(__name__)


class EngineProcess:
    """`python -m MODULE` with these arguments, on a Unix socket in a folder only this user can enter.

    The child holds the other end of a pipe and leaves when it ends, so kill -9 of this process leaves no orphan. A
    child that dies is started again after `backoff_s`, twice as long each time; after `max_restarts` in a row, or when
    it cannot start at all, `failed` is called once with the error.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        failed: Callable[[DpaError], None],
        max_restarts: int = 3,
        backoff_s: float = 0.5,
        module: str = "dpa.serve.child",
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="dpa-engine-")  # mode 0700
        self.socket = str(Path(self._folder) / "s")
        """Where it listens."""
        self.ready = threading.Event()
        """Set while it listens."""
        self._arguments, self._failed, self._module = list(arguments), failed, module
        self._max_restarts, self._backoff_s = max_restarts, backoff_s
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._child = self._start()
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def close(self, grace_s: float = 5.0) -> None:
        """Ask it to end; after `grace_s` seconds it is killed."""
        self._closing.set()
        with self._lock:
            child = self._child
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(grace_s)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._watcher.join(1.0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> subprocess.Popen[bytes]:
        Path(self.socket).unlink(missing_ok=True)
        command = [sys.executable, "-m", self._module, *self._arguments, "--uds", self.socket]
        package = str(Path(__file__).parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        # A session of its own: Ctrl-C in a terminal is for the gateway, which then asks the engine to end.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )

    def _watch(self) -> None:
        deaths, refusal, ever_ready = 0, None, False
        while True:
            begun = time.monotonic()
            stdout = self._child.stdout
            assert stdout is not None
            for line in stdout:
                said = _said(line)
                if "ready" in said:
                    ever_ready = True
                    self.ready.set()
                elif "error" in said:
                    kind = ModelFileError if said.get("exit_code") == 2 else EngineError
                    refusal = kind(said["error"])
            code = self._child.wait()
            self.ready.clear()
            if self._closing.is_set():
                return
            if refusal is not None and not ever_ready:
                self._failed(refusal)
                return
            deaths = 1 if time.monotonic() - begun > HEALTHY_S else deaths + 1
            if deaths > self._max_restarts:
                self._failed(
                    EngineError(
                        f"engine: it died {deaths} times in a row (exit code {code}); look at its messages above, for "
                        "memory or driver trouble."
                    )
                )
                return
            pause = self._backoff_s * 2 ** (deaths - 1)
            _log.warning("engine: it died (exit code %s); starting it again in %.1f s", code, pause)
            if self._closing.wait(pause):
                return
            with self._lock:
                if self._closing.is_set():
                    return
                self._child = self._start()


def _said(line: bytes) -> dict[str, str]:
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
