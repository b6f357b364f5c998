"""The same runs give the same rows, whatever the code around them has become.

    pytest tests/test_golden.py
    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python tests/test_golden.py      # writes tests/golden/*.json anew: only where
                                                                        # rows are MEANT to change; say why

`rows.json`: a whole run through the command line whose parts are the same on every machine: answers come from a
server that hashes the question, the direction and the seed; scores from Python functions; and a learning rate of 1e-30
leaves the start model as it is, bit for bit. `figures.json`: the demo at a toy size, really trained; its figures hold
within what another processor's rounding makes of them.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from fake_server import FakeServer

from dpa.cli.commands import app
from dpa.core.compare_config import load_comparison
from dpa.core.config import load_config
from dpa.core.config_identity import flatten, resolved
from dpa.recipes.compare import Comparison
from dpa.world.comparison import QUICK, write_recipe
from dpa.world.demo import START_MODEL, write_world

GOLDEN = Path(__file__).parent / "golden"
WRITERS = {name: version(name) for name in ("pyarrow", "transformers", "tokenizers", "safetensors")}
"""Whose bytes are in the digest of a shard and of a policy; digests are compared where these are the same."""

FUNCTIONS = """
import hashlib

def marks(messages, response):
    return int(hashlib.sha256((messages[-1]["content"] + response).encode()).hexdigest(), 16) % 1009 / 10.09

def length(messages, response):
    return min(100.0, 6.0 * len(response.split()))
"""
WORDS = ["red", "oak", "map", "sun", "ink", "fox", "sea", "jar", "owl", "key"]

# --- a run that is the same everywhere ------------------------------------------------------------------------------


def hashed(*parts: object) -> int:
    return int(hashlib.sha256(json.dumps(parts).encode()).hexdigest(), 16)


def answer(body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
    """More words the more verbosity weighs; which words, and how they end, is hashed."""
    preference = (body.get("chat_template_kwargs") or {}).get("preference") or {}
    weights = {name: round(weight, 6) for name, weight in preference.items()}
    drawn = hashed(body["messages"], weights, body["seed"])
    count = 2 + drawn % 5 + int(5 * (1 + weights.get("verbosity", 0)))
    text = " ".join(WORDS[drawn // 10**n % 10] for n in range(count))
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    finish = "length" if drawn % 11 == 0 else "stop"
    return 200, {"choices": [{**choice, "finish_reason": finish}], "usage": {"completion_tokens": count + 1}}, {}


def write_inputs(server: FakeServer) -> None:
    """What the runs read, in the working directory, by names that are the same on every machine."""
    Path("start_model").symlink_to(START_MODEL)
    Path("marks.py").write_text(FUNCTIONS)
    questions = [{"id": f"q{n}", "prompt": f"Who has the {WORDS[n]}?"} for n in range(8)]
    rated = [
        {
            "prompt": f"What is {word}?",
            "response": f"It is {end}.",
            "helpfulness": hashed(word, end) % 5,
            "verbosity": k,
        }
        for word in WORDS[:4]
        for k, end in enumerate(["it", "a thing", "what everybody calls so", "not known to me"])
    ]
    tables = {"prompts": questions[:6], "held_out": questions[6:], "rated": rated}
    for name, rows in tables.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    http = {"servers": [server.address], "model": "hash", "server": "openai", "verify": False, "attempts": 1}
    run = {
        "out": "run",
        "seed": 7,
        "iterations": 2,
        "policy": "start_model",
        "space": {"objectives": {"helpfulness": None, "verbosity": None}, "max_angle": 60},
        "ratings": [{"path": "rated.jsonl", "scales": {"helpfulness": [0, 4], "verbosity": [0, 4]}}],
        "reward": {"functions": {"helpfulness": "marks.py:marks", "verbosity": "marks.py:length"}},
        "prompts": {"path": "prompts.jsonl", "count": 4},
        "rollout": {"directions": 2, "samples": 2, "prompts_per_shard": 3, "engine": {"kind": "http", "http": http}},
        "selection": {"directions": 3},
        "finetune": {"max_length": 128, "learning_rate": 1e-30, "packed_rows_per_step": 64, "listening_rows": 0},
        "evaluate": {
            "prompts": {"path": "held_out.jsonl"},
            "directions": 3,
            "resamples": 20,
            "gold": {"helpfulness": "marks.py:marks", "verbosity": "marks.py:length"},
        },
    }
    pairs = {**run, "out": "pairs", "learner": "dpo", "iterations": 1, "ratings": []}
    for name, config in {"run": run, "pairs": pairs}.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(config))


def dpa(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def work() -> None:
    """The whole loop by its commands, and the first three stages of a run that learns from pairs."""
    dpa("ratings", "run.yaml")
    for t, stages in enumerate((STAGES[1:], STAGES, STAGES[:3])):
        for stage in stages:
            dpa(stage, "run.yaml", "-t", t)
    dpa("report", "run.yaml")
    for stage in STAGES[:3]:
        dpa(stage, "pairs.yaml", "-t", 1)


STAGES = ("rollout", "score", "select", "finetune", "evaluate")


def rows_found() -> dict[str, Any]:
    """Everything that must stay, of the run folders `run` and `pairs` of the working directory."""
    shards = sorted(file for out in ("run", "pairs") for file in Path(out).rglob("shard-*.parquet"))
    tables = {str(file): pq.read_table(file) for file in shards}
    records = {str(file): json.loads(file.with_suffix(".json").read_text()) for file in shards}
    policies = json.loads(Path("run/results.json").read_text())["policies"]
    return {
        "writers": WRITERS,
        "columns": {name: [f"{field.name}: {field.type}" for field in table.schema] for name, table in tables.items()},
        "rows": {name: [list(row.values()) for row in table.to_pylist()] for name, table in tables.items()},
        "rejects": {name: record["rejects"] for name, record in records.items() if record["rejects"]},
        "digests": {name: [record["made_from"], record["file"]["sha256"]] for name, record in records.items()},
        "files": sorted(str(file) for out in ("run", "pairs") for file in Path(out).rglob("*") if ours(file)),
        "measures": {policy["name"]: policy["evaluation"]["measures"] for policy in policies},
        "ledger": {
            policy["name"]: {name: counted(one) for name, one in policy["ledger"].items()} for policy in policies
        },
        "inputs": json.loads(Path("run/fingerprint.json").read_text())["inputs"],
        "config": leaves(json.loads(Path("run/fingerprint.json").read_text())["config"]),
    }


def ours(file: Path) -> bool:
    """Whether its name is our own choice: a policy's weights and tokenizer have the names transformers gives them."""
    return file.is_file() and (file.parent.name != "policy" or file.name.startswith(("dpa_", "README")))


def counted(ledger: dict[str, Any]) -> dict[str, int]:
    """What a stage cost, but for the clock and the memory."""
    return {name: ledger[name] for name in ("rows", "rejects", "tokens_generated", "training_tokens")}


def leaves(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted field -> value; a server's port differs from run to run."""
    return {name: value for name, value in flatten(config) if name != "rollout.engine.http.servers"}


# --- a run that is really trained -----------------------------------------------------------------------------------

TOY = {
    "iterations": "1",
    "prompts.count": "4",
    "rollout.directions": "2",
    "rollout.samples": "2",
    "rollout.max_new_tokens": "30",
    "rollout.workers": "1",
    "selection.directions": "3",
    "evaluate.directions": "3",
    "evaluate.prompts.count": "4",
    "evaluate.resamples": "10",
    "reward.train.method": "ridge",
    "reward.train.allow_worse_than_mean": "true",
    "finetune.optimizer": "adamw",  # what the figures were made with
    "finetune.learning_rate": "2.0e-3",
    "finetune.packed_rows_per_step": "1",
}
TOLERANCE = {"loss": 0.1, "words": 0.15, "utility": 0.5}
"""Relative, by what a figure is of. They were written on an AMD EPYC: on an Intel Xeon losses differ by up to 7%; with
other instructions of one processor (ATEN_CPU_CAPABILITY=default) by 0.7%, words by 5%, and the utility of so few
answers by a third."""


def figures_found() -> dict[str, Any]:
    """Train the demo in the working directory; figure -> value."""
    recipe = write_world(Path("world"), Path("demo"), seed=5, rated_questions=6, prompts=8)
    dpa("run", recipe, *(part for name, value in TOY.items() for part in ("--set", f"{name}={value}")))
    found: dict[str, Any] = {}
    for policy in json.loads(Path("demo/results.json").read_text())["policies"]:
        name, evaluation = policy["name"], policy["evaluation"]
        words = [direction["words"]["value"] for direction in evaluation["directions"]]
        found[f"{name}: words"] = sum(words) / len(words)
        for reward, measures in evaluation["measures"].items():
            found[f"{name}: utility by {reward}"] = measures["expected_utility"]["value"]
        log = [json.loads(line) for line in Path(f"demo/iter_{name[-1]}/finetune/log.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        found[f"{name}: loss"] = sum(losses) / len(losses)
    return found


# --- configurations -------------------------------------------------------------------------------------------------


def plans_found() -> dict[str, Any]:
    """What the demo's recipe and the comparison on its world ask for; the working directory is written to."""
    Path("start_model").symlink_to(START_MODEL)
    here = {"policy": "start_model", "reward.train.backbone": "start_model"}
    demo = load_config(write_world(Path("world"), Path("demo"), rated_questions=2, prompts=2), here)
    recipe = write_recipe(Path("worlds"), Path("compared"))
    there = {f"run.{name}": value for name, value in here.items()}
    found: dict[str, Any] = {"demo": dict(flatten(resolved(demo)))}
    for name, more in {"compare": {"seeds": "[0, 1]"}, "compare --quick": QUICK}.items():
        comparison = Comparison(load_comparison(recipe, {**more, **there}))
        jobs = [*comparison.shared, *comparison.jobs]
        settings = [dict(flatten(resolved(job.settings))) for job in jobs]
        found[name] = settings[0]
        found[f"{name}: jobs"] = {
            str(job.folder): {field: value for field, value in own.items() if value != settings[0][field]}
            for job, own in zip(jobs, settings, strict=True)
        }
    return found


# --- what must be -----------------------------------------------------------------------------------------------------


def differences(golden: Any, now: Any, rel: float = 1e-6, place: str = "") -> Iterator[str]:
    """One line per leaf of `golden` that is another one now; floats may differ by `rel`. Mappings may have grown."""
    if isinstance(golden, dict) and isinstance(now, dict):
        for key in golden:
            yield from differences(golden[key], now.get(key, "(absent)"), rel, f"{place}/{key}")
    elif isinstance(golden, list) and isinstance(now, list) and len(golden) == len(now):
        for number, pair in enumerate(zip(golden, now, strict=True)):
            yield from differences(*pair, rel, f"{place}[{number}]")
    elif isinstance(golden, float) and isinstance(now, int | float):
        if not math.isclose(golden, now, rel_tol=rel, abs_tol=1e-9):
            yield f"{place}: {golden} -> {now}"
    elif golden != now:
        yield f"{place}: {str(golden)[:200]} -> {str(now)[:200]}"


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def in_folder(folder: Path) -> Iterator[Path]:
    """Work in a folder of its own."""
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the run gives now."""
    with FakeServer(answer) as server:
        for _ in in_folder(tmp_path_factory.mktemp("golden")):
            write_inputs(server)
            work()
            yield json.loads(json.dumps(rows_found()))


@pytest.mark.parametrize("part", ["columns", "rows", "rejects", "files", "measures", "ledger", "inputs", "config"])
def test_the_same_run_gives_the_same(part: str, found: dict[str, Any]) -> None:
    was, now = golden("rows")[part], found[part]
    assert not list(differences(was, now))[:10]
    assert part == "config" or len(was) == len(now), "there is more than there was"


def test_a_folder_of_before_is_resumed_shard_by_shard(found: dict[str, Any]) -> None:
    """`made_from` is what decides whether a shard stands, the other one is the hash of its bytes, which are the same
    where the rows are to the last bit: another kind of processor rounds some numbers otherwise."""
    was = golden("rows")
    if was["writers"] != found["writers"]:
        pytest.skip(f"written by {was['writers']}, whose bytes are in the digests")
    assert was["digests"].keys() == found["digests"].keys()
    exact = [name for name in was["digests"] if was["rows"][name] == found["rows"][name]]
    assert len(exact) > len(was["digests"]) / 2
    for name, (made_from, digest) in was["digests"].items():
        assert found["digests"][name][0] == made_from, name
        assert found["digests"][name][1] == digest or name not in exact, name


def test_the_demo_comes_to_the_same_figures(tmp_path: Path) -> None:
    for _ in in_folder(tmp_path):
        now = figures_found()
    was = golden("figures")
    assert was.keys() == now.keys()
    for name, value in was.items():
        assert now[name] == pytest.approx(value, rel=TOLERANCE[name.split()[3]]), name


def test_recipes_and_comparisons_ask_for_the_same_work(tmp_path: Path) -> None:
    for _ in in_folder(tmp_path):
        now = json.loads(json.dumps(plans_found()))
    was = golden("plans")
    assert not list(differences(was, now))[:10]
    for name in was:
        assert not name.endswith("jobs") or list(was[name]) == list(now[name])


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, FakeServer(answer) as server:
        places = {name: Path(folder) / name for name in ("rows", "figures", "plans")}
        for place in places.values():
            place.mkdir()
        os.chdir(places["rows"])
        write_inputs(server)
        work()
        found = {"rows": rows_found()}
        os.chdir(places["figures"])
        found["figures"] = figures_found()
        os.chdir(places["plans"])
        found["plans"] = plans_found()
        os.chdir(GOLDEN)
    for name, what in found.items():
        lines = json.dumps(what, indent=1, ensure_ascii=False)
        (GOLDEN / f"{name}.json").write_text(lines + "\n")
        print(GOLDEN / f"{name}.json", file=sys.stderr)


if __name__ == "__main__":
    main()
