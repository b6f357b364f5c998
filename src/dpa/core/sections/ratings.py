"""`ratings`: rated rows, and how they are laid out.
Run its tests: pytest tests/test_config.py tests/test_ratings.py
"""

from typing import Literal, get_args

from pydantic import Field, model_validator

from dpa.core.sections.section import PathText, Section

TextColumn = Literal["prompt", "response", "messages", "source"]
TEXT_COLUMNS: tuple[TextColumn, ...] = get_args(TextColumn)


class RatingsConfig(Section):
    """Rated rows: they train the reward model and are the offline data of t = 0."""

    path: PathText = Field(description="File (.jsonl, .parquet, .csv), folder of them, or a Hub dataset id.")
    format: Literal["helpsteer", "helpsteer2", "ultrafeedback", "generic"] = Field(
        "generic", description="How the rows are laid out; see docs/data.md."
    )
    split: str = Field("train", description="Split, for a Hub dataset.")
    attributes: list[str] | None = Field(
        None, description="Generic form: columns that are marks. Default: those named in `scales`."
    )
    columns: dict[TextColumn, str] = Field(
        default_factory=dict,
        description="Generic form: what we call `prompt`, `response`, `messages`, `source` -> the file's own column.",
    )
    scales: dict[str, tuple[float, float]] = Field(
        default_factory=dict,
        description="Generic form: attribute -> [lowest, highest] of its own scale. Default: [0, 100], kept as it is.",
    )
    count: int | None = Field(
        None,
        ge=1,
        description="Prompts whose rows are used, all rows of each; which ones only their text decides. Default: all.",
    )
    max_reject_rate: float = Field(0.05, ge=0, le=1, description="Stop when more than this share of rows is bad.")
    drop_overall_score_trap: bool = Field(
        True,
        description="UltraFeedback: drop an overall_score of 10 that may be a 1 (OpenBMB issue 8; see docs/data.md).",
    )

    @model_validator(mode="after")
    def _of_the_generic_form(self) -> "RatingsConfig":
        for name in ("attributes", "columns", "scales"):
            if self.format != "generic" and getattr(self, name):
                raise ValueError(f"{name}: format {self.format} has its own, so leave it out, or write format: generic")
        read = {name: self.columns.get(name, name) for name in TEXT_COLUMNS}
        for name, column in self.columns.items():
            if not column.strip():
                raise ValueError(f"columns.{name}: give the name of a column of the file")
            other = next((other for other in read if other != name and read[other] == column), None)
            if other is not None:
                raise ValueError(f"columns.{name}: {column!r} is read as {other} too; give each a column of its own")
        return self
