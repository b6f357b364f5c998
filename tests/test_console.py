"""Tables for people: whole on any terminal. Run: pytest tests/test_console.py"""

import io

import pytest
from rich.console import Console
from rich.table import Table

from dpa.stages.ratings import print_summary
from dpa.stages.train_reward import print_quality
from dpa.storage.console import print_table


def wide_table() -> Table:
    table = Table(title="Figures of everything", caption="said below")
    for heading in ("policy", "hypervolume", "expected\nutility", "words of the tersest"):
        table.add_column(heading, no_wrap=True)
    table.add_row("t = 0", "1,234 \\[1,200, 1,300]", "55.1 \\[54.0, 56.2]", "3 to 40")
    table.add_section()
    table.add_row("t = 1", "2,345 \\[2,300, 2,400]", "66.1 \\[65.0, 67.2]", "")
    return table


def shown(width: int, show) -> str:  # type: ignore[no-untyped-def]
    out = io.StringIO()
    show(Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 60, 200])
def test_no_cell_is_cut_whatever_the_width(width: int) -> None:
    text = shown(width, lambda console: print_table(wide_table(), console))
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    for cell in (
        "t = 0",
        "1,234 [1,200, 1,300]",
        "66.1 [65.0, 67.2]",
        "3 to 40",
        "Figures of everything",
        "said below",
    ):
        assert cell in text
    assert ("hypervolume 2,345" in text) is (width < 200), "a narrow terminal gets paragraphs"


def test_summaries_of_ratings_and_of_the_reward_model_fit_60_columns() -> None:
    names = ("helpsteer-helpfulness", "ultrafeedback-instruction_following")
    attributes = {
        name: {"scale": [0, 4], "count": 35_331, "mean": 66.6, "std": 12.1, "min": 0.0, "max": 100.0} for name in names
    }
    summary = {
        "rows": 35_331, "prompts": 8_000, "rejects": 0, "attributes": attributes, "correlations": [], "reasons": {},
        "trapped_overall_scores": 0,
    }  # fmt: skip
    found = {"n": 3_533, "mse": 123.4, "mae": 9.1, "pearson": 0.81, "kendall": 0.61, "pairwise_accuracy": 0.77}
    quality = dict.fromkeys(names, found)
    training = {"left_out_rows": 35, "train_rows": 31_763, "held_out_rows": 3_533, "max_length": 2_048}
    facts = {"quality": quality, "baselines": {"mean": quality, "length": quality}, "training": training}
    for show in (lambda console: print_summary(summary, console), lambda console: print_quality(facts, console)):
        text = shown(60, show)
        assert all(len(line) <= 60 for line in text.splitlines())
        assert "…" not in text
        for name in names:
            assert name in text
    assert "RMSE 11.1" in text and "pairs 0.77" in text
    assert "LEFT OUT: 35 of 35,331" in text


@pytest.mark.parametrize("width", [60, 200])
def test_a_name_with_brackets_is_shown_as_it_is(width: int) -> None:
    names = ("score [/10]", "tone [formal]")
    facts = {"scale": [0, 10], "count": 9, "mean": 66.6, "std": 12.1, "min": 0.0, "max": 100.0}
    summary = {
        "rows": 9, "prompts": 9, "rejects": 1, "attributes": dict.fromkeys(names, facts), "trapped_overall_scores": 0,
        "correlations": [{"a": names[0], "b": names[1], "n": 9, "pearson": 0.5}],
        "reasons": {f"{names[0]} is …": 1},
    }  # fmt: skip
    found = {"n": 9, "mse": 123.4, "mae": 9.1, "pearson": 0.81, "kendall": 0.61, "pairwise_accuracy": 0.77}
    quality = dict.fromkeys(names, found)
    trained = {"quality": quality, "baselines": {"mean": quality}, "training": {}}
    said = shown(width, lambda console: print_summary(summary, console))
    assert [said.count(name) for name in names] == [3, 2]
    said = shown(width, lambda console: print_quality(trained, console))
    assert all(name in said for name in names)
