"""Line charts with intervals, drawn as inline SVG: no scripts, nothing loaded.
Run its tests: pytest tests/test_report.py

Colours are left to the page: a series of color i has the class `s<i>`, which sets the CSS variable --c.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dpa.pages.rendering import render

WIDTH, HEIGHT = 440, 330  # user units; small enough that text stays readable at phone width
LEFT, RIGHT, TOP, BOTTOM = 60, WIDTH - 16, 14, HEIGHT - 46  # of the drawing inside its axes

Range = tuple[float, float]
Color = tuple[str, str]
"""CSS colours on a light page and on a dark one."""


@dataclass(frozen=True)
class Point:
    """A mark at (x, y), its intervals, the text shown when it is pointed at, and a label printed beside it."""

    x: float
    y: float
    x_range: Range | None = None
    y_range: Range | None = None
    tooltip: str = ""
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points joined in order; `color` is the index of the page's class s<color>."""

    name: str
    color: int
    points: Sequence[Point]

    @property
    def mark(self) -> str:
        """Circle, square, diamond, triangle in turn: series differ by more than their colour."""
        return "●■◆▲"[self.color % 4]


@dataclass(frozen=True)
class Chart:
    """One chart. Intervals are crosses, or with `band` a shaded band of the y intervals.

    `level`: a y and its name, drawn across: what the values are to be held against; `diagonal`: the name of the line on
    which x and y are the same.
    `x_ticks`: (value, text) pairs where the axis is not a plain scale. `title` and `description` are what a screen
    reader says.
    """

    series: Sequence[Series]
    title: str
    x_label: str
    y_label: str
    description: str
    x_ticks: Sequence[tuple[float, str]] = ()
    band: bool = False
    level: tuple[float, str] | None = None
    diagonal: str = ""

    def svg(self, alone: bool = False) -> Markup:
        """The drawing; `alone` in a file it has no page to take its colours from, and brings its own."""
        points = [point for one in self.series for point in one.points]
        x_margin = 0.12 if any(point.label for point in points) else 0.06
        x_values = [v for p in points for v in (p.x, *(p.x_range or ()))] + [v for v, _ in self.x_ticks]
        x_low, x_high = _limits(x_values, x_margin)
        y_values = [v for p in points for v in (p.y, *(p.y_range or ()))] + [p.x for p in points if self.diagonal]
        y_low, y_high = _limits([*y_values, *([self.level[0]] if self.level else [])])
        drawing = render(
            "chart.svg",
            chart=self,
            alone=alone,
            x=lambda value: round(LEFT + (value - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1),
            y=lambda value: round(BOTTOM - (value - y_low) / (y_high - y_low) * (BOTTOM - TOP), 1),
            x_ticks=self.x_ticks or [(value, _tick_text(value)) for value in nice_ticks(x_low, x_high)],
            same=(max(x_low, y_low), min(x_high, y_high)),
            y_ticks=[(value, _tick_text(value)) for value in nice_ticks(y_low, y_high)],
            width=WIDTH,
            height=HEIGHT,
            left=LEFT,
            right=RIGHT,
            top=TOP,
            bottom=BOTTOM,
        )
        return Markup(drawing)


def range_of(interval: dict[str, float | None]) -> Range | None:
    """An interval's ends, for a Point."""
    low, high = interval["low"], interval["high"]
    return None if low is None or high is None else (low, high)


def ramp(count: int) -> list[Color]:
    """Colours for policies in order of time: early to late along one ramp."""
    light = ((0x9A, 0x8F, 0x7F), (0xD1, 0x7A, 0x00), (0xC2, 0x2F, 0x5B), (0x6A, 0x2C, 0x91), (0x14, 0x3F, 0x8C))
    dark = ((0x8F, 0x89, 0x80), (0xF0, 0xA9, 0x3A), (0xFF, 0x76, 0x8E), (0xC5, 0x93, 0xFF), (0x6F, 0xC3, 0xFF))

    def color(stops: Sequence[tuple[int, int, int]], index: int) -> str:
        place = index / max(1, count - 1) * (len(stops) - 1)
        at = min(int(place), len(stops) - 2)
        mixed = (round(a + (b - a) * (place - at)) for a, b in zip(stops[at], stops[at + 1], strict=True))
        return f"#{''.join(f'{channel:02x}' for channel in mixed)}"

    return [(color(light, index), color(dark, index)) for index in range(count)]


def nice_ticks(low: float, high: float) -> list[float]:
    """About seven round values 1, 2 or 5 times a power of ten apart, inside [low, high]."""
    raw = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _limits(values: Sequence[float], share: float = 0.06) -> Range:
    """The values' range with a margin of this share of it; a width of one where there is no range."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = share * (high - low) or 0.5
    return low - margin, high + margin


def _tick_text(value: float) -> str:
    """`85`, `20k`, `1.5M`: short enough to fit beside the axis."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"
