"""From tokens to text while they come: whole characters only, and nothing of a stop string.
Run its tests: pytest tests/test_engine.py
"""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what an unfinished character decodes to


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a whole answer."""
    text: Any = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class TextStream:
    """The text of one answer, piece by piece; joined, the pieces are the decoding of all its tokens up to a stop.

    A piece is held back while it ends within a character, or in what may become one of `stops`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self.stopped = False
        """Whether a stop string was met; it and what follows is not part of the text."""
        self.text = ""
        """All that is certain so far."""
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(skip_special_tokens=True) if self._backend is not None else None
        self._ids: list[int] = []
        self._decoded = 0  # characters of the decoding so far
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain once this token has come."""
        self._ids.append(token)
        piece = self._next(token)
        self._decoded += len(piece)
        return self._certain(self._past_stops(piece)) if piece else ""

    def finish(self) -> str:
        """What is left when no token follows."""
        if self.stopped:
            return ""
        piece = self._past_stops(decoded(self._tokenizer, self._ids)[self._decoded :])
        piece, self._held = piece + self._held, ""
        return self._certain(piece)

    def _next(self, token: int) -> str:
        if self._stream is not None:
            try:
                return self._stream.step(self._backend, token) or ""
            except Exception:  # bytes that are no character changed what is before them: no stream can follow that
                self._stream = None
        text = decoded(self._tokenizer, self._ids)
        return "" if text.endswith(_BROKEN) else text[self._decoded :]

    def _certain(self, piece: str) -> str:
        self.text += piece
        return piece

    def _past_stops(self, piece: str) -> str:
        text = self._held + piece
        found = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._held = text[-size:]
                return text[:-size]
        self._held = ""
        return text
