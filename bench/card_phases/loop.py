"""The whole loop: recipes/smollm2-135m.yaml with two iterations on the given policy, rated rows and prompts.

Its cost is not known beforehand (it is what is measured); a loop that is ended keeps the rows of finished stages, and
one that goes on counts the seconds of its stages instead of the clock's (`resumed`).
"""

import json
import threading
import time
from pathlib import Path

import yaml

from card_phases.common import Card
from dpa.core.config import load_config, read_yaml
from dpa.recipes.dpa import Loop
from dpa.stages.prompts import read_prompts
from dpa.storage.tables import read_json

ROOT = Path(__file__).parents[2]


def loop(card: Card) -> None:
    """Seconds of the whole run and of each stage's kind, and tokens/s of each kind, from the run's own ledgers.

    The last tenth of the prompts is measured on and left out of training.
    """
    card.folder.mkdir(parents=True, exist_ok=True)
    prompts, _ = read_prompts(card.inputs.prompts)
    held = max(3, min(60, len(prompts) // 10))
    for name, part in {"prompts": prompts[:-held], "held_out": prompts[-held:]}.items():
        lines = [json.dumps({"id": one.prompt_id, "messages": one.messages}) for one in part]
        (card.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    fields = read_yaml(ROOT / "recipes" / "smollm2-135m.yaml")
    run = card.folder / "run"
    fields |= {"policy": card.inputs.policy, "out": str(run)}
    fields["ratings"][0]["path"] = card.inputs.ratings
    fields["reward"]["train"]["backbone"] = card.inputs.policy
    fields["reward"]["functions"] = {"verbosity": f"{ROOT / 'recipes' / 'smollm2.py'}:verbosity"}
    fields["prompts"] = {"path": str(card.folder / "prompts.jsonl")}
    fields["evaluate"]["prompts"] = {"path": str(card.folder / "held_out.jsonl")}
    fields["prompts"]["count"], fields["rollout"]["max_new_tokens"] = 300, 256  # of 645 and 512: what fits the time
    if card.tiny:
        fields["reward"]["train"] |= {
            "batch_size": 8,
            "max_length": 512,
            "held_out": 0.2,
            "allow_worse_than_mean": True,
        }
        fields["rollout"] |= {"directions": 2, "samples": 2, "max_new_tokens": 6}
        fields["prompts"]["count"] = 3
        fields["finetune"] |= {"max_length": 512, "packed_rows_per_step": 2, "bf16": False}
        fields["evaluate"] |= {"directions": 3, "resamples": 5}
    config = card.folder / "loop.yaml"
    config.write_text(yaml.safe_dump(fields), encoding="utf-8")
    over, resumed = threading.Event(), run.is_dir()

    def watch() -> None:
        while not over.wait(5):
            rows_of_stages(card, run)

    begun, watcher = time.perf_counter(), threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with Loop(load_config(config)) as run_of:
            run_of.run()
    finally:
        over.set()
        watcher.join()
    seconds = time.perf_counter() - begun
    stages = rows_of_stages(card, run)
    if resumed:  # this call saw only the rest; what lies between stages is not counted
        seconds = sum(sums["wall_s"] for sums in stages.values())
    card.row("the loop, two iterations", seconds, "s", stages=stages, resumed=resumed,
             results=read_json(run / "results.json"))  # fmt: skip


def rows_of_stages(card: Card, run: Path) -> dict[str, dict[str, float]]:
    """Seconds and amounts of each kind of stage that is done so far, rows of them that are new or have changed kept."""
    stages: dict[str, dict[str, float]] = {}
    for file in sorted(run.glob("**/done.json")):
        ledger, kind = read_json(file)["ledger"], file.parent.relative_to(run).as_posix().split("/", 1)[-1]
        kind = kind.replace("evaluate/", "evaluate: ")
        sums = stages.setdefault(kind, {"wall_s": 0.0})
        for name in ("wall_s", "tokens_generated", "training_tokens", "candidates_scored"):
            sums[name] = sums.get(name, 0.0) + (ledger.get(name) or 0)
    known = {(row["what"], row.get("seconds")) for row in card.rows}
    for kind, sums in stages.items():
        for name, unit in (("tokens_generated", "tokens/s"), ("training_tokens", "tokens/s"),
                           ("candidates_scored", "rows/s")):  # fmt: skip
            what = f"the loop: {kind}"
            if sums.get(name) and sums["wall_s"] > 0 and (what, sums["wall_s"]) not in known:
                card.row(what, sums[name] / sums["wall_s"], unit, seconds=sums["wall_s"])
    return stages
