"""The first look at rated data: how much there is, what the marks say, which of them pull against each other.
Run its tests: pytest tests/test_init.py
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpa.core.errors import DataError
from dpa.stages.judge import CHARACTERS_PER_TOKEN
from dpa.stages.ratings import Ratings, read_ratings
from dpa.storage.console import print_table
from dpa.storage.recognising import Recognised
from dpa.storage.schemas import SCORES, name_taken, number_matrix
from dpa.storage.stage_records import count_reasons

LENGTH = "length"
"""The logarithm of a response's words, beside the marks in correlations."""
MEASURED_LENGTHS = 2000
"""Rows whose lengths are counted in tokens, evenly over the data."""
FEW_ROWS = 20
"""Rows that a correlation must rest on."""


@dataclass(frozen=True)
class Mark:
    """A mark on its own scale: least and largest one given, how many different ones, and the share of rows without."""

    name: str
    scale: tuple[float, float]
    low: float
    high: float
    steps: int
    mean: float
    missing: float


@dataclass(frozen=True)
class Correlation:
    """Pearson's r of two marks over `rows`; `within`: of what differs between the responses to a prompt."""

    first: str
    second: str
    r: float
    rows: int
    within: bool


@dataclass(frozen=True)
class FirstLook:
    """What rated data hold. Prompts are (id, messages, rated rows) by their ids, an order that is as good as drawn.

    `prompt_tokens`, `response_tokens`: 5%, 50%, 95% and largest; `in_tokens`: of the start policy, not guessed.
    """

    rows: int
    prompts: list[tuple[str, str, int]]
    rows_in: list[dict[str, int]]
    """Of each data set: prompt id -> rated rows."""
    marks: list[Mark]
    correlations: list[Correlation]
    rejects: int
    reject_rates: tuple[float, ...]
    """Share of bad rows of each data set."""
    reasons: str
    first_reject: str
    trapped: int
    unrated: int
    duplicates: int
    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]
    row_tokens: tuple[int, ...]
    """Of prompt and response together: 50%, 90%, 99% and largest."""
    mean_tokens: tuple[float, float]
    """Of a prompt and of a response."""
    in_tokens: bool

    @property
    def rows_of_a_prompt(self) -> int:
        """The usual number of rated responses of a prompt."""
        return int(np.median([rows for _, _, rows in self.prompts]))

    def correlation(self, first: str, second: str) -> float | None:
        """r of two names; None where it is not known."""
        return self._r.get(frozenset((first, second)))

    @cached_property
    def _r(self) -> dict[frozenset[str], float]:
        return {frozenset((one.first, one.second)): one.r for one in self.correlations}


def look_at(data: Sequence[Recognised], count: Callable[[Sequence[str]], list[int]] | None) -> FirstLook:
    """Read the data as a run does. `count`: tokens of texts; None: guessed by their characters. Raises DataError."""
    parts = [read_ratings([one.config.model_copy(update={"max_reject_rate": 1.0})]) for one in data]
    for one, part in zip(data, parts, strict=True):
        if len(part.rejects) > part.table.num_rows:
            raise DataError(
                f"data: {len(part.rejects):,} of {part.table.num_rows + len(part.rejects):,} rows of {one.config.path} "
                f"are bad ({count_reasons(part.rejects, most=3)}); mend them first."
            )
    ratings = Ratings(
        pa.concat_tables([part.table for part in parts], promote_options="default"),
        {name: scale for part in parts for name, scale in part.scales.items()},
        [bad for part in parts for bad in part.rejects],
        sum(part.trapped for part in parts),
    )
    table, names = ratings.table, list(ratings.attributes)
    ids, texts, responses = (table[name].to_pylist() for name in ("prompt_id", "messages", "response"))
    given_NM = number_matrix(table, names)
    some_M = (~np.isnan(given_NM)).any(axis=0)
    names = [name for name, some in zip(names, some_M, strict=True) if some]
    marks_NM = given_NM[:, some_M]
    if not names:
        raise DataError("data: no row has a mark; rate the responses with numbers first.")
    if taken := name_taken(SCORES, names):
        raise DataError(
            f"data: a mark cannot be called {taken!r}, as a column of scores is; rename it in the file, or name the "
            "other marks with --mark."
        )
    rows_of = Counter(ids)
    messages_of = dict(zip(ids, texts, strict=True))
    lengths_N = np.log1p([len(response.split()) for response in responses])
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(len(ids), MEASURED_LENGTHS)).astype(int))
    counted = count or (lambda some: [math.ceil(len(text) / CHARACTERS_PER_TOKEN) for text in some])
    asked = counted(["\n".join(message["content"] for message in json.loads(texts[place])) for place in chosen])
    answered = counted([responses[place] for place in chosen])
    return FirstLook(
        rows=len(ids),
        prompts=[(prompt_id, messages_of[prompt_id], rows_of[prompt_id]) for prompt_id in sorted(rows_of)],
        rows_in=[Counter(part.table["prompt_id"].to_pylist()) for part in parts],
        marks=[_mark(ratings, name, marks_N) for name, marks_N in zip(names, marks_NM.T, strict=True)],
        correlations=_correlations([*names, LENGTH], np.column_stack([marks_NM, lengths_N]), ids),
        rejects=len(ratings.rejects),
        reject_rates=tuple(len(part.rejects) / (len(part.rejects) + part.table.num_rows) for part in parts),
        reasons=count_reasons(ratings.rejects, most=3) if ratings.rejects else "",
        first_reject=f"{ratings.rejects[0].id}: {ratings.rejects[0].reason}" if ratings.rejects else "",
        trapped=ratings.trapped,
        unrated=int(np.isnan(marks_NM).all(axis=1).sum()),
        duplicates=len(ids) - len(set(zip(ids, responses, strict=True))),
        prompt_tokens=_quantiles(asked, (0.05, 0.5, 0.95, 1)),
        response_tokens=_quantiles(answered, (0.05, 0.5, 0.95, 1)),
        row_tokens=_quantiles([sum(pair) for pair in zip(asked, answered, strict=True)], (0.5, 0.9, 0.99, 1)),
        mean_tokens=(float(np.mean(asked)), float(np.mean(answered))),
        in_tokens=count is not None,
    )


def print_look(look: FirstLook, data: Sequence[Recognised], console: Console) -> None:
    """The look, for people."""
    for one in data:
        console.print(f"{one.config.path}: {one.said}", highlight=False, markup=False)
        if one.unread:
            names = ", ".join(one.unread[:12])
            console.print(f"  not read: {names}", highlight=False, markup=False)
    each = look.rows_of_a_prompt
    console.print(
        f"\n{look.rows:,} rated responses to {len(look.prompts):,} prompts, usually {each} a prompt", highlight=False
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("mark", "scale", "given", "steps", "mean", "missing"):
        table.add_column(heading, justify="left" if heading == "mark" else "right", no_wrap=True)
    for mark in look.marks:
        scale, given = (f"{low:g} to {high:g}" for low, high in (mark.scale, (mark.low, mark.high)))
        table.add_row(Text(mark.name), scale, given, _steps(mark.steps), f"{mark.mean:.2f}", f"{mark.missing:.0%}")
    print_table(table, console)
    _print_correlations(look, console)
    for what, found in (("prompts", look.prompt_tokens), ("responses", look.response_tokens)):
        console.print(
            f"{what}: {found[1]:,} tokens in the middle, {found[0]:,} to {found[2]:,} for nine of ten, {found[3]:,} at "
            "most",
            highlight=False,
        )
    if not look.in_tokens:
        console.print(
            f"  (tokens guessed, {CHARACTERS_PER_TOKEN:g} characters each: the policy's tokenizer is not here)",
            highlight=False,
        )
    for count, text in (
        (look.rejects, f"bad rows, left out: {look.reasons} (first at {look.first_reject})"),
        (
            look.duplicates,
            "rows repeat a prompt and its response; they are kept and count as often as they stand there",
        ),
        (look.unrated, "rows have no mark"),
        (look.trapped, "UltraFeedback overall scores of 10 are not believed (docs/data.md)"),
    ):
        if count:
            console.print(f"{count:,} {text}", highlight=False, markup=False)


def _print_correlations(look: FirstLook, console: Console) -> None:
    known = sorted(look.correlations, key=lambda one: one.r)
    if not known:
        console.print("correlations: too few rows to say", highlight=False)
        return
    within = any(one.within for one in known)
    where = "between responses to the same prompt" if within else "over all rows"
    console.print(f"correlations {where}, the most negative first:", highlight=False)
    shown = known if len(known) <= 8 else [*known[:5], *known[-3:]]
    for one in shown:
        alone = "" if one.within == within else " (over all rows)"
        console.print(f"  {one.r:+.2f}  {one.first} and {one.second}{alone}", highlight=False, markup=False)
    if len(shown) < len(known):
        console.print(f"  ... and {len(known) - len(shown)} between these", highlight=False)


def _mark(ratings: Ratings, name: str, marks_N: np.ndarray) -> Mark:
    low, high = ratings.scales[name]
    values = marks_N[~np.isnan(marks_N)]
    own = values if (low, high) == (0, 100) else values * (high - low + 1) / 100 + low - 0.5
    own = own.round(6)
    missing = 1 - own.size / marks_N.size
    return Mark(name, (low, high), float(own.min()), float(own.max()), np.unique(own).size, float(own.mean()), missing)


def _correlations(names: Sequence[str], marks_NM: np.ndarray, ids: Sequence[str]) -> list[Correlation]:
    """Of every pair, pooled within prompts where enough rows have another of their prompt beside them."""
    _, group_N = np.unique(np.array(ids), return_inverse=True)
    found = []
    for i, j in combinations(range(len(names)), 2):
        both_N = ~np.isnan(marks_NM[:, [i, j]]).any(axis=1)
        values_N2, group = marks_NM[both_N][:, [i, j]], group_N[both_N]
        sizes = np.bincount(group, minlength=group_N.max() + 1)
        several = sizes[group] > 1
        means = np.column_stack([np.bincount(group, column, sizes.size) for column in values_N2.T])
        inside = (values_N2 - means[group] / np.maximum(sizes[group], 1)[:, None])[several]
        for rows, within in ((inside, True), (values_N2, False)):
            if len(rows) >= FEW_ROWS and (rows.std(axis=0) > 1e-9).all():
                r = float(np.corrcoef(rows.T)[0, 1])
                found.append(Correlation(names[i], names[j], r, len(rows), within))
                break
    return found


def _quantiles(counts: Sequence[int], shares: Sequence[float]) -> tuple[int, ...]:
    return tuple(int(value) for value in np.quantile(counts, shares))


def _steps(count: int) -> str:
    return str(count) if count <= 100 else "many"
