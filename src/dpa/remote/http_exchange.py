"""One exchange with a server over HTTP: a question as JSON, its answer within bounds, and what its headers ask for.
Run its tests: pytest tests/test_http_pool.py
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from dpa.core.direction_text import shown
from dpa.core.errors import ConfigError
from dpa.core.sections.section import is_address

_CONNECT_S = 10.0
MAX_ANSWER_BYTES = 16_000_000
"""A longer answer is not read."""
LONGEST_ASKED_S = 3600.0
"""A longer Retry-After is taken for this."""


@dataclass(frozen=True)
class Answer:
    """What a server said: the JSON object or list, and the headers (lower-case names)."""

    payload: Any
    headers: dict[str, str]


@dataclass(frozen=True)
class Refusal:
    """Why a request got no answer."""

    reason: str
    status: int | None = None
    """The HTTP status where one said so."""


class TooLong(Exception):
    """The answer has more than MAX_ANSWER_BYTES."""


def client_of(httpx: Any, key: str | None) -> Any:
    """An httpx.AsyncClient that opens as many connections as it is asked for; none to this machine goes to a proxy."""
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(None, connect=_CONNECT_S)
    here = dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]"))  # None: whatever http_proxy says
    return httpx.AsyncClient(headers=headers, limits=unlimited, timeout=timeout, mounts=here)


async def exchange(client: Any, address: str, content: bytes | None) -> tuple[int, dict[str, str], bytes]:
    """POST `content` (GET where it is None) with an httpx.AsyncClient: status, headers, body. Raises TooLong."""
    async with client.stream("GET" if content is None else "POST", address, content=content) as response:
        parts, size = [], 0
        async for part in response.aiter_bytes():
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise TooLong
            parts.append(part)
        return response.status_code, dict(response.headers), b"".join(parts)


def check_address(address: str, field: str) -> None:
    """Raises ConfigError that names the `field` where this is no address of a server."""
    if not is_address(address):
        raise ConfigError(f"{field}: {shown(address)} is no address; write for example http://localhost:8000/v1.")


def key_in(variable: str | None, field: str) -> str | None:
    """The key an environment variable holds. Raises ConfigError that names the `field` where it holds none that a
    header takes; the key itself is in no sentence."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()  # a key read from a file often brings its line end
    if not key:
        raise ConfigError(f"{field}: {variable!r} is not set in the environment; set it.")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{field}: {variable!r} holds characters that no HTTP header takes; set it to the key alone.")
    return key


def key_of_first(variables: Sequence[str], field: str) -> str | None:
    """The key in the first of several environment variables that is set; None where none is. Raises as `key_in`."""
    return key_in(next((name for name in variables if os.environ.get(name)), None), field)


def retry_after(headers: dict[str, str]) -> float | None:
    """Seconds a server asks to be left alone, an hour at most: a number or a date (RFC 9110, 10.2.3)."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return min(LONGEST_ASKED_S, float(text[:9]))
    try:
        return min(LONGEST_ASKED_S, max(0.0, parsedate_to_datetime(text).timestamp() - time.time()))
    except (ValueError, OverflowError):
        return None


def brief(content: bytes) -> str:
    """What a server said, short enough for one sentence."""
    text = content[:2000].decode("utf-8", "replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = text
    fields = error_fields(said)
    message = fields.get("message", fields)
    return " ".join(own_words("" if message is None else str(message)).split())[:200]


def error_fields(body: Any) -> dict[str, Any]:
    """What an error says: {"error": {...}} as OpenAI has it, {"detail": ...} as FastAPI, {"message": ...} as
    SGLang; anything else is the `message` itself."""
    detail = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return detail if isinstance(detail, dict) else {"message": detail}


def own_words(message: str) -> str:
    """What a chat template said, without the source and the traces that llama.cpp puts before it."""
    return message.rpartition("Jinja Exception: ")[2]
