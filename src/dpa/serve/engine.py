"""A small engine that speaks OpenAI: `python -m dpa.serve.engine --model FOLDER --port 8001`.
Run its tests: pytest tests/test_engine.py

What stock `transformers serve` lacks here (docs/serving.md has the figures): seeds, many answers at once, stop strings
with any tokenizer, and a row that is free again when its client leaves. It knows nothing of directions: the model's
chat template does. It trusts whoever can reach it: the gateway listens to strangers, this listens to the gateway.
"""

import asyncio
import json
import logging
import math
import secrets
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dpa.core.direction_text import shown
from dpa.core.errors import ConfigError, DpaError
from dpa.core.records import Scorer
from dpa.core.reference import ModelReference
from dpa.models.chat_template import has_system_role
from dpa.models.files import folder_revision, load_space, resolve_model
from dpa.models.half_precision import computes_in_bf16
from dpa.models.policy import context_length, default_device, load_policy
from dpa.sampling.batching import Row
from dpa.serve.bodies import (
    TOGETHER,
    ChatBody,
    CompletionBody,
    RefusedError,
    Sampling,
    ScoreBody,
    check_body,
    error_body,
    read_body,
)
from dpa.serve.engine_loop import Answer, EngineLoop, Piece
from dpa.serve.http import (
    DONE,
    ClientGoneError,
    EventStream,
    Json,
    Server,
    event,
    failed,
    http_error,
    or_gone,
    refused,
)
from dpa.serve.logs import log_json, places
from dpa.serve.prompts import PromptReader, plain_messages
from dpa.serve.seeds import nth_seed
from dpa.serve.settings import EngineSettings

MAX_BODY = 64_000_000  # bytes; the gateway's own limit is far below
MAX_ANSWERS = 1024  # to one request
_KEEP_ALIVE_S = 60  # the gateway lets its idle connections go long before
_SIGN_OF_LIFE_S = 1.0
"""A stream that waits its turn says so this often while others are served: a long silence is taken for a hang."""
_WAITING = b": waiting\n\n"
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "functions": (None, []),
    "logprobs": (None, False, 0),
    "logit_bias": (None, {}),
    "echo": (None, False),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
}
"""Fields that would change the answer if they were honoured, and the values that mean nothing is asked."""
_NO_TOOL_NEEDED = (None, "auto", "none")
"""Values of `tool_choice` that an answer in words satisfies: programs (Open WebUI, say) offer tools with every chat."""

_log = logging.getLogger("dpa.serve")

Pieces = asyncio.Queue[tuple[int, Piece]]
"""Of several answers, each with the number of its answer."""


class Engine:
    """The HTTP side: requests become answers, pieces of text become OpenAI's chunks."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        revision: str,
        scorer: Scorer | None,
        max_rows: int,
    ) -> None:
        self._name, self._revision, self._scorer = name, revision, scorer
        self._context = 0
        self.loop: EngineLoop | None = None
        if model is not None and tokenizer is not None:
            self._context = context_length(model)
            embedding: Any = model.get_input_embeddings()
            self._prompts = PromptReader(tokenizer, len(embedding.weight))
            self.loop = EngineLoop(model, tokenizer, max_rows)
        self._scoring = ThreadPoolExecutor(1, "scorer")

    def app(self) -> Starlette:
        """The routes."""
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/v1/chat/completions", self._answer, methods=["POST"]),
            Route("/v1/completions", self._answer, methods=["POST"]),
            Route("/dpa/engine", self._about),
            Route("/dpa/score", self._score, methods=["POST"]),
        ]
        handlers: Any = {
            RefusedError: refused,
            ClientGoneError: _gone,
            ClientDisconnect: _gone,
            HTTPException: http_error,
            Exception: failed,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _health(self, request: Request) -> Response:
        return Json({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self._about_model()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name != self._name:
            raise RefusedError(f"model: {shown(name)} is not served here; take {self._name}.", 404, "model")
        return Json(self._about_model())

    def _about_model(self) -> dict[str, str]:
        return {"id": self._name, "object": "model", "owned_by": "dpa"}

    async def _about(self, request: Request) -> Response:
        running, waiting = self.loop.load if self.loop is not None else (0, 0)
        return Json(
            {
                "revision": self._revision,
                "context": self._context,
                "attributes": list(self._scorer.attributes) if self._scorer is not None else None,
                "running": running,
                "waiting": waiting,
            }
        )

    async def _score(self, request: Request) -> Response:
        if self._scorer is None:
            raise RefusedError("scores: this engine has no reward model; start it with --reward.")
        body = check_body(ScoreBody, await _body(request))
        messages = plain_messages(body.messages)
        conversations = [messages] * len(body.responses)
        work = asyncio.get_running_loop().run_in_executor(
            self._scoring, self._scorer.score, conversations, body.responses
        )
        try:
            scores_NM = await or_gone(request.receive, work)
        except DpaError as error:  # words about its configuration are ours; a server's answer may hold a user's
            _log.error("the scorer failed: %s", error if isinstance(error, ConfigError) else places(error))
            raise RefusedError(f"scores: the scorer failed ({type(error).__name__}).", 502) from None
        rows = [[value if math.isfinite(value) else None for value in row] for row in scores_NM.tolist()]
        return Json({"attributes": list(self._scorer.attributes), "scores": rows})

    async def _answer(self, request: Request) -> Response:
        if self.loop is None:
            raise RefusedError("model: this engine only scores; start it with --model FOLDER.")
        raw = await _body(request)
        chat = request.url.path.endswith("/chat/completions")
        body: Sampling = check_body(ChatBody if chat else CompletionBody, raw)
        for field, idle in _UNSUPPORTED.items():
            if raw.get(field) not in idle:
                raise RefusedError(f"{field}: this engine does not know it; leave it out.", param=field)
        if raw.get("tools") and raw.get("tool_choice") not in _NO_TOOL_NEEDED:
            raise RefusedError(
                'tool_choice: this engine calls no tools; take "auto" or leave it out.', param="tool_choice"
            )
        prompts = await self._prompts.read(body)
        together = raw.get(TOGETHER)
        answers, pieces = self._answers(body, prompts, together if isinstance(together, str) else uuid.uuid4().hex)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": body.model or self._name,
            "system_fingerprint": self._revision,
        }
        self.loop.submit(answers)
        if body.stream:
            return EventStream(self._stream(head, body, answers, pieces), {})
        try:
            texts = await or_gone(request.receive, _collect(answers, pieces))
        finally:
            self.loop.cancel(answers)
        choices = []
        for index, (text, reason) in enumerate(texts):
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        return Json({**head, "choices": choices, "usage": _usage(prompts, answers)})

    async def _stream(
        self, head: dict[str, Any], body: Sampling, answers: Sequence[Answer], pieces: Pieces
    ) -> AsyncGenerator[bytes, None]:
        assert self.loop is not None
        chat = isinstance(body, ChatBody)
        head = {**head, "object": "chat.completion.chunk" if chat else "text_completion"}

        def chunk(index: int, said: dict[str, Any], reason: str | None) -> bytes:
            choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
            return event({**head, "choices": [choice]})

        try:
            begun = [not chat] * len(answers)
            left = len(answers)
            while left:
                rounds = self.loop.rounds
                try:
                    async with asyncio.timeout(_SIGN_OF_LIFE_S):
                        index, piece = await pieces.get()
                except TimeoutError:
                    if self.loop.rounds > rounds:
                        yield _WAITING
                    continue
                if piece.failed is not None:
                    yield event(error_body(piece.failed, 500))
                    break
                if not begun[index]:  # not before: clients take an answer that begins for one that is being written
                    begun[index] = True
                    yield chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)
                if chat:
                    if piece.text:
                        yield chunk(index, {"delta": {"content": piece.text}}, None)
                    if piece.finish_reason:
                        yield chunk(index, {"delta": {}}, piece.finish_reason)
                else:
                    yield chunk(index, {"text": piece.text}, piece.finish_reason)
                left -= piece.finish_reason is not None
            if not left and (body.stream_options or {}).get("include_usage"):
                prompts = [answer.row.prompt for answer in answers[:: body.n or 1]]
                yield event({**head, "choices": [], "usage": _usage(prompts, answers)})
            yield DONE
        finally:
            self.loop.cancel(answers)

    def _answers(self, body: Sampling, prompts: Sequence[Sequence[int]], request: str) -> tuple[list[Answer], Pieces]:
        """`n` answers to each prompt, and the queue their pieces arrive in, with the number of their answer."""
        count = len(prompts) * (body.n or 1)
        if count > MAX_ANSWERS:
            raise RefusedError(
                f"n: {count} answers to one request are more than {MAX_ANSWERS}; ask for less.", param="n"
            )
        asked = body.max_completion_tokens or body.max_tokens
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        seed = secrets.randbits(63) if body.seed is None else body.seed
        pieces: Pieces = asyncio.Queue()
        answers: list[Answer] = []
        for ids in prompts:
            room = self._context - len(ids)
            if room < 1:
                raise RefusedError(
                    f"messages: {len(ids)} tokens fill this model's context of {self._context}; shorten them.",
                    param="messages",
                    code="context_length_exceeded",
                )
            for _ in range(body.n or 1):
                row = Row(
                    prompt=ids,
                    seed=nth_seed(seed, len(answers)),
                    limit=min(asked or room, room),
                    temperature=1.0 if body.temperature is None else body.temperature,
                    top_p=1.0 if body.top_p is None else body.top_p,
                )
                answers.append(Answer(row, stops, bool(body.stream), partial(_put, pieces, len(answers)), request))
        return answers, pieces


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, listen, and say `{"ready": ...}` on standard output; a user's mistake is `{"error": ...}` there."""
    settings = EngineSettings.of(arguments)
    log_json()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    sys.setswitchinterval(0.001)  # the model's thread must not keep the event loop waiting
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        engine = _load(settings)
    except DpaError as error:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}), flush=True)
        sys.exit(error.exit_code)

    def started_up() -> None:
        if engine.loop is not None:
            engine.loop.start()
        print(json.dumps({"ready": settings.uds or settings.port}), flush=True)

    where: dict[str, Any] = {"uds": settings.uds} if settings.uds else {"host": "127.0.0.1", "port": settings.port}
    config = uvicorn.Config(
        engine.app(),
        **where,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    Server(config, started_up).run()


def _load(settings: EngineSettings) -> Engine:
    model = tokenizer = given = None
    revision = "none"
    code = settings.remote_code_revision
    if settings.reward:
        from dpa.scoring.given_reward import GivenReward

        given = GivenReward(settings.reward, code)
        if settings.space is not None:
            given.check(load_space(settings.space))
    if settings.model:
        safe = resolve_model(ModelReference(settings.model, code))
        device = default_device()
        dtype = torch.bfloat16 if computes_in_bf16(False, device) else torch.float32
        model, tokenizer = load_policy(ModelReference(safe.path, code), dtype=dtype, device=device)
        if tokenizer.chat_template:
            has_system_role(tokenizer.get_chat_template())  # a template that escapes or never ends is refused now
        revision = folder_revision(safe.path)
    scorer = None if given is None else given.open()
    return Engine(settings.name or settings.model or "none", model, tokenizer, revision, scorer, settings.rows)


def _put(pieces: Pieces, index: int, piece: Piece) -> None:
    pieces.put_nowait((index, piece))


async def _collect(answers: Sequence[Answer], pieces: Pieces) -> list[tuple[str, str]]:
    done: dict[int, tuple[str, str]] = {}
    while len(done) < len(answers):
        index, piece = await pieces.get()
        if piece.failed is not None:
            raise RefusedError(piece.failed, 500)
        done[index] = piece.text, piece.finish_reason or "stop"
    return [done[index] for index in range(len(answers))]


def _usage(prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> dict[str, int]:
    asked, said = sum(map(len, prompts)), sum(len(answer.row.tokens) for answer in answers)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


async def _body(request: Request) -> dict[str, Any]:
    return await read_body(request.stream(), request.headers.get("content-length"), MAX_BODY)


async def _gone(request: Request, error: ClientGoneError) -> Response:
    return Response(status_code=499)  # nobody reads it


if __name__ == "__main__":
    main()
