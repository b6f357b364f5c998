"""A real `dpa serve`, in a process of its own, for tests of what stands in front of it.
Used by: pytest tests/test_page_end_to_end.py tests/test_guides.py
"""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


@contextmanager
def running(*command: object, ready: str, timeout_s: float = 240) -> Iterator[str]:
    """Start `python -m COMMAND` and wait for a line that matches `ready`; gives its first group (or the match).

    At the end the process is asked to stop, and killed if it does not.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    found: list[str] = []
    seen = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            lines.append(line)
            match = re.search(ready, line)
            if match and not found:
                found.append(match.group(match.lastindex or 0))
                seen.set()
        seen.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert seen.wait(timeout_s) and found, "".join(lines)[-2000:]
        yield found[0]
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
