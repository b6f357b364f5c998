"""Training in several processes: two ranks on a CPU learn what one learns, only the first writes, nothing is lost.
Run: pytest tests/test_launch.py
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.data_loader import SeedableRandomSampler
from forks import interpreter, start
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from dpa.core.config import load_config
from dpa.core.errors import ConfigError
from dpa.core.sections.cluster import ClusterConfig
from dpa.recipes.dpa import Loop
from dpa.training.launching import LAUNCHED, launch, launches
from dpa.training.packing import Example, FillersLast, packed_rows

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
    (folder / "words.py").write_text(
        "def words(messages, response): return float(len(response.split()))\n"
        "def few(messages, response): return 100 - 6 * words(messages, response)\n"
    )
    prompts = {"path": str(folder / "rated.jsonl"), "count": 2}
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"prompt": f"other {n}?"}) + "\n" for n in range(2)))
    config = {
        "out": str(folder / "run"),
        "policy": str(save_tiny_model(folder / "model")),
        "iterations": 0,
        "space": {"objectives": {"length": None, "breadth": None}, "template": "Weigh {weighted_rating}"},
        "ratings": [{"path": str(folder / "rated.jsonl"), "scales": {"length": [0, 4]}}],
        "reward": {"functions": {"breadth": f"{folder / 'words.py'}:words", "length": f"{folder / 'words.py'}:few"}},
        "prompts": prompts,
        "selection": {"directions": 2},
        "finetune": {
            "learning_rate": 3e-3, "max_length": 200, "packed_rows_per_step": 4, "save_steps": 2, "epochs": 2,
        },
        "evaluate": {"prompts": {"path": str(folder / "held_out.jsonl"), "count": 2}},
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


def losses(run: Path) -> list[float]:
    lines = (run / "iter_0" / "finetune" / "log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "iter_0" / "policy" / "model.safetensors")


def assert_same_training(run: Path, alone: Path) -> None:
    assert losses(run) == pytest.approx(losses(alone), rel=2e-3)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=0, atol=2e-3)


CONTRASTED = {
    "finetune.contrastive": "0.5", "finetune.listening_rows": "4", "finetune.max_length": "512",
    "finetune.packed_rows_per_step": "16", "finetune.epochs": "4",  # a step is all rows, in whatever order
}  # fmt: skip


def test_accelerate_launch_of_two_processes_learns_and_contrasts_as_one_does(selected: Path, tmp_path: Path) -> None:
    """As a user of a cluster starts it by hand: only the first rank locks and writes, the other joins. The contrastive
    term is a mean over the rows of a step, whichever rank has them; both ranks measure listening."""
    run, alone = tmp_path / "ranks", tmp_path / "alone"
    for folder in (run, alone):
        with Loop(load_config(selected, {**CONTRASTED, "out": str(folder)})) as loop:
            loop.read_ratings()
            loop.score(0)
            loop.select(0)
            if folder == alone:
                loop.finetune(0)
    command = [interpreter(), "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    sets = [f"--set={name}={value}" for name, value in {**CONTRASTED, "out": str(run)}.items()]
    done = subprocess.run(
        [*command, "-m", "dpa", "finetune", str(selected), "-t", "0", *sets], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_training(run, alone)
    ledgers = [json.loads((r / "iter_0/finetune/done.json").read_text())["ledger"] for r in (run, alone)]
    for field in ("training_tokens", "rows", "rejects"):
        assert ledgers[0][field] == ledgers[1][field]
    assert ledgers[0]["extra"]["listening_rows"] == ledgers[1]["extra"]["listening_rows"] > 0
    gaps = [ledger["extra"]["listening_gap_token"] for ledger in ledgers]
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-3)
    assert not list(run.rglob("checkpoint-*"))


FSDP = """
import sys
from accelerate import DistributedType
from accelerate.state import AcceleratorState
started = AcceleratorState.__init__
def start(self, *args, fsdp_plugin=None, **kwargs):
    started(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
AcceleratorState.__init__ = start  # accelerate has FSDP on cards only; torch's FSDP2 itself runs over gloo
from torch.distributed.tensor import DTensor
from dpa.training.trainers import StopsAtBadStep
check = StopsAtBadStep._check_step
def look(self, norm):
    assert all(isinstance(parameter, DTensor) for parameter in self.model_wrapped.parameters()), "weights are sharded"
    return check(self, norm)
StopsAtBadStep._check_step = look
sys.argv = ["dpa", *sys.argv[1:]]
from dpa.__main__ import main
main()
"""


def test_fsdp2_shards_the_weights_and_saves_a_whole_policy(
    selected: Path, run: Path, alone: Path, tmp_path: Path
) -> None:
    """By its preset, over gloo, through a checkpoint every second step."""
    (tmp_path / "rank.py").write_text(FSDP)
    command = [interpreter(), "-m", "dpa.training.launching", "--config_file", str(PRESETS / "fsdp2.yaml")]
    command += ["--main_process_port", "0", str(tmp_path / "rank.py")]
    done = subprocess.run(
        [*command, "finetune", str(selected), "-t", "0", "--set", f"out={run}"], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_training(run, alone)


def test_kill_9_of_the_loop_ends_the_ranks_and_one_process_resumes(selected: Path, run: Path, alone: Path) -> None:
    loop = start("-m", "dpa", "run", selected, "--processes", 2, "--out", run)
    work = run / "iter_0" / "finetune"
    deadline = time.monotonic() + 300
    ranks: list[psutil.Process] = []
    while not list(work.glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline and loop.poll() is None
        lines = {
            process: process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])
        }  # a zombie has none
        now = [process for process, line in lines.items() if str(run) in " ".join(line)]
        ranks = max(ranks, now, key=len)  # before the checkpoint: after it they may end at any moment
        time.sleep(0.005)
    loop.send_signal(signal.SIGKILL)
    loop.wait()
    assert len(ranks) >= 3, "the launcher and two ranks"
    _, alive = psutil.wait_procs(ranks, timeout=120)
    assert not alive, "no orphans"
    with Loop(load_config(selected, {"out": str(run)})) as again:
        again.finetune(0)
    assert_same_training(run, alone)


def test_a_users_mistake_in_a_rank_is_one_sentence_and_exit_2(capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"iter_0/finetune: the launched training could not start; its message"):
        launch(["finetune", "nowhere.yaml"], ClusterConfig(processes=2), "iter_0/finetune")
    said = capfd.readouterr().err
    assert "dpa: config: no file at nowhere.yaml" in said
    assert "Traceback" not in said
    with pytest.raises(ConfigError, match=r"no file at nowhere\.yaml; see recipes/accelerate"):
        launch(["finetune", "x"], ClusterConfig(accelerate="nowhere.yaml"), "x")


RANK = """
import sys
from dpa.core.errors import RunFolderError
from dpa.training.ranks import any_of, first_then_rest, wait_for_all
print(first_then_rest(lambda join: f"join={join}"), any_of(sys.argv[1] == "1"), flush=True)
wait_for_all()
def locked(join):
    raise RunFolderError("out: in use by process 1.")
try:
    first_then_rest(locked)
except RunFolderError as error:
    print(error, flush=True)
"""


def two_ranks(script: str) -> tuple[list[list[str]], list[int]]:
    """What two ranks of a launch, told their number, say, and how they end."""
    with socket.socket() as held:  # to the end: bound so, the first rank may listen on it and nobody else is given it
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
        both = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [
            subprocess.Popen(
                [interpreter(), "-c", script, rank],
                env={**both, "RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in ("0", "1")
        ]
        said = [process.communicate(timeout=200)[0].splitlines() for process in ranks]
    return said, [process.returncode for process in ranks]


def test_the_other_ranks_leave_when_the_first_cannot_open_the_folder() -> None:
    said, codes = two_ranks(RANK)
    assert said == [["join=False True", "out: in use by process 1."], ["join=True True"]]
    assert codes == [0, 2]


PASSES = """
import sys
from dpa.core.sections.training import PreferenceConfig
from dpa.models.memory import Plan
from dpa.training import trainer_arguments
from dpa.training.dpo import DPO
from dpa.training.ranks import wait_for_all
trainer_arguments.first_plan = lambda *_, **__: (Plan(4, False), Plan(3, True))[int(sys.argv[1])]
shared = {"bf16": False}
first = trainer_arguments.first_passes(DPO(PreferenceConfig(), None, 0), "auto", None, 100, 8, shared)
print(first.units, first.recompute, shared)
wait_for_all()
"""


def test_ranks_with_other_memory_free_take_as_many_passes() -> None:
    """Else one waits in a pass for a rank that has none left."""
    said, _ = two_ranks(PASSES)
    assert said == [["2 True {'bf16': False, 'gradient_checkpointing': True}"]] * 2


PAIRS = f"""
import sys, tempfile
sys.path.insert(0, {str(ROOT / "tests")!r})
from tiny_models import SPACE, tiny_model, tiny_tokenizer
from dpa.core.sections.training import PreferenceConfig
from dpa.training.dpo import DPO, EncodedPair
from dpa.training.ranks import ranks, wait_for_all
together = 8 if ranks() == 1 else 2
settings = dict(learning_rate=1e-3, epochs=3, pairs_per_step=8, pairs_per_device=together, sft_weight=0.7, warmup=0)
pairs = [EncodedPair([2, 7, 4], [11 + i] * (1 + i * i) + [1], [30, 1 + i]) for i in range(8)]
learner = DPO(PreferenceConfig(**settings), SPACE, 0)
trainer = learner.trainer(tiny_model(), tiny_tokenizer(), pairs, tempfile.mkdtemp(), lambda: tiny_model(seed=1))
trainer.train()
print(*(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
wait_for_all()
"""


def test_ranks_learn_from_pairs_as_one_process_does() -> None:
    """A step is all pairs, in whatever order: at once, or two passes of two on each rank, of unlike many tokens."""
    (first, _), _ = two_ranks(PAIRS)
    done = subprocess.run([interpreter(), "-c", PAIRS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found, expected = ([float(loss) for loss in said.split()] for said in (first[-1], done.stdout.splitlines()[-1]))
    assert len(expected) == 3 and found == pytest.approx(expected, rel=1e-4)


def test_training_is_launched_but_not_from_within_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    eight = ClusterConfig(processes=8)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launches(eight) and not launches(ClusterConfig())
    monkeypatch.setenv("WORLD_SIZE", "1")  # as job schedulers and notebooks set it
    assert launches(eight)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launches(eight)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv(LAUNCHED, "1")
    assert not launches(eight)


@pytest.fixture
def three_ranks() -> Iterator[None]:
    os.environ["WORLD_SIZE"] = "3"
    yield
    del os.environ["WORLD_SIZE"]


def test_ranks_share_rows_out_evenly_without_training_on_one_twice(three_ranks: None) -> None:
    """What lacks is filled with rows that have nothing to learn."""
    examples = [Example(list(range(5, 15)), 4) for _ in range(7)]
    rows = packed_rows(examples, 16, together=1, shares=True)
    assert len(rows) == 9
    assert sum(int((row.labels_T != -100).sum()) for row in rows) == 7 * 6


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_is_read_by_accelerate(preset: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(preset)).num_machines == 1


@pytest.mark.parametrize("fillers", [0, 1, 7])
def test_rows_without_a_token_to_learn_change_no_order(fillers: int) -> None:
    """A training that goes on with other ranks, or in one process, has the same rows in a step."""
    torch.manual_seed(3)
    alone = SeedableRandomSampler(range(9))
    ranks = FillersLast([True] * 4 + [False] * fillers + [True] * 5, seed=3)
    for epoch in range(3):
        alone.set_epoch(epoch)
        ranks.set_epoch(epoch)
        drawn = list(ranks)
        assert len(drawn) == len(ranks) == 9 + fillers
        assert [place - fillers * (place > 3) for place in drawn[:9]] == list(alone)
