"""How much memory the work has taken, for the ledger.
Run its tests: pytest tests/test_run_folder.py
"""

from pathlib import Path

import psutil


def peak_memory() -> int:
    """Bytes: the largest resident size so far of this process and of each living child (sampling workers), added up.

    Linux keeps the high-water mark of every process; elsewhere the present size stands in for it. A peak belongs to
    the process, so a later stage of the same process never shows less than an earlier one.
    """
    this = psutil.Process()
    return sum(_high_water(process) for process in (this, *this.children(recursive=True)))


def _high_water(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    try:
        if status.exists():
            lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
        return process.memory_info().rss
    except (OSError, psutil.Error):  # the child has just ended
        return 0
