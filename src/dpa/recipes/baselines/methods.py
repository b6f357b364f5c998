"""The methods of a comparison in the order of reports: ours, its variants and control, and what it is compared with.
Run its tests: pytest tests/test_methods.py

A new one is a file beside these, which ends in a METHOD, and its line here.
"""

from dpa.core.compare_config import CompareConfig
from dpa.core.lookup import look_up
from dpa.recipes.baselines import (
    best_of_start,
    demonstrations,
    dpo,
    moc,
    mod,
    modpo,
    online_dpo,
    online_grpo,
    per_direction,
    pooled,
    pooled_best,
    pooled_third,
    prompted,
    random_candidate,
    ric,
    ric_best,
    scalar_rsf,
    sft,
    soups,
    steerlm,
    steerlm_best,
)
from dpa.recipes.baselines.lab import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        pooled.METHOD,
        pooled_best.METHOD,
        pooled_third.METHOD,
        per_direction.METHOD,
        online_dpo.METHOD,
        online_grpo.METHOD,
        random_candidate.METHOD,
        scalar_rsf.METHOD,
        sft.METHOD,
        dpo.METHOD,
        steerlm.METHOD,
        steerlm_best.METHOD,
        ric.METHOD,
        ric_best.METHOD,
        soups.METHOD,
        mod.METHOD,
        modpo.METHOD,
        moc.METHOD,
        demonstrations.METHOD,
        prompted.METHOD,
        best_of_start.METHOD,
    )
}


def compared(config: CompareConfig) -> dict[str, Method]:
    """The methods a configuration names, or those compared by default. Raises ConfigError for a name of none."""
    for field, names in (("methods", config.methods or ()), ("changes", config.changes)):
        for name in names:
            look_up(METHODS, name, field)
    chosen = config.methods or [name for name, method in METHODS.items() if method.by_default]
    return {name: method for name, method in METHODS.items() if name in chosen}
