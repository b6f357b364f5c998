"""How much data there is: rows, prompts and their lengths, counted here or published for a data set of the Hub.
Run its tests: pytest tests/test_estimate.py

What is neither here nor published below is unknown (None), and never 0. Lengths are counted by the policy's tokenizer
where its folder is here; else a token is taken for four characters.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from dpa.core.config import RunConfig
from dpa.core.errors import ConfigError, DataError
from dpa.core.sections.ratings import RatingsConfig
from dpa.core.sections.rollout import PromptsConfig
from dpa.stages.judge import CHARACTERS_PER_TOKEN
from dpa.storage.rating_forms import RatedRow, declared_scales, named_columns, read_row
from dpa.storage.rows import CSV_BLOCK, find_files, form_of, is_hub_id, read_rows

_log = logging.getLogger(__name__)

DIRECTION_TOKENS = 40
"""The sentence that states a direction, and what a chat template puts around a prompt and an answer."""
PROMPT_TOKENS, RESPONSE_TOKENS = 150, 300
"""A prompt with its direction, and a rated response, where no text is here: the 61,135 rows of ultrafeedback_binarized,
each with its prompt four times and three responses, have 405,688,662 bytes (its data set card)."""
SAMPLED = 20_000
"""Rated rows that are read to know their lengths and how many prompts they have; of prompts a hundredth of it."""

PUBLISHED_RATINGS = {
    ("nvidia/HelpSteer", "train"): (35_331, 35_331 // 4),
    ("nvidia/HelpSteer2", "train"): (20_324, 10_162),
    ("openbmb/UltraFeedback", "train"): (4 * 63_967, 63_967),
}
"""Rated responses and prompts of a split: data set cards (four and two responses a prompt)."""

PUBLISHED_PROMPTS = {
    ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"): 61_135,
    ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"): 2_000,
}


@dataclass(frozen=True)
class Rated:
    """Rated data: `rows` responses to `prompts` prompts, and tokens of one prompt (with a direction) and response."""

    rows: int
    prompts: int
    prompt_tokens: float = PROMPT_TOKENS
    response_tokens: float = RESPONSE_TOKENS


@dataclass(frozen=True)
class Data:
    """What a run reads, None: unknown. `prompts` an iteration asks, `prompt` tokens of one (with a direction), and
    `held_out` prompts that are measured on."""

    rated: Rated | None
    prompts: int | None
    prompt: float
    held_out: int | None


def data_of(config: RunConfig) -> Data:
    """What a configuration names, looked up. Raises ConfigError, DataError."""
    parts = [rated_size(ratings, config.policy) for ratings in config.ratings]
    known = [one for one in parts if one is not None]
    rows = sum(one.rows for one in known)
    rated = None
    if known and len(known) == len(parts):
        rated = Rated(
            rows,
            sum(one.prompts for one in known),
            sum(one.rows * one.prompt_tokens for one in known) / rows,
            sum(one.rows * one.response_tokens for one in known) / rows,
        )
    return Data(
        rated,
        prompt_count(config.prompts, "prompts"),
        prompt_tokens(config.prompts, config.policy),
        prompt_count(config.evaluate.prompts, "evaluate.prompts"),
    )


def rated_size(ratings: RatingsConfig, policy: str = "") -> Rated | None:
    """How much rated data a section uses, in tokens of the policy; None where it is not known."""
    there = _rated_there(ratings, policy)
    if there is None or ratings.count is None or ratings.count >= there.prompts:
        return there
    return replace(there, rows=round(there.rows * ratings.count / there.prompts), prompts=ratings.count)


def _rated_there(ratings: RatingsConfig, policy: str) -> Rated | None:
    if is_hub_id(ratings.path):
        known = PUBLISHED_RATINGS.get((ratings.path, ratings.split))
        return Rated(*known) if known else None
    lines = count_rows(ratings.path)
    if not lines:
        return None
    names = list(declared_scales(ratings))
    read, rows = 0, []
    try:
        for file in find_files(Path(ratings.path)):
            for _, raw in islice(read_rows(file, *named_columns(ratings, names)), SAMPLED - read):
                read += 1
                if isinstance(raw, dict):
                    rows += [row for row in read_row(ratings, raw, names) if isinstance(row, RatedRow)]
    except DataError:
        rows = []
    if not rows:
        return Rated(lines, max(1, lines // 4))
    prompts = ["\n".join(message["content"] for message in row.messages) for row in rows]
    more = lines / read
    return Rated(
        round(len(rows) * more),
        round(len(set(prompts)) * more),
        DIRECTION_TOKENS + _mean_tokens(prompts, policy),
        _mean_tokens([row.response for row in rows], policy),
    )


def prompt_count(prompts: PromptsConfig, where: str) -> int | None:
    """Prompts an iteration or a measurement asks; None where it is not known. Raises ConfigError for a file that is
    not here and has no count."""
    if is_hub_id(prompts.path):
        there = PUBLISHED_PROMPTS.get((prompts.path, prompts.split))
    else:
        there = count_rows(prompts.path)
        if there is None and prompts.count is None:
            raise ConfigError(f"{where}.path: {prompts.path} is not on this machine; give {where}.count.")
    counts = [count for count in (there, prompts.count) if count is not None]
    return min(counts) if counts else None


def prompt_tokens(prompts: PromptsConfig, policy: str = "") -> float:
    """Tokens of a prompt with its direction: of the first ones where they are here."""
    texts: list[str] = []
    try:
        for file in find_files(Path(prompts.path)):
            for _, row in islice(read_rows(file, [prompts.column, "messages"]), SAMPLED // 100):
                text = (row.get("messages") or row.get(prompts.column)) if isinstance(row, dict) else None
                texts += [str(text)] if text else []
    except DataError:
        texts = []
    return DIRECTION_TOKENS + _mean_tokens(texts, policy) if texts else PROMPT_TOKENS


def _mean_tokens(texts: Sequence[str], policy: str) -> float:
    """Mean length of some of the texts, by the tokenizer in a folder."""
    some = texts[:: max(1, len(texts) // 200)]
    file = Path(policy) / "tokenizer.json"
    if policy and file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return sum(len(one.ids) for one in tokenizer.encode_batch(list(some), add_special_tokens=False)) / len(some)
        except Exception as error:  # the library raises no narrower kind for a file that is no tokenizer
            _log.debug("%s is not read (%s); four characters a token", file, error)
    return sum(map(len, some)) / len(some) / CHARACTERS_PER_TOKEN


def count_rows(path: str) -> int | None:
    """Rows of a data file, or of all in a folder; None where it is not on this machine."""
    place = Path(path)
    if place.is_dir():
        return sum(count_rows(str(file)) or 0 for file in find_files(place))
    if not place.is_file():
        return None
    try:
        match form_of(place):
            case ".parquet":
                return pq.read_metadata(place).num_rows
            case ".csv":
                # As storage/rows.py reads it: a row of another width is a bad row, not a bad file.
                options = pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda row: "skip")
                reading = pyarrow.csv.ReadOptions(block_size=CSV_BLOCK)
                return pyarrow.csv.read_csv(place, read_options=reading, parse_options=options).num_rows
            case ".jsonl":
                with place.open("rb") as lines:
                    return sum(1 for line in lines if line.strip())
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data: {place} cannot be read ({type(error).__name__}); mend or replace it.") from None
    return 0
