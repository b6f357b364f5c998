"""`dpa init`: a rated file is looked at, and a configuration that runs is written.
Run its tests: pytest tests/test_init.py
"""

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dpa.core.config import RunConfig, parse_config
from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, DpaError
from dpa.core.objective import Objective
from dpa.core.yaml_text import parse_yaml
from dpa.models.files import GGUF_SUFFIX, check_model_folder, resolve_model
from dpa.models.policy import check_policy, load_prompting
from dpa.recipes.costs.devices import Device, this_device
from dpa.recipes.costs.model_sizes import size_of
from dpa.recipes.estimate import estimate, run_needs
from dpa.recipes.starting.config_text import in_words, reward_yaml, whole_yaml
from dpa.recipes.starting.look import look_at, print_look
from dpa.recipes.starting.objectives import choose
from dpa.recipes.starting.sizes import Files, First, Sizes, Start
from dpa.storage.recognising import recognise
from dpa.storage.rows import has_hub_form
from dpa.storage.tables import disk_error, write_if_new

LEAST_DATA = 24
"""Prompts below which there is nothing to learn from and nothing to measure on."""
USUAL_CONTEXT = 4096
"""Tokens a model reads whose folder is not here."""

START_POLICIES = (
    (60e9, "Qwen/Qwen2.5-7B-Instruct"),
    (20e9, "Qwen/Qwen2.5-1.5B-Instruct"),
    (10e9, "Qwen/Qwen2.5-0.5B-Instruct"),
    (0, "HuggingFaceTB/SmolLM2-135M-Instruct"),
)
"""Bytes of a card's memory -> the start policy; without a card the smallest."""


@dataclass(frozen=True)
class Wanted:
    """What `dpa init` was told. `hours`: what the run may take. `config`: where it goes, by default FILE.yaml here."""

    files: tuple[str, ...]
    policy: str | None = None
    config: Path | None = None
    hours: float = 1.0
    reward_only: bool = False
    force: bool = False
    split: str = "train"
    columns: tuple[tuple[str, str], ...] = ()
    marks: tuple[str, ...] = ()


def init(wanted: Wanted, console: Console, device: Device | None = None) -> Path:
    """Look, choose, write; returns the configuration's path. `device`: default, this machine, measured.

    Raises ConfigError, DataError, ModelFileError.
    """
    if not 0 < wanted.hours < math.inf:
        raise ConfigError(f"--hours: {wanted.hours:g} is no time; give a number of hours.")
    files = _places(wanted)
    device = device or this_device(mixed=True)
    policy = wanted.policy or next(name for bytes_, name in START_POLICIES if bytes_ <= _card_memory(device))
    start, count = _start(policy, wanted.reward_only)
    data = recognise(wanted.files, wanted.split, dict(wanted.columns), wanted.marks)
    look = look_at(data, count)
    print_look(look, data, console)
    if len(look.prompts) < LEAST_DATA:
        raise ConfigError(
            f"data: {len(look.prompts)} prompts are too few to learn from and to measure on; rate responses to "
            f"{LEAST_DATA} or more."
        )
    first = First(data, look, choose(look), start, device, files, wanted.hours)
    if wanted.reward_only:
        sizes, text = None, reward_yaml(first)
    else:
        sizes = first.fit(lambda sizes: _seconds(first, sizes))
        text = whole_yaml(first, sizes)
        _make_folder(files.prompts.parent)
        _write_prompts(files.held_out, first.held_out)
        _write_prompts(files.prompts, first.online)
    _make_folder(files.config.parent)
    write_if_new(files.config, text.encode())
    _say_what_was_written(first, sizes, console)
    return files.config


def _seconds(first: First, sizes: Sizes) -> float:
    """What a run of these sizes will take, by the estimate of its own configuration."""
    config: RunConfig = parse_config(parse_yaml(whole_yaml(first, sizes), "init"))
    stages = estimate(config, parameters=first.start.parameters, device=first.device, data=first.read(sizes))
    return run_needs(stages)[0]


def _places(wanted: Wanted) -> Files:
    """Where everything goes. Raises ConfigError where something is there already, or would be read as rated rows."""
    name = Path(wanted.files[0]).stem or "my"
    config = wanted.config or Path(f"{name}.yaml")
    if config.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out: {config} is no .yaml file; give the name of the configuration, such as my.yaml.")
    where = config.parent
    if _is_one_of(where, wanted.files):  # all rows beside it are taken for rated ones, those of its sub-folders not
        where /= config.stem
    files = Files(
        config,
        Path("runs") / config.stem,
        where / f"{config.stem}-prompts.jsonl",
        where / f"{config.stem}-held-out.jsonl",
    )
    for file in (config,) if wanted.reward_only else (config, files.prompts, files.held_out):
        there = _is_there(file)
        if _is_one_of(file, wanted.files) or (file != config and _is_one_of(file.parent, wanted.files)):
            raise ConfigError(f"--out: {file} would be written among the rated rows; give another --out.")
        if there and not wanted.force:
            raise ConfigError(f"--out: {file} is there already; pass --force to write it anew, or another --out.")
    return files


def _is_one_of(path: Path, given: Sequence[str]) -> bool:
    try:
        return any(path.samefile(one) for one in given if Path(one).exists())
    except (OSError, ValueError):  # it is not there yet, or is no name of a file
        return False


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder, "making") from None


def _is_there(file: Path) -> bool:
    try:
        file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out: {str(file)!r:.60} is no name of a file ({type(error).__name__}).") from None
    return True


def _card_memory(device: Device) -> float:
    return device.memory if device.card else 0


def _start(policy: str, reward_only: bool) -> tuple[Start, Callable[[Sequence[str]], list[int]] | None]:
    """The start policy, and where it is here how many tokens texts have for it. Raises ModelFileError, ConfigError."""
    file = not reward_only and policy.endswith(GGUF_SUFFIX) and Path(policy).is_file()
    folder = None if file else _folder_of(policy)
    parameters, guessed = _parameters(str(folder or policy))
    if folder is None:
        return Start(policy, parameters, USUAL_CONTEXT, file, guessed), None
    space = DirectionSpace((Objective("first", {"first": 1.0}), Objective("second", {"second": 1.0})))
    check_policy(str(folder), space)
    tokenizer, context, _ = load_prompting(resolve_model(str(folder)))

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    return Start(policy, parameters, context, True, guessed), count


def _folder_of(policy: str) -> Path | None:
    """The folder of a policy; None of one of the Hub that was not fetched yet. Raises ModelFileError."""
    if not has_hub_form(policy):
        check_model_folder(Path(policy))
        return Path(policy)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(policy, local_files_only=True))
        check_model_folder(folder)
    except (OSError, ValueError, DpaError):
        return None
    return folder


def _parameters(policy: str) -> tuple[float, bool]:
    """Of the policy, and whether they are guessed: a byte each of a GGUF file, else those of a middling model."""
    try:
        return size_of(policy, None, "policy", "a folder").parameters, False
    except ConfigError:
        file = Path(policy)
        return float(file.stat().st_size) if file.is_file() else 1e9, True


def _write_prompts(file: Path, prompts: Sequence[str]) -> None:
    lines = [json.dumps({"messages": json.loads(text)}, ensure_ascii=False) + "\n" for text in prompts]
    write_if_new(file, "".join(lines).encode())


def _say_what_was_written(first: First, sizes: Sizes | None, console: Console) -> None:
    files, start, look = first.files, first.start, first.look

    def say(text: str, style: str | None = None) -> None:
        console.print(text, highlight=False, markup=False, style=style)

    say(f"\nWritten: {files.config}. {'; '.join(first.objectives.why)}.")
    if sizes is not None:
        kept = "none of the rated rows used is theirs"
        if sizes.held_out_rows:
            kept = f"their {sizes.held_out_rows:,} rated rows ({sizes.held_out_rows / look.rows:.1%}) train nothing"
        say(f"{files.held_out}: {sizes.held_out:,} prompts to measure on, drawn from the data; {kept}.")
        say(f"{files.prompts}: the other {len(first.online):,}, which the policy is asked while it learns.")
        there = len(look.prompts)
        used = first.rated(sizes)[0]
        if (sizes.seconds or 0) > 3600 * first.hours:
            say(
                f"Even the smallest run, over {used:,} of {there:,} prompts, takes about "
                f"{in_words(sizes.seconds or 0)} here, more than --hours {first.hours:g}; with a smaller model "
                "(--policy) less."
            )
        elif sizes.rated is not None:
            given = in_words(3600 * first.hours)
            say(f"In {given} this machine gets through {used:,} of {there:,} prompts (--hours).")
    if start.guessed:
        billions = start.parameters / 1e9
        say(f"{start.name}: its size is not known; sizes and times are for {billions:.2g} billion parameters.")
    if not start.here:
        say(
            f"\n{start.name} is not on this machine: the run fetches it from the Hub. Where that cannot be reached, "
            "take the folder of any instruct model: --policy FOLDER --force.",
            "bold",
        )
    say("\nNext:")
    for command, note in _next(first, sizes):
        console.print(f"  {command}{note}", highlight=False, markup=False, soft_wrap=True)


def _next(first: First, sizes: Sizes | None) -> list[tuple[str, str]]:
    """Commands, and what is to be known of each."""
    config = shlex.quote(str(first.files.config))
    if sizes is None:
        return [(f"dpa run {config}", f"    # ends with {first.files.run}/reward_model")]
    took = "the same command resumes it" if sizes.seconds is None else f"about {in_words(sizes.seconds)}"
    served = shlex.quote(str(first.last_policy))
    return [(f"dpa estimate {config}", ""), (f"dpa run {config}", f"    # {took}"), (f"dpa serve {served}", "")]
