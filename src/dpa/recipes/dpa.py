"""The recipe of the method: t = 0 offline from rated rows, then T rounds of rollout, score, select, finetune, evaluate.

    with Loop(load_config("my.yaml")) as loop:
        loop.run()

Every step returns at once when its done-record stands, so the same call resumes a run wherever it stopped. The steps
are built on run.py and loop_run.py; checks.py refuses what cannot work, results.py writes what was found.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpa.core.errors import RunFolderError
from dpa.core.records import Ledger, stable_hash
from dpa.pages.report import write_report
from dpa.recipes.checks import check_candidates, check_iteration
from dpa.recipes.loop_run import LoopRun
from dpa.recipes.results import (
    adopted,
    chosen_from,
    evaluation_file,
    evaluation_of,
    knows_targets,
    measured_stages,
    pools_file,
    publish,
    results_of,
    trained_elsewhere,
    write_policy_card,
)
from dpa.recipes.room import needed_bytes
from dpa.recipes.run import reports_progress
from dpa.stages.finetune import finetune_policy
from dpa.stages.pools import pool_front
from dpa.stages.rollout import ask, rollout
from dpa.stages.score import score, score_rows
from dpa.stages.select import select_rated, select_winners
from dpa.storage.tables import write_record
from dpa.training.launching import launch, launches
from dpa.training.ranks import is_first


class Loop(LoopRun):
    """One run folder and the stages of the method over it. Raises UserError subclasses for what the user can mend."""

    def run(self, ignore_free_space: bool = False) -> Path:
        """The whole loop; returns the path of the report. Refused where the disk looks too full for what is left."""
        if not ignore_free_space:
            prompts = len(self.prompts(1)) if self.config.iterations else 0
            self._folder.check_room(needed_bytes(self.config, prompts))
        self.look_ahead()
        if self.config.ratings:
            self.read_ratings()
        if self.config.reward.train:
            self.train_reward()
        for t in range(self.first, self.config.iterations + 1):
            self.learn(t)
            self.evaluate(t)
            self.report()
        return self.report()

    def learn(self, t: int) -> None:
        """Iteration t up to its policy. A learner of prompts samples and scores while it learns."""
        if t > 0:
            self.rollout(t)
        if self.learner(t).reads != "prompts":
            self.score(t)
            self.select(t)
        self.finetune(t)

    @reports_progress
    def rollout(self, t: int) -> Ledger:
        """Ask this iteration's prompts under directions drawn from the space, of the policy of t - 1.

        Where the learner samples for itself, only draw the directions.
        """
        check_iteration(self.config, t, lowest=1)
        stage, space, how = self.stage(t, "rollout"), self.drawn_from(t), self.config.rollout
        if self.learner(t).reads == "prompts":
            return ask(stage, self.prompts(t), space, how, self.config.seed)
        if stage.done:
            return stage.ledger
        with self.samplers(self.policy(t - 1), how) as samplers:
            return rollout(stage, self.prompts(t), space, samplers, how, self.config.seed)

    @reports_progress
    def score(self, t: int) -> Ledger:
        """Give every candidate of the iteration its vector; at t = 0 the rated responses are the candidates."""
        check_candidates(self.config, t)
        stage = self.stage(t, "score")
        if stage.done and self.stage(t, "finetune").done:  # until then another scorer's scores take their place
            return stage.ledger
        with self.scorers() as scorers:
            if t == 0:
                return score_rows(stage, self.read_ratings(), scorers)
            return score(stage, self.stage(t, "rollout"), self.prompts(t), scorers)

    @reports_progress
    def select(self, t: int) -> Ledger:
        """Keep the winner of each direction, with a loser beside it where the learner reads pairs. Says what there was
        to choose from, and loudly where that was nothing."""
        check_candidates(self.config, t)
        stage, scores, space = self.stage(t, "select"), self.stage(t, "score"), self.drawn_from(t)
        trained, known = self.stage(t, "finetune").done, chosen_from(self, t)
        if stage.done and trained and known is not None:  # what a policy was trained on stays as it was
            return stage.ledger
        config, seed = self.config.selection.of_iteration(t), self.config.seed
        if t == 0:
            ledger = select_rated(stage, self.read_ratings(), scores, space, config, seed)
        else:
            candidates, pairs = self.stage(t, "rollout"), self.learner(t).reads == "pairs"
            ledger = select_winners(stage, candidates, scores, self.prompts(t), space, config, seed, pairs)
        made_from = stable_hash(*map(scores.shard_digest, range(scores.shards)))
        if known is None or known.get("made_from") != made_from:
            found = pool_front(scores.whole_table(), self.space, config, self.config.evaluate, seed)
            write_record(pools_file(self, t), {**found, "made_from": made_from})
            if not trained:  # else it comes too late
                self.console.print(f"t = {t}: {found['sentence']}", style=None if found["verdict"] else "bold red")
        return ledger

    @reports_progress
    def finetune(self, t: int) -> Ledger:
        """Finetune from the policy of t - 1 on the rows that this iteration's learner reads."""
        check_iteration(self.config, t)
        stage, learn = self.stage(t, "finetune"), self.learner(t)
        if not stage.done and self.policy_folder(t).is_dir() and adopted(self, t):
            source = (trained_elsewhere(self, t) or {}).get("folder", "FOLDER")
            raise RunFolderError(
                f"iteration {t}: {self.policy_folder(t)} was trained elsewhere and is not whole; adopt it again "
                f"(`dpa adopt {source} {self.path} -t {t}`), or delete it to train it here."
            )
        scorer = self.scorer if learn.reads == "prompts" and not stage.done else None
        if scorer is None and not stage.done:
            self.let_scorer_go()
            if launches(self.config.cluster):
                with self._folder.lent():  # the first rank takes the lock
                    launch(["finetune", str(self.path / "config.yaml"), "-t", str(t)], self.config.cluster, stage.name)
                return self.stage(t, "finetune").ledger
        config = self.training(t)
        same = [before for before in range(self.first, t) if self.learner(before).reads == learn.reads]
        ledger = finetune_policy(
            stage,
            self.learned_from(t),
            self.policy(t - 1),
            learn(config, self.space, self.config.seed + t, self.config.rollout, scorer),
            self.policy_folder(t),
            [self.learned_from(before) for before in same] if config.replay else [],
        )
        if is_first():
            write_policy_card(self, t)
        return ledger

    @reports_progress
    def evaluate(self, t: int) -> Mapping[str, Any]:
        """Measure the policy of t on the held-out prompts over the grid; says loudly when it does not listen."""
        check_iteration(self.config, t)
        known, targets = evaluation_of(self, t), knows_targets(self, t)
        names = measured_stages(self.config.evaluate, targets)
        if known is not None and all(self.stage(t, f"evaluate/{name}").done for name in names):
            publish(self, t, known)
            return known
        found = self.measure(
            lambda name: self.stage(t, f"evaluate/{name}"), lambda how: self.samplers(self.policy(t), how), targets
        )
        write_record(evaluation_file(self, t), found)
        publish(self, t, found)
        write_policy_card(self, t, found)
        said = found["listens"]
        self.console.print(f"t = {t}: {said['sentence']}", style=None if said["verdict"] else "bold red")
        return found

    def report(self) -> Path:
        """Write results.json, table.csv, samples.jsonl and report.html from the iterations measured so far."""
        return write_report(self.path, results_of(self))
