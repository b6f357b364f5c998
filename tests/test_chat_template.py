"""The steerable chat template: byte equality with DirectionSpace.prompt, in transformers and in bare Jinja.
pytest tests/test_chat_template.py
"""

import math
import re
import resource
import time
from dataclasses import replace
from pathlib import Path

import minijinja
import pytest
from forks import python
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from real_templates import TEMPLATES
from tiny_models import CHAT_TEMPLATE, SPACE, tiny_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from dpa.core.directions import DirectionSpace
from dpa.core.errors import ModelFileError
from dpa.core.objective import Objective
from dpa.core.targets import read_wish, sentence
from dpa.models.chat_template import (
    PLAIN_TEMPLATE,
    has_system_role,
    steerable_template,
    with_sentence,
)
from dpa.models.template_rendering import TOGETHER, render_chat, render_chats
from dpa.models.template_rendering import render as render_bounded

NO_SYSTEM = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- if m['role'] == 'user' -%}[INST] {{ m['content'] }} [/INST]{%- else -%}{{ m['content'] }}</s>{%- endif -%}"
    "{%- endfor -%}"
)
DROPS_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}<{{ m.content }}>{% endif %}{% endfor %}"
QUESTION = [{"role": "user", "content": "Why?"}]
ASKED = {"helpfulness": 0.8, "verbosity": -0.6}
SENTENCE = SPACE.prompt(SPACE.direction(ASKED))


def in_transformers(template: str, messages: list, **variables) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **variables)
    return rendered[0]


def in_bare_jinja(template: str, messages: list, **variables) -> str:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **variables)


def in_minijinja(template: str, messages: list, **variables) -> str:
    """The engine of servers written in Rust."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = minijinja.Environment()
    environment.add_function("raise_exception", raise_exception)
    return environment.render_str(template, messages=messages, add_generation_prompt=True, **variables)


@pytest.fixture(params=[in_transformers, in_bare_jinja, in_minijinja])
def render(request):
    return request.param


weights = st.one_of(
    st.floats(-100, 100), st.integers(-100, 100), st.sampled_from([0.0, -0.0, 0.005, 0.015, -0.025, 0.125, 1e-90])
)


@settings(max_examples=60)
@given(st.lists(weights, min_size=2, max_size=4), st.data(), st.booleans())
@example([3, 4], None, False)
@example([1.0, -0.001], None, True)
@example([0.995, -0.0998749217771909], None, True)
def test_sentence_is_the_spaces_own_byte_for_byte(values: list[float], data, zero_padded: bool) -> None:
    names = ["helpfulness", "verbosity", "warmth", "wit.2-b"][: len(values)]
    space = DirectionSpace(tuple(Objective(name, {name: 1.0}) for name in names), zero_padded=zero_padded)
    assume(sum(value * value for value in values) > 1e-200)
    preference = dict(zip(names, values, strict=True))
    if data is not None:  # any order, and objectives left out where they weigh nothing
        kept = [name for name in data.draw(st.permutations(names)) if preference[name] != 0 or data.draw(st.booleans())]
        preference = {name: preference[name] for name in kept}
    expected = "<|system|>" + space.prompt(space.direction(preference)) + "<|user|>Why?<|assistant|>"
    template = steerable_template(CHAT_TEMPLATE, space)
    assert in_transformers(template, QUESTION, preference=preference) == expected
    assert in_bare_jinja(template, QUESTION, preference=preference) == expected
    assert in_minijinja(template, QUESTION, preference=preference) == expected


@pytest.mark.parametrize("percent", [0.5, 1.5, 2.5, 12.5, 49.5])
def test_ties_round_as_python_rounds(percent: float) -> None:
    """A weight whose hundredfold lies on a half, as close as doubles go."""
    small = percent / 100
    for nudged in (small, math.nextafter(small, 0), math.nextafter(small, 1)):
        asked = {"helpfulness": math.sqrt(1 - nudged * nudged), "verbosity": -nudged}
        rendered = in_bare_jinja(steerable_template(CHAT_TEMPLATE, SPACE), QUESTION, preference=asked)
        assert SPACE.prompt(SPACE.direction(asked)) in rendered


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
@example("{% raw %}", "{# @after@ %}")
@example('\\"{{ @before@ }}', "\r\n\t😀\u2028")
@settings(max_examples=50)
def test_any_sentence_survives(before: str, after: str) -> None:
    assume("{weighted_rating}" not in before and "{weighted_rating}" not in after)
    space = DirectionSpace(SPACE.objectives, template=before + "{weighted_rating}" + after)
    template = steerable_template(CHAT_TEMPLATE, space)
    expected = "<|system|>" + space.prompt(space.direction(ASKED)) + "<|user|>Why?<|assistant|>"
    assert in_bare_jinja(template, QUESTION, preference=ASKED) == expected


def test_sentence_leads_the_system_prompt(render) -> None:
    template = steerable_template(CHAT_TEMPLATE, SPACE)
    system = [{"role": "system", "content": "Be kind."}, *QUESTION]
    assert render(template, system, preference=ASKED) == f"<|system|>{SENTENCE}\n\nBe kind.<|user|>Why?<|assistant|>"
    empty = [{"role": "system", "content": ""}, *QUESTION]
    assert render(template, empty, preference=ASKED) == f"<|system|>{SENTENCE}<|user|>Why?<|assistant|>"


def test_without_a_system_role_the_first_question_carries_it(render) -> None:
    assert not has_system_role(NO_SYSTEM)
    template = steerable_template(NO_SYSTEM, SPACE)
    talk = [*QUESTION, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    assert render(template, talk, preference=ASKED) == f"[INST] {SENTENCE}\n\nWhy? [/INST]So.</s>[INST] And? [/INST]"
    system = [{"role": "system", "content": "Be kind."}, *QUESTION]
    assert render(template, system, preference=ASKED) == f"[INST] {SENTENCE}\n\nBe kind.\n\nWhy? [/INST]"
    with pytest.raises(TemplateError, match="user's turn"):
        render(template, talk[1:], preference=ASKED)


AFTER = replace(SPACE, placement="after_question")


@pytest.mark.parametrize("base", [CHAT_TEMPLATE, NO_SYSTEM, DROPS_SYSTEM])
def test_after_the_question_it_follows_the_last_one_and_all_before_stays(render, base: str) -> None:
    talk = [*QUESTION, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    template = steerable_template(base, AFTER)
    asked = [*talk[:2], {"role": "user", "content": f"And?\n\n{SENTENCE}"}]
    assert render(template, talk, preference=ASKED) == render(base, asked)
    assert render(template, talk) == render(base, talk)
    assert with_sentence(talk, SENTENCE, "after_question", has_system_role(base)) == asked
    assert steerable_template(template, SPACE) == steerable_template(base, SPACE)
    before = render(base, talk).rpartition("And?")[0]
    assert render(template, talk, preference={"helpfulness": 1}).startswith(before + "And?"), "the prefix is shared"


def test_after_the_question_a_system_prompt_stays_as_it_is(render) -> None:
    system = [{"role": "system", "content": "Be kind."}, *QUESTION]
    template = steerable_template(CHAT_TEMPLATE, AFTER)
    assert render(template, system, preference=ASKED) == f"<|system|>Be kind.<|user|>Why?\n\n{SENTENCE}<|assistant|>"
    with pytest.raises(TemplateError, match="ask one"):
        render(template, [{"role": "assistant", "content": "So."}], preference=ASKED)
    with pytest.raises(ModelFileError, match="needs a model with a chat template"):
        steerable_template(None, AFTER)


def test_no_more_of_jinja_is_asked_for_than_engines_in_other_languages_know() -> None:
    """llama.cpp's refuses a whole template over a power, `round` or an exponent (bench/llama_templates.py asks it)."""
    space = replace(SPACE, target_template="{weighted_rating} with {values}", zero_padded=True)
    baked = steerable_template(CHAT_TEMPLATE, space, space.direction([1.0, 6e-17]))
    ours = baked.removesuffix(CHAT_TEMPLATE)
    for unknown in (r"\*\*", r"\|\s*round", r"(?<![\w\"])\d[\d.]*[eE][-+]?\d", r"\.values\b"):
        assert not re.search(unknown, ours), unknown


def test_a_template_that_drops_the_system_message_has_no_system_role(render) -> None:
    assert not has_system_role(DROPS_SYSTEM)
    assert render(steerable_template(DROPS_SYSTEM, SPACE), QUESTION, preference=ASKED) == f"<{SENTENCE}\n\nWhy?>"


@pytest.mark.parametrize("base", [CHAT_TEMPLATE, NO_SYSTEM, PLAIN_TEMPLATE])
@pytest.mark.parametrize("variables", [{}, {"preference": None}])
def test_without_a_preference_nothing_changes(render, base: str, variables: dict) -> None:
    talk = [*QUESTION, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    assert render(steerable_template(base, SPACE), talk, **variables) == render(base, talk)


@pytest.mark.parametrize("opening", ["\n", " \n", "  ", "text "])
def test_blanks_that_open_the_base_are_kept(opening: str) -> None:
    base = opening + CHAT_TEMPLATE
    assert in_transformers(steerable_template(base, SPACE), QUESTION) == in_transformers(base, QUESTION)


def test_plain_model_reads_no_role_words(render) -> None:
    template = steerable_template(None, SPACE)
    story = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Once upon"}]
    assert render(template, story, preference=ASKED, bos_token="<s>") == f"<s>{SENTENCE}\n\nBe kind.\nOnce upon"
    assert render(template, story[1:]) == "Once upon"


# As Gemma 3 has it: of a system message the first part, and every part is trimmed. vLLM makes parts of any text for it.
FIRST_PART = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set messages = messages[1:] %}"
    "<system>{{ first if first is string else first[0].text }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text|trim if part.type == 'text' else '#' }}{% endfor %}{% endif %}{% endfor %}"
)


def in_parts(role: str, *texts: str | None) -> dict:
    """A message whose content is parts of text; None is a picture."""
    parts = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in texts]
    return {"role": role, "content": parts}


def test_content_in_parts_reads_as_content_in_one_piece(render) -> None:
    kind, why = in_parts("system", "Be kind."), in_parts("user", "Why?")
    before, after = steerable_template(FIRST_PART, SPACE), steerable_template(FIRST_PART, AFTER)
    assert render(before, [kind, why], preference=ASKED) == f"<system>{SENTENCE}\n\nBe kind.<user>Why?"
    assert render(after, [kind, why], preference=ASKED) == f"<system>Be kind.<user>Why?\n\n{SENTENCE}"
    pictured = in_parts("user", None, "Why?"), in_parts("user", "Why?", None)
    assert render(after, [pictured[0]], preference=ASKED) == f"<user>#Why?\n\n{SENTENCE}"
    assert render(after, [pictured[1]], preference=ASKED) == f"<user>Why?#{SENTENCE}"


def test_parts_lead_the_first_users_turn_where_there_is_no_system_role(render) -> None:
    first = "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}"
    template = steerable_template(NO_SYSTEM.replace("{{ m['content'] }}", first), SPACE)
    whole = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    asked = [in_parts("system", "Be ", "kind."), in_parts("user", "Why?")]
    assert f"{SENTENCE}\n\nBe kind.\n\nWhy?" in render(template, whole, preference=ASKED)
    assert render(template, asked, preference=ASKED) == render(template, whole, preference=ASKED)


def test_a_steerable_template_is_taught_anew_and_never_nested() -> None:
    other = DirectionSpace((Objective("wit", {"wit": 1.0}), Objective("warmth", {"warmth": 1.0})))
    for base in (CHAT_TEMPLATE, NO_SYSTEM, None):
        once = steerable_template(base, SPACE)
        assert steerable_template(once, SPACE) == once
        assert steerable_template(once, other) == steerable_template(base, other)


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        ({"helpfulnes": 1.0}, "helpfulnes"),
        ({"helpfulness": 0.0, "verbosity": 0}, "zero"),
        ({}, "zero"),
        ({"helpfulness": math.nan}, "scale them"),
        ({"helpfulness": math.inf}, "scale them"),
        ({"helpfulness": 1e300}, "scale them"),
        ({"helpfulness": "0.8"}, "not a number"),
        ({"helpfulness": True}, "not a number"),
        ("helpfulness*0.8", "mapping"),
        ([0.8, -0.6], "mapping"),
    ],
)
def test_a_wrong_preference_is_refused(render, preference, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(steerable_template(CHAT_TEMPLATE, SPACE), QUESTION, preference=preference)


@pytest.mark.parametrize(
    "base",
    ["{{ messages", "{{ raise_exception('never') }}", "no messages at all", "{{ messages.__class__.__mro__ }}"],
)
def test_a_base_that_does_not_render_is_refused(base: str) -> None:
    with pytest.raises(ModelFileError, match="chat template"):
        steerable_template(base, SPACE)


def test_tokenizer_saves_and_reads_it(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = steerable_template(tokenizer.chat_template, SPACE)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    rendered = again.apply_chat_template(QUESTION, preference=ASKED, tokenize=False, add_generation_prompt=True)
    assert rendered == f"<|system|>{SENTENCE}<|user|>Why?<|assistant|>"


HOSTILE = {
    "escape by class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "escape by globals": "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    "escape by namespace": "{% set n = namespace(__class__=1) %}{{ messages[0].content }}",
    "changes what it is given": "{{ messages.append(1) }}",
    "loop in a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages }}",
    "too long a loop": "{% for a in range(10**9) %}{% endfor %}{{ messages[0].content }}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling a list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "long lines of work": "{% for i in range(99999) %}{{ (range(99999)|join|list|sort|join)[:1] }}{% endfor %}",
    "a wide field": "{{ '%1000000000d' % 1 }}{{ messages[0].content }}",
    "a wide format": "{{ '{:>2000000000}'.format('a') }}{{ messages[0].content }}",
    "centred": "{{ 'a'|center(3000000000) }}{{ messages[0].content }}",
    "repeated": "{{ (messages[0].content * 1000000000)|length }}",
    "a large power": "{{ 10 ** (9 ** (messages|length + 8)) % 7 }}{{ messages[0].content }}",
    "replaced by itself": "{% set x = 'a' * 99999 %}{{ x.replace('a', x)|length }}",
    "lorem ipsum": "{{ lipsum(n=100000000) }}{{ messages[0].content }}",
    "indented JSON": "{{ messages|tojson(indent=1000000000) }}",
    "twenty thousand brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}{{ messages[0].content }}",
    "twenty thousand ifs": "{% if 1 %}" * 20_000 + "{{ messages[0].content }}" + "{% endif %}" * 20_000,
    "too much text": "{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}{{ messages[0].content }}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_30_50_a_template_that_escapes_swells_or_never_ends_is_refused(case: str, tmp_path: Path) -> None:
    begun, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelFileError, match=r"does not render \(.+\); give") as error:
        steerable_template(HOSTILE[case], SPACE)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    assert time.monotonic() - begun < 20 and not Path("canary").exists()  # two seconds on an idle machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 200_000, "kB of this process"


def test_50_a_template_that_swells_only_for_some_is_stopped_and_the_next_is_served() -> None:
    """What the first look does not find: the limits hold for every rendering."""
    tokenizer = tiny_tokenizer(
        "{% if messages|length > 1 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        "{% endif %}{{ messages[0].content }}"
    )
    talk = [*QUESTION, {"role": "assistant", "content": "So."}]
    assert render_chat(tokenizer, QUESTION) == "Why?"
    with pytest.raises(TemplateError, match="writes 8,000,008 characters, more than"):
        render_bounded("{{ 'x' * n }}", {"n": 8_000_008})
    with pytest.raises(SecurityError, match="longer than 1 s"):
        render_chat(tokenizer, talk)
    assert render_chat(tokenizer, QUESTION) == "Why?"
    with pytest.raises(SecurityError, match="MB"):
        render_bounded("{{ 'x' * n }}", {"n": 10**9})
    assert render_bounded("{{ 'x' * n }}", {"n": 3}) == "xxx"


def test_many_are_rendered_as_each_by_itself_and_one_that_is_refused_costs_no_other() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages|length > 2 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        "{% elif messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
        "{{ messages[0].content }}{{ eos_token }}"
    )
    chats = [[{"role": "user", "content": f"{n}?", "name": None}] for n in range(TOGETHER + 9)]
    expected: list[str | None] = [render_chat(tokenizer, chat) for chat in chats]
    chats[TOGETHER + 1], expected[TOGETHER + 1] = chats[0] * 2, None
    chats[TOGETHER + 4], expected[TOGETHER + 4] = chats[0] * 3, None
    assert render_chats(tokenizer, chats) == expected
    assert expected[7] == f"7?{tokenizer.eos_token}" and render_chats(tokenizer, []) == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_renders_as_transformers_does(name: str) -> None:
    tokenizer = tiny_tokenizer(steerable_template(TEMPLATES[name], SPACE))
    tokenizer.bos_token = "<|pad|>"
    talk = [
        {"role": "user", "content": "Why \u2028 <b>'\n 😀?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "And\r\n?"},
    ]
    for messages in (talk[:1], talk):
        for variables in ({}, {"preference": ASKED}, {"preference": ASKED, "add_generation_prompt": True}):
            expected = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
            assert render_chat(tokenizer, messages, **variables) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% generation %}{{ messages|tojson }}{% endgeneration %}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}{{ i }}"
        "{% endfor %}",
        "{{ messages|tojson(indent=2) }}{{ dict(a=1) }}{{ messages[0]|tojson(sort_keys=true) }}",
        "{% set n = namespace(a=1) %}{% set n.b = 2 %}{{ n.a + n.b }}{{ tools is none }}{{ preference is defined }}",
        "{{ strftime_now('%Y') }}{{ nothing }}{{ messages[0].nothing }}|\n  {% if true %}\n x\n  {% endif %}\n",
        "{{ messages[0].content }}\ud800",
    ],
)
def test_it_knows_what_transformers_adds_to_jinja(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    messages = [{"role": "user", "content": "<&'\"\ud83d>", "name": None}]
    assert render_chat(tokenizer, messages) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_the_worker_ends_with_its_process_and_a_fork_gets_its_own() -> None:
    assert render_bounded("{{ a }}", {"a": 1}) == "1"
    code = (
        "import os\n"
        "from dpa.models.template_rendering import _RENDERER, render\n"
        "assert render('{{ a }}', {'a': 1}) == '1'\n"
        "mine = _RENDERER._process.pid\n"
        "if os.fork() == 0:\n"
        "    assert render('{{ a }}', {'a': 2}) == '2' and _RENDERER._process.pid != mine\n"
        "    os._exit(0)\n"
        "assert os.wait()[1] == 0\n"
        "assert render('{{ a }}', {'a': 3}) == '3' and _RENDERER._process.pid == mine\n"
        "print(mine, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = python("-c", code)
    assert done.returncode == -9 and done.stdout, done.stderr
    until = time.monotonic() + 60
    while Path(f"/proc/{done.stdout.strip()}").exists():
        assert time.monotonic() < until
        time.sleep(0.01)


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_padded", [False, True])
def test_a_policy_that_knows_targets_is_told_them_byte_for_byte(render, zero_padded: bool) -> None:
    told_as = "Be kind, reach {weighted_rating} {and} {values}, @step@."
    space = replace(SPACE, target_template=told_as, zero_padded=zero_padded)
    template = steerable_template(None, space)
    for wish in ("helpfulness; verbosity=40", "helpfulness*0.8 - verbosity*0.6", "helpfulness; verbosity=0.5"):
        preference = read_wish(space, wish).as_mapping()
        told = render(template, QUESTION, preference=preference)
        assert told.startswith(sentence(space, read_wish(space, wish)) + "\n")
    for step in (5, 20):
        stepped = replace(space, target_step=step)
        for value in ("37", "42.5", "50", "97.5", "0", "100"):
            preference = {"helpfulness": 1, "verbosity": f"={value}"}
            told = render(steerable_template(None, stepped), QUESTION, preference=preference)
            assert told.startswith(sentence(stepped, read_wish(stepped, preference)) + "\n")
    for wrong, said in (("=140", "from 0 to 100"), ("=x", "from 0 to 100"), ("40", "is not a number")):
        with pytest.raises(TemplateError, match=said):
            render(template, QUESTION, preference={"helpfulness": 1, "verbosity": wrong})


def test_a_policy_that_knows_none_refuses_them_and_its_template_is_as_it_was(render) -> None:
    template = steerable_template(None, SPACE)
    assert "@" not in template and "held" not in template
    with pytest.raises(TemplateError, match="the weight of `verbosity` is not a number"):
        render(template, QUESTION, preference={"helpfulness": 1, "verbosity": "=40"})
