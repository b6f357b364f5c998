"""Fakes that stand at the two seams, Sampler and Scorer, and the small worlds the storage and stage tests share.
They need no torch; tests/fake_run.py runs them in processes that are killed.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpa.core.config import RunConfig, parse_config
from dpa.core.directions import DirectionSpace
from dpa.core.errors import EngineError
from dpa.core.objective import Objective
from dpa.core.records import Messages, Prompt, Sample, SampleRequest
from dpa.storage.run_folder import StageFolder


class FakeSampler:
    """Answers with words whose number follows the direction's last weight, and the seed; a pure function of both.

    `misbehave` says what happens for a prompt's text: "raise" (the whole call raises), "empty" (no answer), "short"
    (one sample too few), "surrogate" (text that is no Unicode), "engine" (EngineError), "hang" (until `release` is
    set), "raise-in-batch" (raises unless it is asked alone). `seconds` is spent per request.
    """

    def __init__(
        self, revision: str = "fake-0", seconds: float = 0.0, misbehave: Mapping[str, str] | None = None
    ) -> None:
        self.revision = revision
        self.release = threading.Event()
        self.calls: list[list[str]] = []
        """The prompts' texts of each call."""
        self._seconds = seconds
        self._misbehave = misbehave or {}

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """One answer per seed of each request, unless told otherwise."""
        texts = [request.messages[-1]["content"] for request in requests]
        self.calls.append(texts)
        for text in texts:
            match self._misbehave.get(text):
                case "raise":
                    raise RuntimeError(f"no luck with {text}")
                case "raise-in-batch" if len(requests) > 1:
                    raise RuntimeError("too much at once")
                case "engine":
                    raise EngineError("the engine is gone.")
                case "hang":
                    self.release.wait()
        time.sleep(self._seconds * len(requests))
        return [self._answer(request, text) for request, text in zip(requests, texts, strict=True)]

    def _answer(self, request: SampleRequest, text: str) -> list[Sample]:
        seeds = request.seeds
        match self._misbehave.get(text):
            case "empty":
                return []
            case "short":
                seeds = seeds[1:]
            case "surrogate":
                return [Sample("\ud800", 1) for _ in seeds]
        wish = request.direction[-1] if request.direction else 0.0
        return [self._sample(text, wish, seed) for seed in seeds]

    def _sample(self, text: str, wish: float, seed: int) -> Sample:
        words = 1 + round(10 * (1 + wish)) + seed % 7
        return Sample(" ".join([f"{text}#{seed % 1000}"] + ["word"] * words), words + 2)


class FakeScorer:
    """verbosity: words of the response. helpfulness: a number that depends on its text. Both on 0-100.

    A response that contains one of `broken` (text -> value) has that value, such as NaN, as its helpfulness.
    """

    attributes: tuple[str, ...] = ("helpfulness", "verbosity")

    def __init__(self, revision: str = "fake-scorer", broken: Mapping[str, float] | None = None) -> None:
        self.revision = revision
        self.scored: list[str] = []
        self._broken = broken or {}

    def score(self, prompts: Sequence[Messages], responses: Sequence[str]) -> np.ndarray:
        """scores_NM."""
        assert len(prompts) == len(responses)
        self.scored += responses
        return np.array([self._row(response) for response in responses])

    def _row(self, response: str) -> list[float]:
        helpfulness = float(sum(map(ord, response)) * 7919 % 10_007) / 100.07
        for text, value in self._broken.items():
            if text in response:
                helpfulness = value
        return [helpfulness, float(min(100, len(response.split())))]


def space_of(*names: str, **options: Any) -> DirectionSpace:
    """A space whose objectives are attributes of the same names; by default those of FakeScorer."""
    names = names or FakeScorer.attributes
    return DirectionSpace(tuple(Objective(name, {name: 1.0}) for name in names), **options)


def prompts_of(count: int) -> list[Prompt]:
    """Prompts p0, p1, ... whose text is question0, question1, ..."""
    return [Prompt(f"p{n}", [{"role": "user", "content": f"question{n}"}]) for n in range(count)]


def run_config(out: Path, **changes: Any) -> RunConfig:
    """A small valid configuration; `changes` replace whole fields."""
    data = {
        "out": str(out),
        "policy": "fake",
        "space": {"objectives": {"helpfulness": None, "verbosity": None}},
        "reward": {"folder": "fake"},
        "prompts": {"path": "prompts.jsonl"},
        "rollout": {"directions": 3, "samples": 2, "prompts_per_shard": 4},
        "selection": {"directions": 3},
        "evaluate": {"prompts": {"path": "held_out.jsonl"}},
    }
    return parse_config({**data, **changes})


def all_rows(stage: StageFolder) -> list[dict[str, Any]]:
    """Every row of a finished stage, in order."""
    return [row for table in stage.tables() for row in table.to_pylist()]
