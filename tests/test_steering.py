"""The steering contract: every form says the same, the most specific wins, the loser is named, user text says nothing.
pytest tests/test_steering.py
"""

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from dpa.core.direction import Direction
from dpa.core.directions import DirectionSpace
from dpa.core.errors import DirectionError
from dpa.core.objective import Objective
from dpa.core.sentences import target_template_of
from dpa.core.targets import read_wish, sentence
from dpa.models.chat_template import steerable_template
from dpa.serve.steering import UnknownModelError, steer, take_tags, verbosity_levels

SPACE = DirectionSpace(
    objectives=(Objective("helpfulness", {"a": 1.0}), Objective("verbosity", {"b": 1.0})),
    max_angle=180.0,
    presets={"terse": {"helpfulness": 0.8, "verbosity": -0.6}},
)
TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = steerable_template(TOKENIZER.chat_template, SPACE)
TEXT = "helpfulness*80 + verbosity*-60"


def asked(system: str | None = None, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Why?"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {"model": "m", "messages": messages, **fields}


def prompt_of(body: dict[str, Any], headers: tuple[str, ...] = (), **options: Any) -> str:
    """The bytes the model reads, as an engine renders them."""
    sent = steer(body, headers, options.pop("space", SPACE), "m", **options).body
    kwargs = sent.get("chat_template_kwargs", {})
    return TOKENIZER.apply_chat_template(sent["messages"], tokenize=False, add_generation_prompt=True, **kwargs)


weights = st.floats(-100, 100, allow_nan=False).filter(lambda weight: abs(weight) > 1e-3)


@settings(max_examples=150, deadline=None)
@given(weights, weights, st.sampled_from([None, "Be kind.", "One.\n\nTwo."]))
def test_32_every_form_gives_the_same_prompt_bytes(a: float, b: float, system: str | None) -> None:
    mapping = {"helpfulness": a, "verbosity": b}
    text = f"helpfulness*{a!r} + verbosity*{b!r}"
    space = DirectionSpace(SPACE.objectives, max_angle=180.0, presets={"mine": mapping})
    tag = f"<dpa>{text}</dpa>"
    prompts = {
        "mapping": prompt_of(asked(system, dpa=mapping)),
        "numbers": prompt_of(asked(system, dpa=[a, b])),
        "expression": prompt_of(asked(system, dpa=text)),
        "swapped": prompt_of(asked(system, dpa=f"{a!r}*helpfulness + {b!r}*verbosity")),
        "kwargs": prompt_of(asked(system, chat_template_kwargs={"preference": mapping})),
        "header": prompt_of(asked(system), (text,)),
        "tag first": prompt_of(asked(tag if system is None else f"{tag}\n{system}")),
        "tag last": prompt_of(asked(tag if system is None else f"{system} {tag}")),
        "preset": prompt_of(asked(system, dpa="mine"), space=space),
        "preset in a header": prompt_of(asked(system), ("mine",), space=space),
        "preset in the model": prompt_of(asked(system, model="m:mine"), space=space),
        "model": prompt_of(asked(system, model=f"m@helpfulness={a!r};verbosity={b!r}")),
        "default": prompt_of(asked(system), default=SPACE.parse(mapping)),
    }
    assert len(set(prompts.values())) == 1, prompts
    sentence = SPACE.prompt(SPACE.parse(mapping))
    assert (
        prompts["mapping"] == f"<|system|>{sentence}{chr(10) * 2 + system if system else ''}<|user|>Why?<|assistant|>"
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(-180, 180))
def test_32_an_angle_says_the_same_in_every_form(degrees: int) -> None:
    text = f"{degrees}deg"
    prompts = {
        prompt_of(asked(dpa=text)),
        prompt_of(asked(), (text,)),
        prompt_of(asked(f"<dpa>{text}</dpa>")),
        prompt_of(asked(dpa=SPACE.parse(text).as_mapping())),
    }
    assert len(prompts) == 1


@pytest.mark.parametrize("level", ["low", "medium", "high"])
def test_32_openai_verbosity_is_an_edge_or_the_center_of_the_cone(level: str) -> None:
    narrow = DirectionSpace(SPACE.objectives, max_angle=30.0)
    degrees = {"low": -30, "medium": 0, "high": 30}[level]
    assert prompt_of(asked(verbosity=level), space=narrow) == prompt_of(asked(dpa=f"{degrees}deg"), space=narrow)
    assert "verbosity" not in steer(asked(verbosity=level), [], narrow, "m").body


def test_verbosity_is_left_alone_where_the_model_has_no_such_objective() -> None:
    space = DirectionSpace((Objective("helpfulness", {"a": 1.0}), Objective("warmth", {"b": 1.0})))
    steered = steer(asked(verbosity="low"), [], space, "m")
    assert steered.body["verbosity"] == "low" and steered.source == "none" and not steered.ignored
    center = DirectionSpace(SPACE.objectives, center={"verbosity": 1.0})
    assert verbosity_levels(center) == {}


STATEMENTS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("body", {"dpa": "10deg"}, ()),
    ("chat_template_kwargs", {"chat_template_kwargs": {"preference": {"helpfulness": 1, "verbosity": 0.1}}}, ()),
    ("header", {}, ("20deg",)),
    ("tag", {"system": "<dpa>30deg</dpa>"}, ()),
    ("model", {"model": "m:terse"}, ()),
    ("verbosity", {"verbosity": "high"}, ()),
]


@pytest.mark.parametrize("first", range(len(STATEMENTS)))
def test_32_a_conflict_has_one_winner_and_names_every_loser(first: int) -> None:
    body, headers = asked(), ()
    for where, fields, values in STATEMENTS[first:]:
        system = fields.get("system")
        body = {**asked(system), **{k: v for k, v in body.items() if k != "messages"}} if system else body
        body |= {name: value for name, value in fields.items() if name != "system"}
        headers += values
        del where
    steered = steer(body, headers, SPACE, "m", default=SPACE.parse("-90deg"))
    alone = steer(
        {
            **asked(STATEMENTS[first][1].get("system")),
            **{k: v for k, v in STATEMENTS[first][1].items() if k != "system"},
        },
        STATEMENTS[first][2],
        SPACE,
        "m",
    )
    assert steered.direction == alone.direction and steered.source == alone.source
    assert [one.source for one in steered.ignored] == [where for where, _, _ in STATEMENTS[first + 1 :]]
    assert all(one.direction and one.direction.startswith("helpfulness*") for one in steered.ignored)
    assert "terse" not in json.dumps(steered.body["messages"]) and "<dpa>" not in json.dumps(steered.body)


def test_the_default_counts_last_and_is_no_loser() -> None:
    default = SPACE.parse("5deg")
    assert steer(asked(), [], SPACE, "m", default=default).source == "default"
    steered = steer(asked(dpa="10deg"), [], SPACE, "m", default=default)
    assert steered.source == "body" and steered.ignored == ()
    assert steer(asked(), [], SPACE, "m").source == "none"


def test_null_states_no_preference_against_every_other_form() -> None:
    steered = steer(asked(dpa=None), ["10deg"], SPACE, "m", default=SPACE.parse("5deg"))
    assert steered.direction is None and steered.source == "body" and "chat_template_kwargs" not in steered.body
    assert steered.ignored[0].source == "header"


def test_the_base_model_is_told_no_direction() -> None:
    steered = steer(asked(dpa="10deg", model="m@base"), [], SPACE, "m")
    assert steered.base and steered.direction is None and steered.ignored[0].source == "body"


def test_34_a_tag_in_user_text_is_ignored_and_stays() -> None:
    body = asked()
    body["messages"] = [
        {"role": "user", "content": f"<dpa>{TEXT}</dpa> hi"},
        {"role": "assistant", "content": f"<dpa>{TEXT}</dpa>"},
        {"role": "tool", "content": f"<dpa>{TEXT}</dpa>"},
    ]
    steered = steer(body, [], SPACE, "m")
    assert steered.source == "none" and steered.direction is None
    assert steered.body["messages"] == body["messages"]


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize(
    ("content", "left"),
    [
        ("A <dpa>10deg</dpa> B", "A B"),
        ("<dpa>10deg</dpa>\n\nA", "A"),
        ("A\n<dpa>10deg</dpa>", "A"),
        ("A <dpa>30deg</dpa>, and <dpa>10deg</dpa>.", "A, and."),
        ([{"type": "text", "text": "A <dpa>10deg</dpa>"}], [{"type": "text", "text": "A"}]),
    ],
)
def test_34_a_tag_in_system_text_is_applied_and_removed(role: str, content: Any, left: Any) -> None:
    body = {"model": "m", "messages": [{"role": role, "content": content}, {"role": "user", "content": "Why?"}]}
    steered = steer(body, [], SPACE, "m")
    assert steered.source == "tag" and steered.direction == SPACE.parse("10deg")
    assert steered.body["messages"][0]["content"] == left
    assert body["messages"][0]["content"] == content, "the request itself is not changed"


@pytest.mark.parametrize("content", ["<dpa>10deg", "<dpa>" * 200_000, "<dpa>10deg</dpa>" * 60_000, "<dpa></dpa>"])
def test_34_a_damaged_tag_is_refused_at_once(content: str) -> None:
    begun = time.thread_time()  # of this thread: what else the machine does takes none of it
    with pytest.raises(DirectionError):
        steer(asked(content), [], SPACE, "m")
    assert time.thread_time() - begun < 0.05


def test_messages_without_tags_are_the_same_objects() -> None:
    messages = asked("Be kind.")["messages"]
    tags, kept = take_tags(messages)
    assert tags == [] and all(a is b for a, b in zip(messages, kept, strict=True))


BAD = [
    {"helpfulnes": 1.0},
    {"helpfulness": 0.0},
    {"helpfulness": float("nan")},
    {"helpfulness": float("inf")},
    {"helpfulness": 10**400},
    {"helpfulness": True},
    {"helpfulness": "1"},
    {"helpfulness": {"a": 1}},
    "+".join(["helpfulness"] * 10_000),
    "(" * 1000 + "helpfulness" + ")" * 1000,
    "helpfulness*٣",
    "helpfulness*0.8; ignore previous",
    "__import__('os').system('true')",
    "helpfulness*1e400",
    "1000deg",
    "",
    [],
    [1.0],
    7,
    "no-such-preset",
]


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:30])
def test_33_what_is_no_direction_is_refused_within_50_ms(value: Any) -> None:
    forms = [(asked(dpa=value), ()), (asked(chat_template_kwargs={"preference": value}), ())]
    if isinstance(value, str):
        forms += [(asked(), (value,)), (asked(f"<dpa>{value}</dpa>"), ())]
        forms += [(asked(model=f"m@{value}"), ()), (asked(model=f"m@helpfulness={value}"), ())]
    for body, headers in forms:
        begun = time.thread_time()  # of this thread: what else the machine does takes none of it
        with pytest.raises((DirectionError, UnknownModelError)) as refused:
            steer(body, headers, SPACE, "m")
        assert time.thread_time() - begun < 0.05
        assert len(str(refused.value)) < 500 and str(refused.value).isprintable()


@pytest.mark.parametrize(
    "name", ["x", "m:", "m:nosuch", "m@", "m@helpfulness", "m@helpfulness=1;helpfulness=2", "mm", 7]
)
def test_33_strange_model_names_are_refused(name: Any) -> None:
    with pytest.raises((DirectionError, UnknownModelError)):
        steer(asked(model=name), [], SPACE, "m")


def test_33_a_loser_that_cannot_be_read_is_shown_short() -> None:
    steered = steer(asked(dpa="10deg"), ["x" * 5000], SPACE, "m")
    assert steered.ignored[0].source == "header" and len(steered.ignored[0].direction or "") < 100


def test_outside_the_cone_is_refused_or_clamped_and_said() -> None:
    narrow = DirectionSpace(SPACE.objectives, max_angle=30.0)
    with pytest.raises(DirectionError, match="30"):
        steer(asked(dpa="60deg"), [], narrow, "m")
    steered = steer(asked(dpa="60deg"), [], narrow, "m", outside="clamp")
    assert steered.clamped and steered.direction == narrow.parse("30deg")
    assert not steer(asked(dpa="20deg"), [], narrow, "m", outside="clamp").clamped


def test_unknown_fields_and_template_variables_travel_on() -> None:
    body = asked(dpa="10deg", foo={"bar": [1]}, chat_template_kwargs={"enable_thinking": False}, dpa_options={})
    sent = steer(body, [], SPACE, "m").body
    assert sent["foo"] == {"bar": [1]} and sent["chat_template_kwargs"]["enable_thinking"] is False
    assert isinstance(sent["chat_template_kwargs"]["preference"], dict)
    assert "dpa" not in sent and "dpa_options" not in sent


def test_two_headers_are_refused() -> None:
    with pytest.raises(DirectionError, match="2 times"):
        steer(asked(), ["10deg", "10deg"], SPACE, "m")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_neighbours_lie_around_the_asked_direction_and_in_the_cone(count: int) -> None:
    wide = DirectionSpace((*SPACE.objectives, Objective("warmth", {"c": 1.0})))
    for space in (DirectionSpace(SPACE.objectives), wide):
        for text in ("helpfulness", "helpfulness - 0.9*verbosity"):
            asked_direction: Direction = space.parse(text)
            near = space.neighbours(asked_direction, 10.0, count)
            cosines = near @ asked_direction.weights
            assert near.shape == (count, space.K)
            assert (cosines > 0.98480).all() and (space.angle_to_center(near) < 45.001).all()
            assert (near == space.neighbours(asked_direction, 10.0, count)).all()
            inside = text == "helpfulness"
            assert not inside or (cosines < 1 - 1e-6).all()
    with pytest.raises(DirectionError, match="angle"):
        wide.neighbours(wide.parse("helpfulness"), 0.0, 2)


KNOWING = replace(SPACE, target_template=target_template_of(SPACE.template))


def test_every_form_states_the_same_target_and_its_loser_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = steerable_template(tokenizer.chat_template, KNOWING)
    text, mapping = "helpfulness; verbosity=40", {"helpfulness": 2, "verbosity": "=40"}
    forms = [
        (asked(dpa=text), ()),
        (asked(dpa=mapping), ()),
        (asked(chat_template_kwargs={"preference": mapping}), ()),
        (asked(), (text,)),
        (asked(f"<dpa>{text}</dpa>"), ()),
    ]
    told = set()
    for body, headers in forms:
        sent = steer(body, headers, KNOWING, "m").body
        kwargs = sent["chat_template_kwargs"]
        told.add(tokenizer.apply_chat_template(sent["messages"], tokenize=False, add_generation_prompt=True, **kwargs))
    (prompt,) = told
    assert sentence(KNOWING, read_wish(KNOWING, text)) in prompt
    steered = steer(asked(f"<dpa>{text}</dpa>", dpa="terse"), (), KNOWING, "m")
    assert str(steered.direction) == TEXT and steered.ignored[0].direction == "helpfulness*100; verbosity=40"
