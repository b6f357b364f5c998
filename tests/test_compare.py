"""`dpa compare`: every method at work on the quick demo world, at equal budgets, resumed after kill -9, and reported.

pytest tests/test_compare.py
"""

import json
import os
import re
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from forks import alive, python, start, within
from rich.console import Console

from dpa.core.compare_config import load_comparison
from dpa.core.errors import ConfigError, RunFolderError, StorageError
from dpa.recipes.baselines.methods import METHODS
from dpa.recipes.compare import Comparison
from dpa.recipes.job_processes import _Worker, do_jobs
from dpa.sampling.process_sampler import start_worker
from dpa.world.comparison import QUICK, RECIPE, write_recipe

SMALLER = {
    "budget": "5000",
    "changes.steerlm": "{prompts.count: 4}",
    "changes.ric": "{prompts.count: 3}",
    "run.space.objectives": "{helpfulness: {critics-overall: 1.0}, verbosity: {readers-verbosity: 1.0}}",
    "run.evaluate.gold": "{helpfulness: dpa.world.true_reward:helpfulness, verbosity: dpa.world.true_reward:verbosity}",
    "run.rollout.max_new_tokens": "32",
    "run.evaluate.prompts.count": "3",
}
"""The quick comparison at a third of its work: of two objectives, hence three specialists instead of five."""
COMMAND = ["-m", "dpa", "compare", "--quick", *(f"--set={name}={value}" for name, value in SMALLER.items()), "--out"]

BY_DEFAULT = [name for name, method in METHODS.items() if method.by_default]
"""What a comparison compares unless its file names others."""


@dataclass(frozen=True)
class ThreadsJob:
    """Writes down how many threads its process has."""

    folder: Path
    name: str = "threads"
    ready: bool = True

    @property
    def done(self) -> bool:
        return (self.folder / "threads").exists()

    def run(self) -> None:
        (self.folder / "threads").write_text(str(torch.get_num_threads()))


@pytest.mark.parametrize(("workers", "threads"), [(1, "3"), (2, "1")])
def test_one_job_at_a_time_has_all_threads_and_several_have_one_each(workers, threads, tmp_path):
    jobs, before = [ThreadsJob(tmp_path / str(job)) for job in range(2)], torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert do_jobs(jobs, workers, Console(stderr=True)) == []
    finally:
        torch.set_num_threads(before)
    assert [(job.folder / "threads").read_text() for job in jobs] == [threads] * 2


def _say_hello(connection: Connection) -> None:
    connection.send("hello")


@dataclass(frozen=True)
class JobWithWorkers(ThreadsJob):
    """Works with processes of its own, as sampling with `rollout.workers` does."""

    def run(self) -> None:
        worker, connection = start_worker(_say_hello)
        (self.folder / "threads").write_text(connection.recv())
        worker.join()


def test_a_job_may_have_workers_of_its_own(tmp_path: Path) -> None:
    assert do_jobs([JobWithWorkers(tmp_path)], 1, Console(stderr=True)) == []
    assert (tmp_path / "threads").read_text() == "hello"


@dataclass(frozen=True)
class EndlessJob(ThreadsJob):
    """Writes down in which process it is, and works on."""

    def run(self) -> None:
        (self.folder / "pid").write_text(str(os.getpid()))
        time.sleep(100)


def test_a_worker_that_died_idle_is_replaced(tmp_path: Path) -> None:
    worker = _Worker(1)
    try:
        worker._process.kill()
        worker._process.join()
        worker.give(ThreadsJob(tmp_path / "job"))
        _, _, trouble = worker.take()
        assert trouble == "" and (tmp_path / "job" / "threads").read_text() == "1"
        worker._process.kill()
        worker._process.join()
        worker.stop()  # it is not there to be asked
    finally:
        worker.close()


@dataclass(frozen=True)
class JobWithoutRoom(ThreadsJob):
    """Finds no room for its work."""

    def run(self) -> None:
        raise StorageError("out: no room for 3 bytes")


def test_a_job_whose_log_is_on_the_full_disk_still_says_what_happened(tmp_path: Path) -> None:
    job = JobWithoutRoom(tmp_path / "job")
    job.folder.mkdir()
    (job.folder / "log.txt").symlink_to("/dev/full")
    worker = _Worker(1)
    try:
        worker.give(job)
        _, _, trouble = worker.take()
        assert trouble == "out: no room for 3 bytes"
        worker.stop()
    finally:
        worker.close()


def test_kill_9_ends_a_worker_in_the_middle_of_its_job(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_compare import Console, EndlessJob, Path, do_jobs\n"
        f"do_jobs([EndlessJob(Path({str(tmp_path)!r}))], 1, Console())\n"
    )
    comparison, pid = start("-c", code), tmp_path / "pid"
    try:
        assert within(60, lambda: pid.is_file() and pid.read_text()), comparison.written()
        worker = int(pid.read_text())
        assert worker != comparison.pid and alive(worker)
    finally:
        comparison.kill()
        comparison.wait()
    assert within(30, lambda: not alive(worker)), "the worker outlives its parent"


def done_jobs(out: Path) -> list[Path]:
    return sorted(out.glob("seed_0/*/job.json"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a quick comparison that was killed on its way and resumed."""
    out = tmp_path_factory.mktemp("compare") / "results"
    process = start(*COMMAND, out)
    try:
        while len(done_jobs(out)) < 3 and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        process.kill()
        process.wait()
    done = python(*COMMAND, out, timeout=1000)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    assert re.search(rf"compare: [3-6] of {1 + len(BY_DEFAULT)} jobs are done", done.stderr), done.stderr
    return out


def test_every_method_is_measured_over_the_same_directions(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert {policy["method"] for policy in results["policies"]} == set(BY_DEFAULT)
    assert [p["name"] for p in results["policies"] if p["method"] == "pooled"] == ["t = 0", "t = 1"]
    for policy in results["policies"]:
        points = policy["fronts"]["gold"]["verbosity"]
        assert len(points) == (1 if policy["point"] else 3)
        assert policy["measures"]["hypervolume"]["value"] > 0
        assert policy["measures"]["hypervolume"]["low"] is not None
    assert len(results["leads"]["verbosity"]) == len(BY_DEFAULT) - 1
    by_method = {row["method"]: row for row in results["costs"]}
    assert by_method["pooled_third"]["scored"] == 3 / 8 * by_method["per_direction"]["scored"]  # 3 prompts of 8
    generated = [by_method[method]["generated"] for method in ("pooled_third", "per_direction")]
    assert results["thrift"]["share"] == pytest.approx(generated[0] / generated[1])
    assert results["missing"] == []


def test_methods_that_are_given_a_budget_spend_it(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    budget = results["config"]["budget"]
    for row in results["costs"]:
        if row["method"] in ("sft", "dpo", "steerlm", "ric", "soups", "mod", "modpo", "scalar_rsf"):
            assert row["total"] == pytest.approx(budget, rel=0.1), row
        assert row["equal"] == (abs(row["total"] - budget) <= 0.1 * budget)
    by_method = {row["method"]: row for row in results["costs"]}
    # as many samples and as many rows trained on; their lengths are drawn, and differ from machine to machine
    assert by_method["per_direction"]["scored"] == by_method["pooled"]["scored"]
    assert by_method["per_direction"]["training"] == pytest.approx(by_method["pooled"]["training"], rel=0.25)


def test_the_report_says_what_holds_and_stands_alone(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    page = (finished / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    assert page.count("Holds") + page.count("Does not hold") >= len(results["claims"])
    assert "SteerLM" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)
    lines = (finished / "table.csv").read_text().splitlines()
    assert len(lines) > 2 * len(BY_DEFAULT)
    assert lines[0].startswith("method,policy,reward,arc")


def test_a_finished_comparison_does_no_work_and_one_with_other_settings_is_refused(finished: Path) -> None:
    recipe = finished.with_name("results-world") / "compare.yaml"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.parquet")}
    Comparison(load_comparison(recipe, QUICK | SMALLER)).run()
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.parquet")} == before
    other = python(*COMMAND, finished, "--set", "run.rollout.samples=2")
    assert other.returncode == 2
    assert "run.rollout.samples: 1 -> 2" in other.stderr
    assert "Traceback" not in other.stderr
    rated = Path(load_comparison(recipe, QUICK | SMALLER).run_config(0, finished).ratings[0].path)
    content = rated.read_bytes()
    rated.write_bytes(content + b"\n")
    with pytest.raises(RunFolderError, match=r"seed_0\.ratings\.0\.path: the content of .* has changed"):
        Comparison(load_comparison(recipe, QUICK | SMALLER)).run()
    rated.write_bytes(content)
    (weights,) = Path(load_comparison(recipe, QUICK | SMALLER).run_config(0, finished).policy).glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunFolderError, match=r"policy: .*safetensors: the content of .* has changed"):
        Comparison(load_comparison(recipe, QUICK | SMALLER)).run()
    weights.write_bytes(content)


def test_the_demos_comparison_loads_with_every_methods_settings(tmp_path: Path) -> None:
    config = load_comparison(write_recipe(tmp_path, tmp_path / "out"))
    assert list(Comparison(config).methods) == BY_DEFAULT
    assert len(config.seeds) >= 3
    for method in BY_DEFAULT:
        settings = config.run_config(1, tmp_path / method, method)
        assert "seed_1" in settings.prompts.path
        assert len(settings.space.build().grid(settings.evaluate.directions)) >= 15
    assert config.run_config(0, tmp_path, "per_direction").selection.method == "per_direction"
    assert config.run_config(0, tmp_path, "online_dpo").learner == "dpo"
    assert RECIPE.is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budjet": "5"}, r"budjet: unknown key; did you mean `budget`"),
        ({"methods": "[stearlm]"}, r"methods: 'stearlm' is not known; did you mean `steerlm`"),
        ({"seeds": "[1, 1]"}, r"seeds: .* is not accepted; give different seeds"),
        ({"run.rollout.sampels": "5"}, r"run\.rollout\.sampels: unknown key; did you mean `samples`"),
        ({"changes.sft": "{finetune.rate: 1}"}, r"run\.finetune\.rate: unknown key"),
        ({"changes.stf": "{finetune.epochs: 1}"}, r"changes: 'stf' is not known; did you mean `sft`"),
        ({"run.seed": "5"}, r"run\.seed: the comparison sets it"),
        ({"run.ratings": "[]"}, r"run\.ratings: a comparison needs rated data"),
        (
            {"methods": "[pooled, online_dpo]", "run.selection.method": "best_mean"},
            r"online_dpo: selection\.method: best_mean keeps winners and no pairs",
        ),
    ],
)
def test_a_wrong_field_is_named_before_any_work(tmp_path: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Comparison(load_comparison(write_recipe(tmp_path, tmp_path / "out"), change))


def test_a_main_objective_that_is_wished_less_of_is_refused(tmp_path: Path) -> None:
    center = {"run.space.center": "{helpfulness: -1.0, verbosity: 0.2}"}
    recipe = write_recipe(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"less of helpfulness is asked for.*less_helpfulness: \{helpfulness: -1\}"):
        Comparison(load_comparison(recipe, center))


def test_a_comparison_of_ones_own_needs_a_configuration(tmp_path: Path) -> None:
    done = python("-m", "dpa", "compare", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert "no file at" in done.stderr
