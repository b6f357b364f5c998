"""Rows scored per second: in batches of like length, against one by one, with the same scores.

    python bench/scoring.py [--model FOLDER] [--rows 512]

The default model is a random Llama of the demo's shape (0.8M parameters); responses of 5 to 120 words.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dpa.core.records import Messages
from dpa.core.sections.reward import RewardTrainConfig
from dpa.scoring.reward_scorer import RewardModelScorer
from dpa.training.reward_rows import RatedExample
from dpa.training.reward_training import train_reward_model
from dpa.world.start_model import build_model, build_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="A trained reward model folder.")
    parser.add_argument("--rows", type=int, default=512)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    words = ["Red", "is", "the", "and", "a", "of", "things", "Say"]
    prompts: list[Messages] = [[{"role": "user", "content": "What is the ?"}]] * arguments.rows
    responses = [" ".join(random.choice(words, random.integers(5, 120))) for _ in range(arguments.rows)]
    with tempfile.TemporaryDirectory() as folder:
        scorer = RewardModelScorer(arguments.model or make_model(Path(folder)))
    one_by_one, alone = rate(lambda: np.concatenate([scorer.score(p, r) for p, r in singles(prompts, responses)]))
    batched, together = rate(lambda: scorer.score(prompts, responses))
    print(f"one by one {arguments.rows / one_by_one:8.0f} rows/s")
    print(f"batched    {arguments.rows / batched:8.0f} rows/s  ({one_by_one / batched:.1f} times)")
    print(f"largest difference of a score: {np.nanmax(np.abs(alone - together)):.2g} of 100")


def singles(prompts: list[Messages], responses: list[str]) -> list[tuple[list[Messages], list[str]]]:
    return [([prompt], [response]) for prompt, response in zip(prompts, responses, strict=True)]


def rate(call: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Seconds of the faster of two calls, and the result."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def make_model(folder: Path) -> Path:
    """A reward model of the demo's shape with a ridge head on random features."""
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    rows = [
        RatedExample(str(n), [{"role": "user", "content": "What is the ?"}], "Red " * (n + 1), (float(n),))
        for n in range(50)
    ]
    config = RewardTrainConfig(backbone=str(folder / "backbone"), method="ridge", max_length=256)
    train_reward_model(rows, ("length",), {"length": (0.0, 100.0)}, config, folder / "reward")
    return folder / "reward"


if __name__ == "__main__":
    main()
