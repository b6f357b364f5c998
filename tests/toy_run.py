"""A whole run of a random policy on four questions, scored by functions: finished in seconds, resumed in less.
Used by: pytest tests/test_faults_run_folder.py
"""

import json
from pathlib import Path

from tiny_models import save_tiny_model

from dpa.core.config import RunConfig, parse_config

FUNCTIONS = """
def marks(messages, response):
    return float(sum(map(ord, response)) % 101)

def length(messages, response):
    return float(min(100, len(response)))
"""


def toy_config(inputs: Path, out: Path, **changes: object) -> RunConfig:
    """One iteration of everything; `inputs` gets the policy, the questions and the functions where it lacks them."""
    if not (inputs / "policy").is_dir():
        save_tiny_model(inputs / "policy")
        (inputs / "marks.py").write_text(FUNCTIONS)
        rows = [{"id": f"q{n}", "prompt": "Why? " * (n + 1)} for n in range(4)]
        (inputs / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (inputs / "held_out.jsonl").write_text('{"id": "h0", "prompt": "And why?"}\n')
    functions = {"helpfulness": f"{inputs}/marks.py:marks", "verbosity": f"{inputs}/marks.py:length"}
    return parse_config(
        {
            "out": str(out),
            "iterations": 1,
            "policy": str(inputs / "policy"),
            "space": {"objectives": {"helpfulness": None, "verbosity": None}},
            "reward": {"functions": functions},
            "prompts": {"path": str(inputs / "prompts.jsonl")},
            "rollout": {"directions": 2, "samples": 2, "max_new_tokens": 6, "prompts_per_shard": 2},
            "finetune": {"max_length": 256, "learning_rate": 1e-3},
            "evaluate": {
                "prompts": {"path": str(inputs / "held_out.jsonl")},
                "directions": 3,
                "resamples": 5,
            },
            **changes,
        }
    )
