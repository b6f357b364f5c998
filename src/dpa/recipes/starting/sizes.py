"""Sizes of a first run: as much of the data as the hours hold, by the project's own estimate.
Run its tests: pytest tests/test_init.py
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from dpa.recipes.costs.data_sizes import DIRECTION_TOKENS, Data, Rated
from dpa.recipes.costs.devices import Device
from dpa.recipes.starting.look import FirstLook
from dpa.recipes.starting.objectives import Objectives
from dpa.storage.recognising import Recognised

SCALES = [2.0 ** (-step / 2) for step in range(17)]
"""Sizes that are tried, from the largest on: 1, 0.7, 0.5, ... 0.004 of what follows."""
RATED_PROMPTS, ONLINE_PROMPTS = 6000, 1500
LEAST_RATED_ROWS, LEAST_RATED_PROMPTS, LEAST_PROMPTS = 200, 32, 12
ROOM = 64
"""Tokens of the sentence that states a direction, and of a chat template."""
BYTES_OF_TRAINING = 18
"""A parameter trained in full: weight, gradient and two moments in fp32, and some for the activations of a row."""


@dataclass(frozen=True)
class Start:
    """The model a run begins with: as it is named, its parameters (`guessed`: nobody knows them), its context in
    tokens, and whether it is here."""

    name: str
    parameters: float
    context: int
    here: bool
    guessed: bool = False


@dataclass(frozen=True)
class Files:
    """Where things go: the configuration, the run, and the prompts taken from the data."""

    config: Path
    run: Path
    prompts: Path
    held_out: Path


@dataclass(frozen=True)
class Sizes:
    """How much of everything. `rated`: prompts of each data set (None: all); `held_out`: prompts to measure on, and the
    rows of `rated` prompts that are theirs; `cut`: rows may be longer than `max_length`; `seconds` by the estimate."""

    rated: tuple[int, ...] | None
    online: int
    held_out: int
    held_out_rows: int
    max_new_tokens: int
    max_length: int
    cut: bool
    seconds: float | None = None


@dataclass(frozen=True)
class First:
    """Everything a first configuration is written from."""

    data: Sequence[Recognised]
    look: FirstLook
    objectives: Objectives
    start: Start
    device: Device
    files: Files
    hours: float

    @property
    def held_out(self) -> list[str]:
        """Messages of the prompts to measure on: the last by their ids, so that data which are not used come first."""
        prompts = self.look.prompts
        most = round((100 if self.device.card else 30) * min(self.hours, 3))
        count = max(4, min(max(most, 8), len(prompts) // 10))
        return [messages for _, messages, _ in prompts[-count:]]

    @property
    def online(self) -> list[str]:
        """Messages of all others."""
        return [messages for _, messages, _ in self.look.prompts[: -len(self.held_out)]]

    def fit(self, seconds_of: Callable[[Sizes], float]) -> Sizes:
        """The largest sizes that the hours hold, `seconds_of` being the estimate; the smallest, if none do."""
        seconds_of = cache(seconds_of)
        sizes = list(dict.fromkeys(self.sizes(scale) for scale in SCALES))
        low, high = 0, len(sizes) - 1  # the first that fits
        while low < high:
            middle = (low + high) // 2
            if seconds_of(sizes[middle]) <= 3600 * self.hours:
                high = middle
            else:
                low = middle + 1
        return replace(sizes[low], seconds=seconds_of(sizes[low]))

    def sizes(self, scale: float) -> Sizes:
        """A share of the data, within what the data and the model have."""
        look, context = self.look, self.start.context
        count, held_out = len(look.prompts), len(self.held_out)
        rows_each = max(1, look.rows // count)
        least = max(LEAST_RATED_PROMPTS, math.ceil(LEAST_RATED_ROWS / rows_each))
        rated = int(min(count, max(RATED_PROMPTS * scale, least)))
        longest = look.row_tokens[2 if self.device.card else 1] + ROOM
        length = min(context, max(256, 64 * math.ceil(longest / 64)))
        most = 768 if self.device.card else 256 if scale > 0.1 else 128 if scale > 0.02 else 64
        answer = min(16 * math.ceil(look.response_tokens[2] / 16), most, context // 2)
        rated_of = [len(rows) if rated == count else math.ceil(rated * len(rows) / count) for rows in look.rows_in]
        measured = {prompt_id for prompt_id, _, _ in look.prompts[-held_out:]}
        used = [
            rows[prompt_id]
            for rows, some in zip(look.rows_in, rated_of, strict=True)
            for prompt_id in sorted(rows)[:some]
            if prompt_id in measured
        ]
        return Sizes(
            rated=None if rated == count else tuple(rated_of),
            online=min(count - held_out, max(LEAST_PROMPTS, int(ONLINE_PROMPTS * min(1, scale)))),
            held_out=held_out,
            held_out_rows=sum(used),
            max_new_tokens=max(16, answer),
            max_length=length,
            cut=longest > length,
        )

    def rated(self, sizes: Sizes) -> tuple[int, int]:
        """Prompts whose ratings are used, and their rows."""
        there = len(self.look.prompts)
        used = there if sizes.rated is None else sum(sizes.rated)
        return used, round(used * self.look.rows / there)

    def read(self, sizes: Sizes) -> Data:
        """What a run of these sizes reads, as the estimate takes it."""
        prompts, rows = self.rated(sizes)
        prompt, response = DIRECTION_TOKENS + self.look.mean_tokens[0], self.look.mean_tokens[1]
        return Data(Rated(rows, prompts, prompt, response), sizes.online, prompt, sizes.held_out)

    @property
    def full(self) -> bool:
        """Whether the device's memory holds a training of all weights."""
        return BYTES_OF_TRAINING * self.start.parameters < 0.8 * self.device.memory

    @property
    def iterations(self) -> int:
        """After t = 0: one more where that is cheap, or where t = 0 has nothing to choose from."""
        return 2 if self.device.card or self.single else 1

    @property
    def single(self) -> bool:
        """Whether prompts have one rated response each."""
        return self.look.rows_of_a_prompt < 2

    @property
    def last_policy(self) -> Path:
        """Where the run leaves its policy."""
        return self.files.run / f"iter_{self.iterations}" / "policy"
