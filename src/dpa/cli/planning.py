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
        list[Path] | None,
        typer.Option(
            "--from",
            help="Run folder whose ledgers say the speeds (its own by itself), or a result folder of bench/card.py.",
        ),
    ] = None,
    parameters: Annotated[
        float | None, typer.Option(min=1, help="Size of the policy, where it is neither here nor known by name: 7.2e9.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="A card by name (h200, a100-80g, l40s, 4090, ...). Default: this machine, measured."),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Cards that train together. Default: cluster.processes.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print hours, tokens, memory and disk of every stage before anything starts (docs/estimate.md)."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dpa.core.config import load_config
    from dpa.recipes.costs.devices import device_named
    from dpa.recipes.costs.wording import HEADINGS, cells, heading, notes
    from dpa.recipes.estimate import estimate_of
    from dpa.storage.console import print_table

    if parameters is not None and not parameters < 1e15:
        raise ConfigError(f"--parameters: {parameters:g} is no size of a model; give a number such as 7.2e9.")
    for run in runs or []:
        if not run.is_dir():
            raise ConfigError(f"--from: there is no run folder at {run}; check the path.")
    on = device_named(device) if device else None
    inputs, stages = estimate_of(load_config(config, overridden(overrides)), runs or [], parameters, on, devices)
    table = Table(box=SIMPLE_HEAD)
    for name in HEADINGS:
        table.add_column(name, justify="left" if name in {"stage", "speed from"} else "right", no_wrap=True)
    *rows, whole = cells(stages)
    for row in rows:
        table.add_row(*map(Text, row))
    table.add_section()
    table.add_row(*map(Text, whole))
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=max(console.width, 100))  # a file or a pipe has no edge
    console.print(heading(inputs), markup=False)
    print_table(table, console)
    for note in notes(stages, inputs):
        console.print(note, markup=False)


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
