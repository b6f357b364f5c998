"""`dpa estimate` and `dpa doctor`: what a run will take, and whether this machine is fit for it.
Run its tests: pytest tests/test_estimate.py tests/test_doctor.py
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from dpa.cli.home import Commands
from dpa.cli.options import ConfigPath, Overrides, overridden
from dpa.core.errors import ConfigError

app = Commands(rich_markup_mode=None)


@app.command()
def estimate(
    config: ConfigPath,
    runs: Annotated[
        list[Path] | None, typer.Option("--from", help="Run folder whose ledgers say the speeds; its own by itself.")
    ] = None,
    parameters: Annotated[
        float | None, typer.Option(min=1, help="Size of the policy, where its folder is not here: 7.2e9.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print tokens, hours, memory and disk of every stage before anything starts."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from dpa.core.config import load_config
    from dpa.recipes.estimate import estimate as estimated
    from dpa.recipes.estimate import run_needs
    from dpa.storage.console import print_table

    for run in runs or []:
        if not run.is_dir():
            raise ConfigError(f"--from: there is no run folder at {run}; check the path.")
    stages = estimated(load_config(config, overridden(overrides)), runs or [], parameters)
    table = Table(box=SIMPLE_HEAD)
    for heading in ("stage", "rows", "tokens", "time", "memory", "disk", "speed from"):
        table.add_column(heading, justify="left" if heading in {"stage", "speed from"} else "right", no_wrap=True)
    for stage in stages:
        table.add_row(
            stage.name,
            f"{stage.rows:,}",
            f"{stage.tokens:,}",
            _time(stage.seconds),
            _bytes(stage.memory),
            _bytes(stage.disk),
            stage.measured or "arithmetic",
        )
    seconds, memory, disk = run_needs(stages)
    table.add_section()
    table.add_row("the run", "", "", _time(seconds), _bytes(memory), _bytes(disk), "")
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=max(console.width, 120))  # a file or a pipe has no edge
    print_table(table, console)
    if not all(stage.measured for stage in stages):
        console.print(
            "arithmetic: a measured matrix rate and the assumptions named in src/dpa/recipes/estimate.py; right within "
            "a factor of a few. Run a small iteration and give its folder with --from."
        )


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="Where run folders will lie.")] = Path("runs"),
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds after which a check that hangs has failed.")] = 90.0,
) -> None:
    """Check versions, devices, disk, rename, lock and an all-reduce; exit code 1 when something is not fit."""
    from dpa.cli.doctor import examine

    failed = False
    for check in examine(folder, limit_s=time_limit):
        mark = {True: "ok    ", False: "FAILED", None: "note  "}[check.ok]
        typer.echo(f"{mark} {check.name}: {check.text}")
        failed = failed or check.ok is False
    raise typer.Exit(1 if failed else 0)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
