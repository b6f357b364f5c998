"""Models for programs that know no directions: a reward model folded to one logit, a policy with a baked-in wish.
Run its tests: pytest tests/test_folding.py
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpa.core.direction import Direction
from dpa.core.directions import DirectionSpace
from dpa.core.errors import ModelFileError
from dpa.core.objective import Objective
from dpa.core.targets import Wish
from dpa.models.chat_template import steerable_template
from dpa.models.files import resolve_model
from dpa.models.loading import load_tokenizer
from dpa.models.policy import copy_policy, ensure_pad_token
from dpa.models.quiet import quiet_libraries
from dpa.scoring.reward_model import (
    RELEASED_SPEC,
    Golden,
    RewardSpec,
    encode,
    find_head,
    forward,
    load_classifier,
    read_spec,
    write_spec,
)
from dpa.scoring.reward_scorer import RewardModelScorer
from dpa.storage.tables import save_folder_atomically

UTILITY = "utility"
"""The one attribute of a folded reward model."""

# The plain template's own text around the conversation, as scoring.reward_model.conversation_text writes it.
_CHAT = (
    '{%- set dpa = namespace(system=[], turns=[], response="", first=true) -%}'
    "{%- for message in messages -%}"
    '{%- if message["role"] == "system" -%}{%- set dpa.system = dpa.system + [message["content"]] -%}'
    '{%- elif loop.last and message["role"] == "assistant" -%}{%- set dpa.response = message["content"] -%}'
    '{%- elif dpa.first -%}{%- set dpa.first = false -%}{%- set dpa.system = dpa.system + [message["content"]] -%}'
    '{%- else -%}{%- set turn = "\\n\\n" ~ message["role"]|capitalize ~ ": " ~ message["content"] -%}'
    "{%- set dpa.turns = dpa.turns + [turn] -%}"
    "{%- endif -%}{%- endfor -%}"
    '{%- set prompt = dpa.system|join("\\n\\n") ~ dpa.turns|join("") -%}'
)


def attribute_space(spec: RewardSpec) -> DirectionSpace:
    """Every attribute an objective of its own, every direction allowed: to fold without a policy's space."""
    return DirectionSpace(tuple(Objective(name, {name: 1.0}) for name in spec.attributes), max_angle=180.0)


def reward_spec(folder: str | Path, released: bool = False) -> RewardSpec:
    """What a reward model's folder says of it; `released`: it is a copy of the published one, which says nothing."""
    return RELEASED_SPEC if released else read_spec(Path(resolve_model(folder).path))


def fold_reward(
    folder: str | Path, space: DirectionSpace, direction: Direction, out: Path, released: bool = False
) -> None:
    """Save a standard one-logit classifier whose logit is the utility v . r(x, y) of one direction.

    The head is linear, so folding it is exact: w = sum over objectives of v_k times the weights of its attributes,
    times the rows of the head. `out` loads with `AutoModelForSequenceClassification` and as a RewardModelScorer; the
    chat template writes the reward model's input text, so TRL and RewardBench ask it rightly. The golden example is
    folded too. Raises ModelFileError, DirectionError.
    """
    spec = reward_spec(folder, released)
    weights_M = space.combine(np.eye(len(spec.attributes)), spec.attributes) @ np.array(direction.weights)
    with quiet_libraries():
        model, tokenizer, _ = load_classifier(folder, torch.float32)
        model.eval()
        found = find_head(model, len(spec.attributes))
        if found is None or model.config.num_labels != len(spec.attributes):
            raise ModelFileError(
                f"reward model: {folder} has no linear head of {len(spec.attributes)} outputs to fold."
            )
        name, head = found
        folded = torch.nn.Linear(head.in_features, 1, bias=head.bias is not None)
        with torch.no_grad():
            folded.weight.copy_(torch.from_numpy(weights_M @ head.weight.double().numpy())[None])
            if head.bias is not None:
                folded.bias.fill_(float(weights_M @ head.bias.double().numpy()))
        model.set_submodule(name, folded)
        model.config.num_labels = 1
        model.config.id2label, model.config.label2id = {0: UTILITY}, {UTILITY: 0}
        if released:
            ensure_pad_token(tokenizer)
        if tokenizer.pad_token_id is not None:
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        golden = spec.golden
        (ids,) = encode(tokenizer, spec.template, spec.max_length, [golden.messages], [golden.response])
        if ids is None:
            raise ModelFileError(f"reward model: {folder} no longer reads its golden example; restore its template.")
        template = spec.template
        if template is not None:
            template = _to_chat_template(tokenizer, template, golden, ids)
        expected = float(weights_M @ np.array(golden.scores))
        score = float(forward(model, [ids], tokenizer.pad_token_id)[0, 0])
        tolerance = golden.tolerance * float(np.abs(weights_M).sum())
        if not abs(score - expected) <= tolerance:
            raise ModelFileError(
                f"reward model: {folder} folded gives {score:.2f} on its golden example instead of {expected:.2f}; "
                "its weights or template were changed; restore them."
            )
        precision = spec.precision and replace(
            spec.precision,
            largest_difference=spec.precision.largest_difference * float(np.abs(weights_M).sum()),
        )
        golden = Golden(golden.messages, golden.response, (score,), tuple(ids), max(golden.tolerance, 0.05))
        facts = {
            "folded": {
                "from": str(folder),
                "direction": direction.as_mapping(),
                "space": space.to_dict(),
                "weights": dict(zip(spec.attributes, weights_M.tolist(), strict=True)),
            }
        }
        with save_folder_atomically(out) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            write_spec(unfinished, RewardSpec((UTILITY,), {}, template, spec.max_length, golden, precision), facts)
            RewardModelScorer(unfinished)  # what was saved must pass its self-test


def chat_template_of(template: str, before: str = "", after: str = "") -> str:
    """A chat template that writes a reward model's plain template from a conversation, letter for letter.

    `before` and `after`: the special tokens the tokenizer puts around a plain text (BOS, [CLS]).
    """
    text = json.dumps(before + template + after, ensure_ascii=False)
    for field in ("prompt", "response"):
        text = text.replace(f"{{{field}}}", f'" ~ {"dpa.response" if field == "response" else field} ~ "')
    return _CHAT + "{{- " + text + " -}}"


def _to_chat_template(tokenizer: Any, template: str, golden: Golden, ids: list[int]) -> str | None:
    """Give the tokenizer a chat template in place of a plain one; None where both make the same tokens of the golden
    example, else the plain template, which stays in use: some tokenizers read text after a written BOS otherwise.
    """
    plain, marked = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next((at for at in range(len(marked)) if marked[at : at + len(plain)] == plain), 0)
    around = (
        tokenizer.convert_ids_to_tokens(marked[:start]),
        tokenizer.convert_ids_to_tokens(marked[start + len(plain) :]),
    )
    tokenizer.chat_template = chat_template_of(template, "".join(around[0]), "".join(around[1]))
    if encode(tokenizer, None, 10**9, [golden.messages], [golden.response]) == [ids]:
        return None
    tokenizer.chat_template = chat_template_of(template)
    return template


def bake_direction(folder: str | Path, space: DirectionSpace, direction: Wish, out: Path) -> None:
    """Copy a policy; the copy's chat template states this direction or target wherever none is asked.

    For programs that cannot pass a template variable (lm-eval's older versions, hosted servers). The folder is plain
    Hugging Face; a `preference` that is given still wins. Raises ModelFileError, StorageError.
    """
    safe = resolve_model(folder)
    with quiet_libraries():
        tokenizer = load_tokenizer(safe)
    base = tokenizer.get_chat_template() if tokenizer.chat_template else None
    tokenizer.chat_template = steerable_template(base, space, default=direction)
    provenance = {"from": str(folder), "baked_direction": direction.as_mapping()}
    copy_policy(safe.path, tokenizer, out, space, provenance)
