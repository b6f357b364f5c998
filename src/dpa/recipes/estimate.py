"""What a run will take before it starts: hours, memory and disk of every stage, and whether they fit.
Run its tests: pytest tests/test_estimate.py

    stages = estimate(load_config("my.yaml"), device=device_named("h200"))
    seconds, memory, disk = run_needs(stages)

Speeds are those measured in the ledgers of runs that are given (the run's own folder by itself, if it is there). Where
nothing was measured they are the arithmetic of costs/work.py on the device's peak and bandwidth, likely and between a
quick and a slow case. Amounts follow from the configuration; rows of data that is not here are unknown.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dpa.core.config import RunConfig
from dpa.models.half_precision import computes_in_bf16
from dpa.recipes.costs.data_sizes import Data, data_of
from dpa.recipes.costs.devices import Device, this_device
from dpa.recipes.costs.model_sizes import size_of
from dpa.recipes.costs.speeds import read_speeds
from dpa.recipes.costs.stages import Inputs, StageEstimate, Stages
from dpa.recipes.costs.work import LIKELY, QUICK, SLOW, on_card
from dpa.training.learners import learner_of


def estimate(
    config: RunConfig,
    runs: Sequence[Path] = (),
    parameters: float | None = None,
    device: Device | None = None,
    cards: int | None = None,
    data: Data | None = None,
) -> list[StageEstimate]:
    """Every stage of the run in order. `runs`: finished or half-finished run folders whose ledgers are to be used, and
    result folders of bench/card.py.

    `parameters`: of the policy, where it is not on this machine and not known by name. `device`: default, this machine,
    measured. `cards`: of them, default cluster.processes. `data`: default, looked up. Raises
    ConfigError, DataError, RunFolderError.
    """
    return estimate_of(config, runs, parameters, device, cards, data)[1]


def estimate_of(
    config: RunConfig,
    runs: Sequence[Path] = (),
    parameters: float | None = None,
    device: Device | None = None,
    cards: int | None = None,
    data: Data | None = None,
) -> tuple[Inputs, list[StageEstimate]]:
    """As `estimate`, and what was looked up for it."""
    own = Path(config.out)
    speeds = read_speeds([*runs, own], own)
    inputs = looked_up(config, parameters, device, cards, data)
    inputs = replace(inputs, device=on_card(inputs.device, speeds.card))
    likely, quick, slow = (Stages(config, speeds, inputs, assume).all() for assume in (LIKELY, QUICK, SLOW))
    return inputs, [_between(*three) for three in zip(likely, quick, slow, strict=True)]


def looked_up(
    config: RunConfig,
    parameters: float | None = None,
    device: Device | None = None,
    cards: int | None = None,
    data: Data | None = None,
) -> Inputs:
    """What a configuration names, looked up. Raises ConfigError."""
    computing = [config.rollout, *(getattr(config, learner_of(config, t).section) for t in (0, 1)), config.reward.train]
    mixed = any(computes_in_bf16(section.bf16) for section in computing if section is not None)
    policy = size_of(config.policy, parameters, "policy", "--parameters 7.2e9")
    scorer, backbone = None, config.reward.folder
    if config.reward.train is not None:
        backbone = backbone or config.reward.train.backbone
    if backbone is not None:
        scorer = policy if backbone == config.policy else size_of(backbone, None, "reward", "a folder that is here")
    return Inputs(
        policy,
        scorer,
        data or data_of(config),
        device or this_device(mixed),
        cards or config.cluster.processes,
    )


def run_needs(stages: Sequence[StageEstimate]) -> tuple[float, int, int]:
    """Of the whole run: likely seconds (of the stages whose time is known), peak memory, disk (a finetuning's
    checkpoints are deleted when it ends)."""
    kept = sum(stage.disk - stage.checkpoints for stage in stages)
    memory = max((stage.memory for stage in stages), default=0)
    disk = kept + max((stage.checkpoints for stage in stages), default=0)
    return sum(stage.seconds or 0.0 for stage in stages), memory, disk


def run_span(stages: Sequence[StageEstimate]) -> tuple[float, float]:
    """Seconds of the whole run in the quick and in the slow case, of the stages whose time is known."""
    return sum(stage.low or 0.0 for stage in stages), sum(stage.high or 0.0 for stage in stages)


def _between(likely: StageEstimate, quick: StageEstimate, slow: StageEstimate) -> StageEstimate:
    if likely.seconds is None or quick.seconds is None or slow.seconds is None:
        return replace(likely, seconds=None)
    return replace(likely, low=min(quick.seconds, likely.seconds), high=max(slow.seconds, likely.seconds))
