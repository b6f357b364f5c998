"""Shares of a stage in several processes on one folder: no lock in the way, nothing lost, rows as of one process.
Run: pytest tests/test_shares.py
"""

import fcntl
import json
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from fake_run import PROMPTS
from fakes import FakeSampler, all_rows, prompts_of, run_config, space_of
from forks import Process, python, start
from tiny_models import save_tiny_model

from dpa.core.config import load_config
from dpa.core.errors import ConfigError, RejectRateError, RunFolderError
from dpa.core.records import Ledger
from dpa.recipes.dpa import Loop
from dpa.stages.rollout import rollout
from dpa.storage.locks import RunLock, Share
from dpa.storage.run_folder import RunFolder, StageFolder


def rows(folder: Path, name: str = "rollout") -> list[dict]:
    return all_rows(StageFolder(folder / "iter_1" / name, f"iter_1/{name}"))


def done(folder: Path, name: str = "rollout") -> bool:
    return (folder / "iter_1" / name / "done.json").exists()


def ended(*processes: Process) -> list[int]:
    return [process.wait(timeout=200) for process in processes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process alone makes."""
    from fake_run import run

    folder = tmp_path_factory.mktemp("whole")
    run(folder, 0.0, workers=1)
    return folder


def test_shares_side_by_side_give_the_rows_of_one_process(tmp_path: Path, whole: Path, fake_run: Callable) -> None:
    """Three processes start together on an empty folder; the last one marks the stage done."""
    assert ended(*(fake_run(tmp_path, "--shard", f"{i}/3", "--seconds", 0.02) for i in (1, 2, 3))) == [0, 0, 0]
    assert done(tmp_path)
    assert rows(tmp_path) == rows(whole)
    assert ended(*(fake_run(tmp_path, "--shard", f"{i}/3", "--score") for i in (1, 2, 3))) == [0, 0, 0]
    assert rows(tmp_path, "score") == rows(whole, "score")
    plain = fake_run(tmp_path)
    assert plain.communicate(timeout=200)[0] == "done\n"
    assert rows(tmp_path, "select") == rows(whole, "select")


def test_a_killed_share_is_made_by_the_same_command_again(tmp_path: Path, whole: Path, fake_run: Callable) -> None:
    """kill -9 of one of two in mid-shard, with a half-written file; the other is not disturbed and finishes nothing."""
    victim, other = fake_run(tmp_path, "--shard", "1/2", "--hang"), fake_run(tmp_path, "--shard", "2/2")
    stage = tmp_path / "iter_1" / "rollout"
    deadline = time.monotonic() + 100
    while not (stage / "shard-00000.json").exists():
        assert time.monotonic() < deadline and victim.poll() is None
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    assert ended(victim, other) == [-signal.SIGKILL, 0]
    assert not done(tmp_path)
    (stage / ".shard-00002.parquet.tmp").write_bytes(b"PAR1 half")
    assert ended(fake_run(tmp_path, "--shard", "1/2")) == [0]
    assert done(tmp_path)
    assert rows(tmp_path) == rows(whole)


def test_a_plain_run_finishes_what_shares_left(tmp_path: Path, whole: Path, fake_run: Callable) -> None:
    assert ended(fake_run(tmp_path, "--shard", "2/3")) == [0]
    assert not done(tmp_path), "the last one at work, but other shares are missing"
    assert ended(fake_run(tmp_path)) == [0]
    assert rows(tmp_path) == rows(whole)


def test_shares_and_plain_runs_do_not_meet(tmp_path: Path, fake_run: Callable) -> None:
    """A plain run is refused while shares work, a share while a plain run works, and one share is made once."""
    share = fake_run(tmp_path, "--shard", "1/2", "--hang")
    deadline = time.monotonic() + 100
    while not (tmp_path / "iter_1" / "rollout").exists():
        assert time.monotonic() < deadline and share.poll() is None
        time.sleep(0.005)
    refused = {
        (): f"in use by process {share.pid} on host",
        ("--shard", "1/2"): f"share 1/2 is being made by process {share.pid}",
        ("--shard", "2/3"): "shares of 2; wait for it",
    }
    started = {arguments: fake_run(tmp_path, *arguments) for arguments in refused}
    for arguments, process in started.items():
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 2
        assert refused[arguments] in errors and errors.count("\n") == 1
    share.kill()
    share.wait()
    with RunFolder(tmp_path).open(run_config(tmp_path)), pytest.raises(RunFolderError, match="in use by process"):
        RunLock(tmp_path / "lock", Share(1, 2))


def test_on_nfs_the_last_share_gets_the_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There flock is a lock of fcntl: one that cannot be raised to exclusive stays as it is."""

    def flock(descriptor: int, kind: int) -> None:
        kinds = {fcntl.LOCK_EX: fcntl.F_WRLCK, fcntl.LOCK_SH: fcntl.F_RDLCK, fcntl.LOCK_UN: fcntl.F_UNLCK}
        asked = struct.pack("hhqqi4x", kinds[kind & ~fcntl.LOCK_NB], os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, asked)  # of the open file, so that one process may hold several

    monkeypatch.setattr(fcntl, "flock", flock)
    locks = []
    for index in (1, 2):
        locks.append(RunLock(tmp_path / "lock", Share(index, 2)))
        locks[-1].let_others_in()
    assert [lock.become_alone() for lock in locks] == [False, True]
    with pytest.raises(RunFolderError, match="in use by process"):
        RunLock(tmp_path / "lock")
    for lock in locks:
        lock.close()


def test_a_share_leaves_what_others_are_writing_alone(tmp_path: Path) -> None:
    """Files without a record may be a neighbour's work in hand; only a process alone sweeps them away."""
    first = RunFolder(tmp_path).open(run_config(tmp_path), share=Share(1, 2))
    first.let_others_in()
    second = RunFolder(tmp_path).open(run_config(tmp_path), share=Share(2, 2))
    folder = first.stage(1, "rollout").path
    in_hand = [folder / "shard-00001.parquet", folder / ".shard-00001.parquet.tmp"]
    for file in in_hand:
        file.write_bytes(b"half")
    assert not first.stage(1, "rollout").may_finish(["x"]), "the second is at work"
    assert all(file.exists() for file in in_hand)
    second.close()
    first.close()
    with RunFolder(tmp_path).open(run_config(tmp_path)) as alone:
        alone.stage(1, "rollout")
    assert not any(file.exists() for file in in_hand)


def test_a_share_whose_server_is_broken_stops_by_its_own_rejects_and_keeps_none(tmp_path: Path) -> None:
    """Held to all prompts, a sixteenth of them could all be rejected, and kept so, before anybody noticed."""
    config = run_config(tmp_path)
    prompts = prompts_of(PROMPTS)
    bad = {f"question{n}": "empty" for n in range(PROMPTS)}
    with RunFolder(tmp_path).open(config, share=Share(1, 16)) as run:
        run.let_others_in()
        stage = run.stage(1, "rollout")
        some = config.rollout.model_copy(update={"max_reject_rate": 0.5, "prompts_per_shard": 2})
        with pytest.raises(RejectRateError):
            rollout(stage, prompts, space_of(), [FakeSampler(misbehave=bad)], some, 0)
        assert not list(stage.path.glob("shard-*.json"))


def test_of_shares_that_are_all_whole_only_the_last_at_work_finishes(tmp_path: Path) -> None:
    first = RunFolder(tmp_path).open(run_config(tmp_path), share=Share(1, 2))
    first.let_others_in()
    second = RunFolder(tmp_path).open(run_config(tmp_path), share=Share(2, 2))
    for number, folder in enumerate((first, second)):
        folder.stage(1, "rollout").write_shard(number, pa.table({"x": [1]}), Ledger(), made_from="x")
    assert not first.stage(1, "rollout").may_finish(["x", "x"]), "the second is at work"
    first.close()
    assert second.stage(1, "rollout").may_finish(["x", "x"])
    second.close()


def test_another_configuration_is_refused_to_a_share_too(tmp_path: Path) -> None:
    with RunFolder(tmp_path).open(run_config(tmp_path), share=Share(1, 2)) as first:
        first.let_others_in()
        with pytest.raises(RunFolderError, match="seed: 0 -> 5"):
            RunFolder(tmp_path).open(run_config(tmp_path, seed=5), share=Share(2, 2))
        RunFolder(tmp_path).open(run_config(tmp_path), share=Share(2, 2)).close()


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/0", "-1/4", "1/4/2"])
def test_a_share_that_cannot_be_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--shard: .* i from 1 to N; a Slurm array of 16 is --array=1-16"):
        Share.parse(text)


def test_every_shard_belongs_to_one_share() -> None:
    shares = [Share.parse(f"{i}/5") for i in range(1, 6)]
    assert all(sum(share.has(number) for share in shares) == 1 for number in range(23))


def test_shares_from_the_command_line(tmp_path: Path) -> None:
    """Two `dpa rollout --shard i/2` side by side, from an empty folder, against the loop in one process."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{n}", "prompt": f"question {n}"}) + "\n" for n in range(12)))
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "another question"}\n')
    config = {
        "out": str(tmp_path / "run"),
        "policy": str(save_tiny_model(tmp_path / "model")),
        "space": {"objectives": {"a": None, "b": None}, "template": "Weigh {weighted_rating}"},
        "reward": {"functions": {"a": "m:f", "b": "m:f"}},
        "prompts": {"path": str(prompts)},
        "rollout": {"directions": 2, "samples": 2, "max_new_tokens": 20, "prompts_per_shard": 2},
        "evaluate": {"prompts": {"path": str(tmp_path / "held_out.jsonl")}},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    command = ["-m", "dpa", "rollout", str(file), "-t", "1", "--shard"]
    assert ended(*(start(*command, f"{i}/2") for i in (1, 2))) == [0, 0]
    assert done(tmp_path / "run")
    with Loop(load_config(file, {"out": str(tmp_path / "plain")})) as loop:
        loop.rollout(1)
    assert rows(tmp_path / "run") == rows(tmp_path / "plain")
    refused = python(*command, "3/2")
    assert refused.returncode == 2 and "--shard: '3/2' is not i/N" in refused.stderr
