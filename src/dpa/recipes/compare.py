"""Compare methods: every (method, seed) is a job; a few processes work through them; one report says what holds.
Run its tests: pytest tests/test_compare.py

    path = Comparison(load_comparison("compare.yaml")).run()

    <out>/seed_0/shared/         ratings, reward model, t = 0: made once, read by every method of the seed
    <out>/seed_0/steerlm/        the method's stages, measure/<policy>/, log.txt, and job.json, written last
    <out>/results.json, table.csv, report.html

A job is done when its job.json stands. Every job resumes where it was stopped, kill -9 included.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dpa.core.compare_config import CompareConfig
from dpa.core.comparison import main_objective
from dpa.core.config import RunConfig
from dpa.core.config_identity import resolved
from dpa.core.errors import ConfigError, DamageError, EngineError, StorageError
from dpa.pages.comparison import write_comparison
from dpa.recipes.baselines.lab import Lab, Method, Trained
from dpa.recipes.baselines.methods import METHODS, compared
from dpa.recipes.checks import check_run, inputs_of
from dpa.recipes.dpa import Loop
from dpa.recipes.job_processes import do_jobs
from dpa.stages.compare import summarise
from dpa.stages.evaluate import EVALUATION, scores_by_prompt
from dpa.storage.run_folder import RunFolder
from dpa.storage.stopping import end_on_signal
from dpa.storage.tables import read_json, read_record, write_record
from dpa.version import __version__

SHARED = "shared"
T0 = "t = 0"
"""Name of the policy that the subject of a comparison starts from."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparisonJob:
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
    def shared(self) -> "ComparisonJob":
        """The job that makes what the methods of its seed share."""
        return ComparisonJob(self.config, None, self.seed)

    @property
    def settings(self) -> RunConfig:
        """The configuration of the loop for it."""
        return self.config.run_config(self.seed, self.folder, self.method.name if self.method else None, self.changed)

    @property
    def ready(self) -> bool:
        """Whether what it needs is made."""
        return self.method is None or (self.shared.done and (self.ground is None or self.ground.done))

    @property
    def ground(self) -> "ComparisonJob | None":
        """The job of the method that its own stands on, where that one is compared with the same settings."""
        below = self.method.stands_on if self.method else None
        if self.method is None or below is None or below not in (self.config.methods or ()):
            return None
        ground = replace(self, method=METHODS[below])
        return ground if self.changed == ground.changed else None

    @property
    def changed(self) -> dict[str, Any]:
        """What its method changes of the run: its own entry or, without one, that of the method it stands on."""
        if self.method is None:
            return {}
        names = (self.method.name, self.method.stands_on)
        return next((self.config.changes[name] for name in names if name in self.config.changes), {})

    @property
    def lab(self) -> Lab:
        """Where its method works."""
        ground = self.ground.lab if self.ground else None
        return Lab(self.settings, self.shared.folder, self.folder, self.config.budget, ground)

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
        except DamageError as error:
            _log.warning("compare: %s; it is made again.", str(error).split("; ")[0])
            return None

    def run(self) -> None:
        """Do what is not done yet. Raises DpaError."""
        if self.done:
            return
        if self.method is None:
            with self.mending(), Loop(self.settings.model_copy(update={"iterations": 0})) as loop:
                results = read_json(loop.run(ignore_free_space=True).with_name("results.json"))
                loop.prompts(1)  # every method reads them from here
            write_record(self.folder / "job.json", {name: results[name] for name in ("ledger", "reward_model")})
            return
        with RunFolder(self.folder).open(self.settings), self.mending():
            lab = self.lab
            policies = [(trained.name, measure(lab, trained)) for trained in self.method.train(lab)]
            write_record(
                self.folder / "job.json",
                {
                    "policies": [{"name": name, "evaluation": evaluation} for name, evaluation in policies],
                    "cost": asdict(lab.cost),
                },
            )

    @contextmanager
    def mending(self) -> Iterator[None]:
        """Where something turns out damaged, this job and those it reads from are no longer done: what is whole of them
        stays, and the same command makes the rest again. Raises StorageError."""
        try:
            yield
        except DamageError as error:
            for job in filter(None, (self, self.shared, self.ground)):
                (job.folder / "job.json").unlink(missing_ok=True)
            found = str(error).split("; ")[0].removesuffix(".")
            raise StorageError(f"compare: {found}; run the same command again, and it is made again.") from None


def measure(lab: Lab, trained: Trained) -> dict[str, Any]:
    """What a policy gets for each direction of the grid, on its seed's held-out prompts."""
    return lab.measure(lab.measuring(trained.name), lambda _how: nullcontext([trained.open()]), trained.targets)


class Comparison:
    """All jobs of a comparison, and the report over those that are done. Raises ConfigError where a method's settings
    cannot work, before any job starts."""

    def __init__(self, config: CompareConfig) -> None:
        self.methods = compared(config)
        self.config = config = config.model_copy(update={"methods": list(self.methods)})
        self.console = Console(stderr=True)
        self.shared = [ComparisonJob(config, None, seed) for seed in config.seeds]
        self.jobs = [ComparisonJob(config, method, seed) for seed in config.seeds for method in self.methods.values()]
        for job in self.jobs[: len(self.methods)]:  # of one seed: they differ in nothing that is checked
            try:
                check_run(job.settings)
            except ConfigError as error:
                raise ConfigError(f"{job.place}: {error}") from None
        space = self.jobs[0].settings.direction_space()
        main = main_objective(space)
        if space.center_K[space.names.index(main)] < 0:
            raise ConfigError(
                f"space.center: less of {main} is asked for, and fronts are drawn that rise; turn the objective "
                f"round, as in space.objectives: {{less_{main}: {{{main}: -1}}}}."
            )

    def run(self) -> Path:
        """Do every job that is not done, write the report, return its path. Raises DpaError, Interrupted."""
        # A finished job is not opened again, so that what all of them read is held fast here.
        inputs = {
            f"seed_{job.seed}.{field}": file for job in self.shared for field, file in inputs_of(job.settings).items()
        }
        for policy in dict.fromkeys(job.settings.policy for job in self.shared):  # read once, though seeds share it
            inputs |= {f"policy: {file}": file for file in sorted(Path(policy).glob("*.safetensors"))}
        with RunFolder(self.config.out).open(self.config.identity(), inputs), end_on_signal("compare"):
            failed = do_jobs([*self.shared, *self.jobs], self.config.workers, self.console)
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
        done = [job for job in self.jobs if job.done and job.shared.done]
        if not done:
            raise EngineError("no job is done, so there is nothing to report; look at the log.txt of each.")
        seeds = [seed for seed in self.config.seeds if any(job.seed == seed for job in done)]
        jobs = {name: [job for job in done if job.method == method] for name, method in self.methods.items()}
        jobs = {name: own for name, own in jobs.items() if seeds == [job.seed for job in own]}
        if not jobs:
            raise EngineError(
                "no method is done in every seed, so there is nothing to report; look at log.txt of each."
            )
        example = self.config.run_config(seeds[0], Path(self.config.out))
        found = {name: [self._found(job) for job in own] for name, own in jobs.items()}
        scores = {
            (name, policy["name"]): [self._scores(job, policy["name"]) for job in own]
            for name, own in jobs.items()
            for policy in found[name][0]["policies"]
        }
        prompts = {tuple(prompt.prompt_id for prompt in job.lab.held_out) for job in next(iter(jobs.values()))}
        results = {
            "name": self.config.name,
            "version": __version__,
            "seeds": seeds,
            "missing": [job.name for job in self.jobs if job not in done],
            "space": example.space.build().to_dict(),
            "config": resolved(self.config),
            "shared": [job.record for job in self.shared if job.seed in seeds],
            **summarise(
                self.methods,
                found,
                scores,
                example.space.build(),
                example.evaluate,
                self.config,
                same_prompts=len(prompts) == 1,
            ),
        }
        return write_comparison(Path(self.config.out), results)

    def _found(self, job: ComparisonJob) -> dict[str, Any]:
        """A job's record; the subject's starts with t = 0, which was measured once for all."""
        found = job.record
        assert found is not None and job.method is not None, "only jobs that are done are reported"
        if job.method.kind == "subject":
            file = job.shared.folder / "iter_0" / "evaluate" / "evaluation.json"
            with job.mending():
                if not file.exists():
                    raise DamageError(f"{file} is gone.")
                t0 = read_record(file, EVALUATION, optional=None)
            found = {**found, "policies": [{"name": T0, "evaluation": t0}, *found["policies"]]}
        return found

    def _scores(self, job: ComparisonJob, policy: str) -> dict[str, np.ndarray]:
        """reward -> scores_DPK of one policy on its seed's held-out prompts."""
        lab = job.lab
        place = (lambda name: lab.shared_stage(0, f"evaluate/{name}")) if policy == T0 else lab.measuring(policy)
        grid_DK = lab.space.grid(lab.config.evaluate.directions)
        with job.mending():
            ids = [prompt.prompt_id for prompt in lab.held_out]
            return scores_by_prompt(place("rollout").whole_table(), lab.measured(place), lab.space, grid_DK, ids)
