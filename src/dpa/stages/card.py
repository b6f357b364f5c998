"""The model card of a trained policy: README.md in its folder, with Hugging Face's metadata header.
Run its tests: pytest tests/test_card.py
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpa.core.directions import DirectionSpace
from dpa.core.page import duration
from dpa.storage.rows import has_hub_form, is_hub_id
from dpa.storage.tables import write_bytes

CARD = "README.md"

PAPER = "https://arxiv.org/abs/2402.18571"


def write_card(
    folder: Path,
    name: str,
    space: DirectionSpace,
    base: str,
    data: Sequence[str],
    reward: str,
    evaluation: Mapping[str, Any] | None = None,
    ledgers: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write the card beside a policy; one that says the same already is left alone.

    `base`: start policy; `data`: rated data sets and prompts, as configured; `reward`: a sentence on where scores come
    from; `evaluation`: the record of stages.evaluate; `ledgers`: stage -> ledger, of the iteration that made it.
    """
    text = card(name, space, base, data, reward, evaluation, ledgers).encode("utf-8", "backslashreplace")
    file = folder / CARD
    if not file.is_file() or file.read_bytes() != text:
        write_bytes(file, text)


def card(
    name: str,
    space: DirectionSpace,
    base: str,
    data: Sequence[str],
    reward: str,
    evaluation: Mapping[str, Any] | None = None,
    ledgers: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The card's text (see `write_card`)."""
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
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {name}",
        f"A language model that follows a numeric preference direction over {_listed(space.names)}, trained with "
        f"[Directional Preference Alignment]({PAPER}) by `dpa`. Start policy: `{base}`. Rated data and prompts: "
        f"{_listed([f'`{source}`' for source in data])}. {reward}",
        _space(space),
        _how(space),
    ]
    if evaluation is not None:
        parts.append(_front(space, evaluation))
    if ledgers:
        parts.append(_ledger(ledgers))
    return "\n\n".join(parts) + "\n"


def _space(space: DirectionSpace) -> str:
    rows = [
        (f"`{objective.name}`", " + ".join(f"{weight:g} {name}" for name, weight in objective.attributes.items()))
        for objective in space.objectives
    ]
    presets = [f"- `{name}`: {space.parse(value)}" for name, value in space.presets.items()]
    lines = [
        "## Direction space",
        _table(("objective", "made of these attributes, each on 0-100"), rows),
        "A direction is a unit vector over the objectives, negative weights allowed. Trained within "
        f"{space.max_angle:g} degrees of `{space.direction(space.center)}`. The model reads it as integers x100 in "
        "this system sentence, which its chat template writes:",
        f"```\n{space.template}\n```",
    ]
    if presets:
        lines.append("Presets:\n\n" + "\n".join(presets))
    return "\n\n".join(lines)


def _how(space: DirectionSpace) -> str:
    edge = space.grid(3)[0]
    preference = {name: round(float(weight), 3) for name, weight in zip(space.names, edge, strict=True)}
    asked = json.dumps(preference)
    return f"""## How to steer it

The chat template takes a variable `preference` (objective -> weight, normalised for you), merged with a system prompt
where there is one. Any engine that passes template variables steers it; without `preference` it answers unsteered.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
question = [{{"role": "user", "content": "Why is the sky blue?"}}]
inputs = tokenizer.apply_chat_template(
    question, preference={asked}, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**inputs, do_sample=True, temperature=0.7, max_new_tokens=512)[0]))
```

```python
from vllm import LLM   # in process

LLM(FOLDER).chat(question, chat_template_kwargs={{"preference": {asked}}})
```

```python
from openai import OpenAI   # vLLM, SGLang, llama.cpp or `transformers serve` as the server

OpenAI(base_url="http://localhost:8000/v1", api_key="-").chat.completions.create(
    model=NAME, messages=question, extra_body={{"chat_template_kwargs": {{"preference": {asked}}}}}
)
```"""


def _front(space: DirectionSpace, evaluation: Mapping[str, Any]) -> str:
    by = evaluation["listens"]["by"]
    rows = [
        (
            f"`{record['direction']}`",
            *(_interval(record["objectives"][by][name]) for name in space.names),
            _interval(record["words"]),
            "yes" if record["front"][by] else "",
        )
        for record in evaluation["directions"]
    ]
    source = "the known true reward" if by == "gold" else "the reward model it was trained with, which flatters it"
    return "\n\n".join(
        [
            "## Measured front",
            f"{evaluation['prompts']} held-out prompts, {evaluation['answers']} answers, scored by {source}; means on "
            f"0-100 with 95% bootstrap intervals over prompts. {evaluation['listens']['sentence']}",
            _table(("asked", *space.names, "words", "on the front"), rows),
        ]
    )


def _ledger(ledgers: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            stage,
            f"{spent['tokens_generated']:,}",
            f"{spent['candidates_scored']:,}",
            f"{spent['training_tokens']:,}",
            duration(spent["wall_s"]),
        )
        for stage, spent in ledgers.items()
    ]
    heading = ("stage", "tokens generated", "candidates scored", "training tokens", "wall time")
    return "## What its iteration cost\n\n" + _table(heading, rows)


def _interval(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['value']:.1f}"
    return f"{found['value']:.1f} ({found['low']:.1f} to {found['high']:.1f})"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
