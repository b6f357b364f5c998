"""Faults of training: a checkpoint cut off or refused by the disk never costs the one before it.
Run: pytest tests/test_faults_training.py

The numbers in the names are those of the project's list of faults; 23, 24 and 26 are in test_finetuning.py.
"""

import json
import logging
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from damage import failing_reads
from test_finetuning import CONFIG, logged, run
from tiny_models import SPACE, save_tiny_model

from dpa.core.errors import StorageError
from dpa.models.disk_refusals import disk_refusals
from dpa.models.files import load_space
from dpa.models.policy import load_policy, save_policy
from dpa.storage.tables import read_json
from dpa.training.checkpoints import newest_checkpoint


def test_fault_22_a_checkpoint_cut_off_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """kill -9 at any moment of a save leaves no readable trainer_state.json, which is written last."""
    for step, state in ((2, json.dumps({"global_step": 2})), (4, None), (6, '{"global_'), (10, "")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert [record.getMessage().split(" is incomplete")[0] for record in caplog.records] == [
        str(tmp_path / f"checkpoint-{step}") for step in (10, 6, 4)
    ]


def test_fault_22_a_read_that_fails_for_a_moment_costs_no_checkpoint(tmp_path: Path) -> None:
    work, base = tmp_path / "work", save_tiny_model(tmp_path / "base")
    for step in (2, 4):
        checkpoint = work / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (work / "inputs.json").write_text('"of these rows"')
    with failing_reads(work / "inputs.json"), pytest.raises(StorageError, match=r"inputs\.json: reading failed"):
        run(base, tmp_path, CONFIG)
    assert newest_checkpoint(work) == work / "checkpoint-4"
    with failing_reads(work / "checkpoint-4" / "trainer_state.json"), pytest.raises(StorageError, match="check the d"):
        newest_checkpoint(work)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "dpa_seal.json"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    """A power cut leaves a truncated file in a checkpoint that looks whole; training goes on from the one before."""
    base = save_tiny_model(tmp_path / "base")
    run(base, tmp_path / "whole", CONFIG)
    folder = tmp_path / "run"
    run(base, folder, CONFIG)
    shutil.rmtree(folder / "policy")
    before, newest = sorted((folder / "work").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(read_json(newest / "dpa_seal.json"))
    data = (newest / file).read_bytes()
    (newest / file).write_bytes(data[: len(data) // 2])
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(folder / "work") == before
    assert f"{newest / file} is damaged" in caplog.text
    run(base, folder, CONFIG)
    assert logged(folder) == logged(tmp_path / "whole")
    assert newest_checkpoint(folder / "work") == newest, "written over, it is whole again"


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """Leaves the limit as it was."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_fault_25_a_save_that_the_disk_refuses_keeps_the_checkpoint_before(
    tmp_path: Path, file_size_limit: None
) -> None:
    """Once checkpoint-2 is whole no file may grow beyond 20 kB: the next save fails, and with room the run goes on."""
    base = save_tiny_model(tmp_path / "base")
    run(base, tmp_path / "whole", CONFIG)
    folder, hard = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def shrink() -> None:
        while not (folder / "work" / "checkpoint-2" / "trainer_state.json").exists():
            time.sleep(0.001)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    threading.Thread(target=shrink, daemon=True).start()
    with pytest.raises(StorageError, match=r"work: saving a checkpoint failed \(.*\); (raise the file-size|free)"):
        run(base, folder, CONFIG)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    newest = newest_checkpoint(folder / "work")
    assert newest is not None and newest.name != "checkpoint-12", "an earlier one is whole"
    assert not (folder / "policy").exists()
    run(base, folder, CONFIG)
    assert logged(folder) == logged(tmp_path / "whole")


@pytest.mark.parametrize("writer", ["safetensors", "torch"])
def test_fault_17_a_model_that_does_not_fit_the_disk_is_one_sentence(
    tmp_path: Path, file_size_limit: None, writer: str
) -> None:
    """Whichever library writes; the model that stood there before stands there still."""
    model, tokenizer = load_policy(save_tiny_model(tmp_path / "base"))
    save_policy(model, tokenizer, tmp_path / "policy", SPACE, {"round": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(StorageError, match=r"failed \((File too large|the file could not be written)\)"):
        if writer == "safetensors":
            save_policy(model, tokenizer, tmp_path / "policy", SPACE, {"round": 2})
        else:
            with disk_refusals(tmp_path / "optimizer.pt", "saving a checkpoint"):
                torch.save(model.state_dict(), tmp_path / "optimizer.pt")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert load_space(tmp_path / "policy") == SPACE
    assert json.loads((tmp_path / "policy" / "dpa_config.json").read_text())["provenance"] == {"round": 1}
