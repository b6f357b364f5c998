"""What the place of the direction costs (`space.placement`): the same winners trained on once and the same questions
asked under nine directions, the sentence in the system message and behind the question; in turn, in one run.

    python bench/placement.py recipes/fairytaleqa.yaml --winners 96 --questions 12 --repeats 2

Reads the selection of a finished iteration of that run (`-t`) and its policy to start from. Training: forward and
backward passes over the winners and what they are contrasted with, no step is taken. Sampling: an answer of at most
`--tokens` tokens to each question under each direction. In this process, as a run of one worker does it.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpa.core.config import RunConfig, load_config
from dpa.core.directions import DirectionSpace
from dpa.core.records import SampleRequest
from dpa.core.sentences import PLACEMENTS
from dpa.models.attention import packed_attention
from dpa.models.policy import load_policy, make_steerable
from dpa.models.quiet import quiet_libraries
from dpa.models.shared_prefixes import families, tokens_read
from dpa.sampling.samplers import SamplerSpec
from dpa.storage.run_folder import RunFolder
from dpa.training.learner import RowEncoder
from dpa.training.packing import may_share
from dpa.training.sft import SFT

Row = dict[str, float]


def main() -> None:
    """A line for each placement and kind of work, and how many times as fast the second is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("-t", type=int, default=0)
    parser.add_argument("--winners", type=int, default=96)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    config = load_config(args.config, {})
    rows = RunFolder(Path(config.out)).stage(args.t, "select").whole_table()
    drawn = np.sort(np.random.default_rng(0).permutation(len(rows))[: args.winners])
    messages = list(dict.fromkeys(rows["messages"].to_pylist()))[: args.questions]
    spaces = {place: replace(config.direction_space(), placement=place) for place in PLACEMENTS}
    found: dict[str, dict[str, list[Row]]] = {"training": {}, "sampling": {}}
    for _ in range(args.repeats):
        for place, space in spaces.items():
            found["training"].setdefault(place, []).append(training(config, space, rows.take(drawn)))
            found["sampling"].setdefault(place, []).append(sampling(config, space, messages, args.tokens))
    for work, places in found.items():
        for place, runs in places.items():
            seconds = ", ".join(f"{run['seconds']:.1f}" for run in runs)
            print(f"{work:8s}  {place:15s} {runs[0]['read']:8,.0f} tokens read  {seconds} s", flush=True)
        before, after = (statistics.median(run["seconds"] for run in runs) for runs in places.values())
        print(f"{work:8s}  {before / after:.2f} times as fast behind the question")


def training(config: RunConfig, space: DirectionSpace, rows: Any) -> Row:
    """Seconds of one pass over the rows, and the tokens that are read."""
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        model, tokenizer = load_policy(config.policy)
        make_steerable(tokenizer, space)
        settings = config.finetune.model_copy(update={"packed_rows_per_step": 10**6, "compile": False})
        encoder = RowEncoder(model, tokenizer, space, settings.max_length, may_share(model, settings.bf16))
        learner = SFT(settings, space, 0)
        examples, _ = learner.encode(rows, encoder)
        trainer: Any = learner.trainer(model, tokenizer, examples, Path(folder))
        (batch,) = trainer.get_train_dataloader()
        with packed_attention(model):
            begun = time.perf_counter()
            trainer.training_step(model, batch)
        return {"read": learner.tokens(examples, trainer), "seconds": time.perf_counter() - begun}


def sampling(config: RunConfig, space: DirectionSpace, messages: list[str], tokens: int) -> Row:
    """Seconds of an answer to every question under every direction, and the tokens of the prompts."""
    with quiet_libraries():
        sampler = SamplerSpec(config.policy, space, tokens, bf16=config.rollout.bf16).build()
        requests = [
            SampleRequest(json.loads(text), tuple(direction), (place,))
            for place, text in enumerate(messages)
            for direction in space.grid(9).tolist()
        ]
        sampler.sample(requests[:1])
        begun = time.perf_counter()
        sampler.sample(requests)
        took = time.perf_counter() - begun
    asked = [sampler.prompting.encode(request.messages, request.direction) for request in requests]
    return {"read": tokens_read(asked, families(asked)), "seconds": took}


if __name__ == "__main__":
    main()
