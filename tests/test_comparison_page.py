"""The page of a comparison: what each method says of itself is drawn, and nothing of a record leaves its place.
Run: pytest tests/test_comparison_page.py
"""

import csv
import json

import pytest
from fakes import space_of
from test_comparison import summary
from test_report import HOSTILE, Page, charts_of, lines_of

from dpa.pages.comparison import comparison_html, write_comparison

TITLE = f"SteerLM {HOSTILE}"


@pytest.fixture(scope="module")
def record() -> dict:
    """A comparison of a subject, a front and a point; a job is missing."""
    found = json.loads(json.dumps(summary(leads_by=5.0)).replace("SteerLM", json.dumps(TITLE)[1:-1]))
    about = {"name": HOSTILE, "version": "0.0.0", "seeds": [0, 1, 2], "missing": [f"sft seed 1 {HOSTILE}"]}
    shared = [{"ledger": {"train_reward": {"training_tokens": 1234}}}] * 3
    about["space"] = space_of().to_dict()
    return {**about, "config": {"budget": 1000, "note": HOSTILE}, "shared": shared, **found}


def test_it_runs_nothing_loads_nothing_and_escapes_what_the_record_says(record):
    html = comparison_html(record)
    page = Page(html)
    assert not page.count("script") and not page.count("img") and not page.count("link")
    assert not any(name in ("src", "href") or name.startswith("on") for _, found in page.tags for name in found)
    assert "url(" not in html and "@import" not in html
    assert page.text.count(TITLE) > 5 and f"Not finished: sft seed 1 {HOSTILE}." in page.text
    assert page.count("caption") == page.count("table") > 0


def test_each_method_is_drawn_in_the_colours_it_states_and_a_point_is_no_line(record):
    html = comparison_html(record)
    charts = charts_of(html)
    assert len(charts) == 1, "no variant is compared, so its chart would show the subject alone"
    assert lines_of(charts[0]) == 3
    for place, method in enumerate(record["methods"].values()):
        light, dark = method["color"]
        assert html.count(f".s{place} {{ --c: {light} }}") == html.count(f".s{place} {{ --c: {dark} }}") == 1
    marks = [sum(element.get("class") == "mark" for element in group.iter()) for group in charts[0] if len(group) > 1]
    assert marks == [5, 5, 1]


def test_axes_say_the_range_of_their_objective(record):
    assert "verbosity (mean, 0 to 100)" in comparison_html(record)
    weighed = space_of().to_dict()
    weighed["objectives"][0]["attributes"] = {"fluency": 1.0, "depth": 1.0, "errors": -0.5}
    assert "helpfulness (mean, -50 to 200)" in comparison_html({**record, "space": weighed})


def test_each_claim_says_whether_it_holds(record):
    page = Page(comparison_html(record))
    holds = [claim["holds"] for claim in record["claims"]]
    assert (page.count("li", **{"class": "holds"}), page.count("li", **{"class": "fails"})) == (sum(holds), 1)
    assert f"{sum(holds)} of {len(holds)}" in page.text


def test_its_table_has_a_row_for_each_direction_of_each_front(tmp_path, record):
    write_comparison(tmp_path, record)
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert len(rows) == 2 * (5 + 5 + 1)  # by both rewards
    assert {row["direction"] for row in rows if row["method"] == "sft"} == {""}
