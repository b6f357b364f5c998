"""`dpa init`: from a rated file to a configuration that runs.
Run its tests: pytest tests/test_init.py
"""

from pathlib import Path
from typing import Annotated

import typer

from dpa.cli.home import Commands

app = Commands(rich_markup_mode=None)


@app.command()
def init(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Rated data: .jsonl, .parquet, .csv, folders, or Hub ids.")
    ],
    policy: Annotated[
        str | None,
        typer.Option(help="Start policy: a model folder, GGUF file or Hub id. Default: one that fits this machine."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the configuration goes. Default: FILE's name, here.")] = None,
    hours: Annotated[float, typer.Option(min=0.05, help="What the run may take; sizes are chosen by it.")] = 1.0,
    reward_only: Annotated[bool, typer.Option("--reward-only", help="A run that ends with a reward model.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
    split: Annotated[str, typer.Option(help="Split, of a Hub data set.")] = "train",
    prompt_column: Annotated[str | None, typer.Option(help="Column of the prompt, where it is not seen.")] = None,
    response_column: Annotated[str | None, typer.Option(help="Column of the response, where it is not seen.")] = None,
    mark: Annotated[list[str] | None, typer.Option(help="Column of a mark; repeat it. Default: those seen.")] = None,
) -> None:
    """Look at rated data and write a configuration that runs: objectives, sizes for this machine, held-out prompts."""
    from rich.console import Console

    from dpa.recipes.starting.init import Wanted
    from dpa.recipes.starting.init import init as begin

    named = {"prompt": prompt_column, "response": response_column}
    columns = tuple((name, column) for name, column in named.items() if column is not None)
    wanted = Wanted(tuple(files), policy, out, hours, reward_only, force, split, columns, tuple(mark or ()))
    begin(wanted, Console())
