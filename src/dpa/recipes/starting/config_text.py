"""A first configuration as YAML that says why each line is there.
Run its tests: pytest tests/test_init.py
"""

import json
import math
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dpa.core.sections.ratings import RatingsConfig
from dpa.recipes.starting.objectives import Objectives, is_bad
from dpa.recipes.starting.sizes import ROOM, First, Sizes

FEW_RATED_ROWS = 2000
"""Rows below which a ridge on frozen features makes the better reward model."""
FEWEST_STEPS = 40
"""Optimizer steps that t = 0 should have: a direction is not read after a handful."""
_WORSE = "   # more of it is worse: ask for less"
_YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def reward_yaml(first: First) -> str:
    """The configuration of a run that ends with its reward model, over all rated rows."""
    sizes = first.sizes(math.inf)
    return "\n".join(
        [*_head(first, "a reward model"), *_space(first.objectives), *_ratings(first), *_reward(first, sizes)]
    )


def whole_yaml(first: First, sizes: Sizes) -> str:
    """The configuration of a run of the loop."""
    what = "one policy that follows directions"
    if sizes.seconds is not None:
        device = first.device.name if first.device.card else "this machine's processor"
        what += f", in about {in_words(sizes.seconds)} on {device}"
    parts = [_head(first, what), _space(first.objectives), _ratings(first, sizes.rated), _reward(first, sizes)]
    return "\n".join([line for part in [*parts, _loop(first, sizes)] for line in part])


def in_words(seconds: float) -> str:
    """A time for people: `40 minutes`, `1.5 hours`."""
    if seconds < 5400:
        minutes = max(1, round(seconds / 60))
        return f"{minutes} minute{'s' if minutes > 1 else ''}"
    return f"{seconds / 3600:.1f} hours"


def _head(first: First, what: str) -> list[str]:
    config = first.files.config
    return [
        *_comment(
            f"Written by `dpa init`: from rated responses to {what}. docs/configuration.md explains every field."
        ),
        f"#   dpa run {_escaped(shlex.quote(str(config)))}     (the same command resumes it)",
        f"name: {_text(config.stem)}",
        f"out: {_path(first.files.run)}   # everything the run makes",
        "seed: 0",
    ]


def _space(objectives: Objectives) -> list[str]:
    lines = ["", *_comment(f"What a user can ask for more or less of: {'; '.join(objectives.why)}."), "space:"]
    lines += ["  objectives:"]
    for name, mark in objectives.marks.items():
        note = _WORSE if is_bad(mark) else ""
        if mark in objectives.by_function:
            note = "   # counted by a function, see reward.functions"
        lines += [f"    {_text(name)}: {_flow({mark: 1.0})}{note}"]
    if objectives.left:
        lines += ["    # Rated too, and learned by the reward model. Without its # a line lets users weigh it:"]
        for name, mark in objectives.left.items():
            lines += [f"    # {_text(name)}: {_flow({mark: 1.0})}{_WORSE if is_bad(mark) else ''}"]
    lines += [
        f"  center: {_flow(dict([objectives.center]))}   # asked where nothing else is said",
        "  max_angle: 45   # how far from it a user may ask, in degrees",
        "  training_angle: 50   # how far training goes, so that the edge is no edge of what was learned",
    ]
    if len(objectives.marks) > 2:
        lines += [
            "  training_arcs: 0.5   # half of the directions weigh one objective beside the main one, the rest all"
        ]
    lines += ["  presets:   # directions with a name"]
    return lines + [f"    {_text(name)}: {_flow(weights)}" for name, weights in objectives.presets.items()]


def _ratings(first: First, counts: Sequence[int] | None = None) -> list[str]:
    lines = [
        "",
        "# The rated rows. The reward model learns from all their marks, the policy of t = 0 from the best responses.",
    ]
    if counts:
        lines += ["# Of each file `count` prompts with all their rows fit the time given; without it all are used."]
    lines += ["ratings:"]
    nothing: list[int | None] = [None] * len(first.data)
    for one, count, bad in zip(first.data, counts or nothing, first.look.reject_rates, strict=True):
        lines += _data_set(one.config, count, bad)
    return lines


def _data_set(config: RatingsConfig, count: int | None, bad: float) -> list[str]:
    lines = [f"  - path: {_path(config.path)}"]
    if config.format != "generic":
        lines += [f"    format: {config.format}"]
    if config.split != "train":
        lines += [f"    split: {_text(config.split)}"]
    if config.columns:
        lines += [f"    columns: {_flow(config.columns)}"]
    if config.scales:
        lines += ["    scales:   # lowest and highest mark there can be, guessed from those given; mend what is not so"]
        lines += [f"      {_text(name)}: [{low:.0f}, {high:.0f}]" for name, (low, high) in config.scales.items()]
    if count is not None:
        lines += [f"    count: {count}"]
    if bad > RatingsConfig.model_fields["max_reject_rate"].default:
        share = min(1.0, math.ceil(100 * bad + 1) / 100)
        lines += [
            f"    max_reject_rate: {share:g}   # {bad:.0%} of the rows are bad and left out: ratings_rejects.jsonl"
        ]
    return lines


def _reward(first: First, sizes: Sizes) -> list[str]:
    look, small = first.look, first.start.parameters < 3e8
    prompts, rows = first.rated(sizes)
    train = [
        f"backbone: {_text(first.start.name)}",
        f"attributes: [{', '.join(_text(mark.name) for mark in look.marks)}]",
    ]
    if not first.device.card or rows < FEW_RATED_ROWS:
        train += ["method: ridge   # a head on frozen features; with a card and thousands of rows: full, or lora"]
    elif first.full:
        train += ["method: full", f"learning_rate: {2e-5 if small else 1e-5:.1e}", "batch_size: 64"]
    else:
        train += ["method: lora", "learning_rate: 1.0e-4", "batch_size: 64", "bf16: true"]
    train += [
        f"max_length: {sizes.max_length}   # tokens of prompt and response; longer rows train nothing and are counted"
    ]
    if sizes.cut:
        train += ["too_long: cut_prompt   # more than the model reads: such prompts lose their beginning"]
    train += [f"held_out: {min(0.3, max(0.1, 60 / prompts)):.2g}   # share of prompts on which its quality is measured"]
    lines = ["", "# The reward model: gives these marks to any response.", "reward:", "  train:"]
    lines += [f"    {line}" for line in train]
    if first.objectives.by_function:
        lines += ["  functions:"]
        lines += [f"    {_text(name)}: {_text(where)}" for name, where in first.objectives.by_function.items()]
    return lines


def _loop(first: First, sizes: Sizes) -> list[str]:
    files, card, size = first.files, first.device.card, first.start.parameters
    rate = 2e-4 if size < 3e8 or not first.full else 5e-5 if size < 1e9 else 2e-5
    mixed = not first.full or (not card and first.device.mixed_peak > 1.2 * first.device.peak)
    shorter = first.look.response_tokens[2] <= sizes.max_new_tokens
    answers = (
        "19 of 20 rated responses are shorter" if shorter else "many rated responses are longer: raise it given time"
    )
    theirs = f"{sizes.held_out_rows:,} of the rated rows are theirs and train nothing"
    theirs = theirs if sizes.held_out_rows else "none of the rated rows used above is theirs"
    directions = 4 if card else 2
    longest = max(sizes.max_length, min(first.start.context, 512))
    rows = first.rated(sizes)[0] * directions * (first.look.row_tokens[0] + ROOM) / longest
    grid = 9 if card and len(first.objectives.marks) == 2 else 5
    lines = ["", "# The policy: first t = 0, then so many iterations of answering, scoring and learning from the best."]
    if first.single:
        lines += _comment(
            "Each prompt has one rated response, so t = 0 has nothing to choose from: it learns to answer like the "
            "data, and directions are learned after it."
        )
    lines += [
        f"policy: {_text(first.start.name)}",
        f"iterations: {first.iterations}",
        "prompts:   # asked in the iterations: all of the data's own but those held out",
        f"  path: {_path(files.prompts)}",
        f"  count: {sizes.online}   # drawn for each iteration",
        "rollout:",
        f"  directions: {directions}   # of each prompt",
        "  samples: 4   # of each direction; all answers to a prompt are compared under every direction",
        f"  max_new_tokens: {sizes.max_new_tokens}   # {answers}",
        "selection:",
        f"  directions: {directions}   # winners kept of each prompt",
        "  ends_until: 1   # t = 0 learns from the ends of the cone, where winners differ most",
        "finetune:",
        f"  learning_rate: {rate:.1e}",
        "  contrastive: 0.3   # a winner must be likelier under its own direction than under another",
        f"  max_length: {longest}",
        f"  packed_rows_per_step: {max(1, min(8 if card else 4, int(rows / FEWEST_STEPS)))}   # small for many steps",
        *(["  epochs: 2"] if rows < 2 * FEWEST_STEPS else []),
    ]
    lines += ["  bf16: true"] if mixed else []
    if not first.full:
        lines += ["  lora: {rank: 32, alpha: 64}   # training all weights does not fit this machine's memory"]
    return [
        *lines,
        f"evaluate:   # {sizes.held_out:,} prompts of the data, kept aside: {theirs}",
        f"  prompts: {{path: {_path(files.held_out)}}}",
        f"  directions: {grid}",
        "",
    ]


def _comment(text: str) -> list[str]:
    text = _escaped(" ".join(text.split()))
    return textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _flow(mapping: Mapping[Any, object]) -> str:
    """A mapping on one line; numbers as they are."""
    parts = [f"{_text(key)}: {value if isinstance(value, float) else _text(value)}" for key, value in mapping.items()]
    return f"{{{', '.join(parts)}}}"


def _path(value: object) -> str:
    """A path as YAML has it; `~x` is a file here and nobody's home folder."""
    text = str(value)
    return _text(f"./{text}" if text.startswith("~") else text)


def _text(value: object) -> str:
    """A text as YAML has it: plain where that is safe, else quoted."""
    text = str(value)
    safe = re.fullmatch(r"(?:[A-Za-z_/]|\.{1,2}/)[\w./-]*(?: [\w./-]+)*", text, re.ASCII)
    return text if safe and text.lower() not in _YAML_WORDS else _escaped(json.dumps(text, ensure_ascii=False))


def _escaped(text: str) -> str:
    """What is no letter, such as an end of a line that only YAML knows (U+0085, U+2028), by its number."""
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text)
