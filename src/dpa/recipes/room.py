"""What a run still has to write, so that a disk too small for it is known before hours of work.
Run its tests: pytest tests/test_room.py
"""

from pathlib import Path

from dpa.core.config import RewardRunConfig, RunConfig
from dpa.core.errors import ConfigError, ModelFileError
from dpa.recipes.checks import BYTES_PER_CANDIDATE, first_iteration
from dpa.recipes.costs.model_sizes import size_of
from dpa.recipes.costs.stages import checkpoint_bytes
from dpa.training.learners import learner_of


def needed_bytes(config: RewardRunConfig, prompts: int = 0) -> int:
    """A rough upper estimate of what the trainings that are not done yet write: each its model in fp32 and, of an
    iteration, the candidates of so many `prompts`; once, the checkpoints of the largest. What is there already counts.

    A model that is neither here nor known by its name counts nothing; nor do checkpoints of adapters, which are small.
    """
    out, train = Path(config.out), config.reward.train
    needed, checkpoints, written = 0.0, 0.0, 0
    if train and not (out / "train_reward" / "done.json").exists():
        backbone = _parameters(train.backbone)
        needed += 4 * backbone
        checkpoints = backbone * (train.method == "full")
        written += _size(out / "reward_model") + _size(out / "reward_model.training")
    if isinstance(config, RunConfig):
        policy = _parameters(config.policy)
        candidates = prompts * config.rollout.directions * config.rollout.samples * BYTES_PER_CANDIDATE
        for t in range(first_iteration(config), config.iterations + 1):
            if (out / f"iter_{t}" / "finetune" / "done.json").exists():
                continue
            needed += 4 * policy + candidates * (t > 0)
            if getattr(config, learner_of(config, t).section).lora is None:
                checkpoints = max(checkpoints, policy)
            written += _size(out / f"iter_{t}")
    return max(0, int(needed) + checkpoint_bytes(checkpoints) - written)


def _parameters(model: str) -> float:
    try:
        return size_of(model, None, "", "").parameters
    except (ConfigError, ModelFileError):
        return 0.0


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
