"""Rollout with two Ray workers against one, and against this process alone: tokens per second, paired in one run.

    python bench/ray_rollout.py [--prompts 96] [--rounds 3]

The demo's start model (0.8 million parameters), the rollout stage with its shards on disk, one thread a worker. Workers
are started and warm before the clock runs; the rounds take turns (one worker, two, this process), the best of each
counts, and the rows of all must be equal.

On a quiet machine of two cores: one worker 7,805 tokens/s, two 14,343, this process alone 7,685; 1.84 (pairs 1.86,
1.84, 1.80).
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dpa.core.directions import DirectionSpace
from dpa.core.objective import Objective
from dpa.core.records import Prompt, Sampler
from dpa.core.sections.cluster import ClusterConfig
from dpa.core.sections.rollout import RolloutConfig
from dpa.sampling.engines import build_samplers
from dpa.sampling.ray_samplers import ray_samplers
from dpa.sampling.samplers import sampler_spec
from dpa.stages.rollout import rollout
from dpa.storage.run_folder import StageFolder
from dpa.world.demo import START_MODEL
from dpa.world.questions import make_questions

SPACE = DirectionSpace(tuple(Objective(name, {name: 1.0}) for name in ("helpfulness", "verbosity", "warmth")))


def timed(samplers: Sequence[Sampler], prompts: list[Prompt], config: RolloutConfig) -> tuple[float, list[dict]]:
    """(tokens per second, rows) of one rollout into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        stage = StageFolder(Path(folder), "bench")
        begun = time.perf_counter()
        ledger = rollout(stage, prompts, SPACE, samplers, config, seed=0)
        seconds = time.perf_counter() - begun
        return ledger.tokens_generated / seconds, [row for table in stage.tables() for row in table.to_pylist()]


def main() -> None:
    """Time all, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    questions = make_questions(args.prompts + 24, seed=12345)
    prompts = [Prompt(q.question_id, [{"role": "user", "content": q.text}]) for q in questions]
    config = RolloutConfig(directions=4, samples=4, max_new_tokens=120, prompts_per_shard=8)
    cluster = ClusterConfig(engine="ray")
    spec = sampler_spec(START_MODEL, config, SPACE)
    warm, prompts = prompts[:24], prompts[24:]
    rounds: dict[str, list[tuple[float, list[dict]]]] = {"this process": [], "one worker": [], "two workers": []}
    with build_samplers(START_MODEL, config, SPACE) as here:
        for _ in range(args.rounds):
            rounds["this process"].append(timed(here, prompts, config))
            for name, count in (("one worker", 1), ("two workers", 2)):
                with ray_samplers(spec, count, cluster) as workers:
                    timed(workers, warm, config)
                    rounds[name].append(timed(workers, prompts, config))
    rows = [found[1] for results in rounds.values() for found in results]
    assert all(found == rows[0] for found in rows), "rows differ"
    best = {name: max(speed for speed, _ in results) for name, results in rounds.items()}
    for name, speed in best.items():
        print(f"{name:13s} {speed:8.0f} tokens/s")
    print(f"two of one    {best['two workers'] / best['one worker']:8.2f}")
    pairs = list(zip(rounds["one worker"], rounds["two workers"], strict=True))
    print("pair by pair ", ", ".join(f"{two[0] / one[0]:.2f}" for one, two in pairs))


if __name__ == "__main__":
    main()
