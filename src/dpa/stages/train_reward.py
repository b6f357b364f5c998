"""Train the reward model on the rated table, and say how good it is.
Run its tests: pytest tests/test_reward_training.py
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpa.core.errors import ConfigError, TrainingError
from dpa.core.sections.reward import RewardTrainConfig
from dpa.models.files import REWARD_FILE
from dpa.models.memory import free_memory
from dpa.storage.console import print_table
from dpa.storage.schemas import number_matrix
from dpa.storage.tables import read_json
from dpa.training.reward_rows import RatedExample
from dpa.training.reward_training import train_reward_model
from dpa.training.trainers import CountSeconds

BEATS_THE_MEAN = 0.999
"""A held-out squared error below this share of the mean's; a head that is the mean differs from it by rounding only."""


def train_reward(
    table: pa.Table,
    scales: Mapping[str, tuple[float, float]],
    config: RewardTrainConfig,
    out: Path,
    seed: int = 0,
    code_revision: str | None = None,
    seconds: CountSeconds | None = None,
) -> dict[str, Any]:
    """Train on a ratings table and save to `out`; return quality, baselines and training facts.

    A finished folder is left as it is: it appears as a whole, so it is there when its dpa_reward.json is. `scales` are
    the data sets' own (Ratings.scales). Raises ConfigError for an attribute the table lacks, and what
    `train_reward_model` raises.
    """
    if (out / REWARD_FILE).is_file():
        return read_json(out / REWARD_FILE)
    attributes = config.attributes or list(scales)
    for name in attributes:
        if name not in scales:
            raise ConfigError(f"reward.train.attributes: nobody rated {name!r}; rated are: {', '.join(scales)}.")
    marks_NM = number_matrix(table, attributes)
    examples = [
        RatedExample(prompt_id, json.loads(messages), response, tuple(marks))
        for prompt_id, messages, response, marks in zip(
            table["prompt_id"].to_pylist(),
            table["messages"].to_pylist(),
            table["response"].to_pylist(),
            marks_NM.tolist(),
            strict=True,
        )
    ]
    own = {name: scales[name] for name in attributes}
    facts = train_reward_model(examples, attributes, own, config, out, seed, code_revision, seconds)
    free_memory()
    return facts


def no_better_than_mean(facts: Mapping[str, Any]) -> dict[str, str]:
    """Attribute -> sentence, for those the model predicts no better than always saying the training rows' mean.

    By the squared error on held-out prompts, whatever chance may have in it: the sentence says how many those were. An
    attribute without a held-out mark, or whose held-out marks are all that mean, is not judged.
    """
    found = {}
    for name, measured in facts["quality"].items():
        own, mean = measured["mse"], facts["baselines"]["mean"][name]["mse"]
        if own is not None and mean and own >= BEATS_THE_MEAN * mean:
            prompts = facts["training"].get("held_out_prompts")
            of_prompts = "" if prompts is None else f" of {prompts:,} held-out prompts"
            found[name] = (
                f"{name}: NO BETTER THAN ALWAYS SAYING THE MEAN (RMSE {own**0.5:.1f} against {mean**0.5:.1f} on "
                f"{measured['n']:,} rows{of_prompts})"
            )
    return found


def require_better_than_mean(facts: Mapping[str, Any], attributes: Collection[str]) -> None:
    """Raise TrainingError where the model is no better than the mean for one of these attributes."""
    worse = [sentence for name, sentence in no_better_than_mean(facts).items() if name in attributes]
    if worse:
        raise TrainingError(
            f"reward model: {'; '.join(worse)}; rate more prompts, take another backbone or method, measure on more "
            "prompts (reward.train.held_out), or go on with reward.train.allow_worse_than_mean: true."
        )


def print_quality(facts: Mapping[str, Any], console: Console | None = None) -> None:
    """Print held-out quality per attribute, beside the mean and the length-only baselines; what is amiss in red."""
    table = Table(
        title="Reward model on held-out prompts (0-100 scale)",
        caption="mean, length: RMSE of always saying the mean, of a ridge on length alone; r: Pearson; tau: Kendall; "
        "pairs: share of pairs of responses to one prompt put in the raters' order",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("attribute", no_wrap=True)
    for heading in ("n", "MAE", "RMSE", "mean", "length", "r", "tau", "pairs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, measured in facts["quality"].items():
        mse = [source[name]["mse"] for source in (facts["quality"], *facts["baselines"].values())]
        table.add_row(
            Text(name),
            str(measured["n"]),
            _show(measured["mae"], 1),
            *(_show(value and value**0.5, 1) for value in mse),
            _show(measured["pearson"]),
            _show(measured["kendall"]),
            _show(measured["pairwise_accuracy"]),
        )
    console = console or Console()
    print_table(table, console)
    training = facts["training"]
    if left_out := training.get("left_out_rows"):
        rated = left_out + training["train_rows"] + training["held_out_rows"]
        console.print(
            f"LEFT OUT: {left_out:,} of {rated:,} rated rows ({left_out / rated:.0%}), longer than "
            f"{training['max_length']:,} tokens (reward.train.max_length, too_long)",
            style="bold red",
        )
    for sentence in no_better_than_mean(facts).values():
        console.print(sentence, style="bold red", markup=False)


def _show(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
