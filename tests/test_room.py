"""A disk too small for what a run has left to do is known before it begins; a resumed one is asked for no more.
Run: pytest tests/test_room.py
"""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from test_methods import toy_comparison
from toy_run import toy_config

from dpa.core.compare_config import load_comparison
from dpa.core.config import RewardRunConfig
from dpa.core.errors import RunFolderError
from dpa.recipes.checks import BYTES_PER_CANDIDATE
from dpa.recipes.compare import Comparison
from dpa.recipes.dpa import Loop
from dpa.recipes.room import needed_bytes
from dpa.storage.tables import write_bytes
from dpa.world.demo import run_demo

CHECKPOINTS = 3 * 12
"""Bytes a parameter: two are kept while a third is written, each of fp32 weights and AdamW's two moments."""


def parameters(model: str) -> int:
    return sum(tensor.numel() for tensor in load_file(Path(model) / "model.safetensors").values())


def done(folder: Path) -> None:
    folder.mkdir(parents=True)
    write_bytes(folder / "done.json", b"{}")


def test_what_is_left_is_what_counts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = toy_config(tmp_path / "inputs", run, iterations=3)
    each, candidates = parameters(config.policy), 5 * 2 * 2 * BYTES_PER_CANDIDATE
    assert needed_bytes(config, 5) == 3 * (4 * each + candidates) + CHECKPOINTS * each
    done(run / "iter_1" / "finetune")
    done(run / "iter_2" / "finetune")
    assert needed_bytes(config, 5) == 4 * each + candidates + CHECKPOINTS * each
    (run / "iter_3" / "finetune" / "checkpoint-5").mkdir(parents=True)
    write_bytes(run / "iter_3" / "finetune" / "checkpoint-5" / "optimizer.pt", bytes(1000))
    assert needed_bytes(config, 5) == 4 * each + candidates + CHECKPOINTS * each - 1000
    adapters = toy_config(tmp_path / "inputs", run, iterations=3, finetune={"lora": {}})
    assert needed_bytes(adapters, 5) == 4 * each + candidates - 1000
    write_bytes(run / "iter_3" / "finetune" / "done.json", b"{}")
    assert needed_bytes(config, 5) == 0, "a finished run needs nothing"
    unknown = toy_config(tmp_path / "inputs", tmp_path / "other", policy="somebody/something")
    assert needed_bytes(unknown, 5) == candidates


@pytest.mark.parametrize("method", ["full", "lora", "ridge"])
def test_a_reward_model_counts_until_it_is_trained(tmp_path: Path, method: str) -> None:
    backbone = toy_config(tmp_path / "inputs", tmp_path / "unused").policy
    config = RewardRunConfig(
        out=str(tmp_path / "run"),
        space={"objectives": {"a": None}},
        ratings=[{"path": "rated.jsonl", "scales": {"a": [0, 4]}}],
        reward={"train": {"backbone": backbone, "method": method}},
    )
    assert needed_bytes(config) == (4 + CHECKPOINTS * (method == "full")) * parameters(backbone)
    done(tmp_path / "run" / "train_reward")
    assert needed_bytes(config) == 0


def test_commands_without_the_flag_that_overrules_it_are_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begins(_: Loop) -> None:
        raise InterruptedError

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr(Loop, "look_ahead", begins)
    (shared,) = Comparison(load_comparison(toy_comparison(tmp_path))).shared
    for begin in (shared.run, partial(run_demo, tmp_path / "demo")):
        with pytest.raises(InterruptedError):
            begin()


def test_a_run_is_refused_before_it_begins_and_not_where_its_rest_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(tmp_path / "inputs", tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with Loop(config) as loop:
        with pytest.raises(RunFolderError, match=r"GB free and the run needs about .* GB; .*--ignore-free-space"):
            loop.run()
        assert not (loop.path / "iter_1").exists()
        loop.rollout(1)  # a stage by itself, a share or a launched rank is not asked for the whole run's room
        loop.run(ignore_free_space=True)
    with Loop(config) as again:
        again.run()
