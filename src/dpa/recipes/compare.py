"""Compare methods: every (method, seed) is a job; a few processes work through them; one report says what holds.
Run its tests: pytest tests/test_compare.py

    path = Comparison(load_comparison("compare.yaml")).run()

    <out>/seed_0/shared/         ratings, reward model, t = 0: made once, read by every method of the seed
    <out>/seed_0/steerlm/        the method's stages, measure/<policy>/, log.txt, and job.json, written last
    <out>/results.json, table.csv, report.html

A job is done when its job.json stands. Every job resumes where it was stopped, kill -9 included.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dpa.core.compare_config import CompareConfig
from dpa.core.config import RunConfig, resolved
from dpa.core.errors import DpaError, EngineError, Interrupted, RunFolderError
from dpa.models.function_scorer import FunctionScorer
from dpa.models.samplers import die_with_parent
from dpa.pages.comparison import write_comparison
from dpa.recipes.baselines.lab import MEASURING, Lab, Method, Trained, spent
from dpa.recipes.baselines.methods import compared
from dpa.recipes.dpa import Loop
from dpa.stages.compare import summarise
from dpa.stages.evaluate import EVALUATION, evaluate, scores_by_prompt
from dpa.stages.rollout import rollout
from dpa.stages.score import score
from dpa.storage.run_folder import RunFolder, StageFolder
from dpa.storage.stopping import StopOnSignal, end_on_signal
from dpa.storage.tables import read_json, read_record, write_record
from dpa.version import __version__

SHARED = "shared"
T0 = "t = 0"
"""Name of the policy that the subject of a comparison starts from."""
_log = logging.getLogger(__name__)
_POLL_S = 0.2


@dataclass(frozen=True)
class Job:
    """One method (or what a seed's methods share) for one seed. Runs in any process; done when job.json stands."""

    config: CompareConfig
    method: Method | None
    seed: int

    @property
    def folder(self) -> Path:
        """Where it works."""
        return Path(self.config.out) / f"seed_{self.seed}" / self.place

    @property
    def place(self) -> str:
        """Its folder's name: its method's."""
        return self.method.name if self.method else SHARED

    @property
    def shared(self) -> "Job":
        """The job that makes what the methods of its seed share."""
        return Job(self.config, None, self.seed)

    @property
    def settings(self) -> RunConfig:
        """The configuration of the loop for it."""
        return self.config.run_config(self.seed, self.folder, self.method.name if self.method else None)

    @property
    def ready(self) -> bool:
        """Whether what it needs is made."""
        return self.method is None or self.shared.done

    @property
    def lab(self) -> Lab:
        """Where its method works."""
        return Lab(self.settings, self.shared.folder, self.folder, self.config.budget)

    @property
    def name(self) -> str:
        """For people."""
        what = self.method.name.replace("_", " ") if self.method else "what its methods share"
        return f"seed {self.seed}, {what}"

    @property
    def done(self) -> bool:
        """Whether its record stands."""
        return self.record is not None

    @property
    def record(self) -> dict[str, Any] | None:
        """What it found; None where it is not done. A damaged record is no record: the job's stages are finished, so
        that it is soon made again."""
        file = self.folder / "job.json"
        if not file.exists():
            return None
        fields = ("ledger", "reward_model") if self.method is None else ("policies", "cost")
        try:
            return read_record(file, fields)
        except DpaError as error:
            _log.warning("compare: %s; it is made again.", str(error).split("; ")[0])
            return None

    def run(self) -> None:
        """Do what is not done yet. Raises DpaError."""
        if self.done:
            return
        if self.method is None:
            with Loop(self.settings.model_copy(update={"iterations": 0})) as loop:
                results = read_json(loop.run().with_name("results.json"))
                loop.prompts(1)  # every method reads them from here
            write_record(self.folder / "job.json", {name: results[name] for name in ("ledger", "reward_model")})
            return
        with RunFolder(self.folder).open(self.settings):
            lab = self.lab
            policies = [(trained.name, measure(lab, trained)) for trained in self.method.train(lab)]
            cost = spent(self.folder)
            write_record(
                self.folder / "job.json",
                {
                    "policies": [{"name": name, "evaluation": evaluation} for name, evaluation in policies],
                    "cost": asdict(cost),
                },
            )


def measure(lab: Lab, trained: Trained) -> dict[str, Any]:
    """Ask a policy the held-out prompts under every direction of the grid; the same code for every method."""
    answers, scores, gold = (_measured(lab.folder, trained.name, name) for name in ("rollout", "score", "gold"))
    settings = lab.config.evaluate
    if not answers.done:
        how = lab.config.rollout.model_copy(
            update={"samples": settings.samples, "temperature": settings.temperature, "top_p": 1.0}
        )
        grid_DK = lab.space.grid(settings.directions)
        rollout(answers, lab.held_out, lab.space, [trained.open()], how, lab.config.seed, grid_DK)
    score(scores, answers, lab.held_out, lab.scorer)
    tables = {"model": scores.whole_table()}
    if settings.gold:
        score(gold, answers, lab.held_out, FunctionScorer(settings.gold))
        tables["gold"] = gold.whole_table()
    return evaluate(answers.whole_table(), tables, lab.space, settings, lab.config.seed)


class Comparison:
    """All jobs of a comparison, and the report over those that are done."""

    def __init__(self, config: CompareConfig) -> None:
        self.methods = compared(config)
        self.config = config = config.model_copy(update={"methods": list(self.methods)})
        self.console = Console(stderr=True)
        self.shared = [Job(config, None, seed) for seed in config.seeds]
        self.jobs = [Job(config, method, seed) for seed in config.seeds for method in self.methods.values()]

    def run(self) -> Path:
        """Do every job that is not done, write the report, return its path. Raises DpaError, Interrupted."""
        with RunFolder(self.config.out).open(self.config.identity()), end_on_signal("compare"):
            failed = work_through([*self.shared, *self.jobs], self.config.workers, self.console)
            page = self.report()
            for claim in read_json(page.with_name("results.json"))["claims"]:
                mark, style = ("holds", "green") if claim["holds"] else ("DOES NOT HOLD", "bold red")
                self.console.print(f"{mark}: {claim['sentence']}", style=style, markup=False, highlight=False)
            if failed:
                raise EngineError(
                    f"{len(failed)} of {len(self.jobs)} jobs failed ({'; '.join(failed)}); the report is of the "
                    "others; mend the cause and run the same command again."
                )
        return page

    def report(self) -> Path:
        """Write results.json, table.csv and report.html from the jobs that are done."""
        done = [job for job in self.jobs if job.done]
        if not done:
            raise EngineError("no job is done, so there is nothing to report; look at the log.txt of each.")
        seeds = [seed for seed in self.config.seeds if any(job.seed == seed for job in done)]
        jobs = {name: [job for job in done if job.method == method] for name, method in self.methods.items()}
        jobs = {name: own for name, own in jobs.items() if seeds == [job.seed for job in own]}
        example = self.config.run_config(seeds[0], Path(self.config.out))
        found = {name: [self._found(job) for job in own] for name, own in jobs.items()}
        scores = {
            (name, policy["name"]): [self._scores(job, policy["name"]) for job in own]
            for name, own in jobs.items()
            for policy in found[name][0]["policies"]
        }
        results = {
            "name": self.config.name,
            "version": __version__,
            "seeds": seeds,
            "missing": [job.name for job in self.jobs if not job.done],
            "space": example.space.build().to_dict(),
            "config": resolved(self.config),
            "shared": [job.record for job in self.shared if job.seed in seeds],
            **summarise(self.methods, found, scores, example.space.build(), example.evaluate, self.config),
        }
        return write_comparison(Path(self.config.out), results)

    def _found(self, job: Job) -> dict[str, Any]:
        """A job's record; the subject's starts with t = 0, which was measured once for all."""
        found = job.record
        assert found is not None and job.method is not None, "only jobs that are done are reported"
        if job.method.kind == "subject":
            file = job.shared.folder / "iter_0" / "evaluate" / "evaluation.json"
            try:
                t0 = read_record(file, EVALUATION, optional=None)
            except DpaError as error:
                raise RunFolderError(
                    f"compare: {str(error).split('; ')[0]}; delete {job.shared.folder / 'job.json'} and run the same "
                    "command again."
                ) from None
            found = {**found, "policies": [{"name": T0, "evaluation": t0}, *found["policies"]]}
        return found

    def _scores(self, job: Job, policy: str) -> dict[str, np.ndarray]:
        """reward -> scores_DPK of one policy on its seed's held-out prompts."""
        lab, settings = job.lab, job.settings
        if policy == T0:
            folder = lab.shared / "iter_0" / "evaluate"
            stages = {name: StageFolder(folder / name, f"evaluate/{name}") for name in ("rollout", "score", "gold")}
        else:
            stages = {name: _measured(lab.folder, policy, name) for name in ("rollout", "score", "gold")}
        tables = {"model": stages["score"].whole_table()}
        if settings.evaluate.gold:
            tables["gold"] = stages["gold"].whole_table()
        grid_DK = lab.space.grid(settings.evaluate.directions)
        ids = [prompt.prompt_id for prompt in lab.held_out]
        return scores_by_prompt(stages["rollout"].whole_table(), tables, lab.space, grid_DK, ids)


# --- processes -----------------------------------------------------------------------------------------------------


def work_through(jobs: Sequence[Job], workers: int, console: Console) -> list[str]:
    """Run the jobs in `workers` processes; a method waits for what its seed shares. Returns what failed, in words.

    A job that fails, or whose process dies, does not stop the others. Raises Interrupted after a signal, once the work
    in hand has come to a safe point.
    """
    waiting = [job for job in jobs if not job.done]
    total, failed, begun = len(jobs), [], time.monotonic()
    finished_here = 0
    if waiting:
        console.print(f"compare: {total - len(waiting)} of {total} jobs are done, {len(waiting)} to do", style="bold")
    with StopOnSignal() as stop, _workers(min(workers, max(1, len(waiting)))) as crew:
        while waiting or any(worker.job for worker in crew):
            for worker in crew:
                if worker.job is None and not stop.requested:
                    job = next((job for job in waiting if job.ready), None)
                    if job:
                        waiting.remove(job)
                        worker.give(job)
            busy = [worker for worker in crew if worker.job]
            if stop.requested:
                for worker in busy:
                    worker.stop()
                if not busy:
                    break
            if not busy:
                failed += [f"{job.name}: it waits for what failed" for job in waiting]
                break
            for worker in busy:
                if worker.connection not in wait([each.connection for each in busy], _POLL_S):
                    continue
                job, seconds, trouble = worker.take()
                if trouble and not stop.requested:
                    failed.append(f"{job.name}: {trouble}")
                    console.print(f"compare: {job.name} FAILED after {seconds:.0f} s: {trouble}", markup=False)
                elif not trouble:
                    finished_here += 1
                    left = len(waiting) + sum(1 for each in crew if each.job)
                    minutes = (time.monotonic() - begun) / finished_here * left / 60
                    console.print(
                        f"compare: {total - left - len(failed)} of {total} done: {job.name} in {seconds:.0f} s; "
                        f"about {minutes:.0f} min left",
                        markup=False,
                    )
        if stop.requested:
            raise stop.interrupted("compare", sum(job.done for job in jobs), total, "jobs")
    return failed


class _Worker:
    """A process that runs one job after another; its output goes to each job's log.txt."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self._start()

    def give(self, job: Job) -> None:
        """Begin a job."""
        self.job, self._begun, self._asked_to_stop = job, time.monotonic(), False
        self.connection.send(job)

    def take(self) -> tuple[Job, float, str]:
        """The job that has ended, its seconds, and what went wrong, or nothing."""
        job, self.job = self.job, None
        assert job is not None
        try:
            trouble = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            trouble = f"its process died (exit code {self._process.exitcode}); see {job.folder / 'log.txt'}"
            self._start()
        return job, time.monotonic() - self._begun, trouble

    def stop(self) -> None:
        """Ask the job in hand to stop at the next safe point."""
        if not self._asked_to_stop and self._process.pid:
            os.kill(self._process.pid, signal.SIGTERM)
            self._asked_to_stop = True

    def close(self) -> None:
        """End the process."""
        self.connection.close()  # an idle worker ends by itself
        self._process.join(timeout=0.0 if self.job else 5.0)
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()


@contextmanager
def _workers(count: int) -> Iterator[list[_Worker]]:
    """Worker processes of one thread each: several jobs side by side are faster than one job on several cores."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by a process when it starts
    crew: list[_Worker] = []
    try:
        crew += [_Worker() for _ in range(count)]
        yield crew
    finally:
        for worker in crew:
            worker.close()
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(connection: Connection) -> None:
    """What a worker does until its parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then asks us to stop
    threading.Thread(target=die_with_parent, daemon=True).start()
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        with _output_to(job.folder / "log.txt"):
            try:
                with end_on_signal(job.name):
                    job.run()
                trouble = ""
            except Interrupted as error:
                trouble = str(error)
            except DpaError as error:
                trouble = str(error)
                print(f"dpa: {error}", file=sys.stderr)
            except Exception as error:  # a defect of ours: the log has it whole, the other jobs go on
                traceback.print_exc()
                trouble = f"{type(error).__name__}: {error}; see {job.folder / 'log.txt'}"
        connection.send(trouble)


@contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Everything this process prints, libraries included, is added to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)
        os.close(target)


def _measured(folder: Path, policy: str, name: str) -> StageFolder:
    slug = "".join(letter if letter.isalnum() else "_" for letter in policy.lower())
    return StageFolder(folder / MEASURING / slug / name, f"{MEASURING}/{slug}/{name}")
