"""Fault 43 to 45: every file of a finished run comes to harm, and nothing of it is ever used in silence.
Run: pytest tests/test_faults_run_folder.py       (DPA_THOROUGH=1: every file in every way by itself, 10 minutes)

The numbers in the names are those of the project's list of faults.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from damage import WAYS, damage
from safetensors.torch import load_file
from toy_run import toy_config

from dpa.core.errors import DpaError, RunFolderError
from dpa.models.files import folder_revision
from dpa.recipes.dpa import Loop

FOR_PEOPLE = {"log.jsonl", "rejects.jsonl", "README.md", "lock", "inputs.json"}
"""Nothing reads them again, so that nothing is wrong with any content."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: `run` in this folder, beside what it was made from."""
    folder = tmp_path_factory.mktemp("toy")
    go(folder / "run", folder)
    return folder


def go(run: Path, inputs: Path, **changes: object) -> None:
    with Loop(toy_config(inputs, run, **changes)) as loop:
        loop.run()


def content(run: Path) -> dict[str, Any]:
    """What a run found: rows, weights and figures, by file."""
    tables = {str(file.relative_to(run)): pq.read_table(file).to_pylist() for file in run.rglob("*.parquet")}
    policy = run / "iter_1" / "policy"
    kept = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "config.json", "dpa_evaluation.json")
    return {
        **tables,
        **{name: (policy / name).read_text() for name in kept},
        "weights": {name: tensor.tolist() for name, tensor in load_file(policy / "model.safetensors").items()},
        "evaluation": json.loads((run / "iter_1/evaluate/evaluation.json").read_text()),
        "table.csv": (run / "table.csv").read_text(),
        "samples.jsonl": (run / "samples.jsonl").read_text(),
        "policies": [
            {**policy, "ledger": sorted(policy["ledger"])}
            for policy in json.loads((run / "results.json").read_text())["policies"]
        ],
        "report": (run / "report.html").stat().st_size > 10_000,
    }


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def files(run: Path) -> list[Path]:
    return sorted(file for file in run.rglob("*") if file.is_file() and file.name not in FOR_PEOPLE)


@pytest.mark.parametrize("way", WAYS)
def test_fault_45_whatever_a_run_folder_holds_is_made_again(finished: Path, tmp_path: Path, way: str) -> None:
    """All at once, the fingerprint aside; damaged shards and records of one stage one by one: test_faults_storage.py"""
    run = copied(finished, tmp_path)
    for file in files(run):
        if file.name != "fingerprint.json":
            damage(file, way)
    go(run, finished)
    assert content(run) == content(finished / "run")


@pytest.mark.parametrize("way", ["truncated", "{}", "[]", "a misspelt key"])
def test_fault_45_a_damaged_fingerprint_is_refused_with_what_to_delete(
    finished: Path, tmp_path: Path, way: str
) -> None:
    run = copied(finished, tmp_path)
    damage(run / "fingerprint.json", way)
    with pytest.raises(RunFolderError, match=r"fingerprint\.json .*; if .* delete .*/fingerprint\.json and") as caught:
        Loop(toy_config(finished, run))
    assert "\n" not in str(caught.value)
    (run / "fingerprint.json").unlink()
    with Loop(toy_config(finished, run)):
        pass
    assert json.loads((run / "fingerprint.json").read_text())["inputs"].keys() == {
        "prompts.path",
        "evaluate.prompts.path",
        "reward.functions.helpfulness",
        "reward.functions.verbosity",
    }


def test_fault_45_a_fingerprint_that_was_changed_says_so_beside_the_difference(finished: Path, tmp_path: Path) -> None:
    file = copied(finished, tmp_path) / "fingerprint.json"
    saved = json.loads(file.read_text())
    saved["config"]["seed"] = 1
    file.write_text(json.dumps(saved))
    with pytest.raises(RunFolderError, match=r"(?s)changed after it was written; .* delete .*seed: 1 -> 0"):
        Loop(toy_config(finished, file.parent))


def test_fault_45_without_its_fingerprint_a_folder_is_still_nobody_elses(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    (run / "fingerprint.json").unlink()
    with pytest.raises(RunFolderError, match=r"seed: 0 -> 1"):
        Loop(toy_config(finished, run, seed=1))
    (run / "config.yaml").write_text("[]")
    with pytest.raises(RunFolderError, match=rf"holds work, but .* delete {run}, or choose another folder"):
        Loop(toy_config(finished, run))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_fault_43_a_damaged_policy_is_named_made_again_and_never_sampled(
    finished: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = copied(finished, tmp_path)
    file = run / "iter_1" / "policy" / name
    before = file.read_bytes()
    damage(file, "a flipped bit")
    shutil.rmtree(run / "iter_1" / "evaluate")
    with (
        caplog.at_level(logging.WARNING),
        Loop(toy_config(finished, run)) as loop,
        pytest.raises(RunFolderError, match=r"iteration 1: its policy .* is damaged; run `dpa finetune -t 1` first"),
    ):
        loop.evaluate(1)
    assert f"{file} is damaged" in caplog.text
    with Loop(toy_config(finished, run)) as loop:
        loop.finetune(1)
    assert file.read_bytes() == before


def test_fault_44_a_run_that_was_moved_gives_the_rows_it_would_have_given(finished: Path, tmp_path: Path) -> None:
    """The second policy says where the first one lies, and its rows are named after it all the same."""
    here, there = copied(finished, tmp_path / "a"), copied(finished, tmp_path / "another" / "place")
    for run in (here, there):
        go(run, finished, iterations=2)
    rows = content(here)
    assert len([name for name in rows if name.startswith("iter_2")]) == 8
    assert rows == content(there)
    policies = [run / "iter_2" / "policy" for run in (here, there)]
    assert folder_revision(policies[0]) == folder_revision(policies[1])
    origins = [json.loads((policy / "dpa_config.json").read_text())["provenance"]["from"] for policy in policies]
    assert origins == [str(run / "iter_1" / "policy") for run in (here, there)]


@pytest.mark.skipif("DPA_THOROUGH" not in os.environ, reason="10 minutes; set DPA_THOROUGH=1")
def test_fault_45_every_file_in_every_way(finished: Path, tmp_path: Path) -> None:
    expected = content(finished / "run")
    names = [file.relative_to(finished / "run") for file in (finished / "run").rglob("*") if file.is_file()]
    for name in sorted(names):
        for way in WAYS:
            run = copied(finished, tmp_path / way)
            if damage(run / name, way):
                print(name, way, flush=True)
                try:
                    go(run, finished)
                except DpaError as error:
                    assert name.name == "fingerprint.json" and f"delete {run}" in str(error), error
                else:
                    assert content(run) == expected, (name, way)
            shutil.rmtree(run)
