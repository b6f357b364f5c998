"""What an engine's answer goes on from: the token ids of a chat, of texts, or those that were sent.
Run its tests: pytest tests/test_engine.py
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpa.core.direction_text import shown
from dpa.core.errors import EngineError
from dpa.core.records import Messages
from dpa.models.policy import encode_chat
from dpa.serve.bodies import ChatBody, CompletionBody, RefusedError, Sampling, are_token_ids


class PromptReader:
    """Reads prompts for a model whose embedding has `known_tokens` rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, known_tokens: int) -> None:
        self._tokenizer, self._count = tokenizer, known_tokens

    async def read(self, body: Sampling) -> list[list[int]]:
        """Token ids of what is to be continued, all of them ones the model knows. Raises RefusedError."""
        if isinstance(body, ChatBody):
            messages, kwargs = plain_messages(body.messages), body.chat_template_kwargs or {}
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
            prompts = (await asyncio.to_thread(self._tokenizer, texts, verbose=False))["input_ids"]
        return [self._known(ids, "prompt") for ids in prompts]

    def _known(self, ids: list[int], field: str) -> list[int]:
        """The one check that every prompt passes before it reaches the model's thread."""
        if not ids:
            raise RefusedError(f"{field}: no token is in it; say something.", param=field)
        if max(ids) >= self._count or min(ids) < 0:
            strange = next(token for token in ids if not 0 <= token < self._count)
            raise RefusedError(
                f"{field}: token {shown(strange)} is beyond the model's {self._count:,}; leave it out.",
                param=field,
            )
        return ids

    def _encode_chat(self, messages: Messages, template_kwargs: dict[str, Any]) -> list[int]:
        reserved = {"conversation", "chat_template", "tokenize", "return_tensors", "tools", "documents"}
        chosen = {name: value for name, value in template_kwargs.items() if name not in reserved}
        try:
            return encode_chat(self._tokenizer, messages, **chosen)
        except EngineError as error:  # no process to render in
            raise RefusedError(str(error), 500) from None
        except Exception as error:  # a template may raise anything over what a client sends
            reason = " ".join(str(error).split())[:300]
            raise RefusedError(
                f"messages: the model's chat template refuses them ({reason}).", param="messages"
            ) from None


def plain_messages(messages: Sequence[Any]) -> Messages:
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
