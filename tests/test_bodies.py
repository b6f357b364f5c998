"""Request bodies: any JSON value in any field is either what the field takes or one sentence that names it.
pytest tests/test_bodies.py
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from dpa.serve.bodies import ChatBody, CompletionBody, DirectionBody, RefusedError, ScoreBody, check_body, read_body

MESSAGES: Any = [{"role": "user", "content": "Why?"}]
JSON = some.recursive(
    some.none()
    | some.booleans()
    | some.integers(-(10**320), 10**320)
    | some.floats(allow_nan=False, allow_infinity=False)
    | some.text(max_size=8),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({*ChatBody.model_fields, *CompletionBody.model_fields})


def read(data: bytes) -> dict[str, Any]:
    async def chunks() -> AsyncIterator[bytes]:
        yield data

    return asyncio.run(read_body(chunks(), None, 100_000))


def sentence_of(kind: Any, body: dict[str, Any]) -> str:
    with pytest.raises(RefusedError) as caught:
        check_body(kind, body)
    return str(caught.value)


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, **fields}


def said(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 5000, "9" * 310, "-" + "9" * 310])
@pytest.mark.parametrize("place", ['{"a": %s}', '{"a": [[{"b": %s}]]}', '{"a": {"b": [1, %s]}}'])
def test_47_a_number_beyond_the_floats_is_refused_wherever_it_stands(number: str, place: str) -> None:
    with pytest.raises(RefusedError) as caught:
        read((place % number).encode())
    assert caught.value.status == 400 and "number" in str(caught.value)


@pytest.mark.parametrize("limit", [60_000, 59_999])
def test_35_of_a_body_without_an_end_no_chunk_is_read_beyond_the_limit(limit: int) -> None:
    read_bytes = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read_bytes
        while True:
            read_bytes += 10_000
            yield b" " * 10_000

    with pytest.raises(RefusedError) as caught:
        asyncio.run(read_body(endless(), None, limit))
    assert caught.value.status == 413 and limit < read_bytes <= limit + 10_000


def test_numbers_that_fit_are_kept() -> None:
    body = {"a": 1e308, "b": 10**300, "c": [-1.5, 0]}
    assert read(json.dumps(body).encode()) == body


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [True],
        [False, 1],
        [1.0],
        [1.5],
        [-1],
        [None],
        [{}],
        [[]],
        [[1], []],
        [[True]],
        [[-1]],
        [[[1]]],
        [1, "a"],
        ["a", 1],
        ["a", [1]],
        [[1], 1],
        [[1], "a"],
        {},
        {"a": 1},
        3,
        True,
        None,
    ],
    ids=repr,
)
def test_41_what_is_no_prompt_is_refused_by_name(prompt: Any) -> None:
    assert sentence_of(CompletionBody, {"prompt": prompt}).startswith("prompt: ")


@pytest.mark.parametrize("prompt", ["a", ["a"], ["a", "b"], [0], [1, 2], [[1], [2, 3]], [10**20]], ids=repr)
def test_the_four_forms_of_a_prompt_are_taken(prompt: Any) -> None:
    assert check_body(CompletionBody, {"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        (ChatBody, said({"a": 1}), "messages.0.content: {'a': 1} does not fit; it should be text, or a list of parts"),
        (ChatBody, said(3), "messages.0.content: 3 does not fit; it should be text"),
        (ChatBody, said([{"text": "x"}]), "messages.0.content.0.type: it is missing"),
        (ChatBody, said([{"type": "text", "text": 3}]), "messages.0.content.0.text: 3"),
        (ChatBody, {"messages": [{"content": "x"}]}, "messages.0.role: it is missing; give a role"),
        (ChatBody, {"messages": []}, "messages: [] does not fit; it should be a list of 1 to 1024 messages"),
        (ChatBody, {}, "messages: it is missing; give a list"),
        (ChatBody, chat(stop=[""]), "stop.0: '' does not fit; it should be text of 1 to 256 characters"),
        (ChatBody, chat(stop=["a"] * 99), "stop: a list of 99 does not fit; it should be text"),
        (ChatBody, chat(stop=3), "stop: 3 does not fit; it should be text"),
        (ChatBody, chat(n=True), "n: true does not fit; it should be a whole number from 1"),
        (ChatBody, chat(temperature=10**310), "temperature: "),
        (ChatBody, chat(temperature="warm"), "temperature: 'warm' does not fit; it should be a number from 0"),
        (ChatBody, chat(dpa=7), "dpa: 7 does not fit; it should be a direction: a mapping"),
        (ChatBody, chat(dpa_options={"best_off": 2}), "dpa_options.best_off: it is unknown here; take one of outside"),
        (ChatBody, chat(dpa_options={"robust": {"angle": 500}}), "dpa_options.robust.angle: 500 does not fit"),
        (ChatBody, chat(dpa_options={"robust": 3}), "dpa_options.robust: 3 does not fit; it should be true, false, or"),
        (CompletionBody, {"prompt": "x", "messages": MESSAGES}, "messages: "),
        (DirectionBody, {"direction": None}, "direction: null does not fit; it should be a direction"),
        (ScoreBody, chat(responses=[3]), "responses.0: 3 does not fit"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_and_what_it_takes(kind: Any, body: dict[str, Any], words: str) -> None:
    said = sentence_of(kind, body)
    assert said.startswith(words) and said.endswith(".") and "String should" not in said and "Input" not in said


@settings(max_examples=150, deadline=None)
@given(field=some.sampled_from(FIELDS), value=JSON, chat=some.booleans())
def test_any_value_in_any_field_is_taken_or_one_sentence_that_names_it(field: str, value: Any, chat: bool) -> None:
    kind: Any = ChatBody if chat else CompletionBody
    body = {"messages": MESSAGES} if chat else {"prompt": "Why?"}
    try:
        check_body(kind, {**body, field: value})
    except RefusedError as error:
        said = str(error)
        assert said.startswith(field) and error.status == 400 and len(said) < 400 and "\n" not in said
