"""Which fields of a configuration make its results: the fingerprint of a run, and what a resumed one may change.
Run its tests: pytest tests/test_config.py
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from dpa.core.records import stable_hash
from dpa.core.sections.cluster import ClusterConfig
from dpa.core.sections.reward import HttpRewardConfig, RewardTrainConfig
from dpa.core.sections.rollout import HttpEngineConfig, VllmEngineConfig
from dpa.core.sections.training import FinetuneConfig, GrpoConfig, PreferenceConfig

_TRAINING_PACE = (
    *("report_to", "gradient_checkpointing", "save_steps", "rows_per_device", "pairs_per_device", "answers_per_device"),
    "compile",
    *("listening_steps", "min_listening", "max_left_out", "allow_worse_than_mean"),
)
"""Fields of a training section that alter no result: what is told, kept, computed at once or put up with."""

_TRAININGS: dict[str, type[BaseModel]] = {
    "finetune": FinetuneConfig,
    "dpo": PreferenceConfig,
    "grpo": GrpoConfig,
    "reward.train": RewardTrainConfig,
}

_PACE = {
    *("name", "out", "iterations", "rollout.workers", "rollout.batch_size", "rollout.bf16", "rollout.max_reject_rate"),
    *("rollout.engine.kind", *(f"rollout.engine.vllm.{field}" for field in VllmEngineConfig.model_fields)),
    *(f"rollout.engine.http.{field}" for field in HttpEngineConfig.model_fields if field != "steer"),
    *(f"reward.http.{field}" for field in HttpRewardConfig.model_fields if field != "folder"),
    *(f"reward.judge.{field}" for field in ("servers", "cache", "in_flight", "request_s", "attempts", "api_key_env")),
    *(
        f"{name}.{field}"
        for name, section in _TRAININGS.items()
        for field in _TRAINING_PACE
        if field in section.model_fields
    ),
    *(f"cluster.{field}" for field in ClusterConfig.model_fields),
}
DOES_NOT_CHANGE_RESULTS = frozenset(_PACE)
"""Fields a resumed run may change: they name, place, extend or pace the work, and alter no finished row."""


def of_results(config: BaseModel) -> str:
    """The text of a training section without what alters no result, such as trackers, or the rate of other iterations
    (FinetuneConfig.of_iteration)."""
    return config.model_dump_json(exclude={*_TRAINING_PACE, "online_learning_rate"})


def resolved(config: BaseModel) -> dict[str, Any]:
    """The configuration as plain data, every default filled in."""
    return json.loads(config.model_dump_json())


def fingerprint(config: BaseModel) -> str:
    """Hash of every field that changes results."""
    kept = {k: v for k, v in flatten(resolved(config)) if k not in DOES_NOT_CHANGE_RESULTS}
    return stable_hash(json.dumps(kept, sort_keys=True))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per field that changes results: `rollout.samples: 4 -> 8`; a field that comes or goes is `(absent)`."""
    before, after = ({key: repr(leaf) for key, leaf in flatten(data)} for data in (old, new))
    keys = sorted((before.keys() | after.keys()) - DOES_NOT_CHANGE_RESULTS)
    pairs = [(key, before.get(key, "(absent)"), after.get(key, "(absent)")) for key in keys]
    return [f"{key}: {was} -> {now}" for key, was, now in pairs if was != now]


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, leaf) pairs; lists, empty mappings and what changes no result are leaves."""
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and dotted not in DOES_NOT_CHANGE_RESULTS:
            yield from flatten(value, f"{dotted}.")
        else:
            yield dotted, value
