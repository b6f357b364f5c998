"""Every command, one function each; its docstring is its help."""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpa.cli import ecosystem, elsewhere, planning, starting
from dpa.cli.home import Commands
from dpa.cli.options import ConfigPath, MaxNewTokens, Overrides, Temperature, as_yaml, overridden, takes_fields
from dpa.core.errors import ConfigError, DataError
from dpa.serve.settings import ServeSettings
from dpa.version import __version__

if TYPE_CHECKING:
    from dpa.core.config import RunConfig
    from dpa.recipes.dpa import Loop
    from dpa.recipes.rated_rows import RewardRun

app = Commands(
    name="dpa",
    help="Directional Preference Alignment: one model, and every user says which way to go.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(starting.app)  # init
app.add_typer(ecosystem.app)  # export, fold, push, judge
app.add_typer(elsewhere.app)  # data, adopt
app.add_typer(planning.app)  # estimate, doctor

Iteration = Annotated[int, typer.Option("--iteration", "-t", min=0, help="Which iteration.")]
Shard = Annotated[
    str | None,
    typer.Option("--shard", metavar="i/N", help="Only share i of N (1/N to N/N); others make theirs beside it."),
]
ModelFolder = Annotated[str, typer.Argument(help="Model folder made by the loop (its dpa_config.json says the space).")]
DirectionText = Annotated[
    str | None,
    typer.Option(
        "--direction",
        "-d",
        help='"helpfulness*0.8 - verbosity*0.6", "-15deg" (two objectives), a preset, or, where the policy was trained '
        'on targets, "helpfulness; verbosity=40". Default: the cone\'s center; or none, which states nothing.',
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the samples.", min=0)]
SpaceName = Annotated[
    str | None, typer.Option("--space", help="Of a model without dpa_config.json: dpa-v1, a policy or a YAML file.")
]
RevisionText = Annotated[str | None, typer.Option(help="Opt in to the model's own code (commit).")]


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    iterations: Annotated[int | None, typer.Option(help="Number of online iterations.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Finetune in this many processes (cards), through accelerate launch.")
    ] = None,
    ignore_free_space: Annotated[bool, typer.Option(help="Start although the disk looks too full.")] = False,
) -> None:
    """Run the whole loop, or as far as the configuration goes; the same command resumes it."""
    flags = {"iterations": iterations, "out": out, "cluster.processes": processes}
    given = {name: as_yaml(value) for name, value in flags.items() if value is not None}
    with _any_run(config, overrides, given) as opened:
        made = opened.run(ignore_free_space)
        if made.is_file():
            from dpa.recipes.results import next_step

            typer.echo(f"try it: {next_step(opened)}")  # type: ignore[arg-type]
    typer.echo(f"{'report' if made.is_file() else 'reward model'}: {made}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything.", min=0)] = 0,
    iterations: Annotated[int | None, typer.Option(help="Number of online iterations.", min=0)] = None,
    development: Annotated[bool, typer.Option(help="Measure on development questions, not on the held-out.")] = False,
    overrides: Overrides = None,
) -> None:
    """Watch one small model learn to follow directions, on any CPU."""
    from dpa.world.demo import run_demo

    flags = {} if iterations is None else {"iterations": str(iterations)}
    run_demo(out, seed, development, {**overridden(overrides), **flags})


@app.command()
def compare(
    config: Annotated[
        Path | None, typer.Argument(help="Comparison to run, YAML (docs/comparison.md); without one, the demo world's.")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Results folder.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, as 0,1,2.")] = None,
    quick: Annotated[bool, typer.Option(help="The demo world in a few minutes: shows that it works, no more.")] = False,
    development: Annotated[bool, typer.Option(help="The demo world: measure on development questions.")] = False,
) -> None:
    """Compare methods at equal budgets over several seeds; the same command resumes it."""
    flags = overridden(overrides)
    if seeds is not None:
        flags["seeds"] = f"[{seeds}]"
    if config is None:
        from dpa.world.comparison import compare_demo

        where = out or Path("runs/compare-quick" if quick else "runs/compare")
        typer.echo(f"report: {compare_demo(where, development, quick, flags)}")
        return
    if quick or development:
        raise ConfigError("--quick, --development: they belong to the demo world; leave CONFIG out, or them.")
    from dpa.core.compare_config import load_comparison
    from dpa.recipes.compare import Comparison

    if out is not None:
        flags["out"] = as_yaml(out)
    typer.echo(f"report: {Comparison(load_comparison(config, flags)).run()}")


@app.command()
def ratings(config: ConfigPath, overrides: Overrides = None) -> None:
    """Read the rated data into one table and print a summary of every attribute."""
    with _any_run(config, overrides) as opened:
        opened.read_ratings(show=True)


@app.command("train-reward")
def train_reward(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the multi-objective reward model on the ratings and print its held-out quality."""
    with _any_run(config, overrides) as opened:
        opened.train_reward(show=True)


@app.command()
def rollout(config: ConfigPath, iteration: Iteration = 1, shard: Shard = None, overrides: Overrides = None) -> None:
    """Sample candidates from the policy of the iteration before."""
    with _loop(_load(config, overrides), shard=shard) as loop:
        loop.rollout(iteration)


@app.command()
def score(config: ConfigPath, iteration: Iteration = 1, shard: Shard = None, overrides: Overrides = None) -> None:
    """Score an iteration's candidates (t = 0: the rated responses)."""
    with _loop(_load(config, overrides), shard=shard) as loop:
        loop.score(iteration)


@app.command()
def select(config: ConfigPath, iteration: Iteration = 1, overrides: Overrides = None) -> None:
    """Keep the winner of each direction."""
    with _loop(_load(config, overrides)) as loop:
        loop.select(iteration)


@app.command()
def finetune(config: ConfigPath, iteration: Iteration = 1, overrides: Overrides = None) -> None:
    """Finetune the policy of the iteration before, as `learner` says; also as a rank of `accelerate launch`."""
    settings = _load(config, overrides)  # before seconds of imports: a mistake in it is said at once

    from dpa.recipes.dpa import Loop
    from dpa.training.launching import end_with_launcher
    from dpa.training.ranks import first_then_rest

    end_with_launcher()
    # The first rank holds the run folder, the others join it.
    with first_then_rest(lambda join: Loop(settings, join=join)) as loop:
        loop.finetune(iteration)


@app.command()
def evaluate(config: ConfigPath, iteration: Iteration = 1, overrides: Overrides = None) -> None:
    """Measure an iteration's policy on held-out prompts over the grid of directions."""
    with _loop(_load(config, overrides)) as loop:
        loop.evaluate(iteration)


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Write results.json, table.csv, samples.jsonl and report.html from what is finished."""
    with _loop(_load(config, overrides)) as loop:
        typer.echo(f"report: {loop.report()}")


@app.command()
def generate(
    model: ModelFolder,
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts; - reads standard input.")],
    direction: DirectionText = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Answers for each prompt.")] = 1,
    temperature: Temperature = 0.7,
    max_new_tokens: MaxNewTokens = 256,
    seed: Seed = 0,
    clamp: Annotated[bool, typer.Option(help="Move a direction outside the cone to its edge.")] = False,
    best_of: Annotated[int, typer.Option("--best-of", min=1, help="Give the best of this many candidates.")] = 1,
    robust: Annotated[bool, typer.Option(help="With --best-of: sample from neighbouring directions too.")] = False,
    reward: Annotated[
        str | None,
        typer.Option(help="With --best-of: a reward model, or a run (folder or YAML) that scores. Default: its own."),
    ] = None,
    space: SpaceName = None,
    remote_code_revision: RevisionText = None,
) -> None:
    """Answer prompts under a direction."""
    from dpa.cli.talk import answer, for_screen
    from dpa.core.reference import ModelReference

    questions = [_standard_input() if text == "-" else text for text in prompt]
    for reply in answer(
        ModelReference(model, remote_code_revision),
        questions,
        direction,
        samples,
        temperature,
        max_new_tokens,
        seed,
        clamp,
        best_of,
        robust,
        reward,
        space,
    ):
        typer.echo(for_screen(reply))


@app.command()
def chat(
    model: ModelFolder,
    direction: DirectionText = None,
    temperature: Temperature = 0.7,
    max_new_tokens: MaxNewTokens = 256,
    seed: Seed = 0,
    space: SpaceName = None,
    remote_code_revision: RevisionText = None,
) -> None:
    """Talk to a model; `/direction TEXT` changes the direction, `/quit` ends."""
    from dpa.cli.talk import converse
    from dpa.core.reference import ModelReference

    converse(ModelReference(model, remote_code_revision), direction, temperature, max_new_tokens, seed, space)


@app.command()
@takes_fields(ServeSettings, argument="model", short={"direction": "-d"})
def serve(settings: ServeSettings) -> None:
    """Serve a model, or one behind a URL: OpenAI's API with a direction in every request, and a page."""
    from dpa.serve.command import serve as run_server

    run_server(settings)


def _standard_input() -> str:
    """All of it. Raises DataError."""
    try:
        return io.TextIOWrapper(io.BytesIO(sys.stdin.buffer.read()), "utf-8").read()
    except UnicodeDecodeError as error:
        raise DataError(f"prompt: standard input is not UTF-8 (byte {error.start}); convert it (iconv).") from None


def _load(path: Path, overrides: list[str] | None) -> "RunConfig":
    from dpa.core.config import load_config

    return load_config(path, overridden(overrides))


def _any_run(path: Path, overrides: list[str] | None, flags: dict[str, str] | None = None) -> "Loop | RewardRun":
    """The run of a configuration, open: the loop, or what ends with its reward model."""
    from dpa.core.config import RunConfig, load_run
    from dpa.recipes.rated_rows import RewardRun

    config = load_run(path, {**overridden(overrides), **(flags or {})})
    if isinstance(config, RunConfig):
        return _loop(config)
    return RewardRun(config)


def _loop(config: "RunConfig", shard: str | None = None) -> "Loop":
    from dpa.storage.locks import Share

    share = None if shard is None else Share.parse(shard)
    from dpa.recipes.dpa import Loop

    return Loop(config, share)
