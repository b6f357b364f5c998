"""What a run found and leaves behind: what was measured of each policy, its card, and the results of the whole.
Run its tests: pytest tests/test_loop.py
"""

import logging
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpa.core.config_identity import resolved
from dpa.core.errors import DamageError, RunFolderError
from dpa.core.sections.evaluate import EvaluateConfig
from dpa.models.files import EVALUATION_FILE, REWARD_FILE, SPACE_FILE
from dpa.pages.card import CARD, card
from dpa.recipes.checks import first_iteration
from dpa.recipes.run import Run
from dpa.scoring.scorers import scored_by
from dpa.stages.evaluate import EVALUATION, side_by_side, typical_question
from dpa.stages.finetune import listening_curve
from dpa.stages.pools import POOLS
from dpa.storage.tables import json_bytes, read_json, read_record, write_if_new
from dpa.training.listening import WHERE_NOT_FOLLOWING
from dpa.version import __version__

log = logging.getLogger(__name__)

EXAMPLES = 3
"""Held-out questions that travel with a policy, for people to try."""
ADOPTED = "adopted"
"""In the ledger of `finetune`, where the policy was trained elsewhere."""
MEASURING = ("rollout", "score", "gold")
STAGES = (
    *("rollout", "score", "select", "finetune"),
    *(f"evaluate/{kind}{name}" for kind in ("", "targets/") for name in MEASURING),
)


def evaluation_file(run: Run, t: int) -> Path:
    """The record of what was measured of the policy of t."""
    return run.path / f"iter_{t}" / "evaluate" / "evaluation.json"


def evaluation_of(run: Run, t: int) -> dict[str, Any] | None:
    """What was measured of the policy of t; None where nothing was, or its record is damaged."""
    file = evaluation_file(run, t)
    if not file.exists():
        return None
    try:
        return read_record(file, EVALUATION, optional=None)
    except DamageError as error:
        log.warning("%s; t = %d does not count as measured.", str(error).split("; ")[0], t)
        return None


def pools_file(run: Run, t: int) -> Path:
    """The record of what iteration t had to choose from."""
    return run.path / f"iter_{t}" / "select" / "pools.json"


def chosen_from(run: Run, t: int) -> dict[str, Any] | None:
    """What iteration t had to choose from; None where nothing was chosen, or the record is damaged."""
    file = pools_file(run, t)
    with suppress(DamageError):
        return read_record(file, POOLS, optional=None) if file.exists() else None
    return None


def publish(run: Run, t: int, found: Mapping[str, Any]) -> None:
    """The front travels with the model, and with it a few questions to try it on."""
    examples = [prompt.messages[-1]["content"] for prompt in run.held_out[:EXAMPLES]]
    write_if_new(run.policy_folder(t) / EVALUATION_FILE, json_bytes({**found, "examples": examples}))


def measured_stages(config: EvaluateConfig, targets: bool) -> list[str]:
    """The stages of one measurement, below its folder; of one with `targets` those of the targets too."""
    names = MEASURING if config.gold else MEASURING[:-1]
    return [f"{kind}{name}" for kind in ("", "targets/")[: 1 + targets] for name in names]


def trained_elsewhere(run: Run, t: int) -> dict[str, Any] | None:
    """What is known of the policy of t where `dpa adopt` took it in (stages.adopt); None where the run trained it."""
    return (_about(run, t).get("provenance") or {}).get("trained_elsewhere")


def adopted(run: Run, t: int) -> bool:
    """Whether `dpa adopt` took in the policy of t: by the record of its stage, or by what stands beside its weights,
    since either may be what is damaged."""
    with suppress(DamageError, RunFolderError):  # no record, or no whole one
        if ADOPTED in run.stage(t, "finetune").ledger.extra:
            return True
    return trained_elsewhere(run, t) is not None


def knows_targets(run: Run, t: int) -> bool:
    """Whether the policy of t was trained on targets."""
    return "target_template" in (_about(run, t).get("space") or {})


def _about(run: Run, t: int) -> dict[str, Any]:
    """What stands beside the weights of the policy of t; nothing where it is not there, or is damaged."""
    file = run.policy_folder(t) / SPACE_FILE
    try:
        about = read_json(file) if file.is_file() else {}
    except DamageError:
        about = {}
    return about if isinstance(about, dict) else {}


def policy_title(run: Run, t: int) -> str:
    """How pages call the policy of t."""
    return f"t = {t}, trained elsewhere" if trained_elsewhere(run, t) else f"t = {t}"


def next_step(run: Run) -> str:
    """The command that opens the page on the last policy that follows its direction; on the last, where none does."""
    last = run.config.iterations
    measured = {t: evaluation_of(run, t) for t in range(first_iteration(run.config), last + 1)}
    following = [t for t, found in measured.items() if found is not None and found["listens"]["verdict"]]
    t = following[-1] if following else last
    note = "" if t in following else f"    # it does not follow its direction yet; {WHERE_NOT_FOLLOWING}"
    if t < last:
        note = f"    # t = {t}; those after it do not follow their direction"
    return f"dpa serve {shlex.quote(str(run.policy_folder(t)))}{note}"


def write_policy_card(run: Run, t: int, evaluation: Mapping[str, Any] | None = None) -> None:
    """README.md beside the policy of iteration t."""
    config = run.config
    text = card(
        f"{config.name}, t = {t}",
        run.space,
        config.policy,
        [*(ratings.path for ratings in config.ratings), config.prompts.path],
        scored_by(config.reward),
        evaluation or evaluation_of(run, t),
        ledgers_of(run, t),
        trained_elsewhere(run, t),
    )
    write_if_new(run.policy_folder(t) / CARD, text.encode("utf-8", "backslashreplace"))


def ledgers_of(run: Run, t: int) -> dict[str, Any]:
    """Stage -> what it cost, of the finished stages of iteration t."""
    stages = {name: run.stage(t, name) for name in STAGES if (run.path / f"iter_{t}" / name).is_dir()}
    return {name: asdict(stage.ledger) for name, stage in stages.items() if stage.done}


def results_of(run: Run) -> dict[str, Any]:
    """results.json: of the iterations measured so far, and of what was made once."""
    iterations = range(first_iteration(run.config), run.config.iterations + 1)
    found = {t: evaluation for t in iterations if (evaluation := evaluation_of(run, t)) is not None}
    once = run.stage(None, "train_reward")
    trained = run.config.reward.train is not None and once.done
    about = read_json(run.reward_folder / REWARD_FILE) if trained else {}
    return {
        "name": run.config.name,
        "seed": run.config.seed,
        "version": __version__,
        "space": run.space.to_dict(),
        "config": resolved(run.config),
        "policies": [
            {
                "name": policy_title(run, t),
                "trained_elsewhere": trained_elsewhere(run, t),
                "evaluation": evaluation,
                "ledger": ledgers_of(run, t),
                "listening": listening_curve(run.stage(t, "finetune")),
                "pools": chosen_from(run, t),
            }
            for t, evaluation in found.items()
        ],
        "samples": _samples(run, max(found)) if found else None,
        "ledger": {"train_reward": asdict(once.ledger)} if once.done else {},
        "reward_model": about.get("quality"),
        "reward_precision": about.get("precision"),
    }


def _samples(run: Run, t: int) -> dict[str, Any]:
    prompts = {prompt.prompt_id: prompt.messages for prompt in run.held_out}
    answers = run.stage(t, "evaluate/rollout").whole_table()
    scores = run.measured(lambda name: run.stage(t, f"evaluate/{name}"))
    found = answers, scores, prompts, run.space, run.config.evaluate
    return {"policy": policy_title(run, t), "questions": side_by_side(*found), "typical": typical_question(*found)}
