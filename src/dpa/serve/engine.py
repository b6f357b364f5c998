"""A small engine that speaks OpenAI: `python -m dpa.serve.engine --model FOLDER --port 8001`.
Run its tests: pytest tests/test_engine.py

What stock `transformers serve` lacks here (docs/serving.md has the figures): seeds, many answers at once, stop strings
with any tokenizer, and a row that is free again when its client leaves. It knows nothing of directions: the model's
chat template does. It trusts whoever can reach it: the gateway listens to strangers, this listens to the gateway.
"""

import argparse
import asyncio
import json
import logging
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

from dpa.core.direction_text import shown
from dpa.core.errors import DpaError, EngineError
from dpa.core.records import Messages, Scorer
from dpa.core.reference import ModelReference
from dpa.models.batching import Row
from dpa.models.chat_template import has_system_role, render_chat
from dpa.models.files import folder_revision, resolve_model
from dpa.models.policy import context_length, default_device, load_policy
from dpa.serve.bodies import (
    TOGETHER,
    ChatBody,
    CompletionBody,
    RefusedError,
    Sampling,
    ScoreBody,
    are_token_ids,
    check_body,
    error_body,
    read_body,
)
from dpa.serve.engine_loop import EngineLoop, Job, Piece
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
    refusal,
)
from dpa.serve.seeds import nth_seed

MAX_BODY = 64_000_000  # bytes; the gateway's own limit is far below
MAX_ANSWERS = 1024  # to one request
_KEEP_ALIVE_S = 60  # the gateway lets its idle connections go long before
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
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


class Engine:
    """The HTTP side: requests become jobs, pieces of text become OpenAI's chunks."""

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
        self._tokenizer = tokenizer
        self._context = context_length(model) if model is not None else 0
        embedding: Any = model.get_input_embeddings() if model is not None else None
        self._known_tokens = len(embedding.weight) if embedding is not None else 0
        self.loop = EngineLoop(model, tokenizer, max_rows) if model is not None and tokenizer is not None else None
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
            RefusedError: _refused,
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
            raise RefusedError("scores: this engine has no reward model; start it with --reward FOLDER.")
        body = check_body(ScoreBody, await _body(request))
        messages = _messages(body.messages)
        conversations = [messages] * len(body.responses)
        work = asyncio.get_running_loop().run_in_executor(
            self._scoring, self._scorer.score, conversations, body.responses
        )
        scores_NM = await or_gone(request.receive, work)
        rows = [[None if value != value else value for value in row] for row in scores_NM.tolist()]
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
        prompts = await self._prompts(body)
        together = raw.get(TOGETHER)
        jobs, pieces = self._jobs(body, prompts, together if isinstance(together, str) else uuid.uuid4().hex)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": body.model or self._name,
            "system_fingerprint": self._revision,
        }
        self.loop.submit(jobs)
        if body.stream:
            return EventStream(self._stream(head, body, jobs, pieces), {})
        try:
            texts = await or_gone(request.receive, _collect(jobs, pieces))
        finally:
            self.loop.cancel(jobs)
        choices = []
        for index, (text, reason) in enumerate(texts):
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        return Json({**head, "choices": choices, "usage": _usage(prompts, jobs)})

    async def _stream(
        self, head: dict[str, Any], body: Sampling, jobs: Sequence[Job], pieces: "asyncio.Queue[tuple[int, Piece]]"
    ) -> AsyncGenerator[bytes, None]:
        assert self.loop is not None
        chat = isinstance(body, ChatBody)
        head = {**head, "object": "chat.completion.chunk" if chat else "text_completion"}

        def chunk(index: int, said: dict[str, Any], reason: str | None) -> bytes:
            choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
            return event({**head, "choices": [choice]})

        try:
            if chat:
                for index in range(len(jobs)):
                    yield chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)
            left = len(jobs)
            while left:
                index, piece = await pieces.get()
                if piece.failed is not None:
                    yield event(error_body(piece.failed, 500))
                    break
                if chat:
                    if piece.text:
                        yield chunk(index, {"delta": {"content": piece.text}}, None)
                    if piece.finish_reason:
                        yield chunk(index, {"delta": {}}, piece.finish_reason)
                else:
                    yield chunk(index, {"text": piece.text}, piece.finish_reason)
                left -= piece.finish_reason is not None
            if not left and (body.stream_options or {}).get("include_usage"):
                prompts = [job.row.prompt for job in jobs[:: body.n or 1]]
                yield event({**head, "choices": [], "usage": _usage(prompts, jobs)})
            yield DONE
        finally:
            self.loop.cancel(jobs)

    def _jobs(
        self, body: Sampling, prompts: Sequence[Sequence[int]], request: str
    ) -> tuple[list[Job], "asyncio.Queue[tuple[int, Piece]]"]:
        """`n` answers to each prompt, and the queue their pieces arrive in, with the number of their answer."""
        count = len(prompts) * (body.n or 1)
        if count > MAX_ANSWERS:
            raise RefusedError(
                f"n: {count} answers to one request are more than {MAX_ANSWERS}; ask for less.", param="n"
            )
        asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        seed = secrets.randbits(63) if body.seed is None else body.seed
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        jobs: list[Job] = []
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
                    seed=nth_seed(seed, len(jobs)),
                    limit=min(asked or room, room),
                    temperature=1.0 if body.temperature is None else body.temperature,
                    top_p=1.0 if body.top_p is None else body.top_p,
                )
                jobs.append(Job(row, stops, bool(body.stream), partial(_put, pieces, len(jobs)), request))
        return jobs, pieces

    async def _prompts(self, body: Sampling) -> list[list[int]]:
        """Token ids of what is to be continued, all of them ones the model knows. Raises RefusedError."""
        if isinstance(body, ChatBody):
            messages, kwargs = _messages(body.messages), body.chat_template_kwargs or {}
            ids = await asyncio.to_thread(self._encode_chat, messages, kwargs)
            return [self._known(ids, "messages")]
        assert isinstance(body, CompletionBody)
        prompt = body.prompt
        if are_token_ids(prompt):
            prompts: Any = [prompt]
        elif isinstance(prompt, list) and are_token_ids(prompt[0]):
            prompts = prompt
        else:
            texts: Any = [prompt] if isinstance(prompt, str) else prompt
            prompts = await asyncio.to_thread(self._encode_texts, texts)
        return [self._known(ids, "prompt") for ids in prompts]

    def _known(self, ids: list[int], field: str) -> list[int]:
        """The one check that every prompt passes before it reaches the model's thread."""
        if not ids:
            raise RefusedError(f"{field}: no token is in it; say something.", param=field)
        if max(ids) >= self._known_tokens or min(ids) < 0:
            strange = next(token for token in ids if not 0 <= token < self._known_tokens)
            raise RefusedError(
                f"{field}: token {shown(strange)} is beyond the model's {self._known_tokens:,}; leave it out.",
                param=field,
            )
        return ids

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        assert self._tokenizer is not None
        return self._tokenizer(texts, verbose=False)["input_ids"]

    def _encode_chat(self, messages: Messages, template_kwargs: dict[str, Any]) -> list[int]:
        assert self._tokenizer is not None
        reserved = {"conversation", "chat_template", "tokenize", "return_tensors", "tools", "documents"}
        chosen = {name: value for name, value in template_kwargs.items() if name not in reserved}
        try:
            text = render_chat(self._tokenizer, messages, **{"add_generation_prompt": True, **chosen})
        except EngineError as error:  # no process to render in
            raise RefusedError(str(error), 500) from None
        except Exception as error:  # a template may raise anything over what a client sends
            reason = " ".join(str(error).split())[:300]
            raise RefusedError(
                f"messages: the model's chat template refuses them ({reason}).", param="messages"
            ) from None
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, listen, and say `{"ready": ...}` on standard output; a user's mistake is `{"error": ...}` there."""
    parser = argparse.ArgumentParser(prog="python -m dpa.serve.engine", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="model folder or Hub id")
    parser.add_argument("--name", help="the model's name in answers; default: --model")
    parser.add_argument("--reward", help="reward model folder, for /dpa/score")
    parser.add_argument("--remote-code-revision", help="opt in to the model's own code, at this commit")
    parser.add_argument("--rows", type=int, default=32, help="answers written at once")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--uds", help="listen on this Unix socket ...")
    parser.add_argument("--port", type=int, help="... or on this port of 127.0.0.1")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    sys.setswitchinterval(0.001)  # the model's thread must not keep the event loop waiting
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        engine = _load(args)
    except DpaError as error:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}), flush=True)
        sys.exit(error.exit_code)

    def started_up() -> None:
        if engine.loop is not None:
            engine.loop.start()
        print(json.dumps({"ready": args.uds or args.port}), flush=True)

    where = {"uds": args.uds} if args.uds else {"host": "127.0.0.1", "port": args.port or 8001}
    config = uvicorn.Config(
        engine.app(),
        **where,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    Server(config, started_up).run()


def _load(args: argparse.Namespace) -> Engine:
    model = tokenizer = scorer = None
    revision = "none"
    if args.model:
        safe = resolve_model(ModelReference(args.model, args.remote_code_revision))
        device = default_device()
        narrow = device.startswith("cuda") and torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if narrow else torch.float32
        model, tokenizer = load_policy(ModelReference(safe.path, args.remote_code_revision), dtype=dtype, device=device)
        if tokenizer.chat_template:
            has_system_role(tokenizer.get_chat_template())  # a template that escapes or never ends is refused now
        revision = folder_revision(safe.path)
    if args.reward:
        from dpa.models.scorers import RewardModelScorer

        scorer = RewardModelScorer(ModelReference(args.reward, args.remote_code_revision))
    return Engine(args.name or args.model or "none", model, tokenizer, revision, scorer, args.rows)


def _messages(messages: Sequence[Any]) -> Messages:
    """Messages as chat templates take them: text content, and `system` for OpenAI's `developer`."""
    plain: list[Any] = []
    for message in messages:
        content = message.content or ""
        if not isinstance(content, str):
            if any(part.type != "text" or part.text is None for part in content):
                raise RefusedError("messages: this engine reads text only; leave other parts out.", param="messages")
            content = "".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        if role not in ("system", "user", "assistant"):
            raise RefusedError(f"messages: this engine has no role {role!r}; take system, user or assistant.")
        plain.append({"role": role, "content": content})
    return plain


def _put(pieces: "asyncio.Queue[tuple[int, Piece]]", index: int, piece: Piece) -> None:
    pieces.put_nowait((index, piece))


async def _collect(jobs: Sequence[Job], pieces: "asyncio.Queue[tuple[int, Piece]]") -> list[tuple[str, str]]:
    done: dict[int, tuple[str, str]] = {}
    while len(done) < len(jobs):
        index, piece = await pieces.get()
        if piece.failed is not None:
            raise RefusedError(piece.failed, 500)
        done[index] = piece.text, piece.finish_reason or "stop"
    return [done[index] for index in range(len(jobs))]


def _usage(prompts: Sequence[Sequence[int]], jobs: Sequence[Job]) -> dict[str, int]:
    asked, said = sum(map(len, prompts)), sum(len(job.row.tokens) for job in jobs)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


async def _body(request: Request) -> dict[str, Any]:
    return await read_body(request.stream(), request.headers.get("content-length"), MAX_BODY)


async def _refused(request: Request, error: RefusedError) -> Response:
    return refusal(error)


async def _gone(request: Request, error: ClientGoneError) -> Response:
    return Response(status_code=499)  # nobody reads it


if __name__ == "__main__":
    main()
