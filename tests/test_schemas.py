"""Every table of a run has the columns that storage/schemas.py states, and is read in one way.
Run: pytest tests/test_schemas.py
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpa.core.records import Ledger
from dpa.storage import schemas
from dpa.storage.run_folder import StageFolder

TABLES = Path(__file__).parent.parent / "docs" / "architecture.md"


def scores_of(rows: list[tuple]) -> pa.Table:
    columns = ("candidate_id", "prompt_id", "b", "a", "valid")
    return pa.Table.from_pylist(
        [dict(zip(columns, row, strict=True)) for row in rows], schemas.score_schema(["b", "a"])
    )


def test_scores_are_a_matrix_in_the_tables_order_and_a_row_that_is_not_valid_is_nan() -> None:
    table = scores_of([("c0", "p0", 1.0, 2.0, True), ("c1", "p0", 3.0, float("inf"), False)])
    scores_NM, attributes = schemas.score_matrix(table)
    assert attributes == ("b", "a")
    assert scores_NM[0].tolist() == [1.0, 2.0]
    assert np.isnan(scores_NM[1]).all(), "not even the finite score of a row that is not valid is used"


def test_a_mark_that_is_not_there_is_nan_and_a_table_may_be_empty() -> None:
    table = pa.table({"a": [None, 2.5], "b": [1, 2]}, schema=pa.schema({"a": pa.float64(), "b": pa.int32()}))
    np.testing.assert_array_equal(schemas.number_matrix(table, ["b", "a"]), [[1.0, np.nan], [2.0, 2.5]])
    assert schemas.score_matrix(scores_of([]))[0].shape == (0, 2)


def test_a_stages_whole_table_is_its_shards_in_order(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path / "score")
    for number in (1, 0):
        stage.write_shard(number, scores_of([(f"c{number}", "p", float(number), 0.0, True)]), Ledger())
    stage.finish(shards=2)
    assert stage.whole_table()["candidate_id"].to_pylist() == ["c0", "c1"]
    assert stage.scores()[0].tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_a_response_is_complete_as_its_own_column_says_or_unless_it_ended_at_a_limit() -> None:
    sampled = pa.table({"finish_reason": ["stop", "length"]})
    assert schemas.completeness(sampled) == [True, False]
    assert schemas.completeness(sampled.append_column("complete", pa.array([False, True]))) == [False, True]
    assert schemas.completeness(pa.table({"response": ["rated"]})) == [True]


@pytest.mark.parametrize(
    ("row", "schema"),
    [
        ("ratings.parquet", schemas.RATINGS),
        ("shards of `prompts/`, `eval_prompts/`", schemas.PROMPTS),
        ("rollout shard", schemas.CANDIDATES),
        ("score shard", schemas.SCORES),
        ("select shard", schemas.WINNERS),
        ("select shard, pairs", schemas.PAIRS),
    ],
)
def test_the_architecture_page_names_every_column(row: str, schema: pa.Schema) -> None:
    (line,) = (line for line in TABLES.read_text().splitlines() if line.startswith(f"| {row} |"))
    assert [name for name in schema.names if name not in line] == []
