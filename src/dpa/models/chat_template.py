"""The model's own chat template, taught to read a `preference`: a direction reaches any stock server this way.
Run its tests: pytest tests/test_chat_template.py

`preference` maps objective to weight. transformers, TRL, vLLM, SGLang and llama.cpp hand it to the template through
`chat_template_kwargs`, so steering needs no plugin: the template normalises the weights and writes the space's
sentence, byte for byte what `DirectionSpace.prompt` writes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import TemplateError

from dpa.core.directions import DirectionSpace
from dpa.core.errors import ModelFileError
from dpa.core.sentences import PLACEHOLDER, VALUES, Placement, target_parts
from dpa.core.targets import Wish
from dpa.models.template_rendering import render

PLAIN_TEMPLATE = (
    "{%- if bos_token is defined and bos_token %}{{- bos_token }}{%- endif %}"
    "{%- for message in messages %}{{- message['content'] }}"
    "{%- if message['role'] != 'user' and not loop.last %}{{- '\\n' }}{%- endif %}"
    "{%- endfor %}"
)
"""For a plain language model: the system text, a new line, the user's text, and the model goes on from there."""

_BEGIN = "{#- dpa: preference -#}"
_END = '{#- dpa: end of preference -#}{{- "" }}'

# Plain Jinja with every blank trimmed, so that it reads the same with and without trim_blocks, and no more of it than
# llama.cpp's own engine knows: no power, no `round`, no exponent in a number. The sum is that of core.cone.unit in the
# same order. Its root: Newton's steps from above, then the remainder, which Dekker's product (1971) has whole. So it
# differs from a power of 0.5 in the last bit for one vector in a thousand, which shows only where a weight lies within
# that bit of a half. No zero has a sign.

# Of Newton's steps at most 5, 14 and 336 bring anything. Such a prompt is rendered in 0.4, 0.7 and 9 ms.
_STEPS = (
    "8 if 0.25 < dpa.squares and dpa.squares < 4 else 20 if 0.000001 < dpa.squares and dpa.squares < 1000000 else 350"
)

# `whole` is `size`, not negative, rounded half to even, as Python's `round` does it.
_ROUNDED = """\
    {%- set whole = size|int -%}
    {%- set over = size - whole - 0.5 -%}
    {%- set whole = whole + 1 if over > 0 or (over == 0 and whole % 2 == 1) else whole -%}
"""
_SENTENCE = """
{%- if preference is defined and preference is not none -%}
  {%- set dpa_names = @names@ -%}
  {%- if preference is not mapping -%}
    {{- raise_exception("preference: give a mapping of objective to weight, over " ~ dpa_names|join(", ") ~ ".") -}}
  {%- endif -%}
  {%- for name in preference -%}
    {%- if name not in dpa_names -%}
      {{- raise_exception("preference: unknown objective `" ~ name ~ "`; known: " ~ dpa_names|join(", ") ~ ".") -}}
@held_is_checked@    {%- elif preference[name] is not number or preference[name] is boolean -%}
      {{- raise_exception("preference: the weight of `" ~ name ~ "` is not a number; give a finite one.") -}}
    {%- endif -%}
  {%- endfor -%}
  {%- set dpa = namespace(weights=[], squares=0.0, root=0.0, terms=[]) -%}
  {%- for name in dpa_names -%}
    {%- set weight = preference.get(name, 0) -%}
    {%- set weight = 0.0 if weight is string else weight|float -%}
    {%- set dpa.weights = dpa.weights + [weight] -%}
    {%- set dpa.squares = dpa.squares + weight * weight -%}
  {%- endfor -%}
  {%- if not ("1e-200"|float < dpa.squares and dpa.squares < "1e200"|float) -%}
    {{- raise_exception("preference: the weights are all zero, or too large or small; scale them to about 1.") -}}
  {%- endif -%}
  {%- set dpa.root = 0.5 * (dpa.squares + 1) -%}
  {%- for step in range(@steps@) -%}
    {%- set nearer = 0.5 * (dpa.root + dpa.squares / dpa.root) -%}
    {%- if nearer < dpa.root -%}{%- set dpa.root = nearer -%}{%- endif -%}
  {%- endfor -%}
  {%- set high = 134217729 * dpa.root - (134217729 * dpa.root - dpa.root) -%}
  {%- set low = dpa.root - high -%}
  {%- set square = dpa.root * dpa.root -%}
  {%- set rest = dpa.squares - square - (high * high - square + 2 * high * low + low * low) -%}
  {%- set dpa.root = dpa.root + rest / (2 * dpa.root) -%}
  {%- for name in dpa_names -%}
    {%- set percent = 100 * (dpa.weights[loop.index0] / dpa.root) -%}
    {%- set size = percent if percent > 0 else 0 - percent -%}
@rounded@    {%- set sign = "-" if percent < 0 and whole > 0 else @plus@ -%}
    {%- set dpa.terms = dpa.terms + [name ~ "*" ~ sign ~ @zeros@ ~ whole] -%}
  {%- endfor -%}
  {%- set dpa_text = @before@ ~ dpa.terms|join(" + ") ~ @after@ -%}
@held_is_stated@""".replace("@rounded@", _ROUNDED).replace("@steps@", _STEPS)

_ZEROS = '("00" if whole < 10 else "0" if whole < 100 else "")'

# Where the policy knows targets (core/targets.py), `"verbosity": "=40"` holds an objective at a value.
_HELD_IS_CHECKED = """\
    {%- elif preference[name] is string and preference[name].startswith("=") -%}
      {%- set dpa_value = preference[name][1:]|float(-1) -%}
      {%- if not (0 <= dpa_value and dpa_value <= 100) -%}
        {{- raise_exception("preference: `" ~ name ~ "` is held at no value from 0 to 100; write e.g. '=40'.") -}}
      {%- endif -%}
"""
_HELD_IS_STATED = """\
  {%- set dpa_held = namespace(free=[], stated=[]) -%}
  {%- for name in dpa_names -%}
    {%- if preference.get(name, 0) is string -%}
      {%- set size = preference[name][1:]|float / @step@ -%}
@rounded@      {%- set dpa_held.stated = dpa_held.stated + [name ~ " = " ~ (whole * @step@)] -%}
    {%- else -%}
      {%- set dpa_held.free = dpa_held.free + [dpa.terms[loop.index0]] -%}
    {%- endif -%}
  {%- endfor -%}
  {%- if dpa_held.stated -%}
    {%- set dpa_text = @target@ -%}
  {%- endif -%}
""".replace("@rounded@", _ROUNDED)

_IN_FRONT = """\
  {%- if dpa_old is string -%}
    {%- set dpa_new = dpa_text ~ "\\n\\n" ~ dpa_old -%}
  {%- elif dpa_old and dpa_old[0]["type"] == "text" -%}
    {%- set dpa_new = [{"type": "text", "text": dpa_text ~ "\\n\\n" ~ dpa_old[0]["text"]}] + dpa_old[1:] -%}
  {%- else -%}
    {%- set dpa_new = [{"type": "text", "text": dpa_text ~ "\\n\\n"}] + dpa_old -%}
  {%- endif -%}
"""
# A part of its own would not do: some templates read the first one only, or trim each.

_INTO_SYSTEM = """
  {%- if messages and messages[0]["role"] == "system" -%}
    {%- set dpa_old = messages[0]["content"] -%}
    {%- set dpa_rest = messages[1:] -%}
  {%- else -%}
    {%- set dpa_old = "" -%}
    {%- set dpa_rest = messages -%}
  {%- endif -%}
  {%- if not dpa_old -%}
    {%- set dpa_new = dpa_text -%}
  {%- else -%}
@in_front@  {%- endif -%}
  {%- set messages = [{"role": "system", "content": dpa_new}] + dpa_rest -%}
{%- endif -%}
""".replace("@in_front@", _IN_FRONT)

_INTO_USER = """
  {%- if messages and messages[0]["role"] == "system" -%}
    {%- set dpa_lead = namespace(text="") -%}
    {%- if messages[0]["content"] is string -%}
      {%- set dpa_lead.text = messages[0]["content"] -%}
    {%- else -%}
      {%- for part in messages[0]["content"] -%}{%- set dpa_lead.text = dpa_lead.text ~ part["text"] -%}{%- endfor -%}
    {%- endif -%}
    {%- set dpa_text = dpa_text ~ "\\n\\n" ~ dpa_lead.text -%}
    {%- set messages = messages[1:] -%}
  {%- endif -%}
  {%- if not messages or messages[0]["role"] != "user" -%}
    {{- raise_exception("preference: this model takes it in the first user message, so start with a user's turn.") -}}
  {%- endif -%}
  {%- set dpa_old = messages[0]["content"] -%}
@in_front@  {%- set messages = [{"role": "user", "content": dpa_new}] + messages[1:] -%}
{%- endif -%}
""".replace("@in_front@", _IN_FRONT)


_AFTER_QUESTION = """
  {%- set dpa_asked = namespace(place=-1) -%}
  {%- for message in messages -%}
    {%- if message["role"] == "user" -%}{%- set dpa_asked.place = loop.index0 -%}{%- endif -%}
  {%- endfor -%}
  {%- if dpa_asked.place < 0 -%}
    {{- raise_exception("preference: this model takes it behind the user's question, so ask one.") -}}
  {%- endif -%}
  {%- set dpa_old = messages[dpa_asked.place]["content"] -%}
  {%- if dpa_old is string -%}
    {%- set dpa_new = dpa_old ~ "\\n\\n" ~ dpa_text -%}
  {%- elif dpa_old and dpa_old[-1]["type"] == "text" -%}
    {%- set dpa_new = dpa_old[:-1] + [{"type": "text", "text": dpa_old[-1]["text"] ~ "\\n\\n" ~ dpa_text}] -%}
  {%- else -%}
    {%- set dpa_new = dpa_old + [{"type": "text", "text": "\\n\\n" ~ dpa_text}] -%}
  {%- endif -%}
  {%- set dpa_rest = messages[dpa_asked.place + 1:] -%}
  {%- set messages = messages[:dpa_asked.place] + [{"role": "user", "content": dpa_new}] + dpa_rest -%}
{%- endif -%}
"""

_DEFAULT = """
{%- if preference is not defined or preference is none -%}{%- set preference = @preference@ -%}{%- endif -%}
"""


_ENDING = (
    "{% if messages and messages[-1]['role'] == 'assistant' and not add_generation_prompt %}{{ eos_token }}{% endif %}"
)


def steerable_template(base_template: str | None, space: DirectionSpace, default: Wish | None = None) -> str:
    """Extend a chat template so that `preference` (objective -> weight) states a direction of the space.

    The sentence leads the system message; the system prompt that was there follows after a blank line. Where the base
    template knows no system role (found out by rendering), sentence and system prompt lead the first user message.
    Where the space's `placement` is after_question, it follows the last user message after a blank line.
    Where the space knows targets, a text such as "=40" in place of a weight holds its objective at that value.
    Without `preference` the base template renders as it always did. An unknown objective, a zero vector or a weight
    that is no number raises the template's own error. `base_template` None means a plain language model
    (PLAIN_TEMPLATE). A template that is steerable already is taught the new space instead of being wrapped twice.
    `default` is stated wherever no preference is asked.

    Raises ModelFileError when the base template does not render a plain question, or a plain language model is to read
    its direction after the question.
    """
    base = PLAIN_TEMPLATE if base_template is None else _without_preference(base_template)
    before, after = space.template.split(PLACEHOLDER)
    literals = {"@names@": _literal(list(space.names)), "@before@": _literal(before), "@after@": _literal(after)}
    literals |= {"@held_is_checked@": "", "@held_is_stated@": ""}
    literals |= {"@plus@": '"+"', "@zeros@": _ZEROS} if space.zero_padded else {"@plus@": '""', "@zeros@": '""'}
    if space.target_template is not None:
        stated = _HELD_IS_STATED.replace("@step@", str(space.target_step))
        stated = stated.replace("@target@", _target_text(space.target_template))
        literals |= {"@held_is_checked@": _HELD_IS_CHECKED, "@held_is_stated@": stated}
    filled = "@(?:names|before|after|plus|zeros|held_is_checked|held_is_stated)@"
    sentence = re.sub(filled, lambda match: literals[match.group()], _SENTENCE)
    # A block that opens the base loses the blanks before it (lstrip_blocks), which it would not do in mid-line.
    base = re.sub(r"^[ \t]+(?=\{[%#])", "", base)
    if default is not None:
        sentence = _DEFAULT.replace("@preference@", _mapping(default.as_mapping())) + sentence
    placed = _INTO_SYSTEM if has_system_role(base) else _INTO_USER
    if space.placement == "after_question":
        if base == PLAIN_TEMPLATE:
            raise ModelFileError(
                "space.placement: after_question needs a model with a chat template; let it be system."
            )
        placed = _AFTER_QUESTION
    return _BEGIN + sentence + placed + _END + base


def ending_answers(template: str) -> str:
    """The same template, which writes the EOS token after an answer that a conversation ends with.

    Prompts are written as before. For a template that ends no turn (PLAIN_TEMPLATE): trainers that write whole
    conversations with it would never teach a policy to stop.
    """
    return template if template.endswith(_ENDING) else template + _ENDING


def with_sentence(
    messages: Sequence[Mapping[str, Any]], sentence: str, placement: Placement, system_role: bool
) -> list[Any]:
    """Messages with the direction's sentence where a steerable template writes it: before the system prompt, or without
    a `system_role` before the first question (`has_system_role`); or after the last question. There is one."""
    chat: list[Any] = [{"role": message["role"], "content": message["content"]} for message in messages]
    if placement == "after_question":
        asked = max(place for place, message in enumerate(chat) if message["role"] == "user")
        chat[asked]["content"] += f"\n\n{sentence}"
        return chat
    if chat and chat[0]["role"] == "system":
        system = chat.pop(0)["content"]
        if system or not system_role:
            sentence = f"{sentence}\n\n{system}"
    if system_role:
        return [{"role": "system", "content": sentence}, *chat]
    return [{"role": "user", "content": f"{sentence}\n\n{chat[0]['content']}"}, *chat[1:]]


@lru_cache(maxsize=64)
def has_system_role(template: str) -> bool:
    """Whether a system message reaches the rendered text. Raises ModelFileError if a question alone does not render."""
    question = {"role": "user", "content": "dpa-question"}
    if "dpa-question" not in _render(template, [question]):
        raise ModelFileError("model: its chat template drops the user's message; give the tokenizer a working one.")
    try:
        return "dpa-system" in _render(template, [{"role": "system", "content": "dpa-system"}, question])
    except ModelFileError:
        return False


def _target_text(template: str) -> str:
    """The Jinja expression that a target's sentence is."""
    filled = {PLACEHOLDER: 'dpa_held.free|join(" + ")', VALUES: 'dpa_held.stated|join(", ")'}
    return " ~ ".join(filled.get(part) or _literal(part) for part in target_parts(template) if part)


def _without_preference(template: str) -> str:
    """The base of a steerable template; any other template as it is."""
    if template.startswith(_BEGIN) and _END in template:
        return template.partition(_END)[2]
    return template


def _mapping(preference: Mapping[str, float | str]) -> str:
    """A Jinja literal, without exponents."""
    values = (
        _literal(value) if isinstance(value, str) else np.format_float_positional(value, trim="0")
        for value in preference.values()
    )
    return "{" + ", ".join(f"{_literal(name)}: {value}" for name, value in zip(preference, values, strict=True)) + "}"


def _literal(value: str | list[str]) -> str:
    """A Jinja literal. JSON escapes are Jinja's too; raw text keeps characters beyond the basic plane whole."""
    return json.dumps(value, ensure_ascii=False)


def _render(template: str, messages: list[dict[str, str]]) -> str:
    try:
        return render(template, {"messages": messages, "add_generation_prompt": True, "bos_token": "", "eos_token": ""})
    except TemplateError as error:
        raise ModelFileError(
            f"model: its chat template does not render ({' '.join(str(error).split())}); "
            "give the tokenizer a working one."
        ) from None
