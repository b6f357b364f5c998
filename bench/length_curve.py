"""The AlpacaEval-style curve, length against direction, of the policy that recipes/stories260k.yaml trains.

    dpa run recipes/stories260k.yaml
    python bench/length_curve.py [--policy runs/stories260k/iter_2/policy] [--count 60] [--out runs/stories260k/export]

Held-out story openings (those the recipe measures on) become AlpacaEval questions, `dpa export` answers them under nine
directions, and OUT/curve.csv and OUT/curve.svg are the curve; OUT/alpaca_eval/ has the nine entries.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from dpa.storage.rows import read_rows

OPENINGS = Path("../shared/data/stories/fairytaleqa_sentence_level_val.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=Path("runs/stories260k/iter_2/policy"))
    parser.add_argument("--openings", type=Path, default=OPENINGS)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/stories260k/export"))
    options = parser.parse_args()
    if not options.policy.is_dir() or not options.openings.is_file():
        print(f"{options.policy} or {options.openings} is not here; run recipes/stories260k.yaml first.")
        return
    texts = [row["text"] for _, row in read_rows(options.openings, ["text"]) if isinstance(row, dict)]
    questions = options.out / "questions.jsonl"
    questions.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": text, "dataset": "fairytaleqa"} for text in list(dict.fromkeys(texts))[: options.count]]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "dpa", "export", str(options.policy), str(questions), "--grid", "9"]
    command += ["--max-new-tokens", "200", "--name", "stories260k", "--out", str(options.out)]
    subprocess.run(command, check=True)
    print((options.out / "curve.csv").read_text())


if __name__ == "__main__":
    main()
