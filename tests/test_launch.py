"""Training in several processes: two ranks on a CPU learn what one learns, only the first writes, nothing is lost.
Run: pytest tests/test_launch.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from dpa.core.config import load_config
from dpa.core.errors import ConfigError
from dpa.models.finetuning import Example, _packed
from dpa.recipes.dpa import Loop

ROOT = Path(__file__).parents[1]
PRESETS = ROOT / "recipes" / "accelerate"


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file beside a run that has come to its first finetuning."""
    folder = tmp_path_factory.mktemp("launch")
    rated = [
        {"prompt": f"question {n}?", "response": "So it is. " * (1 + (n + k) % 5), "length": k}
        for n in range(24)
        for k in range(2)
    ]
    (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    (folder / "words.py").write_text("def words(messages, response): return float(len(response.split()))\n")
    prompts = {"path": str(folder / "rated.jsonl"), "count": 2}
    config = {
        "out": str(folder / "run"),
        "policy": str(save_tiny_model(folder / "model")),
        "iterations": 0,
        "space": {"objectives": {"length": None, "breadth": None}, "template": "Weigh {weighted_rating}"},
        "ratings": [{"path": str(folder / "rated.jsonl"), "scales": {"length": [0, 4]}}],
        "reward": {"functions": dict.fromkeys(("length", "breadth"), f"{folder / 'words.py'}:words")},
        "prompts": prompts,
        "selection": {"directions": 2},
        "finetune": {
            "learning_rate": 3e-3, "max_length": 200, "packed_rows_per_step": 4, "save_steps": 2, "epochs": 2,
        },
        "evaluate": {"prompts": prompts},
    }  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with Loop(load_config(file)) as loop:
        loop.read_ratings()
        loop.score(0)
        loop.select(0)
    return file


@pytest.fixture
def run(selected: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be finetuned."""
    return Path(shutil.copytree(selected.parent / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def alone(selected: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, finetuned in one process."""
    folder = Path(shutil.copytree(selected.parent / "run", tmp_path_factory.mktemp("alone") / "run"))
    with Loop(load_config(selected, {"out": str(folder)})) as loop:
        loop.finetune(0)
    return folder


def dpa(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dpa", *map(str, arguments)]


def losses(run: Path) -> list[float]:
    lines = (run / "iter_0" / "finetune" / "log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "iter_0" / "policy" / "model.safetensors")


def assert_same_training(run: Path, alone: Path) -> None:
    assert losses(run) == pytest.approx(losses(alone), rel=2e-3)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=0, atol=2e-3)


def test_accelerate_launch_of_two_processes_learns_what_one_learns(selected: Path, run: Path, alone: Path) -> None:
    """As a user of a cluster starts it by hand. Only the first rank locks and writes; the other joins."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, "-m", "dpa", "finetune", str(selected), "-t", "0", "--set", f"out={run}"],
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_training(run, alone)
    ledgers = [json.loads((r / "iter_0/finetune/done.json").read_text())["ledger"] for r in (run, alone)]
    for field in ("training_tokens", "rows", "rejects"):
        assert ledgers[0][field] == ledgers[1][field]
    assert not list(run.rglob("checkpoint-*"))


def test_the_loop_launches_fsdp2_by_its_preset(selected: Path, run: Path, alone: Path) -> None:
    """Weights sharded over two ranks (gloo); the policy saved is whole."""
    settings = {"out": str(run), "cluster.accelerate": str(PRESETS / "fsdp2.yaml")}
    with Loop(load_config(selected, settings)) as loop:
        ledger = loop.finetune(0)
        assert ledger.training_tokens > 0
        assert loop.finetune(0) == ledger, "a finished stage launches nothing"
    assert_same_training(run, alone)


def test_kill_9_of_the_loop_ends_the_ranks_and_the_same_command_resumes(selected: Path, run: Path, alone: Path) -> None:
    command = dpa("run", selected, "--processes", 2, "--out", run, "--set", "finetune.epochs=2")
    loop = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    work = run / "iter_0" / "finetune"
    deadline = time.monotonic() + 120
    while not list(work.glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline and loop.poll() is None
        time.sleep(0.005)
    ranks = psutil.Process(loop.pid).children(recursive=True)
    assert len(ranks) >= 3, "the launcher and two ranks"
    loop.send_signal(signal.SIGKILL)
    loop.wait()
    _, alive = psutil.wait_procs(ranks, timeout=40)
    assert not alive, "no orphans"
    assert not (work / "done.json").exists()
    with Loop(load_config(selected, {"out": str(run), "cluster.processes": "2"})) as again:
        again.finetune(0)
    assert_same_training(run, alone)


def test_a_users_mistake_is_one_sentence_from_the_first_rank(selected: Path, run: Path) -> None:
    (run / "iter_0" / "select" / "done.json").unlink()
    done = subprocess.run(
        dpa("run", selected, "--out", run, "--processes", 3, "--set", "iterations=0"), text=True, capture_output=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "packed_rows_per_step: 4 is no multiple of rows_per_device times devices (3); take 6" in done.stderr
    with (
        Loop(load_config(selected, {"out": str(run), "cluster.accelerate": "nowhere.yaml"})) as loop,
        pytest.raises(ConfigError, match=r"no file at nowhere\.yaml; see recipes/accelerate"),
    ):
        loop.finetune(0)


@pytest.fixture
def three_ranks() -> Iterator[None]:
    os.environ["WORLD_SIZE"] = "3"
    yield
    del os.environ["WORLD_SIZE"]


def test_ranks_share_rows_out_evenly_without_training_on_one_twice(selected: Path, three_ranks: None) -> None:
    """What lacks is filled with rows that have nothing to learn."""
    examples = [Example(list(range(5, 15)), 4) for _ in range(7)]
    rows = _packed(examples, load_config(selected).finetune.model_copy(update={"max_length": 16}))
    assert len(rows) == 9
    assert sum(label != -100 for row in rows for example in row for label in example.labels) == 7 * 6


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_is_read_by_accelerate(preset: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(preset)).num_machines == 1
