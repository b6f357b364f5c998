"""The measuring script for a card runs from end to end on a CPU, so that its one run on a card is not its first.
Run: pytest tests/test_bench.py
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_script_for_a_card_runs_tiny_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    command = [sys.executable, str(ROOT / "bench" / "h200.py"), "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["tiny"] and found["matrix_flops"] > 0
    figures = [found[part][name] for part, name in
               (("finetuning", "dpa"), ("finetuning", "trl"), ("scoring", "dpa"), ("scoring", "padded"),
                ("rollout", "dpa"), ("rollout", "generate"))]  # fmt: skip
    assert all(figure["tokens_per_s"] > 0 and figure["peak_bytes"] > 0 for figure in figures)
    assert all(0 < found[part]["dpa"]["share_of_matrix_rate"] < 1 for part in ("finetuning", "scoring"))
