"""Ray workers: on a cluster of two nodes the rows are those of a local run, and a killed node loses nothing.
Run: pytest tests/test_ray.py      (skips without `pip install "dpa[ray]"`)
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import all_rows, prompts_of
from ray_specs import FakeSpec
from tiny_models import SPACE, save_tiny_model

from dpa.core.errors import ConfigError, EngineError, ModelFileError
from dpa.core.records import Sample, SampleRequest
from dpa.core.reference import ModelReference
from dpa.core.sections.cluster import ClusterConfig
from dpa.core.sections.reward import RewardConfig
from dpa.core.sections.rollout import RolloutConfig
from dpa.remote.ray_pool import RayPool
from dpa.sampling.engines import build_samplers
from dpa.sampling.ray_samplers import RaySampler, SameWeights, ray_samplers
from dpa.sampling.samplers import sampler_spec
from dpa.scoring.ray_scorers import ray_scorers
from dpa.scoring.scorers import build_scorer
from dpa.stages.rollout import rollout
from dpa.stages.score import score
from dpa.storage.run_folder import StageFolder

ray = pytest.importorskip("ray")

CONFIG = RolloutConfig(directions=2, samples=2, max_new_tokens=40, prompts_per_shard=2)
PROMPTS = prompts_of(24)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each, which notice within about a second that one is dead."""
    from ray.cluster_utils import Cluster

    folders = os.pathsep.join(sys.path)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = folders  # what a worker process imports from
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    small = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    soon = {
        "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2
    }  # fmt: skip
    nodes = Cluster(initialize_head=True, head_node_args={**small, "_system_config": soon})
    nodes.second = nodes.add_node(**small)
    yield nodes
    ray.shutdown()
    nodes.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its rollout and the scores of it, made in this process."""
    folder = tmp_path_factory.mktemp("local")
    model = save_tiny_model(folder / "model")
    with build_samplers(model, CONFIG, SPACE) as samplers:
        rollout(StageFolder(folder / "rollout", "s"), PROMPTS, SPACE, samplers, CONFIG, seed=0)
    score(StageFolder(folder / "score"), StageFolder(folder / "rollout"), PROMPTS, build_scorer(reward(folder)))
    return folder


def reward(folder: Path) -> RewardConfig:
    file = folder / "words.py"
    if not file.exists():  # a worker may be reading it
        file.write_text("def words(messages, response): return float(min(100, len(response.split())))\n")
    return RewardConfig(functions={"verbosity": f"{file}:words"})


def on(cluster: Any, **changes: Any) -> ClusterConfig:
    return ClusterConfig(engine="ray", address=cluster.address, **changes)


def same_bytes(ours: Path, theirs: Path) -> bool:
    files = sorted(file.name for file in theirs.glob("shard-*.parquet"))
    assert files
    return all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in files)


def test_no_cluster_at_the_address_is_one_sentence() -> None:
    if ray.is_initialized():
        pytest.skip("this process is in a cluster already")
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 "):
        RayPool(FakeSpec(), 1, ClusterConfig(engine="ray", address="127.0.0.1:1"))


def test_scores_of_a_cluster_are_those_of_this_process(cluster: Any, local: Path, tmp_path: Path) -> None:
    with ray_scorers(reward(local), None, None, on(cluster)) as scorers:
        assert scorers[0].attributes == ("verbosity",)
        assert scorers[0].revision == build_scorer(reward(local)).revision
        score(StageFolder(tmp_path / "score"), StageFolder(local / "rollout"), PROMPTS, scorers)
    assert same_bytes(tmp_path / "score", local / "score")


def test_a_worker_that_dies_of_one_request_costs_the_others_nothing(cluster: Any, tmp_path: Path) -> None:
    """Its request is tried on fresh workers a bounded number of times, then the failure is clear."""
    with RayPool(FakeSpec("deadly"), 1, on(cluster), max_deaths=1) as pool:
        sampler = RaySampler(pool, "fake-0")
        with pytest.raises(EngineError, match="ended 2 workers in a row"):
            rollout(StageFolder(tmp_path, "s"), PROMPTS, SPACE, [sampler], CONFIG, seed=0)
        assert StageFolder(tmp_path, "s").shard(0) is not None, "what was finished is kept"


def test_what_cannot_work_is_one_sentence(cluster: Any) -> None:
    with (
        RayPool(FakeSpec("never"), 1, on(cluster), max_deaths=0) as pool,
        pytest.raises(EngineError, match="die while they start"),
    ):
        pool.describe()
    roomless = on(cluster, cpus_per_worker=64, start_timeout_s=0.5)
    with (
        RayPool(FakeSpec(), 1, roomless) as pool,
        pytest.raises(EngineError, match=r"each needs 64 CPUs .* has 2 CPUs"),
    ):
        pool.describe()
    with (
        RayPool(FakeSpec("refused"), 1, on(cluster)) as pool,
        pytest.raises(ModelFileError, match="has other weights"),
    ):
        pool.describe()


def test_a_node_with_other_weights_than_the_run_started_with_is_refused(local: Path, tmp_path: Path) -> None:
    spec = sampler_spec(local / "model", CONFIG, SPACE)
    other = replace(spec, policy=ModelReference(str(save_tiny_model(tmp_path / "other", architecture="qwen2"))))
    assert SameWeights(spec).build().revision == spec.revision
    with pytest.raises(ModelFileError, match="has other weights"):
        SameWeights(other).build()


class KillsOnce:
    """A sampler that waits until the other one has made some shards, takes a node down and asks on: in mid-run on any
    machine."""

    def __init__(self, sampler: Any, stage: StageFolder, kill: Callable[[], None]) -> None:
        self.revision, self._sampler, self._stage, self._kill = sampler.revision, sampler, stage, kill
        self.killed = False

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        if not self.killed:
            deadline = time.monotonic() + 20  # where a shard is shared between the samplers, none stands before
            while len(list(self._stage.path.glob("shard-*.json"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            self.killed = True
            self._kill()
        return self._sampler.sample(requests)


def test_a_node_killed_in_mid_run_loses_nothing(cluster: Any, local: Path, tmp_path: Path) -> None:
    """kill -9 of a node's processes once some shards stand: its request goes to the node that lives. Comes last."""
    stage = StageFolder(tmp_path / "rollout", "s")
    with ray_samplers(sampler_spec(local / "model", CONFIG, SPACE), 2, on(cluster)) as (first, second):
        killer = KillsOnce(first, stage, lambda: cluster.remove_node(cluster.second, allow_graceful=False))
        rollout(stage, PROMPTS, SPACE, [killer, second], CONFIG, seed=0)
    assert killer.killed
    deadline = time.monotonic() + 60  # the head notices after some missed heartbeats
    while sum(node["Alive"] for node in ray.nodes()) != 1:
        assert time.monotonic() < deadline, ray.nodes()
        time.sleep(0.1)
    assert same_bytes(stage.path, local / "rollout")
    rows = all_rows(stage)
    assert len({row["candidate_id"] for row in rows}) == len(rows) == len(PROMPTS) * 4


def test_without_ray_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here')\n")
    code = (
        "from dpa.remote.ray_pool import RayPool\n"
        "from dpa.core.sections.cluster import ClusterConfig\n"
        "RayPool(None, 1, ClusterConfig(engine='ray'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert 'pip install "dpa[ray]"' in done.stderr
