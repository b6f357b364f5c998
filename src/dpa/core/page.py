"""The look of a report: style sheet, colours of the series, tables, tiles, and numbers written for people.
Run its tests: pytest tests/test_report.py

Every function returns HTML with its texts escaped; the numbers' functions return plain text.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any


def number(value: float | None, digits: int | None = 1) -> str:
    """A number for people, millions as M; `digits` None: whole numbers plain, others to three places."""
    if value is None:
        return "–"
    if abs(value) >= 1e6 and digits is not None:
        return f"{value / 1e6:,.2f}M".replace("-", "−")
    if digits is None:
        return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    return f"{value:,.{digits}f}".replace("-", "−")


def value_and_range(interval: Mapping[str, Any], digits: int = 1) -> tuple[str, str]:
    """("51.2", "[50.1, 52.3]"), the parts of a table's cell; large values without decimals."""
    value = interval["value"]
    digits = 0 if value is not None and abs(value) >= 1000 else digits
    if value is None or interval["low"] is None:
        return number(value, digits), ""
    return number(value, digits), f"[{number(interval['low'], digits)}, {number(interval['high'], digits)}]"


def spread(interval: Mapping[str, Any], digits: int = 1) -> str:
    """`51.2 [50.1, 52.3]`."""
    return " ".join(value_and_range(interval, digits)).strip()


def degrees(angle: float) -> str:
    """`+15°`, `−15°`, `0°`."""
    return f"{angle:+g}°".replace("-", "−") if angle else "0°"


def ratio(after: float | None, before: float | None) -> str:
    """`×1.46`."""
    return f"×{after / before:.2f}" if after is not None and before else "–"


def duration(seconds: float) -> str:
    """`88.4 s`, `61 min 40 s`, `5 h 02 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def memory(count: int) -> str:
    """Bytes as `95 MiB` or `1.3 GiB`."""
    if count < 1024**3:
        return f"{count / 1024**2:,.0f} MiB"
    return f"{count / 1024**3:,.1f} GiB"


def tile(value: str, label: str) -> str:
    """A large figure over what it is."""
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def bar(name: str, score: float | None) -> str:
    """A score of 0 to 100 as a bar, an entry of a `dl`."""
    width = min(100.0, max(0.0, score or 0.0))
    return f'<dt>{escape(name)}</dt><dd><i style="width:{width:.1f}%"></i><span>{number(score, 0)}</span></dd>'


def figure(chart: str, caption: str) -> str:
    """A chart in its frame; `chart` is markup, the caption is text."""
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>"


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[str | tuple[str, str]]], total: bool = False
) -> str:
    """A captioned table whose first column heads the rows; a pair of texts is a value over a smaller detail."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{_cell(row[0])}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    kind = ' class="total"' if total else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind}><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: str | tuple[str, str]) -> str:
    if isinstance(cell, str):
        return escape(cell)
    return f"{escape(cell[0])}<small>{escape(cell[1])}</small>"


def series_colors(count: int) -> str:
    """CSS classes s0, s1, ... of a chart's series: early to late along one ramp, for light pages and for dark ones."""

    def ramp(stops: Sequence[tuple[int, int, int]]) -> str:
        rules = []
        for index in range(count):
            place = index / max(1, count - 1) * (len(stops) - 1)
            at = min(int(place), len(stops) - 2)
            mixed = (round(a + (b - a) * (place - at)) for a, b in zip(stops[at], stops[at + 1], strict=True))
            rules.append(f".s{index}{{--c:#{''.join(f'{channel:02x}' for channel in mixed)}}}")
        return "".join(rules)

    light = ramp([(0x9A, 0x8F, 0x7F), (0xD1, 0x7A, 0x00), (0xC2, 0x2F, 0x5B), (0x6A, 0x2C, 0x91), (0x14, 0x3F, 0x8C)])
    dark = ramp([(0x8F, 0x89, 0x80), (0xF0, 0xA9, 0x3A), (0xFF, 0x76, 0x8E), (0xC5, 0x93, 0xFF), (0x6F, 0xC3, 0xFF)])
    return f"{light}@media(prefers-color-scheme:dark){{{dark}}}"


STYLE = """
:root{--bg:#fbfaf8;--card:#fff;--ink:#1d1b18;--soft:#625d55;--rule:#e3dfd8;--accent:#143f8c;--good:#17633a;
--goodbg:#e6f4ea;--bad:#8f1111;--badbg:#fde4e1}
@media(prefers-color-scheme:dark){:root{--bg:#15161a;--card:#1e2026;--ink:#eceae6;--soft:#a9a59d;--rule:#363840;
--accent:#6fc3ff;--good:#8fe0ae;--goodbg:#14301f;--bad:#ffb3aa;--badbg:#4a1512}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 80px}
h1{font-size:clamp(1.7rem,5vw,2.6rem);line-height:1.15;margin:.1em 0 .5em;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:2.6em 0 .5em;padding-top:.7em;border-top:1px solid var(--rule)}
.kicker{color:var(--soft);margin:0;font-size:.85rem}
.note{color:var(--soft);max-width:75ch;margin:.8em 0 1em}
.verdict{border-radius:10px;padding:.8em 1em;margin:0 0 1em;background:var(--goodbg);color:var(--good)}
.verdict.bad{background:var(--badbg);color:var(--bad);font-weight:700;font-size:1.15rem;border:2px solid currentColor}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:.8em 1em}
.tile b{display:block;font-size:1.6rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.85rem;line-height:1.3;display:block;margin-top:.2em}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px}
figcaption{color:var(--soft);font-size:.85rem;text-align:center}
.chart{display:block;width:100%;height:auto}
.chart .grid{stroke:var(--rule);stroke-width:1}
.chart .level{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:5 4}
.chart text{fill:var(--soft);font-size:12px}
.chart .axis{font-size:13px;fill:var(--ink)}
.chart .mark-label{fill:var(--c);font-weight:700}
.chart .line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.chart .arm{stroke:var(--c);stroke-width:1.2;opacity:.55}
.chart .band{fill:var(--c);opacity:.16}
.chart .mark{fill:var(--c);stroke:var(--card);stroke-width:1}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:0 0 10px}
.legend i{color:var(--c);font-style:normal;margin-right:.4em}
.question{white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid var(--accent);padding:.2em 0 .2em .9em;
margin:1.8em 0 .8em;max-height:12em;overflow:auto}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,200px),1fr));gap:12px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px;display:flex;
flex-direction:column;gap:10px;min-width:0}
.card header{display:flex;gap:10px;align-items:center;font-size:.88rem;overflow-wrap:anywhere}
.card header b{display:block;line-height:1.35;font-size:.76rem}
.card header span{color:var(--soft)}
.answer{white-space:pre-wrap;overflow-wrap:anywhere;max-height:22em;overflow:auto;flex:1}
.dial{width:46px;height:46px;flex:none}
.dial .rim{fill:none;stroke:var(--rule);stroke-width:1.5}
.dial .cone{fill:var(--accent);opacity:.16}
.dial .needle{stroke:var(--accent);stroke-width:3;stroke-linecap:round}
.dial .hub{fill:var(--accent)}
.bars{display:grid;grid-template-columns:auto 1fr;gap:3px 10px;margin:0;font-size:.8rem;color:var(--soft)}
.bars dd{margin:0;display:grid;grid-template-columns:1fr 2em;align-items:center;gap:6px}
.bars i{display:block;height:7px;min-width:1px;border-radius:4px;background:var(--accent)}
.scroll{overflow-x:auto;margin:14px 0;border:1px solid var(--rule);border-radius:10px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:10px 12px}
th,td{padding:6px 10px;vertical-align:top;text-align:right;white-space:nowrap;
border-top:1px solid var(--rule);font-weight:400}
th:first-child{text-align:left}
thead th{color:var(--soft)}
td small{display:block;color:var(--soft);font-size:.78rem}
.total tbody tr:last-child>*{font-weight:700;border-top:2px solid var(--soft)}
.words{display:grid;grid-template-columns:minmax(8em,max-content) 1fr;gap:4px 16px;font-size:.88rem;color:var(--soft)}
.words dt{font-weight:600}.words dd{margin:0}
details{margin:6px 0}summary{cursor:pointer;padding:4px 0}
pre{overflow:auto;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px;font-size:.8rem}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media(max-width:520px){.chart text,.chart .axis{font-size:15px}}
@media(max-width:520px){main{padding:18px 14px 60px}.words{grid-template-columns:1fr}.words dd{margin-bottom:6px}}
"""
