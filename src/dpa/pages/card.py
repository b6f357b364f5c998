"""The model card of a trained policy: README.md in its folder, with Hugging Face's metadata header.
Run its tests: pytest tests/test_card.py
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dpa.core.directions import DirectionSpace
from dpa.pages.rendering import render
from dpa.pages.writing import duration, example_preference, number, spread
from dpa.storage.rows import has_hub_form, is_hub_id, public_name

CARD = "README.md"


def card(
    name: str,
    space: DirectionSpace,
    base: str,
    data: Sequence[str],
    reward: str,
    evaluation: Mapping[str, Any] | None = None,
    ledgers: Mapping[str, Mapping[str, Any]] | None = None,
    elsewhere: Mapping[str, Any] | None = None,
) -> str:
    """The card's text.

    `base`: start policy; `data`: rated data sets and prompts, as configured; `reward`: a sentence on where scores come
    from; `evaluation`: the record of stages.evaluate; `ledgers`: stage -> ledger, of the iteration that made it;
    `elsewhere`: what is known of a training that another program did (stages.adopt).
    """
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpa", "directional-preference-alignment", "steerable", "arxiv:2402.18571"],
    }
    if has_hub_form(base):  # a local path is nobody else's
        metadata["base_model"] = base
    hub = [source for source in data if is_hub_id(source)]
    if hub:
        metadata["datasets"] = list(dict.fromkeys(hub))
    by = evaluation["listens"]["by"] if evaluation else ""
    front = [
        [
            f"`{asked['direction']}`",
            *(spread(asked["objectives"][by][name]) for name in space.names),
            spread(asked["words"]),
            "yes" if asked["front"][by] else "",
        ]
        for asked in (evaluation["directions"] if evaluation else ())
    ]
    counted = ("tokens_generated", "candidates_scored", "training_tokens")
    return render(
        "card.md",
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=name,
        space=space,
        base=public_name(base),
        sources=[f"`{public_name(source)}`" for source in data],
        reward=reward,
        objectives=[
            [f"`{one.name}`", " + ".join(f"{weight:g} {name}" for name, weight in one.attributes.items())]
            for one in space.objectives
        ],
        asked=example_preference(space),
        evaluation=evaluation,
        elsewhere=elsewhere,
        front=front,
        costs=[
            [stage, *(number(spent[column], None) for column in counted), duration(spent["wall_s"])]
            for stage, spent in (ledgers or {}).items()
            if elsewhere is None or stage != "finetune"  # that is what taking it in cost
        ],
    )
