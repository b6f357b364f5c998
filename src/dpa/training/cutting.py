"""A conversation that is too long for the reward model, shortened where it hurts least: at the start of its prompt.
Run its tests: pytest tests/test_reward_data.py
"""

from typing import Any

from dpa.core.records import Messages
from dpa.scoring.reward_model import encode

ANY_LENGTH = 1 << 40
"""A limit nothing reaches."""


def cut_prompt(
    tokenizer: Any, template: str | None, max_length: int, messages: Messages, response: str
) -> tuple[Messages, list[int]] | None:
    """The conversation with as much of its prompt's end as fits `max_length` tokens, and its token ids.

    The system message and the response stay whole. Of the turns the oldest goes first, a question with its answer; the
    oldest that stays loses its beginning, character by character. None where even the response and one character of
    the last question do not fit, or the template refuses the conversation.
    """
    system, turns = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    while turns:
        first, text = turns[0], turns[0]["content"].rstrip()

        def shown(start: int) -> tuple[Messages, list[int] | None]:
            rest = text[start:] + first["content"][len(text) :]  # noqa: B023
            kept: Messages = [*system, {"role": "user", "content": rest}, *turns[1:]]  # noqa: B023
            return kept, encode(tokenizer, template, max_length, [kept], [response])[0]

        low, high = 0, len(text) - 1  # the smallest start that fits lies in low..high, if one does
        if shown(high)[1] is not None:
            while low < high:
                middle = (low + high) // 2
                if shown(middle)[1] is None:
                    low = middle + 1
                else:
                    high = middle
            kept, ids = shown(high)
            assert ids is not None
            return kept, ids
        turns = turns[2:]
    return None
