"""What there was to choose from: the best of each pool in every direction, and whether directions choose at all.
pytest tests/test_pools.py
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes import space_of
from hypothesis import given
from hypothesis import strategies as st
from toy_run import toy_config

from dpa.core.pools import best_of_pools, pools_of
from dpa.core.sections.evaluate import EvaluateConfig
from dpa.core.sections.selection import SelectionConfig
from dpa.recipes.dpa import Loop
from dpa.stages.pools import pool_front

SPACE = space_of("helpfulness", "verbosity", max_angle=60)
GRID_DK = SPACE.grid(5)


def front_of(pools: dict[str, list[tuple[float, float]]], **how: object) -> dict:
    """The record of pools of (helpfulness, verbosity); NaN: not scored."""
    rows = [(prompt_id, *scores) for prompt_id, candidates in pools.items() for scores in candidates]
    scores_RK = np.array([row[1:] for row in rows])
    table = pa.table(
        {
            "candidate_id": [f"c{n}" for n in range(len(rows))],
            "prompt_id": [row[0] for row in rows],
            "helpfulness": scores_RK[:, 0],
            "verbosity": scores_RK[:, 1],
            "valid": np.isfinite(scores_RK).all(axis=1),
        }
    )
    evaluation = EvaluateConfig(prompts={"path": "x"}, directions=5, resamples=20)
    return pool_front(table, SPACE, SelectionConfig(**how), evaluation, seed=0)


POOL = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6)


@given(st.lists(POOL, min_size=1, max_size=5))
def test_the_best_of_each_pool_is_that_of_a_loop_over_all_of_it(pools: list[list[tuple[int, int]]]) -> None:
    prompt_ids = [str(p) for p, candidates in enumerate(pools) for _ in candidates]
    scores_RK = np.array([scores for candidates in pools for scores in candidates], dtype=float)
    groups = pools_of(prompt_ids, scores_RK, np.ones(2))
    best_DPK, different_P = best_of_pools(groups, GRID_DK)
    for place, prompt_id in enumerate(prompt_id for group in groups for prompt_id in group.prompt_ids):
        candidates_NK = np.array(pools[int(prompt_id)], dtype=float)
        winners = [int((candidates_NK @ direction_K).argmax()) for direction_K in GRID_DK]
        np.testing.assert_array_equal(best_DPK[:, place], candidates_NK[winners])
        assert different_P[place] == len(set(winners))


def test_a_pool_that_one_candidate_wins_offers_no_choice() -> None:
    trade_off, dominated = [(90.0, 50.0), (60.0, 10.0), (50.0, 90.0)], [(90.0, 50.0), (80.0, 50.0)]
    found = front_of({"a": trade_off, "b": trade_off})
    assert (found["prompts"], found["candidates"], found["dominated"]) == (2, 3.0, 0.0)
    assert found["different"] == 3.0 and found["verdict"]
    ends = [found["directions"][place]["objectives"]["model"]["verbosity"]["value"] for place in (0, -1)]
    assert ends == [10.0, 90.0]
    alone = front_of({"a": dominated, "b": dominated, "c": trade_off})
    assert alone["dominated"] == pytest.approx(2 / 3) and alone["verdict"], "many prompts need not offer a choice"
    assert "for 67% of the prompts all would keep the same." in alone["sentence"]
    nothing = front_of({"a": dominated, "b": [(90.0, 50.0)]})
    assert not nothing["verdict"] and "which teaches no direction" in nothing["sentence"]


def test_what_has_no_score_is_no_candidate() -> None:
    nothing = (np.nan, np.nan)
    found = front_of({"a": [(90.0, 50.0), nothing, (50.0, 90.0)], "b": [nothing]})
    assert (found["prompts"], found["candidates"]) == (1, 2.0)


def test_the_best_is_what_selection_takes_for_it() -> None:
    """Divided by its deviation, what varies little weighs as much."""
    pools = {"a": [(50.0, 10.0), (50.5, 20.0)], "b": [(50.0, 90.0), (50.5, 99.0)]}
    value = [
        front_of(pools, standardise=standardise)["directions"][0]["objectives"]["model"]["helpfulness"]["value"]
        for standardise in (False, True)
    ]
    assert value == [50.0, 50.5]


def test_a_run_says_it_once_for_the_scores_it_chose_by(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = toy_config(tmp_path, tmp_path / "run")
    with Loop(config) as loop:
        loop.run()
    file = tmp_path / "run" / "iter_1" / "select" / "pools.json"
    assert capsys.readouterr().out.count("candidates 3 directions would keep") == 1
    record = json.loads(file.read_text())
    kept = json.loads((tmp_path / "run" / "results.json").read_text())["policies"][0]["pools"]
    assert kept["directions"] == record["directions"] and kept["prompts"] == 4 and kept["candidates"] == 4.0
    file.write_text("{}")  # a damaged one is made again; once the iteration is trained, it is too late to say it
    with Loop(config) as loop:
        loop.run()
    assert json.loads(file.read_text()) == record
    assert "candidates 3 directions" not in capsys.readouterr().out
