"""A comparison's results as the Markdown of docs/findings.md, and the head of its report as docs/comparison.png.

    python scripts/comparison_table.py runs/compare [--picture docs/comparison.png]

The table has a row for each policy, then what holds, leads along the other arcs, and hypervolumes seed by seed.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpa.storage.tables import read_json

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("results", type=Path)
parser.add_argument("--picture", type=Path)
arguments = parser.parse_args()
found = read_json(arguments.results / "results.json")


def said(interval: Mapping[str, Any], unit: float = 1.0, digits: int = 1) -> str:
    """A value with its interval, in units."""
    value, *ends = (interval[end] for end in ("value", "low", "high"))
    low, high = ("" if end is None else f"{end / unit:.{digits}f}" for end in ends)
    return f"{value / unit:.{digits}f}" + (f" [{low}, {high}]" if low else "")


def of_arcs(measure: Mapping[str, Any], digits: int = 0) -> str:
    """The values of the arcs' objectives, one after another."""
    return ", ".join(f"{measure[arc]['value']:.{digits}f}" for arc in found["arcs"] if arc in measure)


costs = {row["method"]: row for row in found["costs"]}
arcs = ", ".join(found["arcs"])
columns = ["method", "expected utility, true", "by the model", "hv", "cone hv"]
columns += [f"tau {arcs}", f"span {arcs}", f"largest jump {arcs}", "generated", "s"]
print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
for policy in found["policies"]:
    measures, cost = policy["measures"], costs[policy["method"]]
    iterates = sum(other["method"] == policy["method"] for other in found["policies"]) > 1
    row = [policy["title"] + (f", {policy['name']}" if iterates else "")]
    row += [said(policy["utility"][reward]) for reward in ("gold", "model")]
    row += [said(measures["hypervolume"], 1e3, 0), said(measures["cone_hypervolume"], 1e6, 0)]
    row += [of_arcs(measures["kendall_tau"], 2), of_arcs(measures["span"]), of_arcs(measures["largest_jump"])]
    row += [f"{cost['generated']:,.0f}", f"{cost['wall_s']:.0f}"]
    print(f"| {' | '.join(row)} |")
print()
for claim in found["claims"]:
    print(f"- **{'holds' if claim['holds'] else 'does not hold'}**: {claim['sentence']}")
for arc in found["arcs"][1:]:
    print(f"\nAlong {arc}:")
    for lead in found["leads"][arc]:
        print(f"- {lead['sentence']}")
print("\nHypervolume in thousands and expected utility, seed by seed:")
for name, method in found["methods"].items():
    jobs = [read_json(arguments.results / f"seed_{seed}" / name / "job.json") for seed in found["seeds"]]
    last = [job["policies"][-1]["evaluation"]["measures"]["gold"] for job in jobs]
    volumes = ", ".join(f"{each['hypervolume']['value'] / 1e3:.0f}" for each in last)
    utilities = ", ".join(f"{each['expected_utility']['value']:.1f}" for each in last)
    print(f"- {method['title']}: {volumes}; {utilities}")

if arguments.picture:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 905, "height": 800}, device_scale_factor=1.5)
        page.goto((arguments.results / "report.html").resolve().as_uri())
        chart = page.locator("figure, svg").first.bounding_box()
        assert chart is not None
        height = chart["y"] + chart["height"] + 10
        page.screenshot(path=arguments.picture, full_page=True, clip={"x": 0, "y": 0, "width": 905, "height": height})
