"""Exports checked against the programs that read them: alpaca-eval (through the openai client), lm-eval, FastChat.

    python -m venv /tmp/consumers && /tmp/consumers/bin/pip install alpaca-eval lm-eval openai
    /tmp/consumers/bin/pip install --no-deps fschat
    python bench/consumers.py [--policy FOLDER] [--questions FILE] [--with /tmp/consumers/lib/python3.11/site-packages]

The policy is a folder that dpa trained (default: the demo start model), the questions are AlpacaEval rows. The judge
of alpaca-eval is a server on loopback that prefers the longer output; no model is downloaded. Prints one line of JSON
for each consumer; one that is not installed is said so.
"""

import argparse
import ast
import glob
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

JUDGE = """<|im_start|>user
{instruction}
[[m]]
{output_1}
[[M]]
{output_2}
[[end]]
Answer m or M.
<|im_end|>
"""
TASK = {
    "task": "dpa_probe",
    "dataset_path": "json",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "test_split": "test",
    "generation_kwargs": {"max_gen_toks": 24, "do_sample": False, "until": ["\n\n\n"]},
    "metric_list": [{"metric": "exact_match"}],
}


class LongerWins(BaseHTTPRequestHandler):
    """A chat server that names the longer of two outputs."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        first, second = text.split("[[m]]\n")[1].split("\n[[end]]")[0].split("\n[[M]]\n")
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "m" if len(first) > len(second) else "M"},
        }
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy")
    parser.add_argument("--questions")
    parser.add_argument("--with", dest="packages", help="site-packages that hold the consumers")
    options = parser.parse_args()
    if options.packages:
        sys.path.append(options.packages)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), options.packages]))
    with tempfile.TemporaryDirectory() as folder:
        policy = options.policy or start_model(Path(folder) / "start")
        questions = options.questions or own_questions(Path(folder) / "questions.jsonl")
        for check in (alpaca_eval, lm_eval, fastchat):
            found = check(policy, questions, Path(folder)) if installed(check.__name__) else "not installed"
            print(json.dumps({check.__name__: found}), flush=True)


def start_model(folder: Path) -> str:
    """The demo's start model, made steerable but not trained: answers hardly differ, the forms are the same."""
    from dpa.core.presets import DPA_V1
    from dpa.models.policy import load_policy, save_policy
    from dpa.world.demo import START_MODEL

    save_policy(*load_policy(START_MODEL), folder, DPA_V1, {"from": "the start model of the demo"})
    return str(folder)


def own_questions(file: Path) -> str:
    rows = [{"instruction": f"What is the home of {name}?", "dataset": "own"} for name in ("Ivy", "Max", "Ada", "Tom")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def dpa(*arguments: object) -> list[str]:
    command = [sys.executable, "-m", "dpa", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def alpaca_eval(policy: str, questions: str, folder: Path) -> dict[str, Any]:
    """Two directions against each other through alpaca_eval.evaluate: it must find the longer outputs' share."""
    from dpa.models.files import load_space

    low, high = (str(load_space(policy).direction(w)) for w in load_space(policy).grid(2)[:2])
    common = ("export", policy, questions, "--out", folder, "--limit", 12, "--max-new-tokens", 60, "--name", "pol")
    first, second = dpa(*common, "-d", low, "-d", high)
    server = ThreadingHTTPServer(("127.0.0.1", 0), LongerWins)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    clients = folder / "clients.yaml"
    clients.write_text(
        yaml.safe_dump({"default": [{"base_url": f"http://127.0.0.1:{server.server_port}/v1", "api_key": "x"}]})
    )
    os.environ["OPENAI_CLIENT_CONFIG_PATH"] = str(clients)
    config = folder / "judge"
    config.mkdir()
    (config / "prompt.txt").write_text(JUDGE)
    judge = {
        "prompt_template": str(config / "prompt.txt"),
        "fn_completions": "openai_completions",
        "completions_kwargs": {"model_name": "gpt-4", "max_tokens": 1, "temperature": 0},
        "completion_parser_kwargs": {"outputs_to_match": {1: "^m", 2: "^M"}},
        "batch_size": 1,
    }
    (config / "configs.yaml").write_text(yaml.safe_dump({"judge": judge}))
    import openai
    from alpaca_eval import evaluate

    board, annotations = evaluate(
        model_outputs=second,
        reference_outputs=first,
        annotators_config=str(config),
        precomputed_leaderboard=None,
        fn_metric="get_winrate",
        sort_by="win_rate",
        output_path=None,
        is_return_instead_of_print=True,
        caching_path=None,
    )
    server.shutdown()
    a, b = (json.loads(Path(file).read_text()) for file in (first, second))
    decided = [(len(x["output"]), len(y["output"])) for x, y in zip(a, b, strict=True) if x["output"] != y["output"]]
    return {
        "openai": openai.__version__,
        "annotated": len(annotations),
        "win_rate_by_alpaca_eval": round(float(board["win_rate"].iloc[0]), 2),
        "longer_outputs_percent": round(100 * sum(y > x for x, y in decided) / max(1, len(decided)), 2),
        "avg_length_by_alpaca_eval": int(board["avg_length"].iloc[0]),
        "avg_length_here": int(sum(len(row["output"]) for row in b) / len(b)),
    }


def lm_eval(policy: str, questions: str, folder: Path) -> dict[str, Any]:
    """`lm-eval run --config` of a direction, and of a baked folder: both must show the direction's sentence."""
    from dpa.models.files import load_space

    space = load_space(policy)
    direction = space.direction(space.grid(2)[0])
    rows = [json.loads(line) for line in Path(questions).read_text().splitlines()[:2]]
    data = [{"question": row["instruction"], "answer": "x"} for row in rows]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}}}
    (folder / "tasks").mkdir()
    (folder / "tasks" / "dpa_probe.yaml").write_text(yaml.safe_dump(task))
    dpa("export", policy, "--form", "lm-eval", "-d", str(direction), "--out", folder, "--name", "pol")
    dpa("export", policy, "--bake", str(direction), "--out", folder / "baked")
    (configured,) = (folder / "lm_eval").glob("*.yaml")
    baked = folder / "baked.yaml"
    baked.write_text(
        yaml.safe_dump(
            {"model": "hf", "model_args": {"pretrained": str(folder / "baked")}, "apply_chat_template": True}
        )
    )
    found: dict[str, Any] = {}
    for name, config in {"configuration": configured, "baked": baked}.items():
        out = folder / f"out-{name}"
        command = [sys.executable, "-m", "lm_eval", "run", "--config", str(config), "--tasks", "dpa_probe"]
        command += ["--include_path", str(folder / "tasks"), "--device", "cpu", "--batch_size", "1"]
        command += ["--log_samples", "--output_path", str(out)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        samples = [json.loads(line) for file in out.rglob("samples_*.jsonl") for line in file.read_text().splitlines()]
        shown = [json.dumps(sample["arguments"]) for sample in samples]
        found[name] = {
            "samples": len(samples),
            "shown_the_direction": sum(json.dumps(space.prompt(direction))[1:-1] in text for text in shown),
            "answers": [sample["resps"][0][0][:40] for sample in samples],
        }
    found["same_answers"] = found["configuration"].pop("answers") == found["baked"].pop("answers")
    return found


def fastchat(policy: str, questions: str, folder: Path) -> dict[str, Any]:
    """MT-Bench answers through FastChat's own reader (that function alone: its module wants every vendor's client)."""
    rows = [json.loads(line) for line in Path(questions).read_text().splitlines()[:4]]
    asked = [
        {"question_id": 81 + n, "category": "stem", "turns": [row["instruction"], "Shorter."]}
        for n, row in enumerate(rows)
    ]
    file = folder / "mt_bench.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    common = ("export", policy, file, "--form", "mt-bench", "--out", folder)
    (answers,) = dpa(*common, "--max-new-tokens", 40, "-d", "0deg")
    origin = importlib.util.find_spec("fastchat")
    assert origin is not None
    assert origin.origin is not None
    source = (Path(origin.origin).parent / "llm_judge" / "common.py").read_text()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    reader = next(node for node in functions if node.name == "load_model_answers")
    names: dict[str, Any] = {"glob": glob, "os": os, "json": json}
    exec(compile(ast.Module([reader], []), "common.py", "exec"), names)
    read = names["load_model_answers"](str(Path(answers).parent))[Path(answers).stem]
    turns = [read[row["question_id"]]["choices"][0]["turns"] for row in asked]
    return {"questions": len(read), "with_two_turns": sum(len(pair) == 2 for pair in turns)}


if __name__ == "__main__":
    main()
