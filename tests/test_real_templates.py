"""Templates in use, made steerable: one render in transformers and in the engines' bare sandbox, system prompts merged.
pytest tests/test_real_templates.py
"""

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from real_templates import TEMPLATES, WITHOUT_SYSTEM, ZEPHYR
from transformers.utils.chat_template_utils import render_jinja_template

from dpa.core.presets import DPA_V1
from dpa.models.chat_template import has_system_role, steerable_template

QUESTION = [{"role": "user", "content": "Why?"}]
SYSTEM = [{"role": "system", "content": "Be kind."}, *QUESTION]
TALK = [*QUESTION, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
ASKED = {"helpfulness": 0.97, "verbosity": -0.26}
SENTENCE = DPA_V1.prompt(DPA_V1.parse("-15deg"))
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def in_transformers(template: str, messages: list, **variables) -> str:
    return render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **TOKENS, **variables
    )[0][0]  # fmt: skip


def in_sandbox(template: str, messages: list, **variables) -> str:
    """As vLLM, SGLang and llama.cpp's own readers set Jinja up: the sandbox with trimmed blocks."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, **TOKENS, **variables
    )


def steered(name: str) -> str:
    return steerable_template(TEMPLATES[name], DPA_V1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_direction_reads_as_if_it_had_been_written_by_hand(name: str) -> None:
    """As the plain template renders the same words given as a system prompt (or in the first question)."""
    if name in WITHOUT_SYSTEM:
        by_hand = [{"role": "user", "content": f"{SENTENCE}\n\nWhy?"}]
        merged = [{"role": "user", "content": f"{SENTENCE}\n\nBe kind.\n\nWhy?"}]
        longer = [*by_hand, *TALK[1:]]
    else:
        by_hand = [{"role": "system", "content": SENTENCE}, *QUESTION]
        merged = [{"role": "system", "content": f"{SENTENCE}\n\nBe kind."}, *QUESTION]
        longer = [{"role": "system", "content": SENTENCE}, *TALK]
    for messages, written in ((QUESTION, by_hand), (SYSTEM, merged), (TALK, longer)):
        expected = in_transformers(TEMPLATES[name], written)
        assert SENTENCE in expected
        assert in_transformers(steered(name), messages, preference=ASKED) == expected
        assert in_sandbox(steered(name), messages, preference=ASKED) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_a_preference_the_model_is_as_it_was(name: str) -> None:
    for messages in (QUESTION, TALK):
        expected = in_transformers(TEMPLATES[name], messages)
        assert in_transformers(steered(name), messages) == expected
        assert in_sandbox(steered(name), messages, preference=None) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("render", [in_transformers, in_sandbox])
def test_a_zero_vector_and_a_stranger_are_rejected(name: str, render) -> None:
    for preference in ({"helpfulness": 0, "verbosity": 0}, {}, {"helpfulnes": 1}, {"helpfulness": "1"}):
        with pytest.raises(TemplateError, match="preference"):
            render(steered(name), QUESTION, preference=preference)


def test_system_roles_are_found_out() -> None:
    assert {name for name, template in TEMPLATES.items() if not has_system_role(template)} == WITHOUT_SYSTEM


def test_the_released_policys_prompt_letter_for_letter() -> None:
    """RLHFlow/DPA-v1-Mistral-7B as its card shows it: the sentence as system prompt of the Zephyr template."""
    expected = (
        "<|system|>\nYou are a helpful, respectful, and honest assistant who always responds to the user in a harmless "
        "way. Your response should maximize weighted rating = helpfulness*97 + verbosity*-26</s>\n<|user|>\nWhy?</s>\n"
        "<|assistant|>\n"
    )
    assert in_transformers(steerable_template(ZEPHYR, DPA_V1), QUESTION, preference=ASKED) == expected
