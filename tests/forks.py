"""Commands in processes of their own that start at once: forked from one process that has imported everything.

    done = python("-m", "dpa", "run", file)                # as subprocess.run([sys.executable, "-m", "dpa", ...])
    process = start("-m", "dpa", "run", file)              # as subprocess.Popen(...): killed, waited for, talked to

    subprocess.Popen([interpreter(), "-m", "dpa", "serve", ...])   # where the command line itself is what is tested

A new interpreter imports torch and transformers for seconds before it does anything; here that is paid once in a test
session, for what a command starts by `sys.executable` too (ranks, engines). What a command imports, and when, is asked
of a real interpreter (tests/test_import.py).
"""

import atexit
import functools
import gc
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["dpa.recipes.compare", "dpa.cli.commands", "dpa.serve.command", "dpa.serve.engine", "accelerate.commands.launch"]
)

_SERVER = "DPA_TEST_FORKS"

_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
if sys.argv[1].startswith("-") and sys.argv[1] not in ("-m", "-c", "-u"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])  # an interpreter of its own kind
door = socket.socket(socket.AF_UNIX)
door.connect({address!r})
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(door, [len(asked).to_bytes(8, "big")], [0, 1, 2])
door.sendall(asked)
said = door.makefile()
pid = int(said.readline())
with open(f"{{sys.argv[0]}}-{{os.getpid()}}", "w") as note:
    note.write(str(pid))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(said.readline() or -signal.SIGKILL)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""
"""An interpreter's stand-in: it asks the tests for the fork, passes signals on, and ends as it ends."""


def share_forks() -> None:
    """Let all processes of a test session fork from one server: the first starts it, those it starts find it."""
    server: Any = forkserver._forkserver
    if _SERVER in os.environ:
        server._forkserver_address, server.ensure_running = os.environ[_SERVER], lambda: None
        server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # it ends with the first process, not with this
    else:
        server.ensure_running()
        os.environ[_SERVER] = server._forkserver_address


class Process:
    """A command that runs. What the tests use of subprocess.Popen, with text on both streams."""

    def __init__(self, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self.args = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory(prefix="dpa-fork-")
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        where = str(cwd or Path.cwd())
        environment = dict(os.environ if env is None else env)
        environment["DPA_TEST_PYTHON"] = interpreter()
        streams = [Path(os.devnull), *self._files]
        self._process = _context.Process(target=_work, args=(self.args, where, environment, streams), daemon=False)
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


@functools.cache
def interpreter() -> str:
    """A program that is to be started as `sys.executable`: its command line runs in such a fork, with its streams."""
    folder = Path(tempfile.mkdtemp(prefix="dpa-fork-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(folder / "door"))
    door.listen(64)
    program = folder / "python"
    program.write_text(_CLIENT.format(python=sys.executable, address=str(folder / "door")))
    program.chmod(0o700)

    def answer(client: socket.socket) -> None:
        size, streams, _, _ = socket.recv_fds(client, 8, 3)
        with client.makefile("rb") as asked:
            arguments, cwd, environment = json.loads(asked.read(int.from_bytes(size, "big")))
        environment["DPA_TEST_PYTHON"] = str(program)
        passed = [_Descriptor(stream) for stream in streams]
        process = _context.Process(target=_work, args=(arguments, cwd, environment, passed, client), daemon=False)
        process.start()
        for stream in streams:
            os.close(stream)
        client.sendall(f"{process.pid}\n".encode())
        process.join()
        with client:
            client.sendall(f"{process.exitcode}\n".encode())

    def attend() -> None:
        while True:
            threading.Thread(target=_unless_hung_up, args=(answer, door.accept()[0]), daemon=True).start()

    threading.Thread(target=attend, daemon=True, name="forks").start()
    return str(program)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def within(seconds: float, condition: Callable[[], object]) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())


def fork_of(pid: int) -> int:
    """The process in which the command line of an `interpreter()` runs; of any other process, itself."""
    note = Path(f"{interpreter()}-{pid}")
    return int(note.read_text()) if note.exists() else pid


class _Descriptor:
    """A file descriptor that is passed to a fork."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _detached, (reduction.DupFd(self.number),)


def _detached(duplicate: Any) -> int:
    return duplicate.detach()


def _unless_hung_up(answer: Any, client: socket.socket) -> None:
    try:
        answer(client)
    except OSError:
        client.close()  # killed while it asked


def _end_with(client: socket.socket) -> None:
    """End as by kill -9 when the program that asked for this fork was ended so."""
    client.recv(1)
    os._exit(137)


def _work(
    arguments: list[str],
    cwd: str,
    environment: Mapping[str, str],
    streams: Sequence[Path | int],
    client: socket.socket | None = None,
) -> None:
    """What an interpreter does with its command line; `streams`: files, or descriptors, of stdin, stdout and stderr."""
    gc.freeze()  # what was imported stays: a Trainer collects garbage twice, which else goes over all of it
    if client is not None:
        threading.Thread(target=_end_with, args=(client,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    forkserver._forkserver.ensure_running = lambda: None  # it runs: what this process starts is forked from it too
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = environment["DPA_TEST_PYTHON"]
    for number, stream in enumerate(streams):
        how = os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY
        opened = stream if isinstance(stream, int) else os.open(stream, how)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # multiprocessing reads nothing
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    what, *rest = [argument for argument in arguments[:1] if argument != "-u"] + arguments[1:]
    if what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = [what, *rest]
        sys.path.insert(0, str(Path(what).parent))
        runpy.run_path(what, run_name="__main__")
