"""Methods that are the ordinary loop of recipes/dpa.py from the shared policy of t = 0, each with its own settings.
Run its tests: pytest tests/test_compare.py
"""

from typing import Any

from dpa.core.config import RunConfig, parse_config
from dpa.core.config_identity import resolved
from dpa.models.files import load_space
from dpa.recipes.baselines.lab import Lab, Trained
from dpa.recipes.dpa import Loop


def run_loop(lab: Lab, **fields: Any) -> list[Trained]:
    """The policies of `loop_policies`."""
    return [_trained(lab, f"t = {t}", folder) for t, folder in enumerate(loop_policies(lab, **fields), start=1)]


def loop_policies(lab: Lab, **fields: Any) -> list[str]:
    """The policies' folders of the loop's iterations t = 1..T in `<folder>/loop`; the configuration, or `fields` of it,
    make this method."""
    start = lab.take_over_t0()
    with Loop(_from_t0(lab, start, fields)) as loop:
        for t in range(1, lab.config.iterations + 1):
            loop.learn(t)
        return [str(loop.policy_folder(t)) for t in range(1, lab.config.iterations + 1)]


def last_of_loop(lab: Lab, **fields: Any) -> list[Trained]:
    """The policy of t = T alone."""
    return run_loop(lab, **fields)[-1:]


def _from_t0(lab: Lab, start: str, fields: dict[str, Any]) -> RunConfig:
    """The method's configuration without t = 0: from the policy and the reward model that are there."""
    own = {"out": str(lab.folder / "loop"), "policy": start, "ratings": [], "reward": resolved(lab.reward)}
    return parse_config({**resolved(lab.config), **own, **fields})


def _trained(lab: Lab, name: str, policy: str) -> Trained:
    targets = load_space(policy).target_template is not None
    return lab.trained(name, policy, targets=targets)
