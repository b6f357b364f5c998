"""Request bodies: read within bounds, checked field by field, refused in OpenAI's shape of an error.
Run its tests: pytest tests/test_bodies.py

Fields that are not named here are OpenAI's or an engine's own: they travel on as they came.
"""

import json
import math
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, from_json

from dpa.core.direction_text import shown
from dpa.core.errors import UserError

MAX_DEPTH = 32  # of JSON: a tool's schema, the deepest thing that is sent, has about ten levels
MAX_BITS = 1024  # of a whole number: beyond the floats nothing can be meant
MAX_MESSAGES = 1024
TOGETHER = "dpa_together"
"""Between the gateway and our engine: requests of one value count as one where turns are taken."""

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


def _prompt(value: Any) -> Any:
    """OpenAI's four forms of a prompt. What kind the first item is, all must be; which ids exist the engine knows."""
    if isinstance(value, str) or (isinstance(value, list) and (are_token_ids(value) or _are_prompts(value))):
        return value
    raise ValueError("give text or token ids")


def are_token_ids(value: Any) -> bool:
    """Whether it is a list of one token id or more: whole numbers that are not negative, and no booleans."""
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


def _are_prompts(items: list[Any]) -> bool:
    texts = all(isinstance(item, str) for item in items)
    return bool(items) and (texts or all(map(are_token_ids, items)))


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True)]
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

    type: Annotated[Text, Field(description='the kind of the part, such as "text"')]
    text: Annotated[Text | None, Field(description="text")] = None


class ChatMessage(Open):
    """One message, of any role an engine knows."""

    role: Annotated[
        str,
        StringConstraints(strict=True, min_length=1, max_length=32),
        Field(description='a role of 1 to 32 characters, such as "user"'),
    ]
    content: Annotated[
        Text | list[Part] | None,
        Field(description='text, or a list of parts such as {"type": "text", "text": "..."}'),
    ] = None


class Robust(Closed):
    """Sample neighbouring directions too, and let the asked one choose (arXiv 2510.20498)."""

    angle: Annotated[
        Number, Field(gt=0, le=90, description="degrees around the asked direction, above 0 and up to 90")
    ] = 10.0
    neighbors: Annotated[Count, Field(ge=1, le=64, description="a whole number from 1 to 64")] = 4


class DpaOptions(Closed):
    """`dpa_options`."""

    outside: Annotated[Literal["error", "clamp"] | None, Field(description='"error", "clamp" or null')] = None
    """What becomes of a direction outside the trained cone; null: the server's setting."""
    best_of: Annotated[Count, Field(ge=1, le=1024, description="a whole number from 1 to 1024")] = 1
    """Sample so many answers and return the one the direction values most; needs a scorer."""
    robust: Annotated[
        Robust | bool, Field(description='true, false, or a mapping such as {"angle": 10, "neighbors": 4}')
    ] = False
    base: Annotated[bool, Field(description="true or false")] = False
    """Answer also without a direction, with the same seed, for comparison."""
    scores: Annotated[bool, Field(description="true or false")] = True
    """Score the answer's objectives, where a scorer is loaded."""

    @property
    def robustly(self) -> Robust | None:
        """How a robust selection is made; None: it is none."""
        return self.robust if isinstance(self.robust, Robust) else Robust() if self.robust else None

    @property
    def samples(self) -> int:
        """Answers sampled to one request."""
        return self.best_of * (1 + self.robustly.neighbors if self.robustly else 1)


_COUNT = "a whole number from 1"
_DIRECTION = (
    "a direction: a mapping of objective to weight, a list of weights, or text; or a target, such as "
    '"helpfulness; verbosity=40"'
)
Messages = Annotated[
    list[ChatMessage],
    Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description=f'a list of 1 to {MAX_MESSAGES} messages such as {{"role": "user", "content": "..."}}',
    ),
]


class Sampling(Open):
    """What chat completions and completions share."""

    model: Annotated[Text | None, Field(description="the model's name, text")] = None
    stream: Annotated[bool | None, Field(description="true or false")] = None
    stream_options: Annotated[dict[str, Any] | None, Field(description='a mapping such as {"include_usage": true}')] = (
        None
    )
    n: Annotated[Annotated[Count, Field(ge=1)] | None, Field(description=_COUNT)] = None
    seed: Annotated[
        Annotated[Count, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None,
        Field(description="a whole number of 64 bits with its sign"),
    ] = None
    temperature: Annotated[Annotated[Number, Field(ge=0, le=2)] | None, Field(description="a number from 0 to 2")] = (
        None
    )
    top_p: Annotated[Annotated[Number, Field(gt=0, le=1)] | None, Field(description="a number above 0 and up to 1")] = (
        None
    )
    max_tokens: Annotated[Annotated[Count, Field(ge=1)] | None, Field(description=_COUNT)] = None
    max_completion_tokens: Annotated[Annotated[Count, Field(ge=1)] | None, Field(description=_COUNT)] = None
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None,
        Field(description=f"text of 1 to {MAX_STOP} characters, or a list of up to {MAX_STOPS} such texts"),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Field(description="a mapping of the chat template's variables")
    ] = None
    dpa: Annotated[
        dict[str, Any] | Text | list[Any] | None, Field(description=f"{_DIRECTION}; null states no preference")
    ] = None
    dpa_options: Annotated[DpaOptions | None, Field(description='a mapping such as {"best_of": 4}')] = None


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Messages


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Annotated[
        str | list[str] | list[int] | list[list[int]],
        BeforeValidator(_prompt),
        Field(description="text, a list of texts, a list of token ids, or a list of such lists; none of them empty"),
    ]
    best_of: Annotated[Annotated[Count, Field(ge=1)] | None, Field(description=_COUNT)] = None
    messages: Annotated[None, Field(description="left out: /v1/chat/completions takes messages, this a prompt")] = None


class DirectionBody(Closed):
    """POST /v1/dpa/direction."""

    direction: Annotated[dict[str, Any] | Text | list[Any], Field(description=_DIRECTION)]
    outside: Annotated[Literal["error", "clamp"], Field(description='"error" or "clamp"')] = "error"


class ScoreBody(Closed):
    """POST /dpa/score of an engine: responses to one conversation."""

    messages: Messages
    responses: Annotated[list[Text], Field(min_length=1, max_length=4096, description="a list of 1 to 4096 texts")]


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
    _check_values(body)
    return body


def check_body(kind: type[Body], body: Mapping[str, Any]) -> Body:
    """The fields we read, checked. Raises RefusedError, which names the field and says what it takes."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        # Of a union's branches the one that looked deepest into the value says most.
        found = max((_misfit(kind, body, one) for one in errors), key=lambda misfit: misfit[0].count("."))
        where, reason = found
        raise RefusedError(f"{where}: {reason}", param=where) from None


def to_json(value: Any) -> bytes:
    """JSON in UTF-8, compact."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _misfit(kind: type[BaseModel], body: Mapping[str, Any], error: ErrorDetails) -> tuple[str, str]:
    """The place of the field that does not fit, with dots, and what is wrong with it.

    pydantic's places name the branches of unions too: what is no key and no index of the value there is left out.
    """
    value: Any = body
    model: type[BaseModel] | None = kind
    takes, places = "a JSON object", list[str]()
    for part in error["loc"]:
        inside = part in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(part, int)
        missing = error["type"] == "missing" and part == error["loc"][-1]
        if not inside and not missing:
            continue
        field = model.model_fields.get(str(part)) if model is not None else None
        if field is not None:
            takes, model = field.description or takes, _model_in(field)
        places.append(str(part)[:100])
        value = None if missing else value[part]
    where = ".".join(places) or "body"
    if error["type"] == "missing":
        return where, f"it is missing; give {takes}."
    if error["type"] == "extra_forbidden":
        fields = ", ".join(model.model_fields) if model is not None else ""
        return where, f"it is unknown here; take one of {fields}."
    return where, f"{_brief(value)} does not fit; it should be {takes}."


def _brief(value: Any) -> str:
    """A value as JSON's reader knows it, short."""
    names = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return names[value]
    if isinstance(value, list) and len(value) > 6:
        return f"a list of {len(value)}"
    text = shown(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _model_in(field: FieldInfo) -> type[BaseModel] | None:
    """The model among a field's types."""
    waiting = [field.annotation]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        waiting += get_args(kind)
    return None


def _finite(value: int | float) -> bool:
    return value.bit_length() <= MAX_BITS if isinstance(value, int) else math.isfinite(value)


def _check_values(body: dict[str, Any]) -> None:
    """Refuse what could not be sent on: too many levels, and numbers beyond the floats (JSON's 1e999 is infinite)."""
    layer: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        items = [item for outer in layer for item in (outer.values() if isinstance(outer, dict) else outer)]
        if not all(_finite(item) for item in items if isinstance(item, int | float)):
            raise RefusedError("body: a number in it is beyond the floats (1.8e308); send smaller ones.")
        layer = [item for item in items if isinstance(item, dict | list)]
        if not layer:
            return
    raise RefusedError(f"body: it is nested more than {MAX_DEPTH} levels deep; flatten it.")
