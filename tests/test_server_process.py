"""Servers that are started from a command: healthy before use, started again when they die, never left behind.
pytest tests/test_server_process.py
"""

import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fake_server import FakeServer
from forks import alive, within

from dpa.core.errors import ConfigError, EngineError
from dpa.remote.http_pool import HttpPool
from dpa.remote.server_process import ServerProcess

SCRIPT = Path(__file__).with_name("fake_server.py")
COMMAND = f"{shlex.quote(sys.executable)} {shlex.quote(str(SCRIPT))} {{port}} {{policy}}"

Start = Callable[..., ServerProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes ServerProcesses that end with the test."""
    made: list[ServerProcess] = []

    def make(extra: str = "", policy: str = "/a policy", **options: object) -> ServerProcess:
        made.append(ServerProcess(f"{COMMAND} {extra}", policy, **options))
        return made[-1]

    yield make
    for process in made:
        process.close()


def ask(pool: HttpPool, count: int = 1) -> list[dict]:
    return [answer.payload for answer in pool.ask("/", [{"number": number} for number in range(count)])]


def test_a_server_is_started_used_and_ended_with_all_it_started(start: Start) -> None:
    with HttpPool(processes=[start()]) as pool:
        (payload,) = ask(pool)
        assert payload["policy"] == "/a policy", "one word, whatever its blanks"
        assert all(map(alive, payload["pids"]))
    assert not any(map(alive, payload["pids"]))


def test_the_guard_finds_psutil_where_this_process_does(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tmp_path / "found"
    (tmp_path / "psutil.py").write_text(
        "import importlib, pathlib, sys\n"
        f"pathlib.Path({str(found)!r}).touch()\n"
        f"sys.path.remove({str(tmp_path)!r})\n"
        "del sys.modules['psutil']\n"
        "importlib.import_module('psutil')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with HttpPool(processes=[start()]) as pool:
        (payload,) = ask(pool)
    assert found.exists() and not any(map(alive, payload["pids"]))


def test_fault_11_a_server_that_dies_is_started_again_and_nothing_is_lost(start: Start) -> None:
    """Each life of the server answers 25 requests and then kills itself."""
    with HttpPool(processes=[start("--die-after 25")], in_flight=4, backoff_s=0.01) as pool:
        payloads = ask(pool, 60)
    assert [payload["echo"]["number"] for payload in payloads] == list(range(60))
    lives = {payload["pids"][0] for payload in payloads}
    assert len(lives) == 3
    assert not any(alive(pid) for payload in payloads for pid in payload["pids"])


def test_fault_11_a_server_that_keeps_dying_is_given_up_with_its_last_words(start: Start) -> None:
    process = start("--die-after 0")
    with (
        HttpPool(processes=[process], max_restarts=2, backoff_s=0.01) as pool,
        pytest.raises(EngineError, match=r"died 3 times in a row; it was `.*` and said: loading /a policy"),
    ):
        pool.ask("/", [{}])
    assert not process.running


def test_fault_11_a_server_that_says_it_is_healthy_and_answers_nothing_ends_the_run(start: Start) -> None:
    with (
        HttpPool(processes=[start("--unwell")], attempts=3, max_restarts=1, backoff_s=0.01) as pool,
        pytest.raises(EngineError, match=r"no server answers .*no worker is left"),
    ):
        pool.ask("/", [{"number": number} for number in range(3)])


def test_what_speaks_no_http_is_not_healthy() -> None:
    process = ServerProcess("sleep 600 {policy} {port}", "1")
    process.start()
    with socket.create_server(("127.0.0.1", 0)) as other:
        process._port = other.getsockname()[1]

        def speak() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46")  # a TLS alert

        speaking = threading.Thread(target=speak)
        speaking.start()
        assert process.healthy(seconds=5.0) is False
        speaking.join()
    process.close()


def test_fault_11_another_server_goes_on_when_one_is_given_up(start: Start) -> None:
    with HttpPool(processes=[start("--die-after 3"), start()], max_restarts=0, in_flight=2, backoff_s=0.01) as pool:
        assert [payload["echo"]["number"] for payload in ask(pool, 40)] == list(range(40))
        assert len(pool.addresses) == 1


def test_fault_11_a_hung_server_is_killed_and_started_again(start: Start) -> None:
    with HttpPool(processes=[start(health_s=2.0, stop_s=0.5)], request_s=2.0, backoff_s=0.01) as pool:
        (payload,) = ask(pool)
        hung = psutil.Process(payload["pids"][0])
        hung.suspend()
        assert within(10, lambda: hung.status() == psutil.STATUS_STOPPED), "a thread may answer until it is"
        (after,) = ask(pool)
    assert after["pids"][0] != payload["pids"][0]
    assert not any(map(alive, payload["pids"]))


def test_a_server_that_does_not_start_is_one_sentence(start: Start) -> None:
    with pytest.raises(
        EngineError, match=r"the server ended while it started; .* said: loading .* no card found"
    ) as caught:
        HttpPool(processes=[start("--die-at-start")])
    assert "\n" not in str(caught.value)


def test_a_server_whose_port_is_taken_while_it_loads_is_started_on_another(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    loading = f"sh -c 'until [ -e {taken} ]; do sleep 0.01; done; exec \"$@\"' sh"
    process = ServerProcess(f"{loading} {COMMAND}", "policy")
    process.start()
    with socket.socket() as other:
        other.bind(("127.0.0.1", process._port))
        taken.touch()
        address = process.wait_until_healthy()
        assert address != "http://{}:{}".format(*other.getsockname())
    with HttpPool([address]) as pool:
        assert ask(pool)[0]["policy"] == "policy"
    process.close()


@pytest.mark.parametrize("said", ["Address already in use", "couldn't bind HTTP server socket"])
def test_a_server_that_finds_every_port_taken_is_given_up(tmp_path: Path, said: str) -> None:
    starts, script = tmp_path / "starts", tmp_path / "server.sh"
    script.write_text(f'echo >> {starts}; echo "{said}"\n')
    process = ServerProcess(f"sh {script} {{port}} {{policy}}", "policy")
    process.start()
    with pytest.raises(EngineError, match=rf"ended while it started; .* said: {said}"):
        process.wait_until_healthy()
    assert starts.read_text().count("\n") == 3
    process.close()


def test_a_server_that_is_never_healthy_is_given_up_and_ended() -> None:
    process = ServerProcess("sleep 600 {policy} {port}", "1", start_s=0.3)
    process.start()
    with pytest.raises(EngineError, match=r"not healthy after 0.3 s"):
        process.wait_until_healthy()
    assert not process.running


@pytest.mark.parametrize("command", ["serve {policy} {prot}", "serve {policy", "serve 'half {port}", "serve {0}"])
def test_a_template_that_cannot_be_filled_in_is_refused(command: str) -> None:
    with pytest.raises(ConfigError, match=r"only {policy}, {port} and {index} are known"):
        ServerProcess(command, "policy")


def test_a_command_that_does_not_exist_is_one_sentence() -> None:
    process = ServerProcess("no-such-engine {policy} {port}", "policy")
    process.start()
    with pytest.raises(EngineError, match="no-such-engine"):
        process.wait_until_healthy()
    process.close()
    assert process._log.closed and "(nothing)" in process.last_words()


def test_fault_11_no_orphans_after_kill_9_of_the_run() -> None:
    code = (
        "import sys, time; sys.path.insert(0, 'src')\n"
        "from dpa.remote.server_process import ServerProcess\n"
        f"process = ServerProcess({COMMAND!r}, 'policy')\n"
        "process.start()\n"
        "print(process.wait_until_healthy(), flush=True)\n"
        "time.sleep(600)\n"
    )
    repository = Path(__file__).parents[1]
    run = subprocess.Popen([sys.executable, "-c", code], cwd=repository, stdout=subprocess.PIPE, text=True)
    with HttpPool([run.stdout.readline().strip()]) as pool:
        (payload,) = ask(pool)
    run.kill()
    run.communicate()
    assert within(20, lambda: not any(map(alive, payload["pids"]))), "the server outlives the run"


def test_a_refused_port_of_another_server_is_not_ours() -> None:
    """A server that is not ours on that address does not count once ours has ended."""
    with FakeServer() as stranger:
        process = ServerProcess("true {policy} {port}", "policy")
        process.start()
        process._port = stranger.server_address[1]
        assert within(20, lambda: not process.running)
        assert not process.healthy()
        process.close()


def test_a_closed_server_stays_closed(start: Start) -> None:
    process = start()
    process.close()
    with pytest.raises(EngineError, match="closed"):
        process.start()
