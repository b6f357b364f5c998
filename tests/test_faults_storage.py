"""Faults of the disk and of the run folder: damage, changed configurations, full disks, two processes, odd paths.
Run: pytest tests/test_faults_storage.py

The numbers in the names are those of the project's list of faults.
"""

import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from damage import WAYS, damage, failing_reads
from fakes import FakeSampler, FakeScorer, all_rows, prompts_of, run_config, space_of
from forks import within
from toy_run import toy_config

from dpa.core.config_identity import of_results
from dpa.core.errors import RunFolderError, StorageError
from dpa.core.records import Ledger
from dpa.core.sections.rollout import RolloutConfig
from dpa.core.sections.selection import SelectionConfig
from dpa.recipes.checks import inputs_of
from dpa.stages.rollout import rollout
from dpa.stages.score import score
from dpa.stages.select import select_winners
from dpa.storage.run_folder import RunFolder, StageFolder
from dpa.storage.stage_records import Reject
from dpa.storage.tables import read_json, write_bytes, write_json

SPACE = space_of()
CONFIG = RolloutConfig(directions=2, samples=2, prompts_per_shard=4)
PROMPTS = prompts_of(12)


class Run:
    """Rollout, score and select with fakes in one folder; counts the sampler's calls."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def go(self) -> FakeSampler:
        candidates, scores, winners = (self.stage(name) for name in ("rollout", "score", "select"))
        sampler = FakeSampler()
        rollout(candidates, PROMPTS, SPACE, [sampler], CONFIG, 0)
        score(scores, candidates, PROMPTS, FakeScorer())
        select_winners(winners, candidates, scores, PROMPTS, SPACE, SelectionConfig(), 0)
        return sampler

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.path / name, f"iter_1/{name}")

    def rows(self) -> dict[str, list[dict]]:
        return {name: all_rows(self.stage(name)) for name in ("rollout", "score", "select")}


def test_fault_02_half_written_files_are_replaced_with_one_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    run.go()
    expected = run.rows()
    folder = tmp_path / "rollout"
    (folder / "done.json").unlink()
    (folder / "shard-00001.json").unlink()  # killed between the data and its record
    (folder / ".shard-00002.parquet.tmp").write_bytes(b"PAR1 half")
    with caplog.at_level(logging.WARNING):
        sampler = run.go()
    notices = [record.getMessage() for record in caplog.records]
    assert notices == ["iter_1/rollout: removed 2 unfinished file(s) of an interrupted run."]
    assert {text for call in sampler.calls for text in call} == {f"question{n}" for n in range(4, 8)}
    assert run.rows() == expected
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["flipped bit", "truncation", "deleted"])
@pytest.mark.parametrize("stage", ["rollout", "score", "select"])
def test_fault_03_a_damaged_shard_is_named_set_aside_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, stage: str
) -> None:
    run = Run(tmp_path)
    run.go()
    expected = run.rows()
    file = tmp_path / stage / "shard-00001.parquet"
    data = bytearray(file.read_bytes())
    match damage:
        case "flipped bit":
            data[len(data) // 2] ^= 4
            file.write_bytes(data)
        case "truncation":
            file.write_bytes(data[: len(data) // 2])
        case "deleted":
            file.unlink()
    with pytest.raises(StorageError, match=rf"shard-00001\.parquet is damaged or missing; run `dpa {stage} -t 1`"):
        list(run.stage(stage).tables())  # never handed to training
    assert not run.stage(stage).done
    sampler = run.go()
    assert run.rows() == expected
    assert len(sampler.calls) == (stage == "rollout"), "only the damaged shard is made again"
    if damage != "deleted":
        assert (tmp_path / stage / "shard-00001.parquet.damaged").read_bytes() == (
            bytes(data) if damage == "flipped bit" else bytes(data[: len(data) // 2])
        )
        assert any("shard-00001.parquet is damaged" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", ["shard-00001.parquet", "shard-00001.json", "done.json"])
def test_fault_03_a_read_that_fails_for_a_moment_condemns_nothing(tmp_path: Path, name: str) -> None:
    run = Run(tmp_path)
    run.go()
    stage, before = run.stage("rollout"), {file.name for file in (tmp_path / "rollout").iterdir()}
    with failing_reads(stage.path / name):
        with pytest.raises(StorageError, match=rf"{name}: reading failed \(Input/output error\); check the disk"):
            assert stage.done
        with pytest.raises(StorageError, match="Input/output error"):
            stage.whole_table()
    assert {file.name for file in stage.path.iterdir()} == before
    assert stage.done


def test_fault_03_a_damaged_record_is_made_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.go()
    expected = run.rows()
    (tmp_path / "rollout" / "shard-00000.json").write_text('{"file": {"rows": 16')
    assert not run.stage("rollout").done
    run.go()
    assert run.rows() == expected


@pytest.mark.parametrize("way", WAYS)
def test_fault_45_every_file_of_a_stage_is_made_again(tmp_path: Path, way: str) -> None:
    run = Run(tmp_path)
    run.go()
    expected = run.rows()
    ledgers = {name: run.stage(name).ledger.rows for name in expected}
    for file in sorted(tmp_path.rglob("*.*")):
        if damage(file, way):
            run.go()
            assert run.rows() == expected, f"{file} {way}"
            assert {name: run.stage(name).ledger.rows for name in expected} == ledgers
            read_json(file) if file.suffix == ".json" else file.read_bytes()


def test_fault_45_a_record_that_says_another_number_is_not_believed(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    stage.write_shard(0, pa.table({"x": [1]}), Ledger(rows=1))
    stage.finish()
    for file in ("done.json", "shard-00000.json"):
        kept = (tmp_path / file).read_text()
        (tmp_path / file).write_text(kept.replace('"rows": 1', '"rows": 3'))
        assert not StageFolder(tmp_path).done
        (tmp_path / file).write_text(kept)
    assert StageFolder(tmp_path).done


def test_a_stage_of_an_earlier_version_is_done_without_checksum_and_seal(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    stage.write_shard(0, pa.table({"x": [1]}), Ledger(rows=1))
    stage.finish()
    for file in ("done.json", "shard-00000.json"):
        record = read_json(tmp_path / file)
        del record["checksum"]
        write_json(tmp_path / file, record)
    assert StageFolder(tmp_path).done
    assert not StageFolder(tmp_path).seals


OBJECTIVES = {"helpfulness": None, "verbosity": None}
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"policy": "other"}, "policy: 'fake' -> 'other'"),
    ({"seed": 1}, "seed: 0 -> 1"),
    ({"rollout": {"directions": 4, "samples": 2, "prompts_per_shard": 4}}, "rollout.directions: 3 -> 4"),
    ({"space": {"objectives": {"helpfulness": None, "warmth": None}}}, "space.objectives.verbosity: None -> (absent)"),
    ({"space": {"objectives": OBJECTIVES, "template": "{weighted_rating}"}}, "space.template: 'You are a helpful"),
    ({"space": {"objectives": OBJECTIVES, "max_angle": 60}}, "space.max_angle: 45.0 -> 60.0"),
    ({"prompts": {"path": "other.jsonl"}}, "prompts.path: 'prompts.jsonl' -> 'other.jsonl'"),
]


@pytest.mark.parametrize(("changes", "line"), CHANGES, ids=[line.split(":")[0] for _, line in CHANGES])
def test_fault_04_a_changed_configuration_is_refused_field_by_field(
    tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    RunFolder(tmp_path).open(run_config(tmp_path)).close()
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(RunFolderError, match="belongs to a run with another configuration") as caught:
        RunFolder(tmp_path).open(run_config(tmp_path, **changes))
    assert line in str(caught.value)
    assert (tmp_path / "config.yaml").read_bytes() == before
    RunFolder(tmp_path).open(run_config(tmp_path)).close()  # the lock is free again


def test_a_folder_of_an_earlier_version_is_resumed_where_new_fields_have_their_defaults(tmp_path: Path) -> None:
    RunFolder(tmp_path).open(run_config(tmp_path)).close()
    file = tmp_path / "fingerprint.json"
    saved = json.loads(file.read_text())
    del saved["config"]["finetune"]["replay"]  # as if that field had come later
    file.write_text(json.dumps(saved))
    RunFolder(tmp_path).open(run_config(tmp_path)).close()
    file.write_text(json.dumps(saved))
    with pytest.raises(RunFolderError, match=r"finetune\.replay: 0\.0 -> 0\.5"):
        RunFolder(tmp_path).open(run_config(tmp_path, finetune={"replay": 0.5}))


def test_fault_04_changed_data_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a"}\n')
    config, inputs = run_config(tmp_path / "run"), {"prompts.path": data}
    RunFolder(config.out).open(config, inputs).close()
    RunFolder(config.out).open(config, inputs).close()
    RunFolder(config.out).open(config).close()  # a command that reads no prompts forgets nothing
    data.write_text('{"prompt": "b"}\n')
    with pytest.raises(RunFolderError, match=r"prompts\.path: the content of .*prompts\.jsonl has changed"):
        RunFolder(config.out).open(config, inputs)


def test_fault_04_an_edited_scoring_function_is_refused(tmp_path: Path) -> None:
    """What is finished was selected and trained by what the function said then."""
    config = toy_config(tmp_path / "in", tmp_path / "run")
    RunFolder(config.out).open(config, inputs_of(config)).close()
    marks = tmp_path / "in" / "marks.py"
    marks.write_text(marks.read_text() + "# and more\n")
    with pytest.raises(RunFolderError, match=r"reward\.functions\.helpfulness: the content of .*marks\.py has changed"):
        RunFolder(config.out).open(config, inputs_of(config))


def test_fault_04_a_reward_model_that_was_trained_again_in_its_place_is_refused(tmp_path: Path) -> None:
    (folder := tmp_path / "reward").mkdir()
    config = run_config(tmp_path / "run", reward={"folder": str(folder)})
    RunFolder(config.out).open(config, inputs_of(config)).close()
    (folder / "dpa_reward.json").write_text('{"golden": 1}')
    RunFolder(config.out).open(config, inputs_of(config)).close()
    (folder / "dpa_reward.json").write_text('{"golden": 2}')
    with pytest.raises(RunFolderError, match=r"reward\.folder: the content of .*dpa_reward\.json has changed"):
        RunFolder(config.out).open(config, inputs_of(config))
    (folder / "dpa_reward.json").unlink()
    RunFolder(config.out).open(config, inputs_of(config)).close()  # a finished run needs it no more


def test_fault_04_an_edited_module_of_scoring_functions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path / "in", tmp_path / "run")
    (package := tmp_path / "mymarks").mkdir()
    (package / "__init__.py").touch()
    (package / "good.py").write_text("def much(messages, responses): return [1.0 for _ in responses]\n")
    monkeypatch.syspath_prepend(tmp_path)
    functions = dict.fromkeys(config.reward.functions, "mymarks.good:much")
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"functions": functions})})
    RunFolder(config.out).open(config, inputs_of(config)).close()
    (package / "good.py").write_text("def much(messages, responses): return [2.0 for _ in responses]\n")
    with pytest.raises(RunFolderError, match=r"the content of .*good\.py has changed"):
        RunFolder(config.out).open(config, inputs_of(config))
    assert "evaluate.gold.helpfulness" not in inputs_of(config), "this package's own are as its version is"


def test_fault_05_what_paces_the_work_is_not_part_of_the_configuration(tmp_path: Path) -> None:
    RunFolder(tmp_path).open(run_config(tmp_path)).close()
    more = {"directions": 3, "samples": 2, "prompts_per_shard": 4, "workers": 7, "batch_size": 8}
    finetune, dpo = {"rows_per_device": 2, "save_steps": 7}, {"pairs_per_device": 2, "save_steps": 7}
    paced = run_config(tmp_path, rollout=more, finetune=finetune, dpo=dpo)
    RunFolder(tmp_path).open(paced).close()
    engine = {"kind": "vllm", "vllm": {"arguments": {"max_num_seqs": 256}}}
    RunFolder(tmp_path).open(run_config(tmp_path, rollout={**more, "engine": engine})).close()
    assert of_results(paced.finetune) == of_results(run_config(tmp_path).finetune)
    assert of_results(paced.dpo) == of_results(run_config(tmp_path).dpo)
    assert of_results(run_config(tmp_path, finetune={"epochs": 2}).finetune) != of_results(paced.finetune)


def test_fault_05_an_unfinished_rollout_goes_on_in_other_batches(tmp_path: Path) -> None:
    run, resumed = Run(tmp_path), FakeSampler()
    run.go()
    (tmp_path / "rollout" / "done.json").unlink()
    other = CONFIG.model_copy(update={"batch_size": 1, "workers": 3})
    rollout(run.stage("rollout"), PROMPTS, SPACE, [resumed], other, 0)
    assert resumed.calls == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_fault_17_a_full_disk_is_named_with_path_and_bytes(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_json(file, "old")
    (tmp_path / ".results.json.tmp").symlink_to("/dev/full")  # where it is written first
    with pytest.raises(StorageError, match=r"results\.json: writing 5 bytes failed \(No space left on device\); free"):
        write_bytes(file, b"12345")
    assert read_json(file) == "old"
    write_bytes(file, b"12345")
    assert file.read_bytes() == b"12345"


def test_fault_17_a_file_that_grows_too_large_is_not_counted_and_resumes(tmp_path: Path) -> None:
    whole, run = Run(tmp_path / "whole"), Run(tmp_path / "run")
    whole.go()
    with (
        largest_file(1000),
        pytest.raises(StorageError, match=r"shard-0000\d\.parquet: writing \d+ bytes failed .*ulimit"),
    ):
        run.go()
    stage = run.stage("rollout")
    assert [file.name for file in stage.path.iterdir()] == []
    assert not stage.done
    run.go()
    assert run.rows() == whole.rows()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_fault_17_resumes_once_there_is_room(tmp_path: Path, small_disk: Path) -> None:
    whole, run = Run(tmp_path / "whole"), Run(small_disk / "run")
    whole.go()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(48_000))
    with pytest.raises(StorageError, match=r"writing \d+ bytes failed \(No space left on device\)"):
        run.go()
    assert not run.stage("select").done
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    run.go()
    assert run.rows() == whole.rows()


def test_fault_18_too_little_free_space_is_refused_before_work_starts(tmp_path: Path) -> None:
    config, free = run_config(tmp_path / "run"), shutil.disk_usage(tmp_path).free
    with RunFolder(config.out).open(config) as folder:
        folder.check_room(free // 2)
        with pytest.raises(RunFolderError, match="--ignore-free-space"):
            folder.check_room(2 * free)
    with pytest.raises(RunFolderError, match=r"has .* GB free and the run needs about 1000000000\.0 GB.*--ignore-free"):
        folder.check_room(10**18)


def test_fault_19_a_second_process_names_the_first_and_kill_frees_the_lock(tmp_path: Path, fake_run: Callable) -> None:
    first = fake_run(tmp_path, "--hang")
    assert within(60, (tmp_path / "iter_1/rollout/shard-00000.json").exists)
    second = fake_run(tmp_path)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"in use by process {first.pid} on host {socket.gethostname()}" in errors
    assert errors.count("\n") == 1, "one sentence, no traceback"
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=20)
    third = fake_run(tmp_path)
    assert third.communicate(timeout=60)[0] == "done\n"


def test_fault_19_one_process_cannot_open_a_folder_twice(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    with RunFolder(tmp_path).open(config), pytest.raises(RunFolderError, match=f"process {os.getpid()} on host"):
        RunFolder(tmp_path).open(config)
    RunFolder(tmp_path).open(config).close()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Without the right to write in `folder`, for root too."""
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_fault_20_a_read_only_folder_is_named(tmp_path: Path) -> None:
    config = run_config(tmp_path / "ro" / "run")
    (tmp_path / "ro").mkdir()
    with read_only(tmp_path / "ro"), pytest.raises(RunFolderError, match=r"ro/run: .*Permission denied.*writable"):
        RunFolder(config.out).open(config)
    with read_only(tmp_path / "ro"), pytest.raises(RunFolderError, match="Permission denied"):
        StageFolder(tmp_path / "ro" / "stage")


def test_fault_20_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = run_config(tmp_path / "file" / "run")
    with pytest.raises(RunFolderError, match="a part of the path is a file"):
        RunFolder(config.out).open(config)


@pytest.mark.parametrize("name", ["with spaces", "größer/日本語", "a'b\"c;$(d)", "deep/er/than/there/is"])
def test_fault_20_odd_paths_and_missing_parents_work(tmp_path: Path, name: str) -> None:
    config = run_config(tmp_path / name)
    with RunFolder(config.out).open(config) as folder:
        run = Run(folder.path)
        run.go()
        assert len(run.rows()["rollout"]) == 12 * 4


def test_fault_20_temporary_files_lie_in_the_same_folder(tmp_path: Path) -> None:
    """A rename never crosses file systems, because what is renamed lies beside its target: /dev/shm, say, works."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    file = shm / f"dpa-test-{os.getpid()}.json"
    try:
        write_json(file, 1)
        assert read_json(file) == 1
    finally:
        file.unlink(missing_ok=True)


def test_fault_21_data_without_its_record_is_never_visible(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "s")
    stage.write_shard(0, pa.table({"x": [1]}), Ledger())
    stage.write_shard(1, pa.table({"x": [2]}), Ledger())
    (tmp_path / "shard-00001.json").unlink()  # killed before the record came
    after = StageFolder(tmp_path, "s")
    assert after.shard(1) is None
    assert after.shard_digest(1) is None
    assert not (tmp_path / "shard-00001.parquet").exists()
    with pytest.raises(ValueError, match="before all 2 shards"):
        after.finish(shards=2)


def test_fault_21_records_without_done_are_not_done(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.go()
    expected = run.rows()
    (tmp_path / "rollout" / "done.json").unlink()  # killed between the last shard and the end
    assert not run.stage("rollout").done
    assert run.go().calls == [], "all shards are recovered"
    assert run.rows() == expected


def test_fault_21_a_run_killed_before_its_fingerprint_starts_anew(tmp_path: Path) -> None:
    RunFolder(tmp_path).open(run_config(tmp_path)).close()
    (tmp_path / "fingerprint.json").unlink()
    RunFolder(tmp_path).open(run_config(tmp_path, seed=5)).close()
    assert read_json(tmp_path / "fingerprint.json")["config"]["seed"] == 5


def test_rejects_of_an_earlier_attempt_do_not_survive_a_stage_made_again_without_any(tmp_path: Path) -> None:
    stage = RunFolder(tmp_path).stage(1, "score")
    table = pa.table({"a": [1]})
    stage.write_shard(0, table, Ledger(), [Reject("x", "bad")])
    stage.finish()
    assert (stage.path / "rejects.jsonl").exists()
    stage.write_shard(0, table, Ledger())
    stage.finish()
    assert not (stage.path / "rejects.jsonl").exists()
