"""Commands in processes of their own that start at once: forked from one process that has imported everything.

    done = python("-m", "dpa", "run", file)                # as subprocess.run([sys.executable, "-m", "dpa", ...])
    process = start("-m", "dpa", "run", file)              # as subprocess.Popen(...): killed, waited for, talked to

A new interpreter imports torch and transformers for seconds before it does anything; here that is paid once in a test
session. What a command imports, and when, is asked of a real interpreter (tests/test_import.py).
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path

_context = multiprocessing.get_context("forkserver")


class Process:
    """A command that runs. What the tests use of subprocess.Popen, with text on both streams."""

    def __init__(self, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self.args = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory(prefix="dpa-fork-")
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        where = str(cwd or Path.cwd())
        environment = dict(os.environ if env is None else env)
        _context.set_forkserver_preload(["dpa.recipes.compare", "dpa.cli.commands"])
        self._process = _context.Process(target=_work, args=(self.args, where, environment, self._files), daemon=False)
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote to stdout and stderr."""
        self.wait(timeout)
        return self.written()

    def written(self) -> tuple[str, str]:
        """What it has written so far."""
        out, err = (file.read_text(errors="replace") if file.exists() else "" for file in self._files)
        return out, err

    def line(self, timeout: float = 60) -> str:
        """The first line of its stdout, once it is there; what there is where it ends before."""
        deadline = time.monotonic() + timeout
        while "\n" not in (out := self.written()[0]) and self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return out.partition("\n")[0]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(*arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Process:
    """A python command line that runs: `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`."""
    return Process(*arguments, cwd=cwd, env=env)


def python(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float | None = 400
) -> subprocess.CompletedProcess[str]:
    """Run a python command line to its end."""
    process = start(*arguments, cwd=cwd, env=env)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode or 0, out, err)


def _work(arguments: list[str], cwd: str, environment: Mapping[str, str], files: list[Path]) -> None:
    """What an interpreter does with its command line; the streams go to two files."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    forkserver._forkserver.ensure_running = lambda: None  # it runs: what this process starts is forked from it too
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in zip((1, 2), files, strict=True):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    what, *rest = arguments
    if what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(what).parent))
        runpy.run_path(what, run_name="__main__")
