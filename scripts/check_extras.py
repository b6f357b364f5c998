"""Whether the extras of pyproject.toml can be installed together: a resolver over the index's metadata, nothing else.

    python scripts/check_extras.py [--show]     # needs uv (`pip install uv`) and a network; about a minute

For Python 3.12 on Linux. Each set is resolved to its newest versions and once more to the oldest that its direct
requirements allow, as users with an older environment get it. Nothing is downloaded but metadata. Exit code 1 names the
sets that nobody can install, with the resolver's own words; 3 where there is no uv or no network.
"""

import argparse
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_35", "--only-binary", ":all:")
SETS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("serve", "judge", "http"), ()),
    (("serve", "http", "vllm"), ("vllm==0.23.0",)),
    (("serve", "http", "vllm"), ("vllm==0.30.0",)),
    (("serve", "http", "vllm"), ("vllm==0.33.0",)),
    (("serve", "ray"), ()),
    (("serve", "ray", "vllm"), ("vllm==0.33.0",)),
)
"""Extras that are asked for together, and what else is asked for."""
_SHOWN = ("fastapi", "starlette", "uvicorn", "numpy", "torch", "transformers", "trl", "ray")


def requirements(extras: Sequence[str], also: Sequence[str], project: Mapping[str, object]) -> list[str]:
    """Of the project with these extras, one a line as pip reads them."""
    optional = project["optional-dependencies"]
    assert isinstance(optional, dict)
    missing = [extra for extra in extras if extra not in optional]
    if missing:
        raise SystemExit(f"pyproject.toml has no extra {', '.join(missing)}")
    dependencies = project["dependencies"]
    assert isinstance(dependencies, list)
    return [*dependencies, *(line for extra in extras for line in optional[extra]), *also]


def resolve(lines: Sequence[str], oldest: bool, uv: Sequence[str]) -> tuple[dict[str, str], str]:
    """Package -> version, and what the resolver said where there is no solution."""
    how = ["--resolution", "lowest-direct"] if oldest else []
    done = subprocess.run(
        [*uv, "pip", "compile", "-", "--quiet", "--no-header", "--no-annotate", "--no-config", *PLATFORM, *how],
        input="\n".join(lines),
        capture_output=True,
        text=True,
    )
    found = (line.split("==") for line in done.stdout.splitlines() if "==" in line)
    return {name: version.split(" ")[0] for name, version in found}, "" if done.returncode == 0 else done.stderr


def main() -> None:
    """Resolve every set, several at a time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--show", action="store_true", help="print the versions found")
    args = parser.parse_args()
    here = Path(sys.executable).with_name("uv")
    uv = [str(here)] if here.exists() else [shutil.which("uv") or ""]
    if not uv[0]:
        print("check_extras: there is no uv; `pip install uv` brings it.")
        sys.exit(3)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    jobs = [(extras, also, oldest) for extras, also in SETS for oldest in (False, True)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda job: resolve(requirements(job[0], job[1], project), job[2], uv), jobs))
    failed = 0
    for (extras, also, oldest), (versions, trouble) in zip(jobs, answers, strict=True):
        name = f"dpa[{','.join(extras)}] {' '.join(also)} ({'oldest' if oldest else 'newest'})"
        if not trouble:
            shown = ", ".join(f"{package} {versions[package]}" for package in _SHOWN if package in versions)
            print(f"ok   {name}" + (f": {shown}" if args.show else ""))
        elif any(
            words in trouble.lower() for words in ("error sending request", "failed to fetch", "dns", "timed out")
        ):
            print(f"check_extras: the index does not answer: {trouble.strip()[:300]}")
            sys.exit(3)
        else:
            failed += 1
            print(f"FAIL {name}\n{trouble.strip()}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
