"""How a policy is asked: the one place where messages and a direction become token ids, whatever engine samples.
Run its tests: pytest tests/test_samplers.py tests/test_http_sampler.py
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpa.core.directions import DirectionSpace
from dpa.core.records import Messages, SampleRequest
from dpa.core.targets import Held
from dpa.models.files import SafeModel
from dpa.models.policy import encode_prompt, encode_prompts, load_prompting, make_steerable


@dataclass(frozen=True)
class Prompting:
    """A policy's tokenizer, whose chat template is made steerable over `space`, its `context` in tokens, and the tokens
    that end its answers. May be used by several threads."""

    tokenizer: PreTrainedTokenizerBase
    space: DirectionSpace
    context: int
    end_ids: tuple[int, ...]
    _alone: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        make_steerable(self.tokenizer, self.space)

    @classmethod
    def of(cls, policy: SafeModel, space: DirectionSpace) -> "Prompting":
        """That of a checked folder; its weights are not loaded. Raises ModelFileError."""
        tokenizer, context, end_ids = load_prompting(policy)
        return cls(tokenizer, space, context, end_ids)

    def encode(
        self, messages: Messages, direction: Sequence[float] | None, held: Held | None = None
    ) -> tuple[int, ...]:
        """Token ids of a prompt that states a direction or, with `held` values, a target; none where it cannot be
        written or leaves no room for an answer."""
        try:
            with self._alone:  # a fast tokenizer borrows itself
                ids = encode_prompt(self.tokenizer, self.space, messages, direction, held)
        except (TemplateError, KeyError, TypeError, UnicodeError):
            return ()
        return tuple(ids) if len(ids) < self.context else ()

    def encode_all(self, requests: Sequence[SampleRequest]) -> list[tuple[int, ...]]:
        """`encode` of each request, together."""
        try:
            with self._alone:
                asked = [(request.messages, request.direction, request.held) for request in requests]
                found = encode_prompts(self.tokenizer, self.space, asked)
        except (KeyError, TypeError, UnicodeError):  # of one of them
            return [self.encode(*one) for one in asked]
        return [tuple(ids) if ids is not None and len(ids) < self.context else () for ids in found]

    def room(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """Tokens an answer may have."""
        return min(max_new_tokens, self.context - prompt_tokens)

    def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        with self._alone:
            return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
