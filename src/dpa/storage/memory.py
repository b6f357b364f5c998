"""How much memory the work has taken, for the ledger, how much is free, and what can be given back.
Run its tests: pytest tests/test_run_folder.py tests/test_memory.py
"""

import ctypes
from contextlib import suppress
from pathlib import Path

import psutil

MUCH = 10**9
"""Bytes that are worth giving back."""


def peak_memory() -> int:
    """Bytes: the largest resident size so far of this process and of each living child (sampling workers), added up.

    Linux keeps the high-water mark of every process; elsewhere the present size stands in for it. A peak belongs to
    the process, so a later stage of the same process never shows less than an earlier one.
    """
    this = psutil.Process()
    return sum(_high_water(process) for process in (this, *this.children(recursive=True)))


def free_memory_of_machine(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes this process can still take: what the machine has available, or less where a cgroup (a container, a batch
    job) limits it, file pages not counted as taken: they are given back when needed. Both versions of cgroups are read,
    as seen from inside a container or from outside."""
    free = [psutil.virtual_memory().available]
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    second = [path for _, names, path in lines if not names]
    first = [path for _, names, path in lines if "memory" in names.split(",")]
    for root, paths, limit, used, total in (
        (cgroups, second, "memory.max", "memory.current", ""),
        (cgroups / "memory", first, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        for folder in {root, *(root / path.strip("/") for path in paths)}:
            try:
                most = (folder / limit).read_text().strip()
                taken = int((folder / used).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if most.isdigit():  # else "max"
                pages = sum(int(stat.get(f"{total}{kind}_file", 0)) for kind in ("inactive", "active"))
                free.append(int(most) - taken + pages)
    return max(0, min(free))


def _high_water(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    try:
        if status.exists():
            lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
        return process.memory_info().rss
    except (OSError, psutil.Error):  # the child has just ended
        return 0


def give_back_heap() -> None:
    """Return what has been freed to the system, where the C library keeps it and can: glibc's heap after a training
    was twice what lived in it (docs/findings.md)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def give_back_heap_where_scarce() -> None:
    """The same where less memory is free than half of what this process holds, if that is much; it takes 10 to 100
    milliseconds, and the pages must be had again."""
    resident = psutil.Process().memory_info().rss
    if resident > MUCH and free_memory_of_machine() < resident / 2:
        give_back_heap()
