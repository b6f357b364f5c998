"""`dpa export`, `fold`, `push` and `judge`: a trained model on its way into other people's programs, and compared.
Run its tests: pytest tests/test_ecosystem_cli.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpa.cli.home import Commands
from dpa.cli.options import MaxNewTokens, Temperature, check_new_folder, check_unused
from dpa.core.errors import ConfigError, DirectionError, OutsideConeError
from dpa.core.targets import read_wish

if TYPE_CHECKING:
    from dpa.core.direction import Direction
    from dpa.core.directions import DirectionSpace
    from dpa.core.records import Sampler

app = Commands(rich_markup_mode=None)

FORMS = ("alpaca-eval", "mt-bench", "arena-hard", "lm-eval")
KEY_VARIABLES = ("DPA_JUDGE_API_KEY", "OPENAI_API_KEY")
_ASKING = ("questions", "temperature", "max_new_tokens", "batch_size", "limit", "seed")
"""What only answering a benchmark's questions uses."""
ASK_BEYOND = 500_000
"""Tokens of a judge beyond which `--yes` is needed."""

SpaceText = Annotated[
    str | None,
    typer.Option(
        "--space",
        help="Direction space: dpa-v1, a policy or run folder, a YAML configuration. Default: MODEL's.",
    ),
]
Directions = Annotated[
    list[str] | None, typer.Option("--direction", "-d", help="A direction in any form; repeat it for several.")
]


@app.command()
def export(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Policy folder (or Hub id).")],
    questions: Annotated[Path | None, typer.Argument(help="The benchmark's question file.")] = None,
    form: Annotated[str, typer.Option(help=f"One of {', '.join(FORMS)}.")] = "alpaca-eval",
    out: Annotated[Path, typer.Option(help="Folder to write to; the same command resumes.")] = Path("exports"),
    directions: Directions = None,
    grid: Annotated[
        int, typer.Option(min=0, help="Directions on each arc of the cone, beside those of -d: 0, or 2 or more.")
    ] = 0,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in the files. Default: RUN-T, or its folder's.")
    ] = None,
    bake: Annotated[
        str | None, typer.Option(help="Copy the model to --out, stating this direction or target by default.")
    ] = None,
    temperature: Temperature = 0.7,
    max_new_tokens: MaxNewTokens = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the answers.")] = 0,
    space: SpaceText = None,
) -> None:
    """Answer a benchmark's questions, one entry per direction, in its own file form."""
    from dpa.models.files import policy_name, resolve_model
    from dpa.storage.seals import check_in_run

    if bake is not None:
        check_unused(context, "--bake", "form", "directions", "grid", "name", *_ASKING)
    elif form == "lm-eval":
        check_unused(context, "--form lm-eval", *_ASKING)
    if name is not None and "/" in name:
        raise ConfigError(
            f"--name: {name!r} has a slash, and files are named by it; write for example {name.replace('/', '-')!r}."
        )
    path = resolve_model(model).path
    check_in_run(path)
    where = read_space(space or path)
    if bake is not None:
        from dpa.scoring.folding import bake_direction

        check_new_folder(out)
        wish = read_wish(where, bake)
        bake_direction(path, where, wish, out)
        typer.echo(f"{out}: a plain Hugging Face folder that answers under {wish} by default")
        return
    if form not in FORMS:
        raise ConfigError(f"--form: {form!r} is unknown; known: {', '.join(FORMS)}.")
    if grid == 1:
        raise ConfigError("--grid: 1 would be one end of the cone alone; take 2 or more, or 0 for no grid.")
    chosen = [where.parse(text) for text in directions or []]
    chosen += [where.direction(weights_K) for weights_K in where.grid(grid)] if grid else []
    chosen = chosen or [where.parse(preset) for preset in where.presets] or [where.direction(where.center)]
    chosen = list({str(direction): direction for direction in chosen}.values())
    name = name or policy_name(model)
    if form == "lm-eval":
        from dpa.models.policy import check_steerable

        check_steerable(path, where)
        for file in _lm_eval(Path(path).resolve(), chosen, out, name):
            typer.echo(f"lm-eval run --config {file} --tasks ...")
        return
    if questions is None:
        raise ConfigError("export: the question file is missing; give it after the model.")
    for file in _export(path, where, questions, form, chosen, out, name, temperature, max_new_tokens, batch_size, limit, seed):  # fmt: skip # noqa: E501
        typer.echo(str(file))


@app.command()
def fold(
    model: Annotated[str, typer.Argument(help="Reward model folder (its dpa_reward.json names the attributes).")],
    direction: Annotated[str, typer.Option("--direction", "-d", help="The wish to fold in.")],
    out: Annotated[Path, typer.Option(help="New folder of the one-logit classifier.")],
    space: SpaceText = None,
    preset: Annotated[str | None, typer.Option(help="dpa-v1: MODEL is a copy of the published reward model.")] = None,
) -> None:
    """Fold a reward model and a direction into a standard one-logit classifier."""
    from dpa.scoring.folding import attribute_space, fold_reward, reward_spec

    if preset not in (None, "dpa-v1"):
        raise ConfigError(f"--preset: {preset!r} is unknown; known: dpa-v1.")
    check_new_folder(out)
    released = preset is not None
    spec = reward_spec(model, released)
    where = read_space(space) if space else space_of_run(Path(model), spec.attributes) or attribute_space(spec)
    try:
        chosen = where.parse(direction)
    except DirectionError as error:
        if space or where.presets:
            raise
        raise DirectionError(f"{error} With --space POLICY the objectives and presets of a policy are known.") from None
    fold_reward(model, where, chosen, out, released)
    typer.echo(f"{out}: one logit, the utility under {chosen}")


@app.command()
def push(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    hub_id: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Everyone may see it. Default: private.")] = False,
) -> None:
    """Upload a model folder with its card to the Hugging Face Hub."""
    from dpa.models.hub import holds_rated_row, push_model

    typer.echo(push_model(model, hub_id, private=not public))
    if holds_rated_row(model):
        typer.echo("dpa_reward.json went along with one rated conversation, by which the model tests itself", err=True)


@app.command()
def judge(
    context: typer.Context,
    first: Annotated[str, typer.Argument(help="Answer file (dpa export), or MODEL@DIRECTION to answer --questions.")],
    second: Annotated[str, typer.Argument(help="The same, of what it is compared with.")],
    preference: Annotated[list[str], typer.Option("--preference", "-p", help="What the judge is told; repeatable.")],
    judge_model: Annotated[str, typer.Option("--judge", help="Model name the judge's server knows.")],
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server, .../v1. Default: only the cache.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the table, the page and the cache.")] = Path("judgements"),
    space: SpaceText = None,
    questions: Annotated[Path | None, typer.Option(help="AlpacaEval question file, for MODEL@DIRECTION.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pairs.")] = None,
    limit_tokens: Annotated[int, typer.Option(help="More tokens than this are refused without --yes.")] = ASK_BEYOND,
    price_in: Annotated[float | None, typer.Option(help="Price of a million tokens read, for the estimate.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Price of a million tokens written.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Go on, whatever the estimate.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Longest reply; a judge that reasons needs more.", min=1)] = 16,
    together: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of MODEL@DIRECTION, in tokens.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Seed of answers and intervals.")] = 0,
) -> None:
    """Win rates of two sets of answers by a judge told the preference, both orders, replayable from a cache.

    The key is read from DPA_JUDGE_API_KEY, else OPENAI_API_KEY.
    """
    from dpa.models.files import policy_name
    from dpa.remote.http_exchange import key_of_first
    from dpa.remote.judge_client import ChatJudge
    from dpa.stages.judge import count_tokens, judge, make_pairs, prompts_of, read_answers, sentence, write_verdicts
    from dpa.storage.progress import ProgressBar

    if Path(first).is_file() and Path(second).is_file():
        check_unused(context, "judge, of two answer files,", "questions", "max_new_tokens")
    answering = None if any(Path(text).is_file() for text in (first, second)) else limit  # a file has its own order
    answerers = {Path(text.rpartition("@")[0]).resolve() for text in (first, second) if not Path(text).is_file()}
    if len({policy_name(folder) for folder in answerers}) < len(answerers):
        raise ConfigError(
            f"judge: {first!r} and {second!r} would answer under one name, into the same file; let one answer by "
            "`dpa export --name` first, and give its file."
        )
    sides = [_side(text, questions, out, max_new_tokens, seed, answering) for text in (first, second)]
    policies = [folder for _, folder in sides if folder]
    if space is None and not policies:
        raise ConfigError("--space: answer files do not say it; give a policy folder, a configuration or dpa-v1.")
    where = read_space(space or policies[0])
    wishes = [_told(where, text) for text in preference]
    (name_a, answers_a), (name_b, answers_b) = (read_answers(file) for file, _ in sides)
    if name_a == name_b:
        name_a, name_b = (str(file) for file, _ in sides)
    pairs = make_pairs(answers_a, answers_b)[:limit]
    key = key_of_first(KEY_VARIABLES, "judge")
    asked = ChatJudge([base_url] if base_url else [], judge_model, out / "cache.jsonl", key, max_tokens, together)
    missing = asked.missing([prompt for wish in wishes for prompt in prompts_of(pairs, where, wish)])
    cost = count_tokens(missing, max_tokens)
    tokens = cost.tokens_in + cost.tokens_out
    replies = f" (each reply counted as all of --max-tokens {max_tokens})" if cost.longest else ""
    money = ""
    if price_in is not None or price_out is not None:
        price = (cost.tokens_in * (price_in or 0) + cost.tokens_out * (price_out or 0)) / 1e6
        money = f", about {price:.2f} in your prices"
    total = 2 * len(pairs) * len(wishes)
    typer.echo(
        f"{len(pairs)} pairs, both orders, {len(wishes)} preference(s): {cost.calls} calls to make "
        f"({total - cost.calls} are in the cache), about {tokens:,} tokens{replies}{money}",
        err=True,
    )
    if tokens > limit_tokens and not yes:
        raise ConfigError(
            f"judge: about {tokens:,} tokens{replies} are more than --limit-tokens {limit_tokens:,}; pass --yes."
        )
    with ProgressBar("judge", cost.calls, "verdicts") as bar:
        results = [judge(asked, pairs, where, wish, (name_a, name_b), bar.advance, seed) for wish in wishes]
    for found in results:
        typer.echo(sentence(found))
    typer.echo(f"page: {write_verdicts(out, results)}")


def read_space(text: str) -> "DirectionSpace":
    """A published name, a YAML configuration, or a policy (its dpa_config.json). Raises UserError subclasses."""
    from dpa.core.config import run_named
    from dpa.core.presets import SPACES
    from dpa.models.files import REWARD_FILE, SPACE_FILE, load_space

    if text in SPACES:
        return SPACES[text]
    if Path(text, REWARD_FILE).is_file() and not Path(text, SPACE_FILE).is_file():
        raise ConfigError(
            f"--space: {text} is a reward model, which has no directions; give a policy folder (RUN/iter_1/policy), a "
            f"YAML configuration or one of {', '.join(SPACES)}."
        )
    run = run_named(text)
    return load_space(text) if run is None else run.direction_space()


def space_of_run(reward_model: Path, attributes: Sequence[str]) -> "DirectionSpace | None":
    """The space of the run that a reward model lies in (RUN/reward_model), where it is made of these attributes."""
    if not (reward_model.resolve().parent / "config.yaml").is_file():
        return None
    space = read_space(str(reward_model.resolve().parent))
    needed = {name for objective in space.objectives for name in objective.attributes}
    return space if needed <= set(attributes) else None


def _side(
    text: str, questions: Path | None, out: Path, max_new_tokens: int, seed: int, limit: int | None
) -> tuple[Path, str | None]:
    """Answer file of one side, and the policy that made it where we asked it (the first `limit` questions)."""
    from dpa.models.files import policy_name, resolve_model
    from dpa.storage.seals import check_in_run

    if Path(text).is_file():
        return Path(text), None
    model, at, direction = text.rpartition("@")
    if not at:
        raise ConfigError(f"judge: {text!r} is no file; give an answer file, or MODEL@DIRECTION with --questions.")
    if questions is None:
        raise ConfigError(f"judge: {text!r} has to answer first; give --questions.")
    path = resolve_model(model).path
    check_in_run(path)
    where = read_space(path)
    chosen, name = [where.parse(direction)], policy_name(model)
    files = _export(path, where, questions, "alpaca-eval", chosen, out, name, 0.7, max_new_tokens, 64, limit, seed)  # fmt: skip # noqa: E501
    return files[0], path


def _told(space: "DirectionSpace", text: str) -> "Direction":
    """What a judge is told of a preference; one beyond the cone is moved to its edge, and that is said."""
    try:
        return space.parse(text)
    except OutsideConeError as error:
        edge = space.parse(text, outside="clamp")
        typer.echo(f"--preference: {error.finding}; the judge is told its edge, {edge}.", err=True)
        return edge


def _export(
    path: str, space: "DirectionSpace", questions: Path, form: str, directions: list["Direction"], out: Path, name: str,
    temperature: float, max_new_tokens: int, batch_size: int, limit: int | None, seed: int,
) -> list[Path]:  # fmt: skip
    from dpa.models.files import folder_revision
    from dpa.sampling.samplers import SamplerSpec
    from dpa.stages.export import export, read_questions, write_curve

    kind = {"alpaca-eval": "alpaca_eval", "mt-bench": "mt_bench", "arena-hard": "arena_hard"}[form]
    asked = read_questions(questions, kind)[:limit]  # type: ignore[arg-type]
    sampler: Sampler = SamplerSpec(
        path, space, max_new_tokens, temperature, batch_size=batch_size, revision=folder_revision(path)
    ).build()
    settings = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    files = export(sampler, asked, directions, kind, out, name, settings, seed)  # type: ignore[arg-type]
    write_curve(out, kind, space, directions, name)  # type: ignore[arg-type]
    return files


def _lm_eval(folder: Path, directions: list["Direction"], out: Path, name: str) -> list[Path]:
    """One configuration of `lm-eval run` for each direction: its model_args hand the direction to the chat template."""
    import yaml

    from dpa.stages.export import entry_name
    from dpa.storage.tables import write_bytes

    files = []
    for direction in directions:
        preference = direction.as_mapping()
        config = {
            "model": "hf",
            "model_args": {"pretrained": str(folder), "chat_template_args": {"preference": preference}},
            "apply_chat_template": True,
        }
        file = out / "lm_eval" / f"{entry_name(name, direction)}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, yaml.safe_dump(config, sort_keys=False).encode())
        files.append(file)
    return files
