"""The columns of every table of a run, stated once, and what is read from such a table everywhere.
Run its tests: pytest tests/test_schemas.py

`messages` is the JSON text of chat messages, `direction` the K weights of a unit vector, null where none is stated.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

_TEXT, _NUMBER, _FLAG, _DIRECTION = pa.string(), pa.float64(), pa.bool_(), pa.list_(pa.float64())

PROMPTS = pa.schema({"prompt_id": _TEXT, "messages": _TEXT})

ASKED = pa.schema({"prompt_id": _TEXT, "messages": _TEXT, "direction": _DIRECTION})
"""Of the rollout of a learner that samples for itself: what it asks."""

RATINGS = pa.schema({"row_id": _TEXT, "prompt_id": _TEXT, "messages": _TEXT, "response": _TEXT, "source": _TEXT})
"""Followed by one float column per attribute: its mark, null where not rated."""

CANDIDATES = pa.schema(
    {
        "candidate_id": _TEXT,
        "prompt_id": _TEXT,
        "direction": _DIRECTION,
        "k": pa.int32(),
        "seed": pa.int64(),
        "response": _TEXT,
        "tokens": pa.int32(),
        "finish_reason": _TEXT,
    }
)
"""Of a rollout."""

SCORES = pa.schema({"candidate_id": _TEXT, "prompt_id": _TEXT, "valid": _FLAG})
"""With one float column per attribute before `valid`; rows in the order of the candidates. See `score_schema`."""

WINNERS = pa.schema(
    {
        "prompt_id": _TEXT,
        "messages": _TEXT,
        "direction": _DIRECTION,
        "candidate_id": _TEXT,
        "response": _TEXT,
        "complete": _FLAG,
        "utility": _NUMBER,
        "negative_direction": _DIRECTION,
    }
)
"""Of a selection; followed by one float column per objective. `complete`: the response ended by itself, not at a limit
of tokens. `negative_direction`: a direction for which the pool keeps another response; empty: none was found; null: not
known."""

PAIRS = pa.schema(
    {
        "prompt_id": _TEXT,
        "messages": _TEXT,
        "direction": _DIRECTION,
        "chosen": _TEXT,
        "rejected": _TEXT,
        "utility_chosen": _NUMBER,
        "utility_rejected": _NUMBER,
        "chosen_complete": _FLAG,
        "rejected_complete": _FLAG,
        "chosen_id": _TEXT,
        "rejected_id": _TEXT,
        "negative_direction": _DIRECTION,
    }
)
"""Of a selection of pairs; followed by one float column per objective: the chosen one's."""

ANSWERS = pa.schema(
    {"candidate_id": _TEXT, "prompt_id": _TEXT, "messages": _TEXT, "response": _TEXT, "complete": _FLAG}
)
"""Rated or sampled responses beside what was asked, as the baselines take them up."""


HELD = pa.field("held", pa.list_(pa.int32()))
"""After `direction`, where there are targets (core/targets.py): the K values of a target, null where an objective is
free; null where the row states a direction."""


def with_held(schema: pa.Schema) -> pa.Schema:
    """The schema of rows that may state targets."""
    return schema.insert(schema.get_field_index("direction") + 1, HELD)


def selection_schema(pairs: bool, held: bool) -> pa.Schema:
    """Columns of a selection, before the objectives' own: of winners or of pairs, which may state targets."""
    schema = PAIRS if pairs else WINNERS
    return with_held(schema) if held else schema


def held_values(table: pa.Table) -> list[list[int | None] | None]:
    """What each row holds; None throughout in a table without targets."""
    return _values_or_none(table, HELD.name)


def named_negatives(table: pa.Table) -> list[list[float] | None]:
    """`negative_direction` of each row of a selection; None throughout in one of an older version."""
    return _values_or_none(table, "negative_direction")


def _values_or_none(table: pa.Table, column: str) -> list:
    return table[column].to_pylist() if column in table.column_names else [None] * len(table)


def with_numbers(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """The schema followed by one float column for each name (an attribute's mark, an objective's score)."""
    return pa.schema([*schema, *((name, _NUMBER) for name in names)])


def score_schema(attributes: Sequence[str]) -> pa.Schema:
    """Columns of the scores of these M attributes."""
    return pa.schema([*list(SCORES)[:-1], *((name, _NUMBER) for name in attributes), SCORES.field("valid")])


def name_taken(schema: pa.Schema, names: Sequence[str]) -> str | None:
    """The first name that a column of the schema has already; such a one cannot have a column of its own."""
    return next((name for name in names if name in schema.names), None)


def score_matrix(scores: pa.Table) -> tuple[np.ndarray, tuple[str, ...]]:
    """scores_NM of a table of scores, a row that is not valid NaN throughout, and the names of its M attributes."""
    attributes = tuple(name for name in scores.column_names if name not in SCORES.names)
    scores_NM = number_matrix(scores, attributes)
    scores_NM[~scores["valid"].to_numpy(zero_copy_only=False)] = np.nan
    return scores_NM, attributes


def number_matrix(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    """values_NM of these float columns; null is NaN."""
    return np.array([table[name].to_numpy() for name in names], dtype=np.float64).reshape(len(names), len(table)).T


def completeness(table: pa.Table, column: str = "complete") -> list[bool]:
    """Whether each response ended by itself: as `column` says, else by `finish_reason`; rated responses all did."""
    if column in table.column_names:
        return table[column].to_pylist()
    if "finish_reason" in table.column_names:
        return [reason != "length" for reason in table["finish_reason"].to_pylist()]
    return [True] * len(table)
