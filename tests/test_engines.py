"""Engines: one more is a class and a line, and a whole rollout goes through it.
pytest tests/test_engines.py
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toy_run import toy_config

from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError
from dpa.core.records import Sample, Sampler, SampleRequest
from dpa.core.reference import Model
from dpa.core.sections.rollout import RolloutConfig
from dpa.recipes.dpa import Loop
from dpa.sampling.engine import SamplingEngine
from dpa.sampling.engines import ENGINES, engine_of


class Parrot(SamplingEngine):
    """Says the question again: what would be the file of a new engine."""

    def __init__(self) -> None:
        self.asked: list[Sequence[SampleRequest]] = []
        self.revision = "parrot"
        self.closed = False
        PARROTS.append(self)

    @contextmanager
    def samplers(self, policy: Model, space: DirectionSpace, config: RolloutConfig) -> Iterator[list[Sampler]]:
        """Itself, twice: two shards are asked for side by side."""
        yield [self, self]

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """The last message, once per seed."""
        self.asked.append(requests)
        return [[Sample(f"{one.messages[-1]['content']} {seed}", 3) for seed in one.seeds] for one in requests]

    def close(self) -> None:
        self.closed = True


PARROTS: list[Parrot] = []


@pytest.fixture
def registered() -> Iterator[None]:
    ENGINES["parrot"] = Parrot  # the line
    yield
    del ENGINES["parrot"]


def test_a_toy_engine_is_one_file_and_one_line(registered: None, tmp_path: Path) -> None:
    rollout = {"directions": 2, "samples": 2, "max_new_tokens": 6, "prompts_per_shard": 2, "engine": {"kind": "parrot"}}
    with Loop(toy_config(tmp_path, tmp_path / "run", rollout=rollout)) as loop:
        ledger = loop.rollout(1)
        loop.score(1)
    table = pa.concat_tables(
        [pq.read_table(file) for file in sorted((tmp_path / "run/iter_1/rollout").glob("*.parquet"))]
    )
    assert ledger.rows == len(table) == 4 * 2 * 2
    assert all(row["response"] == f"{'Why? ' * 4} {row['seed']}" for row in table.to_pylist()[-4:])
    assert len(PARROTS) == 1 and PARROTS[0].closed, "one engine for all of a run, closed with it"
    assert len(PARROTS[0].asked) >= 2


def test_an_unknown_engine_is_refused_when_the_run_opens_and_the_nearest_is_named(tmp_path: Path) -> None:
    rollout = {"engine": {"kind": "transformer"}}
    with pytest.raises(ConfigError, match=r"rollout.engine.kind: 'transformer' is not known; did you mean `transf"):
        Loop(toy_config(tmp_path, tmp_path / "run", rollout=rollout))


def test_servers_of_one_name_cannot_follow_the_policies_of_a_run() -> None:
    http = {"servers": ["http://127.0.0.1:1"], "model": "alias"}
    config = RolloutConfig.model_validate({"engine": {"kind": "http", "http": http}})
    with engine_of(config) as engine, pytest.raises(ConfigError, match=r"http\.model: 'alias' is one name at servers"):
        engine.check(config)


@pytest.mark.parametrize("card", [True, False])
def test_an_engine_that_samples_here_wants_the_card_that_is_here(card: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    for kind, engine in ENGINES.items():
        config = RolloutConfig(engine={"kind": kind, "http": {"servers": ["http://gpu1:8000"]}})
        assert engine().wants_card(config) == (kind == "vllm" or (card and kind != "http")), kind
    started = RolloutConfig(engine={"kind": "http", "http": {"command": "vllm serve {policy} --port {port}"}})
    assert engine_of(started).wants_card(started) == card
