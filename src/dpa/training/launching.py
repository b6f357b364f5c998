"""Training in processes of its own, through `accelerate launch`: DDP, FSDP2 or DeepSpeed, as its configuration says.
Run its tests: pytest tests/test_launch.py

    launch(["finetune", "runs/demo/config.yaml", "-t", "1"], cluster)      # = accelerate launch ... -m dpa finetune ...

The ranks end with this process, however it ends: they hold the other end of a pipe and read it.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from dpa.core.errors import ConfigError, TrainingError
from dpa.core.sections.cluster import ClusterConfig
from dpa.models.memory import free_memory
from dpa.storage.stopping import POLL_S, StopOnSignal
from dpa.training.ranks import LAUNCHED, in_one_process


def launches(cluster: ClusterConfig) -> bool:
    """Whether training is to be launched, and this process is not itself part of a launch."""
    return (cluster.processes > 1 or cluster.accelerate is not None) and in_one_process()


def launch(arguments: Sequence[str], cluster: ClusterConfig, label: str) -> None:
    """Run `dpa ARGUMENTS` in every rank, and wait for them. What goes wrong there is said there.

    Raises ConfigError (no such configuration file, or a user's mistake in a rank), TrainingError, Interrupted (a
    signal here is passed on; the ranks save a checkpoint and end).
    """
    if cluster.accelerate is not None and not Path(cluster.accelerate).is_file():
        raise ConfigError(f"cluster.accelerate: no file at {cluster.accelerate}; see recipes/accelerate/.")
    command = [sys.executable, "-m", "dpa.training.launching", *_options(cluster), "-m", "dpa", *arguments]
    free_memory()
    with StopOnSignal() as stop:
        child = subprocess.Popen(
            command, env={**os.environ, LAUNCHED: "1"}, stdin=subprocess.PIPE, start_new_session=True
        )
        asked = False
        while True:
            try:
                code = child.wait(timeout=POLL_S)
                break
            except subprocess.TimeoutExpired:
                if stop.requested and not asked:
                    asked = True
                    child.terminate()
            except BaseException:
                child.kill()
                raise
        if stop.requested:
            raise stop.interrupted(label, 0, 1, "trainings")
    if code == ConfigError.exit_code:
        raise ConfigError(f"{label}: the launched training could not start; its message stands above.")
    if code:
        raise TrainingError(f"{label}: the launched training ended with exit code {code}; its message stands above.")


def end_with_launcher() -> None:
    """In a rank: when the process that called `launch` ends, even by kill -9, save a checkpoint and end too."""
    if LAUNCHED in os.environ:
        threading.Thread(target=_await_end_of_launcher, daemon=True).start()


def _await_end_of_launcher() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _options(cluster: ClusterConfig) -> list[str]:
    """Of `accelerate launch`. Its `--cpu` starts one process whatever `--num_processes` says; `--multi_gpu` starts
    all, on CPUs too (accelerate 1.15)."""
    count = ["--num_processes", str(cluster.processes)] if cluster.processes > 1 else []
    if cluster.accelerate is not None:
        return ["--config_file", cluster.accelerate, *count, "--main_process_port", "0"]
    return ["--multi_gpu", *count, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", "0"]  # fmt: skip


def main() -> None:
    """`accelerate launch`, with the exit code of the rank that failed first instead of a report of the launcher."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    try:
        launch_command(launch_command_parser().parse_args())
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        sys.exit(128 + int(error.sigval))


if __name__ == "__main__":
    main()
