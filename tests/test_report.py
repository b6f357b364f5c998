"""The four files of a report: complete, self-contained, escaped, and true to the record.
Run: pytest tests/test_report.py
"""

import copy
import csv
import itertools
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import CONFIG, THREE, TWO, policy_tables, replaced, target_tables

from dpa.core.directions import DirectionSpace
from dpa.core.errors import RunFolderError
from dpa.core.objective import Objective
from dpa.pages.charts import nice_ticks
from dpa.pages.report import report_html, samples_jsonl, table_csv, write_report
from dpa.pages.writing import duration, memory, number, spread
from dpa.stages.evaluate import evaluate, evaluate_targets, side_by_side

HOSTILE = '<script>alert("x")</script> & </style><img src=//evil.example/x onerror=alert(1)>" onfocus="alert(2)'
VOID = {"meta", "br", "circle", "rect"}


def results_of(space: DirectionSpace, follows: tuple[float, ...] = (0.0, 20.0, 30.0)) -> dict:
    """A record as the recipe makes it; each policy moves `follow` points along the direction asked."""
    policies = []
    for iteration, follow in enumerate(follows):
        rollout, scores = policy_tables(space, follow, prompts=6)
        by_reward = {"model": scores, "gold": scores}
        ledger = {"rollout": {"rows": 60, "tokens_generated": 1000, "wall_s": 2.5, "peak_memory": 2**30}}
        policies.append(
            {
                "name": f"t = {iteration}",
                "evaluation": evaluate(rollout, by_reward, space, CONFIG, seed=0),
                "ledger": ledger,
                "listening": [listened(step, 0.4 + step / 40 + iteration / 10) for step in (4, 8, 12)],
            }
        )
    rollout = replaced(rollout, "response", [HOSTILE] * rollout.num_rows)
    prompts = {f"p{p}": [{"role": "user", "content": f"{p} {HOSTILE}"}] for p in range(6)}
    quality = {objective: {"rows": 412, "pearson": 0.871, "kendall": None} for objective in space.names}
    return {
        "name": f"run {HOSTILE}",
        "seed": 7,
        "version": "0.0.0",
        "space": space.to_dict(),
        "config": {"name": HOSTILE},
        "policies": policies,
        "samples": {"policy": "t = 2", "questions": side_by_side(rollout, by_reward, prompts, space, CONFIG, 2)},
        "ledger": {"train_reward": {"training_tokens": 5000, "wall_s": 61.0, "peak_memory": 3 * 2**30}},
        "reward_model": quality,
    }


def listened(step: int, share: float) -> dict:
    """Figures as `listening_curve` reads them."""
    share = min(share, 1.0)
    gaps = {"gap_token": 0.01 * share, "gap_response": share, "gap_response_low": 0.5, "gap_response_high": 1.5}
    return {"step": step, "rows": 64.0, "share": share, "share_low": share - 0.1, "share_high": share + 0.1, **gaps}


@pytest.fixture(scope="module")
def two() -> dict:
    return results_of(TWO)


@pytest.fixture(scope="module")
def three() -> dict:
    return results_of(THREE)


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        return sum(name == tag and attributes.items() <= found.items() for name, found in self.tags)


def charts_of(html: str) -> list[ElementTree.Element]:
    """Every chart, parsed as XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="chart".*?</svg>', html, re.DOTALL)]


def lines_of(chart: ElementTree.Element) -> int:
    return sum(element.get("class") == "line" for element in chart.iter("{http://www.w3.org/2000/svg}path"))


def test_four_files_and_nothing_else(tmp_path, two):
    page = write_report(tmp_path, two)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html",
        "results.json",
        "samples.jsonl",
        "table.csv",
    ]
    assert page == tmp_path / "report.html"
    assert json.loads((tmp_path / "results.json").read_text()) == two


def test_the_record_is_enough_to_write_it_all_again(tmp_path, two):
    write_report(tmp_path, two)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_report(tmp_path, json.loads(first["results.json"]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_a_missing_folder_is_the_users_to_mend(tmp_path, two):
    with pytest.raises(RunFolderError):
        write_report(tmp_path / "nowhere", two)


@pytest.mark.parametrize("K", [2, 3])
def test_the_page_is_self_contained_and_escapes_what_the_run_said(K, two, three):
    html = report_html(two if K == 2 else three)
    page = Page(html)
    assert not page.count("script") and not page.count("img") and not page.count("link") and not page.count("iframe")
    assert not any(name in ("src", "href") or name.startswith("on") for _, found in page.tags for name in found)
    assert "url(" not in html and "@import" not in html
    assert any("default-src 'none'" in (found.get("content") or "") for _, found in page.tags)
    assert page.text.count(HOSTILE) >= 2 * (2 * K - 1) + 2  # every answer, the title, the configuration
    assert "prefers-color-scheme:dark" in html
    assert page.count("caption") == page.count("table") > 0
    assert page.count("svg") == page.count("svg", role="img") == html.count("<svg")


def test_every_policy_is_a_line_in_every_panel(two, three):
    for results, arcs in ((two, 1), (three, 2)):
        html = report_html(results)
        charts = charts_of(html)
        assert all(chart[0].tag.endswith("title") and chart[1].tag.endswith("desc") for chart in charts)
        fronts = [chart for chart in charts if chart[0].text.startswith("Fronts")]
        achieved = [chart for chart in charts if "achieved" in chart[0].text]
        assert len(fronts) == len(achieved) == arcs * 2  # true reward and model reward
        assert {lines_of(chart) for chart in fronts + achieved} == {3}
        assert "true reward" in fronts[0][0].text


def test_the_marks_say_the_numbers_of_the_record(two):
    html = report_html(two)
    for policy in two["policies"]:
        for direction in policy["evaluation"]["directions"]:
            found = direction["objectives"]["gold"]
            said = f"verbosity {spread(found['verbosity'])}, helpfulness {spread(found['helpfulness'])}"
            assert said in html


def test_a_better_policy_is_drawn_higher(two):
    """The charts' y axis points up: more verbosity achieved is further up the page."""
    chart = next(chart for chart in charts_of(report_html(two)) if "verbosity achieved" in chart[0].text)
    group = next(g for g in chart if g.get("class") == "s2")
    path = next(element.get("d") for element in group if element.get("class") == "line")
    heights = [float(corner.split()[1]) for corner in path[1:].split(" L")]
    assert heights == sorted(heights, reverse=True)


def test_a_policys_name_cannot_leave_its_place(two):
    named = {**two, "policies": [{**policy, "name": f"{n} {HOSTILE}"} for n, policy in enumerate(two["policies"])]}
    page = Page(report_html(named))
    assert not page.count("script") and not page.count("img")
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    assert {found["aria-label"] for tag, found in page.tags if "aria-label" in found} >= {f"2 {HOSTILE}, true reward"}


def test_a_policy_that_does_not_listen_is_called_out_loudly(two):
    listening = Page(report_html(two))
    assert (listening.count("p", role="status"), listening.count("p", role="alert")) == (1, 0)
    rollout, scores = policy_tables(TWO, 30.0, prompts=6)
    scores = replaced(scores, "words", [50.0] * scores.num_rows)
    deaf = copy.deepcopy(two)
    deaf["policies"][-1]["evaluation"] = evaluate(rollout, {"model": scores, "gold": scores}, TWO, CONFIG, seed=0)
    page = Page(report_html(deaf))
    assert (page.count("p", role="status"), page.count("p", role="alert")) == (0, 1)
    assert "DOES NOT FOLLOW" in page.text


def test_what_was_heard_while_training_is_drawn_over_all_iterations(two):
    page = report_html(two)
    section = page.split("<h2>Listening, while it was trained</h2>")[1].split("</section>")[0]
    assert section.count("<svg") == 2 and section.count('class="level"') == 2
    assert section.count("t = 2, step 36: 90 (80 to 100)") == 1, "steps go on from iteration to iteration"
    assert "90%<small>80 to 100</small>" in section
    without = {**two, "policies": [{k: v for k, v in p.items() if k != "listening"} for p in two["policies"]]}
    assert "Listening, while" not in report_html(without), "a run of an earlier version"


def test_what_there_was_to_choose_from_is_drawn_beside_what_became_of_it(two):
    pools = {"prompts": 600, "candidates": 16.0, "different": 3.25, "dominated": 0.125, "verdict": True, "sentence": ""}
    offered = copy.deepcopy(two)
    for policy in offered["policies"][1:]:  # t = 0 was trained elsewhere
        policy["pools"] = {**pools, "directions": policy["evaluation"]["directions"]}
    page = report_html(offered)
    section = page.split("<h2>What there was to choose from</h2>")[1].split("</section>")[0]
    assert len(charts_of(section)) == 1 and "Best of the pools: helpfulness against verbosity" in section
    assert section.count("<td>3.2</td>") == section.count("<td>12%</td>") == 2
    assert "What there was to choose from" not in report_html(two), "a run of an earlier version"


def test_the_table_holds_every_direction_of_every_policy(three):
    rows = list(csv.DictReader(table_csv(three).splitlines()))
    evaluations = [policy["evaluation"] for policy in three["policies"]]
    assert len(rows) == sum(2 * len(evaluation["directions"]) for evaluation in evaluations)
    first, record = rows[0], evaluations[0]["directions"][0]
    assert first["policy"] == "t = 0"
    assert float(first["weight_verbosity"]) == record["weights"][1]
    assert float(first["warmth_low"]) == record["objectives"][first["reward"]]["warmth"]["low"]
    assert first["on_front"] == str(record["front"][first["reward"]])
    assert float(first["asked_verbosity"]) == record["angles"]["verbosity"] == -45
    assert first["asked_warmth"] == ""


def test_each_line_of_the_samples_is_an_answer(two):
    lines = [json.loads(line) for line in samples_jsonl(two).splitlines()]
    assert len(lines) == 2 * 3
    assert {line["policy"] for line in lines} == {"t = 2"}
    assert all(line["response"] == HOSTILE and line["prompt"].endswith(HOSTILE) for line in lines)
    assert len({line["direction"] for line in lines}) == 3


def test_the_ledger_adds_up(two):
    page = Page(report_html(two))
    assert "What each stage cost" in page.text
    total = page.text[page.text.index("total", page.text.index("What each stage cost")) :]
    assert total.startswith("total" + "180" + "0" + "3,000" + "0" + "5,000" + "68.5 s" + "3.0 GiB")


def test_what_a_judge_was_paid_has_columns_where_there_was_one(two):
    assert "judge" not in Page(report_html(two)).text
    paid = copy.deepcopy(two)
    ledger = next(iter(paid["policies"][0]["ledger"].values()))
    ledger["extra"] = {"judge_requests": 12.0, "judge_tokens_read": 34_000.0}
    text = Page(report_html(paid)).text
    assert "training tokens" + "judge requests" + "judge tokens read" + "wall time" in text
    total = text[text.index("total", text.index("What each stage cost")) :]
    assert total.startswith("total" + "180" + "0" + "3,000" + "0" + "5,000" + "12" + "34,000" + "68.5 s")


def test_what_half_precision_costs_the_reward_model_is_said(two):
    measured = {"dtype": "bfloat16", "rows": 64, "largest_difference": 0.83, "kendall": 0.9913}
    said = " ".join(Page(report_html(two | {"reward_precision": measured})).text.split())
    assert "no score is further than 0.83 from fp32, and Kendall’s tau within prompts is at least 0.991." in said
    assert "bfloat16" not in report_html(two | {"reward_precision": None})


def test_what_was_not_measured_leaves_no_hole(tmp_path, two):
    bare = copy.deepcopy(two) | {"policies": [], "samples": None, "ledger": {}, "reward_model": None}
    write_report(tmp_path, bare)
    page = Page((tmp_path / "report.html").read_text())
    assert "No policy has been measured yet" in page.text
    assert "Reward model" not in page.text
    assert (tmp_path / "samples.jsonl").read_text() == ""

    rollout, scores = policy_tables(TWO, 30.0, prompts=6)
    first = rollout["direction"].to_pylist()[0]
    scores = replaced(scores, "valid", [direction != first for direction in rollout["direction"].to_pylist()])
    holed = copy.deepcopy(two)
    holed["policies"][1]["evaluation"] = evaluate(rollout, {"model": scores, "gold": scores}, TWO, CONFIG, seed=0)
    Page(report_html(holed))


def test_objectives_may_have_the_names_of_an_intervals_parts():
    named = {"value": {"help": 1}, "low": {"words": 1}, "high": {"warm": 1}}
    space = DirectionSpace(tuple(Objective(name, parts) for name, parts in named.items()))
    text = Page(report_html(results_of(space))).text
    assert all(f"span, {name}" in text for name in named) and "expected utility" in text


def test_bars_fill_the_range_of_their_objective():
    space = DirectionSpace((Objective("depth", {"help": 1, "other": 1}), Objective("verbosity", {"words": 1, "b": -1})))
    results = results_of(space)
    for answer in (answer for question in results["samples"]["questions"] for answer in question["answers"]):
        answer["objectives"] = {"gold": {"depth": 150.0, "verbosity": None}}
    shown = report_html(results)
    assert "width:75.0%" in shown and shown.count("width:0%") == shown.count("width:75.0%")
    answer["objectives"] = {"gold": {"depth": 500.0, "verbosity": 0.0}}
    assert "width:100%" in report_html(results) and "width:50.0%" in report_html(results)


def test_one_policy_is_enough():
    results = results_of(TWO, follows=(30.0,))
    shown = report_html(results)
    page, (policy,) = Page(shown), results["policies"]
    assert policy["name"] == "t = 0" and "t = 0" in page.text
    assert "Fronts by" in page.text and '<g class="s0">' in shown, "its front is drawn"


# --- charts and numbers --------------------------------------------------------------------------------------------


@given(st.floats(-1e3, 1e3), st.floats(0.1, 1e5))
def test_ticks_are_round_few_and_inside(low, width):
    ticks = nice_ticks(low, low + width)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in ticks)
    for before, after in itertools.pairwise(ticks):
        assert f"{after - before:.1e}"[:3] in ("1.0", "2.0", "5.0")


def test_the_needle_points_where_the_direction_does(two):
    """Drawn straight up and turned clockwise: the grid's first direction leans furthest left, its middle one up."""
    needles = re.findall(r'class="needle" d="M26 26V5" transform="rotate\((\S+) 26 26\)"', report_html(two))
    assert [float(angle) for angle in needles] == [-60, 0, 60] * 2


def test_numbers_for_people():
    assert [number(None), number(-1.25, 2), number(1234.5, 0), number(7, None), number(0.8714, None)] == [
        "–",
        "−1.25",
        "1,234",
        "7",
        "0.871",
    ]
    assert spread({"value": 5873.4, "low": 5728.0, "high": 6053.0}) == "5,873 [5,728, 6,053]"
    assert spread({"value": None, "low": None, "high": None}) == "–"
    assert [duration(9.96), duration(125), duration(3 * 3600 + 61)] == ["10.0 s", "2 min 05 s", "3 h 01 min"]
    assert [memory(5 * 2**20), memory(3 * 2**29)] == ["5 MiB", "1.5 GiB"]


def test_values_asked_and_kept_are_drawn_for_the_policies_that_know_targets(three):
    record = copy.deepcopy(three)
    assert "Values asked and kept" not in report_html(record)
    rollout, scores = target_tables(THREE)
    found = evaluate_targets(rollout, {"model": scores, "gold": scores}, THREE, CONFIG, seed=0)
    for policy in record["policies"][1:]:
        policy["evaluation"]["targets"] = found
    page = report_html(record)
    assert Page(page).text.count("Values asked and kept") == 2
    charts = [chart for chart in charts_of(page) if "asked and kept" in (chart[0].text or "")]
    assert len(charts) == 4 and {lines_of(chart) for chart in charts} == {2}
    error = found["errors"]["gold"]["warmth"]["per_target"]["value"]
    assert "warmth, the mean of all answers" in Page(page).text and number(error) in Page(page).text
