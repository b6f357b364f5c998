"""Rollout: which rows come out, and that they depend on nothing but prompts, space, settings, seed and policy.
Run: pytest tests/test_rollout.py
"""

from pathlib import Path

import numpy as np
import pytest
from fakes import FakeSampler, all_rows, prompts_of, space_of

from dpa.core.errors import EngineError
from dpa.core.records import candidate_id, seed_of
from dpa.core.sections.rollout import RolloutConfig
from dpa.stages.rollout import ask, rollout
from dpa.storage.run_folder import StageFolder
from dpa.storage.schemas import CANDIDATES

CONFIG = RolloutConfig(directions=3, samples=2, prompts_per_shard=4)
SPACE = space_of(max_angle=60)


def stage_at(path: Path, name: str = "iter_1/rollout") -> StageFolder:
    return StageFolder(path, name)


def test_every_prompt_gets_D_x_N_rows_with_derived_ids_and_seeds(tmp_path: Path) -> None:
    stage = stage_at(tmp_path)
    ledger = rollout(stage, prompts_of(10), SPACE, [FakeSampler()], CONFIG, seed=7)
    rows = all_rows(stage)
    assert stage.shards == 3
    assert next(stage.tables()).schema.equals(CANDIDATES)
    assert [row["prompt_id"] for row in rows] == [f"p{n}" for n in range(10) for _ in range(6)]
    assert [row["k"] for row in rows] == [0, 1] * 30
    assert len({row["candidate_id"] for row in rows}) == 60
    for row in rows:
        assert row["candidate_id"] == candidate_id(row["prompt_id"], row["direction"], row["k"], 7, "fake-0")
        assert row["seed"] == seed_of(row["candidate_id"])
    directions = np.array([row["direction"] for row in rows[::2]])
    assert len(np.unique(directions, axis=0)) == 30, "each prompt has directions of its own"
    assert SPACE.angle_to_center(directions).max() <= 60
    assert (ledger.rows, ledger.rejects) == (60, 0)
    assert ledger.tokens_generated == sum(row["tokens"] for row in rows)
    assert ledger.peak_memory > 0
    assert ledger.wall_s > 0


def test_a_fixed_grid_is_asked_of_every_prompt(tmp_path: Path) -> None:
    grid_DK = SPACE.grid(5)
    stage = stage_at(tmp_path)
    rollout(stage, prompts_of(3), SPACE, [FakeSampler()], RolloutConfig(samples=1), 0, grid_DK)
    got = np.array([row["direction"] for row in all_rows(stage)]).reshape(3, len(grid_DK), 2)
    assert (got == grid_DK).all()


def test_directions_are_keyed_by_seed_stage_and_prompt(tmp_path: Path) -> None:
    def directions(name: str, seed: int, prompts: list) -> dict[str, list]:
        place = stage_at(tmp_path / f"{name}-{seed}-{len(prompts)}", name)
        rollout(place, prompts, SPACE, [FakeSampler()], CONFIG, seed)
        return {row["prompt_id"]: row["direction"] for row in all_rows(place)}

    base = directions("iter_1/rollout", 0, prompts_of(3))
    assert directions("iter_1/rollout", 0, prompts_of(5)).items() >= base.items()
    assert directions("iter_2/rollout", 0, prompts_of(3)) != base
    assert directions("iter_1/rollout", 1, prompts_of(3)) != base


def test_samplers_with_different_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one revision"):
        rollout(stage_at(tmp_path), prompts_of(2), SPACE, [FakeSampler("a"), FakeSampler("b")], CONFIG, 0)


def test_duplicate_prompt_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distinct"):
        rollout(stage_at(tmp_path), [*prompts_of(2), *prompts_of(1)], SPACE, [FakeSampler()], CONFIG, 0)


def test_an_engine_that_fails_on_purpose_stops_the_run_and_keeps_what_is_finished(tmp_path: Path) -> None:
    stage = stage_at(tmp_path)
    with pytest.raises(EngineError, match="the engine is gone"):
        rollout(stage, prompts_of(12), SPACE, [FakeSampler(misbehave={"question9": "engine"})], CONFIG, 0)
    assert [stage.shard(n) is not None for n in range(3)] == [True, True, False]


def test_shards_of_another_policy_are_made_again(tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        rollout(stage_at(tmp_path), prompts_of(8), SPACE, [FakeSampler("a", 0, {"question5": "engine"})], CONFIG, 0)
    rollout(stage_at(tmp_path), prompts_of(8), SPACE, [FakeSampler("b")], CONFIG, 0)
    rollout(stage_at(tmp_path / "clean"), prompts_of(8), SPACE, [FakeSampler("b")], CONFIG, 0)
    assert all_rows(stage_at(tmp_path)) == all_rows(stage_at(tmp_path / "clean"))


def test_shards_under_another_seed_are_made_again(tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        rollout(stage_at(tmp_path), prompts_of(8), SPACE, [FakeSampler(misbehave={"question5": "engine"})], CONFIG, 0)
    rollout(stage_at(tmp_path), prompts_of(8), SPACE, [FakeSampler()], CONFIG, 1)
    rollout(stage_at(tmp_path / "clean"), prompts_of(8), SPACE, [FakeSampler()], CONFIG, 1)
    assert all_rows(stage_at(tmp_path)) == all_rows(stage_at(tmp_path / "clean"))


def test_prompts_to_be_asked_under_another_seed_are_written_again(tmp_path: Path) -> None:
    written = []
    for seed in (0, 1):
        ask(stage_at(tmp_path), prompts_of(8), SPACE, CONFIG, seed)
        written.append(all_rows(stage_at(tmp_path)))
    assert len(written[0]) == len(written[1]) == 8 * 3 and written[0] != written[1]


def test_what_only_paces_the_work_leaves_shards_good(tmp_path: Path) -> None:
    """Workers, batch size and precision are the machine's, as the engine is."""
    rollout(stage_at(tmp_path), prompts_of(8), SPACE, [FakeSampler()], CONFIG, 0)
    before = all_rows(stage_at(tmp_path))
    (tmp_path / "done.json").unlink()
    elsewhere = CONFIG.model_copy(update={"workers": 2, "batch_size": 3, "bf16": "auto"})
    idle = FakeSampler(misbehave={f"question{n}": "engine" for n in range(8)})
    rollout(stage_at(tmp_path), prompts_of(8), SPACE, [idle], elsewhere, 0)
    assert stage_at(tmp_path).done and all_rows(stage_at(tmp_path)) == before


def test_every_prompt_rejected_still_adds_up(tmp_path: Path) -> None:
    stage = stage_at(tmp_path)
    sampler = FakeSampler(misbehave={f"question{n}": "empty" for n in range(4)})
    rollout(stage, prompts_of(4), SPACE, [sampler], RolloutConfig(max_reject_rate=1), 0)
    assert (stage.ledger.rows, stage.ledger.rejects) == (0, 4)
