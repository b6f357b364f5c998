"""Train the reward model on the rated table, and say how good it is.
Run its tests: pytest tests/test_reward_training.py
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dpa.core.config import RewardTrainConfig
from dpa.core.errors import ConfigError
from dpa.models.reward_model import RECORD
from dpa.models.reward_training import RatedExample, train_reward_model
from dpa.storage.tables import read_json


def train_reward(
    table: pa.Table,
    scales: Mapping[str, tuple[float, float]],
    config: RewardTrainConfig,
    out: Path,
    seed: int = 0,
    remote_code_revision: str | None = None,
) -> dict[str, Any]:
    """Train on a ratings table and save to `out`; return quality, baselines and training facts.

    A finished folder is left as it is: it appears as a whole, so it is there when its dpa_reward.json is. `scales` are
    the data sets' own (Ratings.scales). Raises ConfigError for an attribute the table lacks, and what
    `train_reward_model` raises.
    """
    if (out / RECORD).is_file():
        return read_json(out / RECORD)
    attributes = config.attributes or list(scales)
    for name in attributes:
        if name not in scales:
            raise ConfigError(f"reward.train.attributes: nobody rated {name!r}; rated are: {', '.join(scales)}.")
    marks_NM = np.stack([table[name].to_numpy(zero_copy_only=False) for name in attributes], axis=1)
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
    return train_reward_model(examples, attributes, own, config, out, seed, remote_code_revision)


def print_quality(facts: Mapping[str, Any], console: Console | None = None) -> None:
    """Print held-out quality per attribute, beside the mean and the length-only baselines."""
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
        rmse = [_root(source[name]["mse"]) for source in (facts["quality"], *facts["baselines"].values())]
        table.add_row(
            name,
            str(measured["n"]),
            _show(measured["mae"], 1),
            *rmse,
            _show(measured["pearson"]),
            _show(measured["kendall"]),
            _show(measured["pairwise_accuracy"]),
        )
    (console or Console()).print(table)


def _root(mse: float | None) -> str:
    return _show(None if mse is None else mse**0.5, 1)


def _show(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
