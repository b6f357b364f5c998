"""What is asked: a request's body and headers, checked, steered to a direction, bounded, and made ready to be sent on.
Run its tests: pytest tests/test_gateway.py
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dpa.core.targets import Target
from dpa.serve.bodies import ChatBody, CompletionBody, DpaOptions, RefusedError, Sampling, check_body
from dpa.serve.seeds import sendable
from dpa.serve.settings import Limits, Served
from dpa.serve.steering import Steering, steer
from dpa.serve.upstream import Engines

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_NULL_IS_NOTHING = ("seed", "n", "stop", "stream_options", "best_of", "messages")


@dataclass(frozen=True)
class Asked:
    """One request, understood."""

    chat: bool
    """Whether the client speaks chat completions (else completions)."""
    body: Sampling
    options: DpaOptions
    steering: Steering
    to: str
    """The engine's route: a steered completion is asked as a chat, whose template states the direction."""
    begun: float = field(default_factory=time.monotonic)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its number of tokens."""
        return bool((self.body.stream_options or {}).get("include_usage"))


def understand(raw: dict[str, Any], headers: Sequence[str], chat: bool, served: Served, engines: Engines) -> Asked:
    """Check every field, find the direction, and bound what is asked. `headers`: the values of X-DPA-Direction.

    Raises RefusedError, DirectionError or UnknownModelError.
    """
    body: Sampling = check_body(ChatBody if chat else CompletionBody, raw)
    options = body.dpa_options or DpaOptions()
    steering = steer(raw, headers, served.space, served.name, options.outside or served.outside, served.default)
    _check_counts(body, served.limits)
    selects = options.samples > 1
    if selects:
        _check_selection(body, options, steering, served.limits.best_of, engines.scorer is not None)
    if options.base and body.stream:
        raise RefusedError("dpa_options.base: not in a stream; ask MODEL@base in a second request.")
    sent = steering.body
    if not chat and (steering.direction is not None or selects or options.base):
        sent["messages"] = [{"role": "user", "content": _one_text(sent.pop("prompt"))}]
    sent["model"] = engines.base_model if engines.asked_by(steering) is engines.base else served.upstream_model
    if body.max_completion_tokens is None and body.max_tokens is None:
        sent["max_tokens"] = served.limits.max_tokens
    if body.seed is None and options.base:
        sent["seed"] = secrets.randbits(48)
    elif body.seed is not None:
        sent["seed"] = sendable(body.seed)
    for name in _NULL_IS_NOTHING:
        if sent.get(name, 0) is None:
            del sent[name]
    to = CHAT if chat or "messages" in sent else COMPLETIONS
    if to == CHAT and not sent["messages"]:
        raise RefusedError("messages: nothing but a direction is in them; ask something.", param="messages")
    return Asked(chat, body, options, steering, to)


def _check_counts(body: Sampling, limits: Limits) -> None:
    bounds = {"max_tokens": limits.max_tokens, "max_completion_tokens": limits.max_tokens, "best_of": limits.best_of}
    for name, limit in {**bounds, "n": limits.n}.items():  # `best_of` is OpenAI's own, which travels on
        value = getattr(body, name, None)
        if isinstance(value, int | float) and value > limit:
            raise _beyond(name, value, limit)
    n, prompts = body.n or 1, _prompt_count(body)
    if n * prompts > limits.n:
        raise RefusedError(
            f"prompt: {prompts} prompts with n = {n} are {n * prompts} answers, more than {limits.n}, this "
            "server's limit for one request; send fewer at once.",
            param="prompt",
        )


def _check_selection(asked: Sampling, options: DpaOptions, steering: Steering, limit: int, scorer: bool) -> None:
    if options.samples > limit:
        raise _beyond("dpa_options", options.samples, limit, "answers sampled for one")
    if steering.direction is None or steering.source == "default":
        raise RefusedError("dpa_options: a selection needs a direction to choose by; state one.", param="dpa")
    if options.robustly and isinstance(steering.direction, Target):
        raise RefusedError("dpa_options.robust: a target has no neighbours; take best_of.", param="dpa_options")
    if not scorer:
        raise RefusedError("dpa_options: no scorer is loaded; start the gateway with --reward.")
    if (asked.n or 1) > 1:
        raise RefusedError("n: a selection returns one answer; leave n out.", param="n")


def _one_text(prompt: Any) -> str:
    text = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if not isinstance(text, str):
        raise RefusedError("prompt: with a direction it must be one text; send the others by themselves.")
    return text


def _prompt_count(body: Sampling) -> int:
    """How many texts are to be continued."""
    prompt = body.prompt if isinstance(body, CompletionBody) else ""
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def _beyond(field: str, value: float, limit: int, what: str = "this server's limit for one") -> RefusedError:
    return RefusedError(f"{field}: {value} is more than {limit}, {what} request; ask for less.", param=field)
