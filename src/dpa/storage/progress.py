"""Progress of long work: a bar with speed and time left on a terminal, a line now and then where there is none.
Run its tests: pytest tests/test_run_folder.py
"""

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0
"""Seconds between two lines where the output is no terminal, however long a step takes."""

_SHORTEST_WAIT_S = 0.2
_last_line = time.monotonic()
"""When the latest line was written, by whom ever."""


class _Ticker:
    """A thread that writes a line whenever nobody has written one for `every_s` seconds."""

    def __init__(self, write: Callable[[], None], every_s: float) -> None:
        self._write, self._every_s = write, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Write no more."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        wait_s = self._every_s
        while not self._ended.wait(max(wait_s, _SHORTEST_WAIT_S)):
            wait_s = self._every_s - (time.monotonic() - _last_line)
            if wait_s <= 0:
                self._write()
                wait_s = self._every_s


class AtWork:
    """Around work that counts nothing, such as loading a model: where the output is no terminal, a line now and then
    says that it goes on, unless a ProgressBar inside has said more.

    with AtWork("iter_1/finetune"):
        ...
    """

    def __init__(self, label: str, out: TextIO | None = None, line_every_s: float = LINE_EVERY_S) -> None:
        self._label, self._out, self._line_every_s = label, out or sys.stderr, line_every_s
        self._ticker: _Ticker | None = None

    def __enter__(self) -> "AtWork":
        self._begun = time.monotonic()
        if not self._out.isatty():
            self._ticker = _Ticker(self._write, self._line_every_s)
        return self

    def __exit__(self, *error: object) -> None:
        if self._ticker is not None:
            self._ticker.end()

    def _write(self) -> None:
        _say(f"{self._label}: at work for {time.monotonic() - self._begun:.0f} s", self._out)


class ProgressBar:
    """Count finished steps of `total`, and optionally an amount (tokens, rows) whose speed is shown.

    with ProgressBar("iter_1/rollout", total=2400, unit="prompts", amount_unit="tokens") as progress:
        progress.advance(64, amount=12_000)

    `done` is what an earlier process finished already: it counts as progress, not as speed.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str = "rows",
        amount_unit: str = "",
        done: int = 0,
        out: TextIO | None = None,
        line_every_s: float = LINE_EVERY_S,
    ) -> None:
        self.label, self.total, self.unit, self.amount_unit = label, total, unit, amount_unit or unit
        self._start_at, self._steps, self._amount = done, done, 0.0
        self._out = out or sys.stderr
        self._line_every_s = line_every_s
        self._bar: Progress | None = None
        self.note = ""
        """Shown behind the speed."""
        self._ticker: _Ticker | None = None

    def __enter__(self) -> "ProgressBar":
        self._started = self._printed = time.monotonic()
        if self._out.isatty():
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
            )
            speed = TextColumn("{task.fields[speed]}"), TimeRemainingColumn()
            self._bar = Progress(*columns, *speed, console=Console(file=self._out), transient=False)
            self._task = self._bar.add_task(self.label, total=self.total, completed=self._steps, speed="")
            self._bar.start()
        else:
            self._ticker = _Ticker(self._print_line, self._line_every_s)
        return self

    def __exit__(self, *error: object) -> None:
        if self._ticker is not None:
            self._ticker.end()
        if self._bar is not None:
            self._bar.stop()
        elif error[0] is None and self._steps > self._start_at:
            self._print_line()

    def advance(self, steps: int = 1, amount: float | None = None) -> None:
        """Count `steps` more, and the amount they came with (default: the steps themselves)."""
        self._steps += steps
        self._amount += steps if amount is None else amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self._steps, speed=self._speed())
        elif time.monotonic() - self._printed >= self._line_every_s:
            self._print_line()

    def _speed(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        note = f", {self.note}" if self.note else ""
        return f"{self._amount / elapsed:,.0f} {self.amount_unit}/s{note}"

    def _print_line(self) -> None:
        self._printed = now = time.monotonic()
        done_here = self._steps - self._start_at
        left = (self.total - self._steps) * (now - self._started) / done_here if done_here else 0.0
        text = f"{self.label}: {self._steps:,}/{self.total:,} {self.unit}, {self._speed()}"
        _say(f"{text}, {left:.0f} s left" if left > 0 else f"{text}, {now - self._started:.1f} s", self._out)


def _say(text: str, out: TextIO) -> None:
    global _last_line
    print(text, file=out, flush=True)
    _last_line = time.monotonic()
