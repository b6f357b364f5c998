"""From tokens to text while they come: whole characters only, and nothing of a stop string.
Run its tests: pytest tests/test_engine.py
"""

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what an unfinished character decodes to


class TextStream:
    """The text of one answer, piece by piece; joined, the pieces are the decoding of all its tokens up to a stop.

    A piece is held back while it ends within a character, or in what may become one of `stops`.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self.stopped = False
        """Whether a stop string was met; it and what follows is not part of the text."""
        self.text = ""
        """All that is certain so far."""
        self._decode, self._stops = decode, tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._ids: list[int] = []
        self._from, self._read = 0, 0  # a window: text before `_read` is out, decoding starts at `_from`
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain once this token has come."""
        self._ids.append(token)
        text = self._decode(self._ids[self._from :])
        if text.endswith(_BROKEN):
            return ""
        before = len(self._decode(self._ids[self._from : self._read]))
        if len(text) <= before:
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._certain(self._past_stops(text[before:]))

    def finish(self) -> str:
        """What is left when no token follows."""
        if self.stopped:
            return ""
        text = self._decode(self._ids[self._from :])
        before = len(self._decode(self._ids[self._from : self._read]))
        self._read = self._from = len(self._ids)
        piece = self._past_stops(text[before:])
        piece, self._held = piece + self._held, ""
        return self._certain(piece)

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
