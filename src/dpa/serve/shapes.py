"""OpenAI's shapes: answers and chunks that say what was done (`dpa`), and errors.
Run its tests: pytest tests/test_gateway.py
"""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dpa.core.errors import DirectionError
from dpa.core.targets import Target, Wish
from dpa.serve.bodies import ChatBody, CompletionBody, DirectionBody, RefusedError, error_body
from dpa.serve.http import Json, failed, http_error, refused
from dpa.serve.steering import Steering, UnknownModelError
from dpa.serve.understanding import CHAT, Asked
from dpa.serve.upstream import UpstreamError

Handler = Callable[[Request, Exception], Awaitable[Response]]
Scores = dict[str, float] | None
"""An answer's objectives by name; None: it was not scored, or could not be."""
TOKEN_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
"""What OpenAI's `usage` counts."""
MAX_COUNT = 2**53
"""Whole numbers up to this are exact as floats, which counters are."""

# --- answers -----------------------------------------------------------------------------------------------------


def direction_json(direction: Wish) -> dict[str, Any]:
    """A direction as the page and clients read it; a target has the values it holds beside its weights."""
    held = {"held": direction.values} if isinstance(direction, Target) else {}
    return {"weights": dict(zip(direction.space_names, direction.weights, strict=True)), **held, "text": str(direction)}


def echo(steering: Steering) -> dict[str, Any]:
    """What was made of the request's statements."""
    said = {"text": None, "weights": None} if steering.direction is None else direction_json(steering.direction)
    return {
        "direction": said.pop("text"),
        **said,
        "source": steering.source,
        "ignored": [asdict(one) for one in steering.ignored],
        "clamped": steering.clamped,
    }


def named(names: tuple[str, ...], row_K: np.ndarray) -> Scores:
    """Scores by the objectives' names."""
    return dict(zip(names, map(float, row_K), strict=True)) if np.isfinite(row_K).all() else None


def readable(answer: dict[str, Any]) -> dict[str, Any]:
    """An engine's answer or chunk, contents that come in parts as one text, counts that are none left out. Raises
    UpstreamError where it is not shaped as OpenAI's: an engine at a URL is anybody's."""
    choices, usage = answer.get("choices"), answer.get("usage")
    well = isinstance(choices, list | None) and all(map(_is_choice, choices or ())) and isinstance(usage, dict | None)
    if not well:
        raise UpstreamError("upstream: its answer has choices of another kind; is it an OpenAI-compatible server?", 502)
    for choice in choices or ():
        for part in filter(None, (choice.get("message"), choice.get("delta"))):
            if isinstance(part.get("content"), list):
                part["content"] = plain_text(part["content"])
    for name in TOKEN_COUNTS:  # no answer is lost because its tokens are not to be counted
        if usage and not _is_count(usage.get(name)):
            usage.pop(name, None)
    return answer


def _is_count(value: Any) -> bool:
    """Whether a number of tokens is one."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _is_choice(choice: Any) -> bool:
    if not isinstance(choice, dict) or not isinstance(choice.get("index"), int | None):
        return False
    parts = [choice.get("message"), choice.get("delta")]
    contents = [part.get("content") for part in parts if isinstance(part, dict)]
    return (
        isinstance(choice.get("text"), str | None)
        and all(isinstance(part, dict | None) for part in parts)
        and all(isinstance(content, str | list | None) for content in contents)
    )


def plain_text(content: Any) -> str:
    """A message's content as text: that of its parts, where it has any."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content or ""


def texts_of(answer: dict[str, Any]) -> list[str]:
    """What the choices say, in order. Raises UpstreamError."""
    choices = answer.get("choices")
    if choices is None:
        raise _no_choices()
    return [choice.get("text") or (choice.get("message") or {}).get("content") or "" for choice in choices]


def first_text(answer: dict[str, Any]) -> str:
    """What its first choice says. Raises UpstreamError where it has none."""
    texts = texts_of(answer)
    if not texts:
        raise _no_choices()
    return texts[0]


def _no_choices() -> UpstreamError:
    return UpstreamError("upstream: its answer has no choices; is it an OpenAI-compatible server?", 502)


def told(steering: Steering, texts: list[str], rows: list[Scores]) -> dict[str, Any]:
    """`dpa` of an answer that says these texts, scored so: what was done, and how it came out."""
    lengths = [len(text.split()) for text in texts]
    dpa = {**echo(steering), "scores": rows[0] if texts else None, "words": lengths[0] if texts else 0}
    if len(texts) > 1:
        dpa["choices"] = [{"scores": row, "words": words} for row, words in zip(rows, lengths, strict=True)]
    return dpa


def told_of_base(text: str, row: Scores) -> dict[str, Any]:
    """`dpa.base`: what the model answered that was told no direction."""
    return {"content": text, "scores": row, "words": len(text.split())}


def in_clients_words(asked: Asked, answer: dict[str, Any], name: str) -> dict[str, Any]:
    """An answer or a chunk in the shape and under the model's name the client knows; `name` is the served one."""
    if not asked.chat and asked.to == CHAT:
        answer = _as_completion(answer)
    return {**answer, "model": asked.body.model or name}


# --- streams -----------------------------------------------------------------------------------------------------


def as_chunks(asked: Asked, answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A whole answer as a stream of few chunks."""
    dpa, usage = answer.pop("dpa"), answer.pop("usage", None)
    choices, ends = answer.pop("choices"), []
    for choice in choices:
        message = choice.pop("message", None)
        choice.pop("logprobs", None)
        choice.update({"delta": message} if message is not None else {})
        reason, choice["finish_reason"] = choice.get("finish_reason"), None
        nothing: dict[str, Any] = {"delta": {}} if asked.chat else {"text": ""}
        ends.append({"index": choice.get("index", 0), **nothing, "finish_reason": reason})
    head = {**answer, "object": "chat.completion.chunk" if asked.chat else "text_completion"}
    yield {**head, "choices": choices, "dpa": echo(asked.steering)}
    counted = {"usage": usage} if usage else {}
    if counted and asked.wants_usage:
        yield {**head, "choices": ends}
        yield {**head, "choices": [], **counted, "dpa": dpa}
    else:
        yield {**head, "choices": ends, **counted, "dpa": dpa}


def said_in(chunk: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """What a chunk adds to each choice it names, by the choice's number."""
    for choice in chunk.get("choices") or ():
        yield choice.get("index") or 0, choice.get("text") or (choice.get("delta") or {}).get("content") or ""


def is_silent(chunk: dict[str, Any]) -> bool:
    """Whether a chunk of completions says nothing."""
    return chunk.get("object") == "text_completion" and all(
        not choice.get("text") for choice in chunk.get("choices") or ()
    )


def _as_completion(answer: dict[str, Any]) -> dict[str, Any]:
    """A chat answer, or a chunk of one, in the shape of completions."""
    choices = []
    for choice in answer.get("choices") or ():
        text = (choice.get("message") or choice.get("delta") or {}).get("content") or ""
        rest = {name: value for name, value in choice.items() if name not in ("message", "delta")}
        choices.append({**rest, "text": text})
    return {**answer, "object": "text_completion", "choices": choices}


# --- errors ------------------------------------------------------------------------------------------------------


def too_slow(limit: float) -> UpstreamError:
    """The answer to a request that took longer than `limit` seconds."""
    return UpstreamError(f"server: the answer took longer than {limit:g} seconds; ask for less.", 504)


def _answered(status: int, param: str | None = None, code: str | None = None, words: str = "") -> Handler:
    async def handler(request: Request, error: Exception) -> Response:
        return Json(error_body(words or str(error), status, param, code), status)

    return handler


HANDLERS: dict[type[Exception], Handler] = {
    RefusedError: refused,
    DirectionError: _answered(400, "dpa", "invalid_direction"),
    UnknownModelError: _answered(404, "model", "model_not_found"),
    HTTPException: http_error,
    RequestValidationError: _answered(422, words="request: it cannot be read; see /openapi.json."),
    Exception: failed,
}
"""What answers each error of a route."""

_STATUSES = {
    400: "The request cannot be used; the message names the field",
    401: "The key is missing or wrong",
    403: "Another site's page may not use this gateway",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "Too many requests in flight; Retry-After says when to ask again",
    502: "The engine failed",
    503: "The engine is starting, or the gateway is shutting down",
    504: "The engine took too long",
}
_FIELDS = {"message": "string", "type": "string", "param": ["string", "null"], "code": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": list(_FIELDS),
    "properties": {name: {"type": kind} for name, kind in _FIELDS.items()},
}
_ERROR_CONTENT = {
    "application/json": {"schema": {"type": "object", "required": ["error"], "properties": {"error": _ERROR}}}
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": _ERROR_CONTENT} for status, text in _STATUSES.items()
}
"""The errors' description for OpenAPI, by status."""


def request_schema(kind: type[DirectionBody] | type[ChatBody] | type[CompletionBody]) -> dict[str, Any]:
    """The body's description for OpenAPI; it is read by `read_body`, which bounds it first."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    inlined = _inline(schema, definitions)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined}}}}


def _inline(value: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_inline(item, definitions) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _inline(definitions[value["$ref"].rpartition("/")[2]], definitions)
    return {name: _inline(item, definitions) for name, item in value.items()}
