"""One command for one card: how fast everything is there, beside its peers and beside what the card can do.

    python bench/card.py --policy DIR --ratings FILE --prompts FILE --out DIR      at most 20 minutes
    ... the same command again                                                     goes on: finished phases are kept
    ... --phases finetune,vllm                                                     only these

--policy is a small instruct model (SmolLM2-135M-Instruct), --ratings rows of `prompt`, `response` and `quality`
(0 to 100), --prompts rows of `prompt`; recipes/smollm2-135m.yaml says where they come from. Nothing is downloaded.
Every phase is a process of its own with a time limit, a result file (OUT/PHASE.json) and a log (OUT/PHASE.log), so that
one that fails costs no other, and one that is ended keeps the rows it had: they are written as they come, and logged.
At the end OUT/table.md is printed: figure, peer's figure, ratio, and the share of the card's measured matrix rate or
copy rate. What is not installed (vLLM) is reported as absent. `--tiny` runs the same code on a CPU in a test; its
figures are of no use.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from card_phases.common import Absent, Card, Inputs

PHASES = {
    "rates": ("rates", 120),
    "finetune": ("training", 180),
    "reward": ("training", 180),
    "scoring": ("training", 120),
    "decoding": ("decoding", 180),
    "vllm": ("decoding", 300),
    "seven_b": ("seven_b", 360),
    "loop": ("loop", 480),
    "gateway": ("serving", 240),
    "serve": ("serving", 240),
    "classify": ("serving", 300),
}
"""Phase -> the file of card_phases it stands in, and its time limit in seconds; with less than a third of that left it
is not begun. In the order of what matters most: servers, which have no bar to reach and start slowly, are last."""

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "vllm")
PRELOADED = ["dpa.training.sft", "dpa.training.reward_training", "dpa.sampling.samplers", "dpa.recipes.dpa"]


def main() -> None:
    """Run the phases that are not finished, then print the table. Exit code 1 where a phase failed or was not begun."""
    args = arguments()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(*(str(path.resolve()) for path in (args.policy, args.ratings, args.prompts)), args.tiny)
    out = out.resolve()
    # For what phases start themselves: `dpa serve`, `vllm serve`.
    source, paths = str(Path(__file__).resolve().parents[1] / "src"), os.environ.get("PYTHONPATH")
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, (source, paths))), "PYTHONUNBUFFERED": "1"}
    # Without it no engine of vLLM starts where flashinfer is not installed; with top_p 1 nothing is sampled by it.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false" if args.tiny else "true"}
    if args.tiny:
        multiprocessing.set_forkserver_preload(PRELOADED)
    deadline = time.monotonic() + 60 * args.minutes
    for phase in args.phases:
        found = read(out, phase)
        if found and found["inputs"] != vars(inputs):
            sys.exit(f"--out: {out}/{phase}.json was measured with other inputs; give another folder.")
        if found and found["status"] in ("done", "absent"):
            continue
        left = deadline - time.monotonic()
        if left < PHASES[phase][1] / 3:
            print(f"{phase}: not begun with {max(left, 0):.0f} s left; the same command goes on", flush=True)
            continue
        print(f"{phase}: {run(phase, inputs, out, min(left, PHASES[phase][1]))}", flush=True)
    table = "\n".join(lines(out))
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    if any((read(out, phase) or {"status": "none"})["status"] not in ("done", "absent") for phase in args.phases):
        sys.exit(1)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--policy", type=Path, required=True, help="A small instruct model's folder.")
    parser.add_argument("--ratings", type=Path, required=True, help="Rows of prompt, response, quality.")
    parser.add_argument("--prompts", type=Path, required=True, help="Rows of prompt.")
    parser.add_argument("--out", type=Path, required=True, help="Result files, logs and the table.")
    parser.add_argument("--phases", type=chosen, default=list(PHASES), help=f"Of {','.join(PHASES)}; default: all.")
    parser.add_argument("--minutes", type=float, default=20.0, help="For all phases of this call together.")
    parser.add_argument("--tiny", action="store_true", help="The same code on a CPU in a test: no figure of use.")
    args = parser.parse_args()
    for name in ("policy", "ratings", "prompts"):
        if not getattr(args, name).exists():
            parser.error(f"--{name}: {getattr(args, name)} is not there; give a path that is.")
    return args


def chosen(text: str) -> list[str]:
    """Names of phases between commas."""
    names = text.split(",")
    unknown = [name for name in names if name not in PHASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no phase {unknown[0]!r}; there are {', '.join(PHASES)}")
    return names


def run(phase: str, inputs: Inputs, out: Path, seconds: float) -> str:
    """Run one phase in a process of its own; return what became of it."""
    begun = time.monotonic()
    # A card wants a process that begins with nothing; a test takes a copy of one that has imported the libraries.
    context = multiprocessing.get_context("forkserver" if inputs.tiny else "spawn")
    process: Any = context.Process(target=begin, args=(phase, inputs, out))
    process.start()
    try:
        process.join(seconds)
        reason = f"it ended with code {process.exitcode}"
        if process.is_alive():
            reason = f"it was ended after {seconds:.0f} s, its time limit"
    finally:
        end(process)
    taken = time.monotonic() - begun
    card = Card(phase, inputs, out)
    found = read(out, phase) or {"status": "none", "reason": "", "rows": []}
    if found["status"] not in ("done", "absent"):
        reason = found["reason"] or f"{reason}; its log ends: {last_line(out / f'{phase}.log')}"
        card.rows = found["rows"]
        card.write("failed", reason, taken)
        return f"failed after {taken:.0f} s: {reason}"
    return f"{found['status']} after {taken:.0f} s{': ' + found['reason'] if found['reason'] else ''}"


def end(process: Any) -> None:
    """End a phase and all it started: they share its session. What a phase that is over left behind ends at once."""
    for which, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, which)
        process.join(patience)
    with contextlib.suppress(ValueError):  # it hangs in the driver and outlives even this
        process.close()


def begin(phase: str, inputs: Inputs, out: Path) -> None:
    """What the process of a phase does: a session and a log of its own, then the phase. It ends with the script."""
    os.setsid()
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    with (out / f"{phase}.log").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    work(Card(phase, inputs, out))


def end_with(script: Any) -> None:
    """However the script ends, kill -9 included, a phase does not keep the card."""
    script.join()
    os.killpg(0, signal.SIGKILL)


def work(card: Card) -> None:
    """The phase itself, in its own process."""
    card.rows = (read(card.out, card.phase) or {"rows": []})["rows"]  # those of an earlier try, until they are replaced
    card.write("running")
    begun = time.monotonic()
    try:
        module = importlib.import_module(f"card_phases.{PHASES[card.phase][0]}")
        getattr(module, card.phase)(card)
    except Absent as lack:
        card.write("absent", str(lack), time.monotonic() - begun)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        card.write("failed", reason, time.monotonic() - begun)
        raise
    else:
        card.write("done", seconds=time.monotonic() - begun)


def read(out: Path, phase: str) -> dict[str, Any] | None:
    """A phase's result file; None where there is none, or none that can be read."""
    try:
        return json.loads((out / f"{phase}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def last_line(log: Path) -> str:
    """What a phase said last."""
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return said[-1][-300:] if said else "(nothing)"


def lines(out: Path) -> list[str]:
    """The table of everything there is in OUT, as Markdown."""
    table = [machine(), "", "| what | figure | peer | ratio | share |", "|---|---|---|---|---|"]
    notes, figures = [], {}
    for phase in PHASES:
        found = read(out, phase)
        if found is None:
            continue
        for row in found["rows"]:
            figures[row["what"]] = row
            ratio = f"{row['figure'] / row['peer']:.2f}" if row["peer"] else ""
            peer = f"{amount(row['peer'])} ({row['peer_name']})" if row["peer"] is not None else ""
            share = f"{row['share']:.1%} of the {row['of']} rate" if "share" in row else ""
            table.append(f"| {row['what']} | {amount(row['figure'])} {row['unit']} | {peer} | {ratio} | {share} |")
        if found["status"] != "done":
            notes.append(f"{phase}: {found['status']}{': ' + found['reason'] if found['reason'] else ''}")
    inside, bare = figures.get("decoding, 1024 rows"), figures.get("rollout through vLLM")
    if inside and bare:
        ratio = inside["figure"] / bare["peer"]
        table.append(f"| in process beside bare vLLM | {amount(inside['figure'])} tokens/s | {amount(bare['peer'])} "
                     f"(bare vLLM) | {ratio:.2f} | |")  # fmt: skip
    return [*table, *(["", *notes] if notes else [])]


def machine() -> str:
    """The card or processor, and the versions that matter."""
    names = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    ).stdout if any(Path(p, "nvidia-smi").exists() for p in os.get_exec_path()) else ""  # fmt: skip
    installed = []
    for package in PACKAGES:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    what = ", ".join(names.split("\n")).strip(", ") or f"CPU {platform.machine()}"
    return f"{what}; Python {platform.python_version()}, {', '.join(installed)}"


def amount(value: float) -> str:
    """A figure with three or four digits that mean something."""
    if abs(value) >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
