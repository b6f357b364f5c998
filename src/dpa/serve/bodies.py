"""Request bodies: read within bounds, checked field by field, refused in OpenAI's shape of an error.
Run its tests: pytest tests/test_bodies.py

Fields that are not named here are OpenAI's or an engine's own: they travel on as they came.
"""

import json
import math
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import from_json

from dpa.core.errors import UserError

MAX_DEPTH = 32  # of JSON: a tool's schema, the deepest thing that is sent, has about ten levels
MAX_MESSAGES = 1024
MAX_STOPS, MAX_STOP = 16, 256
MAX_SEED = 2**63 - 1


class RefusedError(UserError):
    """A request that is answered with an error. `status` is HTTP's, `kind`, `param` and `code` are OpenAI's."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _strict_number(value: Any) -> Any:
    """A JSON number that is finite and no bool; pydantic's own coercions would change what is sent on."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("give a finite number")
    return value


def _strict_integer(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("give a whole number")
    return value


Number = Annotated[float, BeforeValidator(_strict_number)]
Count = Annotated[int, BeforeValidator(_strict_integer)]
Text = Annotated[str, StringConstraints(strict=True)]
Stop = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=MAX_STOP)]


class Open(BaseModel):
    """Fields that are not named are kept."""

    model_config = ConfigDict(extra="allow", strict=True)


class Closed(BaseModel):
    """Fields that are not named are refused: they are ours, and misspelt."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Part(Open):
    """A piece of a message's content."""

    type: Text
    text: Text | None = None


class ChatMessage(Open):
    """One message, of any role an engine knows."""

    role: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=32)]
    content: Text | list[Part] | None = None


class Robust(Closed):
    """Sample neighbouring directions too, and let the asked one choose (arXiv 2510.20498)."""

    angle: Annotated[Number, Field(gt=0, le=90)] = 10.0
    """Degrees around the asked direction."""
    neighbors: Annotated[Count, Field(ge=1, le=64)] = 4


class Options(Closed):
    """`dpa_options`."""

    outside: Literal["error", "clamp"] | None = None
    """What becomes of a direction outside the trained cone; null: the server's setting."""
    best_of: Annotated[Count, Field(ge=1, le=1024)] = 1
    """Sample so many answers and return the one the direction values most; needs a scorer."""
    robust: Robust | bool = False
    base: bool = False
    """Answer also without a direction, with the same seed, for comparison."""
    scores: bool = True
    """Score the answer's objectives, where a scorer is loaded."""


class Sampling(Open):
    """What chat completions and completions share."""

    model: Text | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    n: Annotated[Count, Field(ge=1)] | None = None
    seed: Annotated[Count, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    dpa: dict[str, Any] | Text | list[Any] | None = None
    """A direction in any form; null: no preference is stated."""
    dpa_options: Options | None = None


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Text | list[Any]


class DirectionBody(Closed):
    """POST /v1/dpa/direction."""

    direction: dict[str, Any] | Text | list[Any]
    outside: Literal["error", "clamp"] = "error"


class ScoreBody(Closed):
    """POST /dpa/score of an engine: responses to one conversation."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    responses: Annotated[list[Text], Field(min_length=1, max_length=4096)]


Body = TypeVar("Body", bound=BaseModel)


async def read_body(chunks: AsyncIterator[bytes], declared: str | None, max_bytes: int) -> dict[str, Any]:
    """The JSON object a request carries, never more than `max_bytes` of it. Raises RefusedError.

    Refused: more bytes, invalid UTF-8 or lone surrogates, anything but an object, more than MAX_DEPTH levels, NaN.
    """
    too_big = RefusedError(f"body: it is larger than this server's {max_bytes:,} bytes; send less.", 413)
    if declared is not None and (not declared.isdecimal() or int(declared[:20]) > max_bytes):
        raise too_big
    data = bytearray()
    async for chunk in chunks:
        data += chunk
        if len(data) > max_bytes:
            raise too_big
    try:
        body = from_json(bytes(data), allow_inf_nan=False)
    except ValueError as error:
        raise RefusedError(f"body: it is not JSON in UTF-8 ({str(error)[:100]}); send a JSON object.") from None
    if not isinstance(body, dict):
        raise RefusedError('body: it is not a JSON object; send one, such as {"model": ..., "messages": [...]}.')
    if _deeper_than(body, MAX_DEPTH):
        raise RefusedError(f"body: it is nested more than {MAX_DEPTH} levels deep; flatten it.")
    return body


def check_body(kind: type[Body], body: Mapping[str, Any]) -> Body:
    """The fields we read, checked. Raises RefusedError, which names the field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        places = [part for part in first["loc"] if not (isinstance(part, str) and ("[" in part or part in _BRANCHES))]
        where = ".".join(map(str, places)) or "body"
        what = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise RefusedError(f"{where}: it should be {what}.".replace("be give", "be"), param=where) from None


def to_json(value: Any) -> bytes:
    """JSON in UTF-8, compact."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


_BRANCHES = {"str", "bool", "dict", "list", "Robust", "constrained-str"}  # pydantic's names of a union's branches


def _deeper_than(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not layer:
            return False
    return True
