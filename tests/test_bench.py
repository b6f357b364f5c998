"""The measuring script for a card runs from end to end on a CPU, so that its one run on a card is not its first.
Run: pytest tests/test_bench.py
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from forks import python
from tiny_models import save_tiny_model

ROOT = Path(__file__).parents[1]
NEEDS_VLLM = {"vllm", "serve", "classify"}
MEASURED = {"rates", "finetune", "reward", "scoring", "decoding", "loop", "gateway", "seven_b"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny policy, 60 rated rows of 30 prompts and as many prompts."""
    folder = tmp_path_factory.mktemp("card")
    save_tiny_model(folder / "policy", "llama", context=1024)
    asked = [f"Why is number {n} a number?" for n in range(30)]
    rated = [
        {"prompt": text, "response": f"Because {'of ' * (n % 7 + r)}it.", "quality": float((13 * n + 29 * r) % 100)}
        for n, text in enumerate(asked)
        for r in range(2)
    ]
    for name, rows in {"ratings": rated, "prompts": [{"prompt": text} for text in asked]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"--policy={folder / 'policy'}", *(f"--{n}={folder / f'{n}.jsonl'}" for n in ("ratings", "prompts"))]


def card(inputs: list[str], out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return python(ROOT / "bench" / "card.py", *inputs, f"--out={out}", "--tiny", *more, cwd=out.parent, timeout=1200)


def test_the_script_for_a_card_runs_every_phase_tiny_on_a_cpu(inputs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "card"
    done = card(inputs, out)
    logs = "\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in sorted(out.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    found = {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}
    assert set(found) == MEASURED | NEEDS_VLLM
    assert {found[phase]["status"] for phase in MEASURED} == {"done"}
    for phase in NEEDS_VLLM:
        assert found[phase]["status"] == "absent" and "vLLM" in found[phase]["reason"]
    rows = {row["what"]: row for phase in MEASURED for row in found[phase]["rows"]}
    assert all(row["figure"] > 0 for row in rows.values())
    for what in ("finetuning", "scoring", "reward training", "7B shape, finetuning", "7B shape, scoring"):
        assert rows[what]["peer"] > 0 and rows[what]["share"] > 0 and rows[what]["of"] == "matrix"
    assert rows["scoring"]["largest_difference"] < 0.01
    table = (out / "table.md").read_text()
    for what in ("finetuning, compiled layers, 16 packed rows", "reward training, compiled layers, 16 rows"):
        assert f"| {what} a step |" in table
    assert "| scoring, compiled layers |" in table
    for log in ("finetune", "reward", "scoring", "seven_b"):  # ours before its peer, each as it is found
        said = [line for line in (out / f"{log}.log").read_text().splitlines() if line.startswith("[ ")]
        assert len(said) >= 2 and any(";" not in line for line in said)
    assert "| finetuning |" in table and "vllm: absent" in table
    whole = rows["the loop, two iterations"]
    assert [policy["name"] for policy in whole["results"]["policies"]][-1] == "t = 2" and not whole["resumed"]
    (out / "loop.json").write_text(
        json.dumps({**found["loop"], "status": "running"})
    )  # as one that was ended leaves it
    assert card(inputs, out, "--phases=loop").returncode == 0
    again = {row["what"]: row for row in json.loads((out / "loop.json").read_text())["rows"]}[
        "the loop, two iterations"
    ]
    assert again["resumed"] and again["figure"] == sum(sums["wall_s"] for sums in whole["stages"].values())


def test_a_phase_that_fails_costs_no_other_and_is_made_again_while_finished_ones_are_kept(
    inputs: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "card"
    out.mkdir()
    (out / "gateway.files").write_text("in the way")  # where the gateway's phase would write
    broken = card(inputs, out, "--phases=gateway,rates")
    assert broken.returncode == 1
    gateway, rates = (json.loads((out / f"{name}.json").read_text()) for name in ("gateway", "rates"))
    assert gateway["status"] == "failed" and "FileExistsError" in gateway["reason"] and rates["status"] == "done"
    (out / "gateway.files").unlink()
    mended = card(inputs, out, "--phases=gateway,rates")
    assert mended.returncode == 0 and "rates: " not in mended.stdout  # kept, not made again
    assert json.loads((out / "rates.json").read_text()) == rates
    assert json.loads((out / "gateway.json").read_text())["status"] == "done"


def test_a_phase_over_its_limit_is_ended_and_says_so(inputs: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import card\n"
        "if __name__ == '__main__':\n"
        "    print(card.run('seven_b', card.Inputs(*sys.argv[3:], False), Path(sys.argv[2]), 0.2))"
    )
    (tmp_path / "one.py").write_text(code)
    paths = [text.partition("=")[2] for text in inputs]
    done = python(tmp_path / "one.py", ROOT / "bench", tmp_path, *paths, timeout=60)
    assert "its time limit" in done.stdout, done.stderr
    assert json.loads((tmp_path / "seven_b.json").read_text())["status"] == "failed"


def test_a_phase_ends_with_the_script(inputs: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import card, time\n"
        "card.work = lambda phase: (phase.write('running'), time.sleep(600))\n"
        "if __name__ == '__main__':\n"
        "    card.run('seven_b', card.Inputs(*sys.argv[3:], False), Path(sys.argv[2]), 600)"
    )
    (tmp_path / "one.py").write_text(code)
    paths = [text.partition("=")[2] for text in inputs]
    script = subprocess.Popen([sys.executable, tmp_path / "one.py", ROOT / "bench", tmp_path, *paths])
    deadline = time.monotonic() + 60
    while not (tmp_path / "seven_b.json").is_file():
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    phases = psutil.Process(script.pid).children(recursive=True)
    script.terminate()
    script.wait(60)
    _, left = psutil.wait_procs(phases, timeout=60)
    assert phases and not left


def test_servers_which_have_no_bar_to_reach_are_last() -> None:
    text = subprocess.run([sys.executable, ROOT / "bench" / "card.py", "--help"], capture_output=True, text=True).stdout
    assert "".join(text.split()).partition("default:all")[0].endswith("seven_b,loop,gateway,serve,classify;")


def test_a_phase_is_not_begun_when_the_time_is_used_up(inputs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "card"
    late = card(inputs, out, "--phases=rates,seven_b", "--minutes=0.001")
    assert late.returncode == 1 and late.stdout.count("not begun") == 2


def test_other_inputs_are_refused_in_a_folder_that_holds_figures(inputs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "card"
    assert card(inputs, out, "--phases=rates").returncode == 0
    other = card([inputs[0], inputs[2].replace("prompts=", "ratings="), inputs[2]], out, "--phases=rates")
    assert other.returncode == 1 and "other inputs" in other.stderr
