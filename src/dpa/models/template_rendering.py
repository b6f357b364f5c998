"""What a chat template makes of a conversation, rendered in a process of its own with limits on time and memory.
Run its tests: pytest tests/test_chat_template.py

A template or a request of strangers may ask for work without an end (template_worker.py is that process).
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import SecurityError
from transformers import PreTrainedTokenizerBase

from dpa.core.errors import EngineError
from dpa.models import template_worker
from dpa.models.template_worker import CPU_S

TOGETHER = 64
"""Conversations in one question to the process that renders."""


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], **variables: Any) -> str:
    """The text that the tokenizer's chat template makes of messages, as `apply_chat_template(tokenize=False)` would.

    Messages and variables are plain JSON values. Raises jinja2.TemplateError, of which SecurityError says that a limit
    or the sandbox ended it.
    """
    given = {**_variables(tokenizer), **variables, "messages": _plain(messages)}
    return render(str(tokenizer.get_chat_template()), given)


def render_chats(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Any]],
    variables: Sequence[Mapping[str, Any]] | None = None,
) -> list[str | None]:
    """What `render_chat` makes of each conversation, with variables of its own, None where it raises TemplateError.
    Many are asked for at once."""
    template, common = str(tokenizer.get_chat_template()), _variables(tokenizer)
    own = [{}] * len(chats) if variables is None else variables
    each = [{**given, "messages": _plain(messages)} for messages, given in zip(chats, own, strict=True)]
    texts: list[str | None] = []
    for start in range(0, len(each), TOGETHER):
        part = each[start : start + TOGETHER]
        try:
            texts += _ask({"template": template, "variables": common, "chats": part})["texts"]
        except TemplateError:  # of one of them, or a limit that they reach together
            for chat in part:
                try:
                    texts.append(render(template, {**common, **chat}))
                except TemplateError:
                    texts.append(None)
    return texts


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of a template over plain JSON values, within the limits of template_worker.py.

    Raises jinja2.TemplateError or SecurityError, EngineError when no process can be started.
    """
    return _ask({"template": template, "variables": variables})["text"]


def _plain(messages: Sequence[Any]) -> list[dict[str, Any]]:
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def _variables(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"tools": None, "documents": None, "add_generation_prompt": False, **tokenizer.special_tokens_map}


def _ask(question: Mapping[str, Any]) -> dict[str, Any]:
    asked = json.dumps(question, ensure_ascii=False).encode("utf-8", "surrogatepass")
    answer = json.loads(_RENDERER.ask(asked).decode("utf-8", "surrogatepass"))
    if "error" not in answer:
        return answer
    raise (TemplateError if answer["kind"] == "template" else SecurityError)(answer["error"])


class _Renderer:
    """The one template worker of this process, started when it is first asked and again after it was stopped."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """In the child of a fork: the worker is its parent's."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: bytes) -> bytes:
        """The answer to one line. Raises SecurityError when the worker was stopped over it, EngineError."""
        with self._lock:
            for _ in range(2):  # the machine may have ended an idle worker: then another is asked
                answer, code = self._ask(line)
                if code is None:
                    return answer
                if code == -signal.SIGPROF:
                    raise SecurityError(f"the chat template works for longer than {CPU_S:g} s, or without an end")
            raise SecurityError(f"the process that renders the chat template ended with code {code}")

    def _ask(self, line: bytes) -> tuple[bytes, int | None]:
        """The answer, or the exit code of a worker that ended before it."""
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        answer = b""
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            pass
        except BaseException:  # a Ctrl-C between question and answer: the next one must not read this one's
            self._stop()
            raise
        if answer.endswith(b"\n"):
            if b'"kind": "memory"' in answer[-40:]:
                self._stop()
            return answer, None
        code = process.wait()
        self._stop()
        return b"", code

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(template_worker.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent
            )
        except OSError as error:
            raise EngineError(f"chat template: the process that renders it cannot be started ({error}).") from None

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                with suppress(OSError):  # what was not read by the worker any more
                    stream.close()
        self._process = None


_RENDERER = _Renderer()
atexit.register(_RENDERER._stop)
os.register_at_fork(after_in_child=_RENDERER.forget)
