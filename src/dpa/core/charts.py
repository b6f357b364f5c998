"""Line charts with intervals, and the dial of a direction, drawn as inline SVG text: no scripts, nothing loaded.
Run its tests: pytest tests/test_report.py

Colours are left to the page: series i has the class `s<i>`, which sets the CSS variable --c.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 330  # user units; small enough that text stays readable at phone width
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 14, 46

Range = tuple[float, float]
Placing = Callable[[float, float], tuple[float, float]]


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
    points: tuple[Point, ...]


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    *,
    description: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    band: bool = False,
    level: tuple[float, str] | None = None,
) -> str:
    """One chart. Intervals are crosses, or with `band` a shaded band of the y intervals.

    `level`: a y and its name, drawn across: what the values are to be held against.
    `x_ticks`: (value, text) pairs where the axis is not a plain scale. `title` and `description` are what a screen
    reader says.
    """
    points = [point for one in series for point in one.points]
    x_margin = 0.12 if any(point.label for point in points) else 0.06
    x_values = [v for p in points for v in (p.x, *(p.x_range or ()))] + [v for v, _ in x_ticks or ()]
    x_low, x_high = _limits(x_values, x_margin)
    y_values = [v for p in points for v in (p.y, *(p.y_range or ()))]
    y_low, y_high = _limits([*y_values, *([level[0]] if level else [])])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    ticks = x_ticks or [(value, _tick_text(value)) for value in nice_ticks(x_low, x_high)]
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">',
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>",
        *(_x_tick(at(value, y_low)[0], text) for value, text in ticks),
        *(_y_tick(at(x_low, value)[1], _tick_text(value)) for value in nice_ticks(y_low, y_high)),
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text class="axis" transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>',
    ]
    if level:
        y = at(x_low, level[0])[1]
        parts.append(f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">{escape(level[1])}</text>')
    for one in series:
        parts.append(f'<g class="s{one.color}">')
        if band:
            parts.append(_band(one, at))
        parts.append(_path([at(p.x, p.y) for p in one.points], "line"))
        for place, point in enumerate(one.points):
            if not band:
                parts.append(_cross(point, at))
            parts.append(_mark(point, one.color, at, label_left=place == 0))
        parts.append("</g>")
    parts.append("</svg>")
    return "".join(parts)


def dial(degrees: float, towards: str, max_angle: float) -> str:
    """A small picture of a direction: the center points up, positive angles lean right, the trained cone is shaded."""
    center, radius = 26.0, 21.0

    def on_circle(angle: float, r: float) -> str:
        turned = math.radians(angle)
        return f"{center + r * math.sin(turned):.1f} {center - r * math.cos(turned):.1f}"

    cone = min(max_angle, 179.9)
    large = 1 if cone > 90 else 0
    return (
        f'<svg class="dial" viewBox="0 0 52 52" role="img"><title>{degrees:+.0f} degrees towards {escape(towards)}'
        f'</title><path class="cone" d="M{center} {center} L{on_circle(-cone, radius)} A{radius} {radius} 0 {large} 1 '
        f'{on_circle(cone, radius)} Z"/><circle class="rim" cx="{center}" cy="{center}" r="{radius}"/>'
        f'<path class="needle" d="M{center} {center} L{on_circle(degrees, radius)}"/>'
        f'<circle class="hub" cx="{center}" cy="{center}" r="3"/></svg>'
    )


def nice_ticks(low: float, high: float, about: int = 7) -> list[float]:
    """Round values 1, 2 or 5 times a power of ten apart, inside [low, high]."""
    raw = (high - low) / about
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


def _x_tick(x: float, text: str) -> str:
    return (
        f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
        f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(text)}</text>'
    )


def _y_tick(y: float, text: str) -> str:
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _path(corners: Sequence[tuple[float, float]], kind: str, close: str = "") -> str:
    return f'<path class="{kind}" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in corners)}{close}"/>' if corners else ""


def _band(one: Series, at: Placing) -> str:
    known = [(point.x, point.y_range) for point in one.points if point.y_range]
    lower = [at(x, y_range[0]) for x, y_range in known]
    upper = [at(x, y_range[1]) for x, y_range in known]
    return _path(lower + upper[::-1], "band", "Z")


def _cross(point: Point, at: Placing) -> str:
    arms = ""
    if point.x_range:
        arms += _path([at(point.x_range[0], point.y), at(point.x_range[1], point.y)], "arm")
    if point.y_range:
        arms += _path([at(point.x, point.y_range[0]), at(point.x, point.y_range[1])], "arm")
    return arms


def _mark(point: Point, color: int, at: Placing, label_left: bool) -> str:
    """Circle, square, diamond, triangle in turn: series differ by more than their colour."""
    x, y = at(point.x, point.y)
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
        f'<rect x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2"/>',
        f'<path d="M{x:.1f} {y - 5:.1f}l5 5-5 5-5-5z"/>',
        f'<path d="M{x:.1f} {y - 5:.1f}l4.8 8.4h-9.6z"/>',
    )
    label = ""
    if point.label:
        label = (
            f'<text class="mark-label" x="{x + (-7 if label_left else 7):.1f}" y="{y - 7:.1f}" '
            f'text-anchor="{"end" if label_left else "start"}">{escape(point.label)}</text>'
        )
    return f'<g class="mark">{shapes[color % len(shapes)]}<title>{escape(point.tooltip)}</title></g>{label}'
