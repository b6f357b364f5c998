"""A small run in a process of its own, to be stopped, killed and resumed by the fault tests.

python tests/fake_run.py FOLDER [--seconds S] [--workers W] [--hang]     rollout, score and select, then print "done"
python tests/fake_run.py FOLDER --shard i/N [--score] [--hang]           that share of the rollout (and score) shards
python tests/fake_run.py FOLDER --kills 30 --seconds S                   FOLDER/0, FOLDER/1, ...: kill -9, resume
"""

import argparse
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from fakes import FakeSampler, FakeScorer, prompts_of, run_config, space_of

from dpa.core.errors import DpaError
from dpa.stages.rollout import rollout
from dpa.stages.score import score
from dpa.stages.select import select_winners
from dpa.storage.locks import Share
from dpa.storage.run_folder import RunFolder

PROMPTS = 16
HANGS = {"question9": "hang"}  # in shard 2


def run(folder: Path, seconds: float, workers: int, hang: bool = False) -> None:
    """One iteration with fakes; the same call resumes it."""
    config = run_config(folder)
    prompts, space = prompts_of(PROMPTS), space_of()
    with RunFolder(folder).open(config) as run:
        candidates, scores = run.stage(1, "rollout"), run.stage(1, "score")
        samplers = [FakeSampler("fake-0", seconds, HANGS if hang else {}) for _ in range(workers)]
        rollout(candidates, prompts, space, samplers, config.rollout, config.seed)
        score(scores, candidates, prompts, FakeScorer())
        select_winners(run.stage(1, "select"), candidates, scores, prompts, space, config.selection, config.seed)


def run_share(folder: Path, seconds: float, share: Share, scoring: bool, hang: bool = False) -> None:
    """One share of the rollout, or of the scoring of a finished one."""
    config = run_config(folder)
    prompts, space = prompts_of(PROMPTS), space_of()
    with RunFolder(folder).open(config, share=share) as run:
        run.let_others_in()
        candidates = run.stage(1, "rollout")
        if scoring:
            score(run.stage(1, "score"), candidates, prompts, FakeScorer())
        else:
            sampler = FakeSampler("fake-0", seconds, HANGS if hang else {})
            rollout(candidates, prompts, space, [sampler], config.rollout, config.seed)


def kill_and_resume(folder: Path, kills: int, seconds: float) -> None:
    """Kill -9 runs at random instants and resume each. Forks, so that imports are paid once.

    An instant is a random number of files on disk plus a random moment. Where a run ended before its instant came, on
    however busy a machine, that run does not count and another instant is drawn.
    """
    assert _forked(folder / "whole", seconds) == 0
    files = _files(folder / "whole")
    rng = random.Random(0)
    for number in range(kills):
        place = folder / str(number)
        while _forked(place, seconds, rng.randrange(files), rng.uniform(0, 0.01)) != -signal.SIGKILL:
            shutil.rmtree(place)
        assert _forked(place, seconds) == 0
    print(f"killed {kills} while running")


def _forked(folder: Path, seconds: float, kill_at_files: int | None = None, kill_after: float = 0.0) -> int:
    child = os.fork()
    if child == 0:
        run(folder, seconds, workers=2)
        os._exit(0)
    if kill_at_files is not None:
        while (
            _files(folder) < kill_at_files and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.001)
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _files(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--hang", action="store_true")
    parser.add_argument("--shard")
    parser.add_argument("--score", action="store_true")
    given = parser.parse_args()
    try:
        if given.kills:
            kill_and_resume(given.folder, given.kills, given.seconds)
        elif given.shard:
            run_share(given.folder, given.seconds, Share.parse(given.shard), given.score, given.hang)
        else:
            run(given.folder, given.seconds, given.workers, given.hang)
            print("done")
    except DpaError as error:
        print(f"dpa: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
