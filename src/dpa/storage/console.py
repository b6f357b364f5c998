"""Tables for people, on wide terminals and on narrow ones.
Run its tests: pytest tests/test_console.py
"""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_UNBOUNDED = 100_000


def print_table(table: Table, console: Console) -> None:
    """Print a table; where it is wider than the terminal, as one paragraph a row, so that no cell is cut."""
    needed = Measurement.get(console, console.options.update(max_width=_UNBOUNDED), table).maximum
    if needed <= console.width:
        console.print(table)
        return
    headings = [_plain(column.header) for column in table.columns]
    if table.title:
        console.print(table.title, style="italic", highlight=False)
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        name, *values = map(_plain, cells)
        console.print(Text(name, style="bold"), highlight=False)
        entries = [f"{heading} {value}" for heading, value in zip(headings[1:], values, strict=True) if value]
        for line in _lines(entries, console.width - 2):
            console.print(Text(f"  {line}"), highlight=False)
    if table.caption:
        console.print(table.caption, style="dim", highlight=False)


def _lines(entries: list[str], width: int) -> list[str]:
    """Entries in lines of at most `width` characters; one that is longer has a line of its own."""
    lines: list[str] = []
    for entry in entries:
        if lines and len(lines[-1]) + len(entry) + 2 <= width:
            lines[-1] += f", {entry}"
        else:
            lines.append(entry)
    return lines


def _plain(cell: object) -> str:
    """A cell's text on one line, markup taken out."""
    text = Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)
    return " ".join(text.split())
