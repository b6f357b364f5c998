"""A language model that judges, behind any OpenAI-compatible server: `dpa judge` and `reward.judge` ask it.
Run its tests: pytest tests/test_judge.py
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dpa.core.errors import EngineError
from dpa.core.records import JUDGE_COSTS, Messages, add_costs, stable_hash
from dpa.remote.http_exchange import Answer, Refusal, check_address
from dpa.remote.http_pool import BACKOFF_S, HttpPool
from dpa.storage.replies import Replies

MAX_TOKENS = 16
"""A verdict is one word; a judge that reasons first needs more (`max_tokens`)."""

_REQUESTS, _TOKENS_READ, _TOKENS_WRITTEN = JUDGE_COSTS
_FIRST_ONES = 3
"""So many different conversations refused before any is answered end the run instead of one after another."""
_PATH = "/chat/completions"


class ChatJudge:
    """Puts each conversation to the model at temperature 0; every reply is kept in `cache` by its content.

    The key of a reply is a hash of model, conversation and settings, so that nothing is paid for twice and a rerun
    gives the same without a network. No `servers` (base addresses, .../v1): only the cache answers. `arguments` are
    further fields of each request; None leaves one out. `fields`: where servers and key are set, for sentences.
    """

    def __init__(
        self,
        servers: Sequence[str],
        model: str,
        cache: Path,
        key: str | None = None,
        max_tokens: int = MAX_TOKENS,
        in_flight: int = 8,
        request_s: float = 120.0,
        attempts: int = 6,
        arguments: Mapping[str, Any] | None = None,
        backoff_s: float = BACKOFF_S,
        fields: tuple[str, str] = ("--base-url", "DPA_JUDGE_API_KEY"),
    ) -> None:
        for server in servers:
            check_address(server, fields[0])
        self.model, self.calls = model, 0
        self._kept, self._fields = Replies(cache), fields
        self._settings = (max_tokens, *sorted(f"{name}={value!r}" for name, value in (arguments or {}).items()))
        self._body = {"model": model, "temperature": 0.0, "max_tokens": max_tokens, **(arguments or {})}
        self._servers = [server.rstrip("/") + ("" if urlsplit(server).path.strip("/") else "/v1") for server in servers]
        self._make_pool = partial(
            HttpPool, in_flight=in_flight, request_s=request_s, attempts=attempts, key=key, backoff_s=backoff_s
        )
        self._pool: HttpPool | None = None
        self._takes_format: bool | None = None
        """Whether the servers take `response_format`; None before one was asked."""
        self._without_content = 0
        """Replies that were not in OpenAI's shape."""
        self._refused_first = 0
        """Conversations that were refused in both forms before one was answered."""

    @property
    def revision(self) -> str:
        """Names the model and its settings."""
        return stable_hash("judge", self.model, *self._settings)

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that the cache cannot answer, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if self._address(_asking(prompt)) not in self._kept.replies]

    def ask(self, prompts: Sequence[str], progress: Callable[[int], None] = lambda count: None) -> list[str]:
        """The reply to each prompt. Raises EngineError, also where a prompt is refused; earlier replies are kept."""
        replies, _ = self.converse([_asking(prompt) for prompt in prompts], progress=progress)
        texts = []
        for reply in replies:
            if isinstance(reply, Refusal):
                raise EngineError(f"judge: {self.model} refused ({reply.reason}); mend it.")
            texts.append(reply)
        return texts

    def converse(
        self,
        conversations: Sequence[Messages],
        response_format: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> tuple[list[str | Refusal], dict[str, float]]:
        """The reply to each conversation, or why the server refused it, and what was paid for them now.

        `response_format` (OpenAI's) is sent to servers that take it. Raises EngineError, RunFolderError, StorageError;
        replies that came before it are kept.
        """
        addresses = [self._address(conversation) for conversation in conversations]
        asked = dict(zip(addresses, conversations, strict=True))
        self._kept.catch_up()  # another worker may have paid for some
        missing = [address for address in asked if address not in self._kept.replies]
        if not self._servers:
            missing = [address for address in missing if address not in self._kept.refused]
            if missing:
                raise EngineError(
                    f"judge: {len(missing)} of {len(asked)} replies are not in {self._kept.file}; give "
                    f"{self._fields[0]} to ask."
                )
        costs: dict[str, float] = {}
        if missing:
            self._ask_servers({address: asked[address] for address in missing}, response_format, costs, progress)
        replies, refused = self._kept.replies, self._kept.refused
        return [replies[address] if address in replies else Refusal(refused[address]) for address in addresses], costs

    def _ask_servers(
        self,
        asked: dict[str, Messages],
        response_format: Mapping[str, Any] | None,
        costs: dict[str, float],
        progress: Callable[[int], None],
    ) -> None:
        """Ask each, keep what comes, add up its cost. The first finds out whether the format is taken."""
        pool = self._open()
        waiting = list(asked)

        def ask(addresses: list[str], with_format: bool) -> list[Answer | Refusal]:
            form = {"response_format": response_format} if with_format else {}
            whole = [{**self._body, **form, "messages": asked[address]} for address in addresses]
            bodies = [{name: value for name, value in body.items() if value is not None} for body in whole]

            def heard(place: int, answer: Answer | Refusal) -> None:
                if isinstance(answer, Refusal):
                    self._kept.keep(addresses[place], self.model, refused=answer.reason)
                    return
                add_costs(costs, _spent(answer))
                if (text := _content(answer)) is None:
                    self._without_content += 1
                    self._kept.keep(addresses[place], self.model, refused=_nothing_in(answer).reason)
                    if not self.calls and self._without_content >= _FIRST_ONES:
                        raise EngineError(f"judge: {_nothing_in(answer).reason}; check {self._fields[0]}.")
                    return
                if not self.calls:
                    pool.set_touchstone(_PATH, bodies[place])
                self.calls += 1
                self._kept.keep(addresses[place], self.model, text)
                progress(1)

            answers = pool.ask(_PATH, bodies, heard)
            return [
                _nothing_in(answer) if isinstance(answer, Answer) and _content(answer) is None else answer
                for answer in answers
            ]

        while response_format is not None and self._takes_format is None and waiting:
            # From all over: neighbours have one prompt, which may be what is refused.
            first = [waiting.pop((len(waiting) - 1) * self._refused_first // (_FIRST_ONES - 1))]
            if isinstance(ask(first, True)[0], Answer):
                self._takes_format = True
            elif isinstance(answer := ask(first, False)[0], Answer):
                self._takes_format = False
            else:
                self._refused_first += 1
                if self._refused_first == _FIRST_ONES:
                    self._refused_first = 0
                    raise EngineError(
                        f"judge: {self.model} refuses all it is asked ({answer.reason}); check {self._fields[0]}, the "
                        "model's name and its arguments."
                    )
        ask(waiting, response_format is not None and bool(self._takes_format))

    def _open(self) -> HttpPool:
        """The pool of servers, made when it is first needed; its connections close with this object, or at exit."""
        if self._pool is None:
            self._pool = self._make_pool(self._servers, key_from=self._fields[1])
            weakref.finalize(self, self._pool.close)
        return self._pool

    def _address(self, conversation: Messages) -> str:
        texts = [message["content"] for message in conversation]
        return stable_hash("judge", self.model, *self._settings, *texts, digits=32)


def _content(answer: Answer) -> str | None:
    """What the model said; None where it has no choice (a prompt that was filtered, an error with status 200)."""
    try:
        return str(answer.payload["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        return None


def _nothing_in(answer: Answer) -> Refusal:
    return Refusal(f"a server's reply is not in OpenAI's shape ({str(answer.payload)[:200]})")


def _asking(prompt: str) -> Messages:
    return [{"role": "user", "content": prompt}]


def _spent(answer: Answer) -> dict[str, float]:
    """What one answer cost, as far as its server says."""
    usage = answer.payload.get("usage") if isinstance(answer.payload, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    counts = {_TOKENS_READ: usage.get("prompt_tokens"), _TOKENS_WRITTEN: usage.get("completion_tokens")}
    known = {name: float(count) for name, count in counts.items() if isinstance(count, int) and 0 <= count < 2**63}
    return {_REQUESTS: 1.0, **known}
