"""The engines are asked, a selection chooses, and the answer is told what was done; whole, or as a stream.
Run its tests: pytest tests/test_gateway.py

    Asked -> one body, or candidates (serve/selection.py) -> engines -> scores -> the client's shape (serve/shapes.py)
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from dpa.core.errors import DirectionError
from dpa.serve.bodies import RefusedError
from dpa.serve.selection import best_of, candidates, chosen_of, listing
from dpa.serve.settings import Served
from dpa.serve.shapes import (
    Scores,
    as_chunks,
    echo,
    first_text,
    in_clients_words,
    is_silent,
    named,
    plain_text,
    readable,
    said_in,
    texts_of,
    told,
    told_of_base,
)
from dpa.serve.understanding import CHAT, Asked
from dpa.serve.upstream import Engines, UpstreamError

_log = logging.getLogger(__name__)


class Answering:
    """Answers requests that were understood. Every method raises RefusedError, of which UpstreamError is one."""

    def __init__(self, served: Served, engines: Engines) -> None:
        self._served, self._engines = served, engines

    async def answer(self, asked: Asked) -> dict[str, Any]:
        """The client's answer (or its `n`), beside it the base model's where that was asked."""
        if asked.options.samples > 1:
            return await self._selected(asked)
        answer, *base = await self._asked(asked, [{**asked.steering.body, "stream": False}])
        return await self._told(asked, answer, base, [])

    async def stream(self, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks as they come. The first says what was done, the last how it came out, and with how many tokens.

        A selection knows its answer only when all are in: it comes as a stream of few chunks.
        """
        if asked.options.samples > 1:
            for chunk in as_chunks(asked, await self._selected(asked)):
                yield chunk
            return
        said: dict[int, list[str]] = {}
        first = True
        held: dict[str, Any] | None = None
        usage: dict[str, Any] | None = None
        engine = self._engines.asked_by(asked.steering)
        body = {**asked.steering.body, "stream": True}
        if self._engines.ours or engine is self._engines.base:  # another's may not know the field
            body["stream_options"] = {**(asked.body.stream_options or {}), "include_usage": True}
        async with aclosing(engine.stream(asked.to, body)) as chunks:
            async for chunk in chunks:
                usage = readable(chunk).get("usage") or usage
                counts_only = "usage" in chunk and not chunk.get("choices")
                if counts_only and held is not None and not asked.wants_usage:
                    continue
                for index, text in said_in(chunk):
                    said.setdefault(index, []).append(text)
                choices = chunk.get("choices")
                ending = not choices or any(choice.get("finish_reason") is not None for choice in choices)
                chunk = in_clients_words(asked, chunk, self._served.name)
                if first:
                    chunk["dpa"] = echo(asked.steering)
                if held is not None:
                    yield held
                    held = None
                if ending:  # it may be the last one, which tells more
                    held = chunk
                elif first or not is_silent(chunk):
                    yield chunk
                first = False
        if held is None:
            raise UpstreamError("upstream: its stream ended without an end; ask again.", 502)
        texts = ["".join(said[index]) for index in sorted(said)]
        rows: list[Scores] = [None] * len(texts)
        if texts and self._wants_scores(asked):
            rows = await self._named_scores(asked, texts)
        counted = {"usage": usage} if usage else {}
        yield {**held, **counted, "dpa": told(asked.steering, texts, rows)}

    async def _selected(self, asked: Asked) -> dict[str, Any]:
        """The answer the asked direction values most, of several under it or (robust) under its neighbours too."""
        direction, names = asked.steering.direction, self._served.space.names
        assert direction is not None
        wanted = candidates(asked, self._served.space, self._engines.ours)
        answers = await self._asked(asked, [one.body for one in wanted])
        answers, base = answers[: len(wanted)], answers[len(wanted) :]
        scores_NK = await self._scores(asked, [first_text(answer) for answer in answers])
        best, utility_N = best_of(direction, scores_NK)
        answer = await self._told(asked, chosen_of(answers, best), base, [named(names, scores_NK[best])])
        answer["dpa"]["candidates"] = listing(wanted, names, scores_NK, utility_N, best)
        return answer

    async def _told(
        self, asked: Asked, answer: dict[str, Any], base: list[dict[str, Any]], rows: list[Scores]
    ) -> dict[str, Any]:
        """The client's answer: its shape, its model's name, and what was done. `rows`: scores of it that are known."""
        said, plain = texts_of(answer), [text for one in base for text in texts_of(one)[:1]]
        unscored = [*said, *plain][len(rows) :]
        if unscored and self._wants_scores(asked):
            rows = [*rows, *await self._named_scores(asked, unscored)]
        else:
            rows = [*rows, *[None] * len(unscored)]
        dpa = told(asked.steering, said, rows[: len(said)])
        if base:
            dpa["base"] = told_of_base(plain[0], rows[-1]) if plain else told_of_base("", None)
        return {**in_clients_words(asked, answer, self._served.name), "dpa": dpa}

    async def _asked(self, asked: Asked, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The engine's answers to these bodies, all asked at once, and last the base model's where that was asked."""
        engine = self._engines.asked_by(asked.steering)
        work: list[Awaitable[dict[str, Any]]] = [engine.post(asked.to, body) for body in bodies]
        if asked.options.base:
            work.append(self._base_answer(bodies[0]))
        if len(work) == 1:
            return [readable(await work[0])]
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(_or_refusal(one)) for one in work]
        answers = []
        for task in running:
            answer = task.result()
            if isinstance(answer, RefusedError):
                raise answer
            answers.append(readable(answer))
        return answers

    async def _base_answer(self, sent: dict[str, Any]) -> dict[str, Any]:
        """The answer to the same question and seed, with no preference stated."""
        kwargs = {name: value for name, value in sent.get("chat_template_kwargs", {}).items() if name != "preference"}
        body = {name: value for name, value in sent.items() if name != "chat_template_kwargs"}
        if kwargs:
            body["chat_template_kwargs"] = kwargs
        if self._engines.base is None:
            return await self._engines.policy.post(CHAT, body)
        return await self._engines.base.post(CHAT, {**body, "model": self._engines.base_model})

    def _wants_scores(self, asked: Asked) -> bool:
        return asked.options.scores and self._engines.scorer is not None and asked.to == CHAT

    async def _named_scores(self, asked: Asked, texts: list[str]) -> list[Scores]:
        """The scores of answers that are there: none is lost because the scorer fails or is slow, which is logged."""
        limits = self._served.limits
        left = limits.seconds - (time.monotonic() - asked.begun)
        try:
            async with asyncio.timeout(min(limits.stall_seconds, left / 2)):
                return [named(self._served.space.names, row_K) for row_K in await self._scores(asked, texts)]
        except (RefusedError, TimeoutError) as error:
            # Without its words: they may hold a user's.
            facts = {"status": getattr(error, "status", 504)}
            _log.warning("the scorer failed; the answer goes without scores", extra={"facts": facts})
            return [None] * len(texts)

    async def _scores(self, asked: Asked, texts: list[str]) -> np.ndarray:
        """scores_NK of the objectives; NaN where the scorer could not score. Raises RefusedError that names it."""
        assert self._engines.scorer is not None
        messages = [
            {"role": message["role"], "content": plain_text(message.get("content"))}
            for message in asked.steering.body["messages"]
            if message.get("role") in ("system", "developer", "user", "assistant")
        ]
        try:
            said = await self._engines.scorer.post("/dpa/score", {"messages": messages, "responses": texts})
        except RefusedError as error:
            message = f"scorer: {str(error).removeprefix('upstream: ')}"
            raise RefusedError(message, error.status, retry_after_s=error.retry_after_s) from None
        try:
            scores_NA = np.array(said["scores"], dtype=np.float64)
            if scores_NA.shape != (len(texts), len(said["attributes"])):
                raise ValueError("a row for each answer, with a number for each attribute")
            return self._served.space.combine(scores_NA, said["attributes"])
        except (LookupError, TypeError, ValueError, OverflowError, DirectionError):
            raise RefusedError("scorer: its answer has no scores of these attributes; is it a scorer?", 502) from None


async def _or_refusal(work: Awaitable[dict[str, Any]]) -> dict[str, Any] | RefusedError:
    """The result, or the refusal as a value: a TaskGroup would wrap it."""
    try:
        return await work
    except RefusedError as error:
        return error
