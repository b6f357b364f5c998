"""`dpa data` and `dpa adopt`: a selection for other trainers, and what they trained as a policy.
Run its tests: pytest tests/test_elsewhere.py
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpa.cli.ecosystem import read_space
from dpa.cli.home import Commands
from dpa.cli.options import as_yaml, check_new_folder
from dpa.core.errors import ConfigError

if TYPE_CHECKING:
    from dpa.recipes.loop_run import LoopRun

app = Commands(rich_markup_mode=None)

FORMS, FORMATS = ("trl", "messages"), ("parquet", "jsonl")

RunPath = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or the YAML configuration of a run.")]


@app.command()
def data(
    run: RunPath,
    iteration: Annotated[
        int | None, typer.Option("--iteration", "-t", min=0, help="Whose selection. Default: the last finished one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder. Default: RUN-t1-data beside the run.")] = None,
    form: Annotated[
        str,
        typer.Option(
            help="trl: the direction in chat_template_kwargs. messages: its sentence in the messages, for programs "
            "that pass no template variables (LLaMA-Factory, axolotl)."
        ),
    ] = "trl",
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = "parquet",
    count: Annotated[int | None, typer.Option(min=1, help="Draw as many rows. Default: all.")] = None,
    held_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the prompts kept apart, as the split `test`.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn and kept apart.")] = 0,
    keep_cut: Annotated[bool, typer.Option("--keep-cut", help="Also answers that were cut at a token limit.")] = False,
    policy: Annotated[bool, typer.Option(help="Copy the policy to start from into the folder.")] = True,
) -> None:
    """Write a selection for other trainers (TRL, LLaMA-Factory, axolotl), with the policy they start from."""
    for name, value, known in (("form", form, FORMS), ("format", format, FORMATS)):
        if value not in known:
            raise ConfigError(f"--{name}: {value!r} is unknown; known: {', '.join(known)}.")
    from dpa.models.files import SPACE_FILE, resolve_model
    from dpa.recipes.elsewhere import hand_over, newest_selection
    from dpa.stages.data import DataSettings

    settings = DataSettings(form, format, count, held_out, seed, keep_cut)  # type: ignore[arg-type]
    with _open(run) as loop:
        t = newest_selection(loop) if iteration is None else iteration
        if not policy and form == "trl" and not Path(resolve_model(loop.policy(t - 1)).path, SPACE_FILE).is_file():
            raise ConfigError(
                f"--no-policy: the chat template of {loop.policy(t - 1)} reads no `preference`, so a trainer would "
                "never see a direction; leave it out, or take --form messages."
            )
        folder = out or loop.path.resolve().with_name(f"{loop.path.resolve().name}-t{t}-data")
        written = hand_over(loop, t, folder, settings, policy)
    kind = "pairs" if written.pairs else "winners"
    typer.echo(f"{folder}: {', '.join(f'{rows} {kind} ({name})' for name, rows in written.rows.items())}")
    for reason, rows in written.left_out.items():
        typer.echo(f"left out: {rows} rows ({reason})", err=True)
    if written.other:
        typer.echo(
            f"{written.other} of {written.checked} rows become other tokens than dpa's own learner reads: the chat "
            "template changes an answer, or tokens merge where it begins",
            err=True,
        )
    typer.echo(f"how to train on it, and read it back: {folder / 'README.md'}")


@app.command()
def adopt(
    model: Annotated[str, typer.Argument(help="Folder trained elsewhere: whole weights, or LoRA adapters.")],
    run: RunPath,
    iteration: Annotated[
        int | None, typer.Option("--iteration", "-t", min=0, help="It becomes the policy of this iteration of RUN.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="... or a policy by itself, in this new folder; RUN may then be anything with a space."),
    ] = None,
) -> None:
    """Take in a folder that was trained elsewhere, as an iteration of a run or as a policy by itself."""
    if iteration is None and out is None:
        raise ConfigError("adopt: say what it becomes: -t N, an iteration of the run, or --out FOLDER, a policy.")
    trained = Path(model)
    if not trained.is_dir():
        raise ConfigError(f"adopt: there is no folder at {trained}; give the folder that was trained.")
    if out is not None:
        notes, place = _by_itself(trained, run, iteration, out), out
    else:
        from dpa.recipes.elsewhere import take_in

        assert iteration is not None
        with _open(run) as loop:
            notes, place = take_in(loop, iteration, trained), loop.policy_folder(iteration)
    for note in notes:
        typer.echo(note, err=True)
    typer.echo(f"{place}: a policy, trained elsewhere")
    if out is None:
        typer.echo(f"next: dpa run CONFIG goes on from it; dpa evaluate CONFIG -t {iteration} measures it")


def _by_itself(trained: Path, run: str, iteration: int | None, out: Path) -> list[str]:
    from dpa.recipes.elsewhere import from_data
    from dpa.stages.adopt import adopt as take

    check_new_folder(out)
    if iteration is None:
        return take(trained, None, read_space(run), out, from_data(trained))
    with _open(run) as loop:
        return take(trained, loop.policy(iteration - 1), loop.space, out, from_data(trained))


def _open(run: str) -> "LoopRun":
    from dpa.core.config import load_config
    from dpa.recipes.loop_run import LoopRun

    folder = Path(run)
    if (folder / "config.yaml").is_file():
        config = load_config(folder / "config.yaml")
        if Path(config.out).resolve() != folder.resolve():  # from another working directory, or it was moved
            config = load_config(folder / "config.yaml", {"out": as_yaml(folder.resolve())})
        return LoopRun(config)
    if folder.is_dir():
        raise ConfigError(f"RUN: {folder} has no config.yaml; give a run folder, or the YAML configuration of a run.")
    return LoopRun(load_config(folder))
