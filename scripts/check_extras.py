"""Whether the extras of pyproject.toml can be installed together: a resolver over the index's metadata, nothing else.

    python scripts/check_extras.py [--show]     # needs uv (the dev extra brings it) and a network; a minute at most

For Python 3.12 on Linux, each set to its newest versions: what cannot be resolved in that order cannot be in any other,
and a set that can be installed can be without some of its extras. Nothing is downloaded but metadata. Exit code 1 names
the sets that nobody can install, with the resolver's own words; 3: no uv, or no index that answers in time.
"""

import argparse
import os
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
    (("serve", "http", "judge", "vllm"), ("vllm==0.23.0",)),
    (("serve", "http", "judge", "vllm"), ("vllm==0.30.0",)),
    (("serve", "http", "judge", "vllm", "ray"), ("vllm==0.33.0",)),
)
"""Extras that are asked for together, and what else is asked for. Only the largest sets are here."""
PATIENCE_SECONDS = 55
"""For all sets, which are resolved at once: an index that takes longer is taken as one that does not answer."""
_NO_INDEX = ("error sending request", "failed to fetch", "dns error", "timed out")
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


def resolve(lines: Sequence[str], uv: str) -> tuple[dict[str, str], str]:
    """Package -> version, and what the resolver said where there is no solution."""
    try:
        done = subprocess.run(
            [uv, "pip", "compile", "-", "--quiet", "--no-header", "--no-annotate", "--no-config", *PLATFORM],
            input="\n".join(lines),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            env={**os.environ, "UV_HTTP_TIMEOUT": "20", "UV_HTTP_RETRIES": "1"},
        )
    except subprocess.TimeoutExpired:
        return {}, f"timed out after {PATIENCE_SECONDS} s"
    found = (line.split("==") for line in done.stdout.splitlines() if "==" in line)
    return {name: version.split(" ")[0] for name, version in found}, "" if done.returncode == 0 else done.stderr


def main() -> None:
    """Resolve every set, all at once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--show", action="store_true", help="print the versions found")
    args = parser.parse_args()
    here = Path(sys.executable).with_name("uv")
    uv = str(here) if here.exists() else shutil.which("uv")
    if not uv:
        print("check_extras: skipped, there is no uv; `pip install uv` brings it.")
        sys.exit(3)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with ThreadPoolExecutor(len(SETS)) as pool:
        answers = list(pool.map(lambda job: resolve(requirements(*job, project), uv), SETS))
    failed = skipped = 0
    for (extras, also), (versions, trouble) in zip(SETS, answers, strict=True):
        name = f"dpa[{','.join(extras)}] {' '.join(also)}"
        if not trouble:
            shown = ", ".join(f"{package} {versions[package]}" for package in _SHOWN if package in versions)
            print(f"ok   {name}" + (f": {shown}" if args.show else ""))
        elif any(words in trouble.lower() for words in _NO_INDEX):
            skipped += 1
            print(f"skip {name}: the index does not answer: {' '.join(trouble.split())[:200]}")
        else:
            failed += 1
            print(f"FAIL {name}\n{trouble.strip()}")
    sys.exit(1 if failed else 3 if skipped else 0)


if __name__ == "__main__":
    main()
