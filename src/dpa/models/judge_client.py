"""A judge behind any OpenAI-compatible server, and the cache that replays it without a network.
Run its tests: pytest tests/test_judge.py
"""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from dpa.core.errors import ConfigError, EngineError
from dpa.core.records import stable_hash
from dpa.storage.tables import disk_error

RETRIES = 6
LONGEST_WAIT_S = 30.0
MAX_TOKENS = 16
"""A verdict is one word; a judge that reasons first needs more (`max_tokens`)."""


class ChatJudge:
    """Asks one question at a time, `together` in flight; every reply is kept in `cache` (JSON lines) by its content.

    The key of a reply is a hash of model, prompt and settings, so the same comparison is never paid for twice and a
    rerun gives the same table without a network. `base_url` None: only the cache may answer. A 429, 5xx or broken
    connection is tried again with back-off, honouring Retry-After; any other refusal is not.
    """

    def __init__(
        self,
        base_url: str | None,
        model: str,
        cache: Path,
        key: str | None = None,
        max_tokens: int = MAX_TOKENS,
        together: int = 8,
        timeout_s: float = 120.0,
        backoff_s: float = 1.0,
    ) -> None:
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"--base-url: {base_url!r} is no address; write for example http://localhost:8000/v1.")
        self.model = model
        self.calls = 0
        self._url = None if base_url is None else f"{base_url.rstrip('/')}/chat/completions"
        self._key, self._max_tokens, self._together = key, max_tokens, together
        self._timeout_s, self._backoff_s = timeout_s, backoff_s
        self._cache, self._lock = cache, threading.Lock()
        self._known = dict(_read_cache(cache))

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that the cache cannot answer, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if self._address(prompt) not in self._known]

    def ask(self, prompts: Sequence[str], progress: Callable[[int], None] = lambda count: None) -> list[str]:
        """The reply to each prompt. Raises EngineError; replies that came before it are kept."""
        missing = self.missing(prompts)
        if missing and self._url is None:
            raise EngineError(
                f"judge: {len(missing)} of {len(prompts)} verdicts are not in {self._cache}; give --base-url to ask."
            )
        if missing:
            httpx = _httpx()
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            with (
                httpx.Client(timeout=self._timeout_s, headers=headers) as client,
                ThreadPoolExecutor(self._together) as pool,
            ):
                futures = [pool.submit(self._ask, client, prompt) for prompt in missing]
                try:
                    for future in as_completed(futures):
                        future.result()
                        progress(1)
                finally:
                    for future in futures:
                        future.cancel()
        return [self._known[self._address(prompt)] for prompt in prompts]

    def _address(self, prompt: str) -> str:
        return stable_hash("judge", self.model, self._max_tokens, prompt, digits=32)

    def _body(self, prompt: str) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": self._max_tokens,
        }

    def _ask(self, client: Any, prompt: str) -> None:
        assert self._url is not None
        trouble = ""
        for attempt in range(RETRIES):
            try:
                response = client.post(self._url, json=self._body(prompt))
            except _httpx().HTTPError as error:
                trouble, wait = type(error).__name__, None
            else:
                if response.status_code == 200:
                    self._keep(prompt, _content(response))
                    return
                trouble, wait = f"status {response.status_code}", response.headers.get("Retry-After")
                if response.status_code != 429 and response.status_code < 500:
                    raise EngineError(f"judge: {self._url} refused ({trouble}: {_short(response.text)}); mend it.")
            time.sleep(_wait(wait, attempt, self._backoff_s))
        raise EngineError(f"judge: {self._url} did not answer in {RETRIES} tries ({trouble}); is it running?")

    def _keep(self, prompt: str, reply: str) -> None:
        address = self._address(prompt)
        with self._lock:
            self.calls += 1
            self._known[address] = reply
            try:
                self._cache.parent.mkdir(parents=True, exist_ok=True)
                with self._cache.open("ab") as file:
                    line = json.dumps({"key": address, "model": self.model, "reply": reply})
                    file.write(line.encode() + b"\n")
            except OSError as error:
                raise disk_error(error, self._cache, "keeping a verdict") from None


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise ConfigError('judge: it needs httpx; pip install "dpa[judge]".') from None
    return httpx


def _read_cache(file: Path) -> Iterator[tuple[str, str]]:
    """Whole lines only: one that was being written when the power went is asked again."""
    if not file.is_file():
        return
    data = file.read_bytes()
    if data and not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]
        file.write_bytes(data)
    for line in data.splitlines():
        try:
            row = json.loads(line)
            yield str(row["key"]), str(row["reply"])
        except (ValueError, KeyError, TypeError):
            continue


def _content(response: Any) -> str:
    try:
        return str(response.json()["choices"][0]["message"]["content"] or "")
    except (ValueError, KeyError, IndexError, TypeError):
        raise EngineError(
            f"judge: the server's reply is not in OpenAI's shape ({_short(response.text)}); check --base-url."
        ) from None


def _wait(retry_after: str | None, attempt: int, backoff_s: float) -> float:
    asked = float(retry_after) if retry_after and retry_after.isdigit() else 0.0
    return min(LONGEST_WAIT_S, max(asked, backoff_s * 2**attempt * random.uniform(0.5, 1.0)))


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
