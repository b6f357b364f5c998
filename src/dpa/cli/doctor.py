"""`dpa doctor`: is this machine fit for a run? Versions, devices, disk, the folder's rename and lock, an all-reduce.
Run its tests: pytest tests/test_doctor.py

Every check is done, none is believed: two real processes fight over the lock, real ranks run the all-reduce.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dpa.core.errors import DpaError
from dpa.models.half_precision import card_has_bf16
from dpa.storage.locks import RunLock
from dpa.storage.tables import read_json, write_json

LOW_DISK = 10e9
"""Bytes below which free disk is reported: less than one checkpoint of a 1B model."""

REDUCE_S = 5.0
"""Longest time the all-reduce itself may take."""

_HOLD = """
import sys, time
from pathlib import Path
from dpa.storage.locks import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""

_REDUCE = """
import datetime, sys, time, torch, torch.distributed as dist
rank, world, file, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=world,
                        timeout=datetime.timedelta(seconds=float(sys.argv[6])))
group = dist.new_group(timeout=datetime.timedelta(seconds=float(sys.argv[5])))  # all are here: now it must be quick
numbers = torch.full((4_000_000,), float(rank + 1), device=device)
dist.all_reduce(numbers, group=group)
right = bool((numbers == world * (world + 1) / 2).all())
begun, count = time.perf_counter(), 0
while count < 5:
    dist.all_reduce(numbers, group=group)
    count += 1
if backend == "nccl":
    torch.cuda.synchronize()
seconds = (time.perf_counter() - begun) / count
print(f"{int(right)} {16e6 / seconds / 1e9:.3f}", flush=True)
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Check:
    """One finding. `ok`: True, False (the machine is not fit; the text says what to do), or None (worth knowing)."""

    name: str
    ok: bool | None
    text: str


def examine(folder: Path, ranks: int | None = None, limit_s: float = 90.0) -> Iterator[Check]:
    """Every check in turn. `folder`: where runs will lie. `limit_s`: when a check that hangs is given up."""
    yield from versions()
    yield from devices()
    yield disk(folder)
    yield _guarded("rename", lambda: rename(folder))
    yield _guarded("lock", lambda: lock(folder, limit_s))
    yield _guarded("all-reduce", lambda: all_reduce(ranks, limit_s))


def versions(requirements: list[str] | None = None) -> Iterator[Check]:
    """Installed packages against the ranges this package was tested with; extras only where they are installed."""
    yield Check("python", sys.version_info >= (3, 11), f"{sys.version.split()[0]} (tested: >=3.11)")
    for wanted, extra in _wanted(metadata.requires("dpa") or [] if requirements is None else requirements):
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            if not extra:
                yield Check(wanted.name, False, f'is missing; run pip install "{wanted.name}{wanted.specifier}"')
            continue
        if wanted.specifier.contains(found, prereleases=True):
            yield Check(wanted.name, True, f"{found} (tested: {wanted.specifier})")
        else:
            fix = f'run pip install "{wanted.name}{wanted.specifier}"'
            yield Check(wanted.name, False, f"{found} is outside the tested range {wanted.specifier}; {fix}")


def _wanted(requirements: list[str]) -> list[tuple[Requirement, bool]]:
    """Every package once, with all that is asked of it, and whether only an extra asks for it; those of `dev` aside."""
    found: dict[str, tuple[Requirement, bool]] = {}
    for text in requirements:
        wanted = Requirement(text)
        extra = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
        if extra and wanted.marker is not None and wanted.marker.evaluate({"extra": "dev"}):
            continue
        name = canonicalize_name(wanted.name)
        if name in found:
            before, only_extra = found[name]
            wanted.specifier &= before.specifier
            extra = extra and only_extra
        found[name] = wanted, extra
    return list(found.values())


def devices() -> Iterator[Check]:
    """Cards and what they can; cores and memory."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    yield Check(
        "cpu", True, f"{cores} cores, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB of memory free"
    )
    if not torch.cuda.is_available():
        yield Check("cards", None, "none that torch sees; everything runs on the CPU")
        return
    for place in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(place)
        free, total = torch.cuda.mem_get_info(place)
        kind = "bf16" if card_has_bf16() else "no bf16: fp32 will be used"
        yield Check(f"cuda:{place}", True, f"{about.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {kind}")


def disk(folder: Path) -> Check:
    """Free space where runs will lie."""
    there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:.1f} GB free at {there}"
    if free < LOW_DISK:
        return Check("disk", False, f"{text}, less than {LOW_DISK / 1e9:.0f} GB; free some, or choose another folder")
    return Check("disk", True, text)


def rename(folder: Path) -> Check:
    """A file is replaced as a whole, by the code that writes shards."""
    with _place(folder) as place:
        for value in (1, 2):
            write_json(Path(place) / "record.json", value)
        left = sorted(file.name for file in Path(place).iterdir())
        ok = read_json(Path(place) / "record.json") == 2 and left == ["record.json"]
    return Check("rename", ok, "a file is replaced whole" if ok else f"left behind {left}; choose another file system")


def lock(folder: Path, limit_s: float = 90.0) -> Check:
    """A second process is refused while the first lives, and let in once it was killed. On this host only."""
    with _place(folder) as place:
        file = Path(place) / "lock"
        child = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            if _line(child, limit_s) != "held":
                return Check("lock", False, "a process cannot lock a file there (NFS: mount it with locks)")
            try:
                RunLock(file).close()
                return Check("lock", False, "two processes lock one file there; choose a file system with flock")
            except DpaError:
                pass
        finally:
            child.kill()
            child.wait()
        deadline = time.monotonic() + 5
        while True:
            try:
                RunLock(file).close()
                return Check("lock", True, "held by one process, free as soon as it is killed")
            except DpaError:
                if time.monotonic() > deadline:
                    return Check("lock", False, "is not freed when its process is killed; choose another file system")
                time.sleep(0.05)


def all_reduce(ranks: int | None = None, limit_s: float = 90.0) -> Check:
    """As many processes as there are cards (two on a CPU) add up 16 MB; each must get the sum, within the limit."""
    cards = torch.cuda.device_count()
    backend = "nccl" if cards >= 2 else "gloo"
    world = ranks or (cards if backend == "nccl" else 2)
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-c", _REDUCE]
        children = [
            subprocess.Popen(
                [*command, str(rank), str(world), f"{place}/meeting", backend, str(REDUCE_S), str(limit_s)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        try:
            said = [_line(child, limit_s) for child in children]
        finally:
            for child in children:
                child.kill()
        errors = [child.communicate()[1] for child in children]
    if all(text.startswith("1 ") for text in said):
        return Check("all-reduce", True, f"{world} processes over {backend}, {said[0].split()[1]} GB/s")
    reason = next((error.strip().splitlines()[-1] for error in errors if error.strip()), f"nothing in {limit_s:.0f} s")
    return Check(
        "all-reduce", False, f"{world} processes over {backend} do not add up ({reason}); check the network interface"
    )


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that meets an error has failed."""
    try:
        return check()
    except (DpaError, OSError) as error:
        return Check(name, False, " ".join(str(error).split()))


def _place(folder: Path) -> tempfile.TemporaryDirectory:
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder)


def _line(child: subprocess.Popen, limit_s: float) -> str:
    """The first line a child says; empty when it ends or the time is over."""
    found: list[str] = []
    out = child.stdout
    assert out is not None
    reader = threading.Thread(target=lambda: found.append(out.readline().strip()), daemon=True)
    reader.start()
    reader.join(limit_s)
    return found[0] if found else ""
