"""Rows scored per second: in batches of like length against one by one, and behind the prompts they share against in
such batches, with the same scores.

    python bench/scoring.py [--model FOLDER] [--rows 512] [--answers 16] [--prompt-words 60]

The default model is a random Llama of the demo's shape (0.8M parameters); responses of 5 to 120 words for the first, of
5 to 30 words, `--answers` of them to a prompt, for the second.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

from dpa.core.records import Messages
from dpa.core.sections.reward import RewardTrainConfig
from dpa.scoring.reward_scorer import RewardModelScorer
from dpa.scoring.row_layouts import SharedPrompts
from dpa.training.reward_rows import RatedExample
from dpa.training.reward_training import train_reward_model
from dpa.world.start_model import build_model, build_tokenizer

WORDS = ["Red", "is", "the", "and", "a", "of", "things", "Say"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="A trained reward model folder.")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--answers", type=int, default=16, help="Responses to each prompt that is shared.")
    parser.add_argument("--prompt-words", type=int, default=60, help="Words of each prompt that is shared.")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)

    def said(least: int, most: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(least, most)))

    with tempfile.TemporaryDirectory() as folder:
        scorer = RewardModelScorer(arguments.model or make_model(Path(folder)))
    prompts: list[Messages] = [[{"role": "user", "content": "What is the ?"}]] * arguments.rows
    responses = [said(5, 120) for _ in range(arguments.rows)]
    with without_sharing():
        one_by_one, alone = rate(lambda: np.concatenate([scorer.score(p, r) for p, r in singles(prompts, responses)]))
        batched, together = rate(lambda: scorer.score(prompts, responses))
    print(f"one by one {arguments.rows / one_by_one:8.0f} rows/s")
    print(f"batched    {arguments.rows / batched:8.0f} rows/s  ({one_by_one / batched:.1f} times)")
    print(f"largest difference of a score: {np.nanmax(np.abs(alone - together)):.2g} of 100")
    words = arguments.prompt_words
    asked = [said(words, words + 1) for _ in range(-(-arguments.rows // arguments.answers))]
    prompts = [[{"role": "user", "content": asked[row // arguments.answers]}] for row in range(arguments.rows)]
    responses = [said(5, 30) for _ in range(arguments.rows)]
    with without_sharing():
        batched, alone = rate(lambda: scorer.score(prompts, responses))
    shared, together = rate(lambda: scorer.score(prompts, responses))
    print(f"{arguments.answers} short answers to a prompt of {words} words:")
    print(f"batched    {arguments.rows / batched:8.0f} rows/s")
    print(f"shared     {arguments.rows / shared:8.0f} rows/s  ({batched / shared:.1f} times)")
    print(f"largest difference of a score: {np.nanmax(np.abs(alone - together)):.2g} of 100")


@contextmanager
def without_sharing() -> Iterator[None]:
    """Every row is read with its prompt."""
    with mock.patch.object(SharedPrompts, "worth_it", False):
        yield


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
