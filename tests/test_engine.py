"""The engine: rows join and leave without changing an answer, text comes whole, a leaving client frees its row.
pytest tests/test_engine.py
"""

import inspect
import json
import logging
import math
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from forks import within
from serving import CHAT, at_best_within, events_of, in_thread
from tiny_models import SPACE, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpa.core.errors import EngineError
from dpa.core.records import SampleRequest
from dpa.models.policy import make_steerable
from dpa.sampling.batching import ContinuousBatch, Row
from dpa.sampling.decoding import Decoder, Decoding, decode
from dpa.sampling.samplers import TransformersSampler
from dpa.serve.engine import Engine, main
from dpa.serve.engine_loop import TURN, Answer, EngineLoop
from dpa.serve.logs import JsonLines
from dpa.serve.text_stream import TextStream

QUESTION: Any = [{"role": "user", "content": "Why?"}]
PREFERENCE = {"helpfulness": 0.8, "verbosity": -0.6}


def steerable(context: int = 4096) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = tiny_model(context=context), tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    return model, tokenizer


# --- the batch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["strided", "fixed"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "qwen2"])
def test_an_answer_does_not_depend_on_who_joins_and_leaves(architecture: str, cache: Any) -> None:
    changes = {"sliding_window": None} if architecture in ("mistral", "qwen2") else {}
    model = tiny_model(architecture, **changes)
    chance = random.Random(0)
    prompts = [[5 + chance.randrange(250) for _ in range(chance.randrange(1, 120))] for _ in range(6)]
    seeds = list(range(18))
    how = Decoding(0.9, 1.0, 60, (1,))
    expected = decode(Decoder(model, "strided"), prompts, [seed % 6 for seed in seeds], seeds, [60] * 18, how)
    batch = ContinuousBatch(Decoder(model, cache), (1,))
    rows = [Row(prompts[seed % 6], seed, 60, 0.9, 1.0) for seed in seeds]
    noise = [Row(prompts[n % 6], 99 + n, 40, (0.0, 0.4)[n % 2], 0.7) for n in range(8)]
    waiting: list[Row] = [*rows, *noise]
    chance.shuffle(waiting)
    while waiting or batch.rows:
        joining = [waiting.pop() for _ in range(min(len(waiting), chance.randrange(4)))]
        if joining:
            batch.join(joining)
        batch.step()
        leaving = [row for row in batch.rows if row in noise and chance.random() < 0.05]
        batch.leave(leaving, "cancelled")
    assert [row.tokens for row in rows] == expected
    assert {row.finish_reason for row in rows} <= {"stop", "length"}


def test_the_cache_does_not_grow_with_those_who_left() -> None:
    decoder = Decoder(tiny_model(), "strided")
    batch = ContinuousBatch(decoder, ())
    for n in range(16):
        batch.join([Row([7] * 10, n, 30, 1.0, 1.0)])
        for _ in range(15):  # two at a time, each 30 tokens long: 240 columns in all, were none forgotten
            batch.step()
    assert decoder.width < 110


def test_nan_is_not_sampled_from() -> None:
    model = tiny_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(EngineError, match="NaN"):
        ContinuousBatch(Decoder(model), (1,)).join([Row([5], 0, 5, 1.0, 1.0)])


# --- the text -------------------------------------------------------------------------------------------------------


def pieces_of(text: str, stops: list[str] | None = None) -> tuple[list[str], TextStream]:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, stops or [])
    pieces = []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 text", "👩‍👩‍👧 family", "a\ufffdb", " lead", ""])
def test_pieces_joined_are_the_text_and_never_half_a_character(text: str) -> None:
    pieces, stream = pieces_of(text)
    assert "".join(pieces) == text == stream.text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, [])
    for token in tokenizer("é")["input_ids"][:1]:
        assert stream.push(token) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("stops", "left", "stopped"),
    [
        (["o w"], "hell", True),
        (["xyz"], "hello world", False),
        (["d", "l"], "he", True),
        (["world!"], "hello world", False),
        (["hello"], "", True),
        (["ll", "hell"], "", True),
    ],
)
def test_a_stop_string_ends_the_text_before_it_and_no_piece_shows_it(
    stops: list[str], left: str, stopped: bool
) -> None:
    pieces, stream = pieces_of("hello world", stops)
    assert "".join(pieces) == left == stream.text and stream.stopped is stopped


def byte_fallback_tokenizer() -> PreTrainedTokenizerBase:
    """As Llama's and Mistral's: `▁` for a space, an unknown character as its bytes, the first space left out."""
    words = ["▁hello", "▁world", "▁", "a", "b", "é", "日"]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", 0.0) for byte in range(256))]
    inside = Tokenizer(models.Unigram([*pieces, *((word, -1.0) for word in words)], unk_id=0, byte_fallback=True))
    inside.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inside.decoder = decoders.Sequence(steps)
    inside.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=inside, eos_token="</s>")


class Wordwise(PreTrainedTokenizer):
    """A tokenizer written in Python: none of the tokenizers library is behind it."""

    vocab_size = 300

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + n): n for n in range(self.vocab_size)}

    def _convert_id_to_token(self, index: int) -> str:
        return chr(97 + index)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) - 97


@pytest.mark.parametrize("make", [tiny_tokenizer, byte_fallback_tokenizer, Wordwise])
def test_the_pieces_of_random_answers_are_their_decoding_as_a_whole(make: Any) -> None:
    """Special tokens are skipped, a character may end within the answer's last token, ids need not make sense."""
    tokenizer, chance, scraps = make(), random.Random(0), [" ", "a", "é", "日本", "👩‍👩‍👧", "hello", " world", "\n"]
    broken = came = 0
    for _ in range(300):
        ids = [chance.randrange(len(tokenizer)) for _ in range(chance.randrange(1, 40))]
        if make is byte_fallback_tokenizer:  # bytes that are no character change the decoding of those before them
            ids = tokenizer("".join(chance.choices(scraps, k=9)), add_special_tokens=False)["input_ids"]
            ids.insert(chance.randrange(len(ids)), tokenizer.eos_token_id)
        stream = TextStream(tokenizer, [])
        pieces = [stream.push(token) for token in ids]
        broken += sum("\ufffd" in piece for piece in pieces)
        pieces.append(stream.finish())
        assert "".join(pieces) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)
        came += sum(map(bool, pieces))
    assert came > 1500, "they come while they are written"
    assert make is tiny_tokenizer or not broken


def test_bytes_that_are_no_character_end_no_stream() -> None:
    tokenizer = byte_fallback_tokenizer()
    stream = TextStream(tokenizer, [])
    accent, stray = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>"]), tokenizer.convert_tokens_to_ids("<0xFF>")
    said = [
        stream.push(token) for token in [*accent, stray, *tokenizer(" hello", add_special_tokens=False)["input_ids"]]
    ]
    assert said[:2] == ["", "é"] and said[-1].endswith(" hello")
    assert stream.finish() == ""


# --- HTTP -----------------------------------------------------------------------------------------------------------


class Started:
    """An engine whose loop starts in the event loop that serves it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_rows: int = 4) -> None:
        self.engine = Engine("m", model, tokenizer, "rev", None, max_rows)
        self.app = self.engine.app()
        self.begun = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self.begun and self.engine.loop is not None:
            self.begun = True
            self.engine.loop.start()
        await self.app(scope, receive, send)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with in_thread(Started(*steerable())) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"messages": QUESTION, "max_tokens": 30, "seed": 7, "temperature": 1.0, **fields}
    return client.post(CHAT, json=body)


def said(answer: httpx.Response) -> list[str]:
    return [choice["message"]["content"] for choice in answer.json()["choices"]]


def test_answers_are_those_of_the_sampler_with_the_same_seed(client: httpx.Client) -> None:
    sampler = TransformersSampler(*steerable(), SPACE, max_new_tokens=30)
    (samples,) = sampler.sample([SampleRequest(QUESTION, (0.8, -0.6), (7, 8))])
    kwargs = {"preference": PREFERENCE}
    answers = [ask(client, seed=seed, chat_template_kwargs=kwargs) for seed in (7, 8)]
    assert [said(answer)[0] for answer in answers] == [sample.text for sample in samples]
    assert answers[0].json()["usage"]["completion_tokens"] == samples[0].tokens
    assert said(ask(client)) != said(answers[0]), "the direction changes the prompt"


def test_a_stream_says_what_the_whole_answer_says(client: httpx.Client) -> None:
    for fields in ({}, {"stop": ["a", "e", "q"]}, {"n": 3}, {"temperature": 0}, {"top_p": 0.5}):
        whole = ask(client, **fields).json()
        *chunks, done = events_of(ask(client, stream=True, stream_options={"include_usage": True}, **fields))
        texts = [""] * len(whole["choices"])
        reasons = [None] * len(texts)
        for chunk in chunks[:-1]:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
        assert done == "[DONE]" and chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
        assert texts == [choice["message"]["content"] for choice in whole["choices"]]
        assert reasons == [choice["finish_reason"] for choice in whole["choices"]]


def test_seed_temperature_and_n_are_honoured(client: httpx.Client) -> None:
    assert said(ask(client)) == said(ask(client)) != said(ask(client, seed=8))
    assert said(ask(client, temperature=0, seed=1)) == said(ask(client, temperature=0, seed=2))
    three = said(ask(client, n=3))
    assert len(set(three)) == 3 and three[0] == said(ask(client))[0]
    assert said(ask(client, seed=-5)) == said(ask(client, seed=-5))


def test_completions_continue_text_and_tokens(client: httpx.Client) -> None:
    body = {"max_tokens": 5, "temperature": 0}
    texts = client.post("/v1/completions", json={"prompt": ["abc", "b"], **body}).json()["choices"]
    ids = tiny_tokenizer()("abc")["input_ids"]
    from_ids = client.post("/v1/completions", json={"prompt": ids, **body}).json()["choices"]
    assert len(texts) == 2 and from_ids[0]["text"] == texts[0]["text"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{}], "tool_choice": "required"},
        {"logprobs": True},
        {"frequency_penalty": 1.0},
        {"chat_template_kwargs": {"preference": {"x": 1}}},
        {"messages": [{"role": "user", "content": "x" * 5000}]},
        {"messages": [{"role": "alien", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    ],
)
def test_what_it_cannot_do_is_a_400_that_names_it(client: httpx.Client, fields: dict[str, Any]) -> None:
    answer = ask(client, **fields)
    assert answer.status_code == 400
    field = next(iter(fields)).removeprefix("chat_template_kwargs") or "messages"
    assert field in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_38_a_client_that_leaves_frees_its_row(stream: bool) -> None:
    model, tokenizer = steerable()
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0.0  # never the likeliest: 4,000 tokens, which take seconds
    request = {"messages": QUESTION, "max_tokens": 4000, "n": 3, "temperature": 0, "stream": stream}
    with in_thread(Started(model, tokenizer)) as url:

        def load() -> tuple[int, int]:
            about = httpx.get(f"{url}/dpa/engine", timeout=10).json()
            return about["running"], about["waiting"]

        body = json.dumps(request).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"

        def noticed_after() -> float:
            with socket.create_connection(tuple(url.removeprefix("http://").split(":")), timeout=10) as connection:
                connection.sendall(f"{head}\r\n\r\n".encode() + body)
                if stream:  # it leaves in the middle of the answer
                    with connection.makefile("rb") as answer:
                        assert any(line.startswith(b"data:") for line in answer)
                assert within(10, lambda: load() == (3, 0))
            begun = time.monotonic()
            assert within(10, lambda: load() == (0, 0))
            return time.monotonic() - begun

        assert at_best_within(1.0, 5, noticed_after)


def test_more_than_fit_wait_their_turn(client: httpx.Client) -> None:
    answers = said(ask(client, n=8, max_tokens=20))  # four rows are written at once
    assert len(answers) == 8 and answers[:3] == said(ask(client, n=3, max_tokens=20))


def test_a_stream_that_waits_its_turn_gives_signs_of_life_while_others_are_served_and_none_in_a_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dpa.serve.engine._SIGN_OF_LIFE_S", 0.1)
    model, tokenizer = steerable()
    forward, at_work, goes_on = model.forward, threading.Event(), threading.Event()

    def slow(**inputs: Any) -> Any:
        at_work.set()
        assert goes_on.wait(30)
        time.sleep(0.005)
        return forward(**inputs)

    slow.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = slow  # type: ignore[method-assign]
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0.0  # never the likeliest: answers end at their limit
    started = Started(model, tokenizer, max_rows=1)
    with (
        in_thread(started) as url,
        httpx.Client(base_url=url, timeout=30) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        loop = started.engine.loop
        assert loop is not None
        first = pool.submit(ask, client, stream=True, temperature=0, max_tokens=100)
        assert at_work.wait(10)
        hung = httpx.Timeout(30, read=0.5)
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json={"messages": QUESTION, "stream": True}, timeout=hung)
        second = pool.submit(ask, client, stream=True, temperature=0, max_tokens=3)
        assert within(10, lambda: loop.load[1] == 1)
        goes_on.set()
        assert ": waiting\n\n" in second.result().text and events_of(second.result())[-1] == "[DONE]"
        assert events_of(first.result())[-1] == "[DONE]"


def test_30_a_request_cannot_make_the_template_loop_for_ever(tmp_path: Path) -> None:
    model, tokenizer = steerable()
    tokenizer.chat_template = (
        "{% if messages[0].content == 'boom' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}{{ messages[0].content }}"
    )
    app = Engine("m", model, tokenizer, "rev", None, max_rows=1).app()
    with in_thread(app) as url:
        begun = time.monotonic()
        answer = httpx.post(url + CHAT, json={"messages": [{"role": "user", "content": "boom"}]}, timeout=20)
        assert answer.status_code == 400 and "chat template" in answer.json()["error"]["message"]
        assert time.monotonic() - begun < 15


# --- one request never ends an engine, nor waits for another ---------------------------------------------------------

PROMPTS: list[Any] = [
    [True], [], [1.0], [-1], [10**9], [2**70], [None], [[]], [[3], [10**9]], [[True]], "", [""], ["a", ""], {}, 7,
]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
def test_41_tokens_that_cannot_be_read_are_400_and_the_engine_goes_on(client: httpx.Client, prompt: Any) -> None:
    answer = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2})
    assert answer.status_code == 400 and "prompt" in answer.json()["error"]["message"]
    assert client.post("/v1/completions", json={"prompt": [[5, 6], [7]], "max_tokens": 2}).status_code == 200


def test_41_a_users_text_with_a_token_beyond_the_embedding_is_400() -> None:
    model, tokenizer = steerable()
    tokenizer.add_tokens(["<beyond>"], special_tokens=True)
    tokenizer.pad_token = "<beyond>"
    with in_thread(Started(model, tokenizer)) as url, httpx.Client(base_url=url, timeout=30) as client:
        beyond = [{"role": "user", "content": "x <beyond>"}]
        refusals = [ask(client, messages=beyond), client.post("/v1/completions", json={"prompt": "<beyond>"})]
        for answer in refusals:
            assert answer.status_code == 400 and "beyond the model's" in answer.json()["error"]["message"]
        body = {"prompt": ["a", "a longer one"], "max_tokens": 3}
        assert client.post("/v1/completions", json=body).status_code == 200, "padding is any token"


def test_41_messages_that_render_to_nothing_are_400() -> None:
    model, tokenizer = steerable()
    tokenizer.chat_template = "{{ messages[0].content }}"
    with in_thread(Started(model, tokenizer)) as url, httpx.Client(base_url=url, timeout=30) as client:
        answer = ask(client, messages=[{"role": "user", "content": ""}])
        assert answer.status_code == 400 and "no token" in answer.json()["error"]["message"]
        assert ask(client).status_code == 200


@pytest.mark.parametrize("fields", [{"temperature": 5e-324}, {"temperature": 1e-40, "top_p": 0.5}, {"top_p": 5e-324}])
def test_numbers_next_to_zero_take_the_likeliest_token(client: httpx.Client, fields: dict[str, Any]) -> None:
    assert said(ask(client, **fields)) == said(ask(client, temperature=0))


class Poisoned:
    """A model that fails where a token is read: `when` it stands in a prompt, or when it is written."""

    def __init__(self, model: PreTrainedModel, token: int) -> None:
        self.token, self.failures = token, 0
        self._forward = model.forward
        model.forward = self  # type: ignore[method-assign,assignment]
        self.__signature__ = inspect.signature(self._forward)

    def __call__(self, **inputs: Any) -> Any:
        if bool((inputs["input_ids"] == self.token).any()):
            self.failures += 1
            raise RuntimeError("no such luck with the user's words")
        return self._forward(**inputs)


def test_41_an_error_in_one_rows_work_fails_that_row_alone() -> None:
    """Of a prompt, and of a token that is written in the middle of four answers."""
    model, tokenizer = steerable()
    prompts = [[10 + 7 * n, 20 + 11 * n] for n in range(4)]
    bodies = [{"prompt": one, "seed": seed, "max_tokens": 40, "temperature": 1} for seed, one in enumerate(prompts)]
    with in_thread(Started(model, tokenizer)) as url, httpx.Client(base_url=url, timeout=60) as client:
        expected = [client.post("/v1/completions", json=body).json() for body in bodies]
        ends = (tokenizer.eos_token_id,)
        written = decode(Decoder(model), prompts, [0, 1, 2, 3], [0, 1, 2, 3], [40] * 4, Decoding(1.0, 1.0, 40, ends))
        token = next(one for one in written[0][5:] if all(one not in other for other in [*written[1:], *prompts]))
        poisoned = Poisoned(model, token)
        with ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(client.post, "/v1/completions", json=body) for body in bodies]
            bad = pool.submit(client.post, "/v1/completions", json={**bodies[0], "prompt": [token, 3]})
            answers = [one.result() for one in asked]
        assert poisoned.failures >= 2 and [one.status_code for one in answers] == [500, 200, 200, 200]
        assert bad.result().status_code == 500
        for answer in (answers[0], bad.result()):
            error = answer.json()["error"]
            assert error["type"] == "server_error" and "luck" not in error["message"], "an error may hold a user's text"
        assert [one.json()["choices"] for one in answers[1:]] == [one["choices"] for one in expected[1:]]
        *_, error, done = events_of(client.post("/v1/completions", json={**bodies[0], "stream": True}))
        assert "error" in error and done == "[DONE]"


def test_52_full_memory_makes_smaller_batches_with_the_same_answers(client: httpx.Client) -> None:
    model, tokenizer = steerable()
    forward = model.forward

    def full(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return forward(**inputs)

    full.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = full  # type: ignore[method-assign]
    with in_thread(Started(model, tokenizer)) as url, httpx.Client(base_url=url, timeout=60) as small:
        assert said(ask(small, n=4)) == said(ask(client, n=4))


def test_a_broken_device_ends_the_engine() -> None:
    model, tokenizer = steerable()
    loop = EngineLoop(model, tokenizer, 2)
    loop._survive(ValueError("one answer's"))
    loop._device = torch.device("cuda:0") if not torch.cuda.is_available() else torch.device("cuda:99")
    with pytest.raises(ValueError, match="the device's"):
        loop._survive(ValueError("the device's"))


class Turns:
    """An engine's loop that is stepped by hand, so that the order of things does not depend on a clock."""

    def __init__(self, max_rows: int) -> None:
        model, tokenizer = steerable()
        model.lm_head.weight.data[tokenizer.eos_token_id] = 0.0  # answers end at their limit
        self.loop = EngineLoop(model, tokenizer, max_rows)
        self.ended: dict[str, list[int]] = {}
        self.answers: dict[str, list[list[int]]] = {}
        self.steps = 0
        self.asked: dict[str, int] = {}
        self.loop._loop = self  # type: ignore[assignment]

    def call_soon_threadsafe(self, call: Any, *arguments: Any) -> None:
        call(*arguments)

    def ask(self, name: str, answers: int, tokens: int) -> None:
        self.asked[name] = self.asked.get(name, 0) + answers

        def done(row: Row) -> Any:
            def deliver(piece: Any) -> None:
                self.ended.setdefault(name, []).append(self.steps)
                self.answers.setdefault(name, []).append(row.tokens)

            return deliver

        rows = [Row([7, 8 + n], n, tokens, 0.0, 1.0) for n in range(answers)]
        self.loop.submit([Answer(row, (), False, done(row), name) for row in rows])

    def run(self) -> None:
        while sum(self.loop.load):
            self.steps += 1
            self.loop._once()


def test_52_memory_that_runs_out_as_an_answer_joins_ends_no_answer() -> None:
    """A card's cache takes its memory when rows enter; those that were in are let go with it."""
    roomy, full = Turns(max_rows=4), Turns(max_rows=4)
    batch = full.loop._batch
    enter = batch._decoder.enter

    def refuse(read: Any, places: list[int]) -> Any:
        if len(batch.rows) + len(places) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return enter(read, places)

    batch._decoder.enter = refuse  # type: ignore[method-assign]
    for turns in (roomy, full):
        turns.ask("first", 2, 12)
        for _ in range(3):
            turns.loop._once()
        turns.ask("second", 1, 6)
        turns.run()
    assert full.answers == roomy.answers and full.loop._room < 4


def test_49_a_neighbours_short_answer_does_not_wait_for_a_large_request() -> None:
    turns = Turns(max_rows=4)
    turns.ask("large", 24, 30)
    for _ in range(3):
        turns.loop._once()
    turns.ask("small", 1, 4)
    turns.run()
    assert turns.ended["small"] == [4] and len(turns.ended["large"]) == 24
    alone = Turns(max_rows=24)
    alone.ask("large", 24, 30)
    alone.run()
    assert sorted(turns.answers["large"]) == sorted(alone.answers["large"]), "who gave way lost nothing"


def test_49_requests_take_turns_in_the_queue() -> None:
    turns = Turns(max_rows=2)
    for name, answers in (("a", 6), ("b", 6), ("c", 1)):
        turns.ask(name, answers, 5)
    turns.run()
    assert max(turns.ended["c"]) <= 15 and abs(max(turns.ended["a"]) - max(turns.ended["b"])) <= 5


def test_49_a_request_with_several_answers_gets_its_turn_among_newcomers_without_end() -> None:
    turns = Turns(max_rows=2)
    turns.ask("several", 3, 4)
    while len(turns.ended.get("several", ())) < 3 and turns.steps < 200:
        for name in ("a", "b", "c", "d", "e"):  # more than there are rows; each asks again at once
            if len(turns.ended.get(name, ())) == turns.asked.get(name, 0):
                turns.ask(name, 1, 4)
        turns.steps += 1
        turns.loop._once()
    assert turns.steps < 100, "it waits for ever behind those who came later"


def test_49_long_answers_of_many_requests_give_way_in_turn() -> None:
    turns = Turns(max_rows=2)
    for name in ("a", "b"):
        turns.ask(name, 1, TURN + 20)
    turns.loop._once()
    turns.ask("small", 1, 3)
    turns.run()
    assert max(turns.ended["small"]) <= TURN + 4 and max(turns.ended["b"]) < 2 * TURN
    assert {len(tokens) for name in ("a", "b") for tokens in turns.answers[name]} == {TURN + 20}


def test_more_answers_than_one_request_may_have_are_refused(client: httpx.Client) -> None:
    assert ask(client, n=10**6).status_code == 400
    assert client.post("/v1/completions", json={"prompt": ["a"] * 600, "n": 2}).status_code == 400


class Scoring:
    """A scorer that gives what it is told to, or raises it."""

    attributes, revision = ("good",), "r"

    def __init__(self, score: float | Exception) -> None:
        self._score = score

    def score(self, prompts: Any, responses: Any) -> np.ndarray:
        if isinstance(self._score, Exception):
            raise self._score
        return np.full((len(responses), 1), self._score)


@pytest.mark.parametrize(
    ("score", "status"),
    [(1.5, 200), (math.inf, 200), (math.nan, 200), (EngineError("my words"), 502), (ValueError("my words"), 500)],
    ids=str,
)
def test_a_scorer_that_fails_is_said_without_a_word_of_what_it_read(
    score: Any, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with in_thread(Engine("m", None, None, "rev", Scoring(score), 1).app()) as url:
        answer = httpx.post(url + "/dpa/score", json={"messages": QUESTION, "responses": ["my words"]})
    assert answer.status_code == status and "my words" not in answer.text
    assert status != 200 or answer.json()["scores"] == [[score if math.isfinite(score) else None]]
    log = "".join(map(JsonLines().format, caplog.records))
    assert "my words" not in log and (status == 200) != (type(score).__name__ in log)


def test_the_engines_log_is_the_gateways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    monkeypatch.setattr(logging.getLogger("dpa"), "level", logging.INFO)
    monkeypatch.setattr(logging, "captureWarnings", lambda capture: None)
    for name in ("disable_default_handler", "enable_propagation"):
        monkeypatch.setattr(f"transformers.utils.logging.{name}", lambda: None)
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path / "nowhere")])
    (handler,) = root.handlers
    assert isinstance(handler.formatter, JsonLines)


def test_the_engine_answers_in_openai_shape_where_there_is_nothing(client: httpx.Client) -> None:
    for method, path, status in (("GET", "/nosuch", 404), ("GET", CHAT, 405), ("GET", "/v1/models/other", 404)):
        answer = client.request(method, path)
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert client.get("/v1/models/m").json()["id"] == "m"
    assert ask(client, best_of=3).status_code == 400
