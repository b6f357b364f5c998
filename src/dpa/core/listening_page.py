"""The part of a report that says whether a policy read its direction while it was trained: two charts and a table.
Run its tests: pytest tests/test_report.py
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dpa.core.charts import Point, Series, line_chart
from dpa.core.page import figure, number, table

NOTE = (
    "Selected rows kept out of training. The flip gap is the loss of a winner under another direction of its pool (the "
    "mirrored one, where the pool has none) minus its loss under its own. While it is near 0, and the own direction "
    "makes about half of the rows likelier, the policy does not read what is asked. Bars: 95% intervals over prompts."
)


def listening_section(policies: Sequence[Mapping[str, Any]]) -> str:
    """Charts over the optimizer steps of all iterations, and the last figures of each as a table. Markup, or nothing
    where nothing was measured. `policies` are those of a report's record, with `listening` as
    `stages.finetune.listening_curve` reads it."""
    curves = [(policy["name"], index, policy.get("listening") or []) for index, policy in enumerate(policies)]
    measured = [(name, index, curve) for name, index, curve in curves if curve]
    if not measured:
        return ""
    shares, gaps, before = [], [], 0
    for name, index, curve in measured:
        steps = [(before + entry["step"], entry) for entry in curve]
        shares.append(Series(name, index, tuple(_point(name, step, entry, "share", 100) for step, entry in steps)))
        gaps.append(Series(name, index, tuple(_point(name, step, entry, "gap_response", 1) for step, entry in steps)))
        before = steps[-1][0]
    figures = [
        figure(
            line_chart(
                series,
                title,
                "optimizer steps, all iterations",
                label,
                description="One line for each policy, one mark for each measurement with its 95% interval; the last "
                "ones are in the table below.",
                level=level,
            ),
            title,
        )
        for series, title, label, level in (
            (shares, "Rows whose own direction makes them likelier", "% of held-out rows", (50.0, "chance")),
            (gaps, "Flip gap", "nats a response", (0.0, "not read")),
        )
    ]
    rows = [
        [
            name,
            number(curve[-1]["rows"], 0),
            (f"{100 * curve[-1]['share']:.0f}%", f"{_percent(curve[-1], 'low')} to {_percent(curve[-1], 'high')}"),
            number(curve[-1]["gap_token"], 4),
            (
                number(curve[-1]["gap_response"], 2),
                f"{number(curve[-1]['gap_response_low'], 2)} to {number(curve[-1]['gap_response_high'], 2)}",
            ),
        ]
        for name, _, curve in measured
    ]
    columns = ("policy", "held-out rows", "own direction likelier", "nats a token", "nats a response")
    return (
        f'<p class="note">{NOTE}</p><div class="figures">{"".join(figures)}</div>'
        f"{table('Listening after the last step, with 95% intervals', columns, rows)}"
    )


def _point(name: str, step: float, entry: Mapping[str, float], figure_name: str, times: float) -> Point:
    value, low, high = (times * entry[f"{figure_name}{end}"] for end in ("", "_low", "_high"))
    places = 0 if times == 100 else 2
    said = f"{name}, step {step:,.0f}: {number(value, places)} ({number(low, places)} to {number(high, places)})"
    return Point(step, value, None, (low, high), said)


def _percent(entry: Mapping[str, float], end: str) -> str:
    return f"{100 * entry[f'share_{end}']:.0f}"
