"""Scorers: a reward model, Python functions, or several side by side; all give scores_NM on the 0-100 scale.
Run its tests: pytest tests/test_scorers.py
"""

import hashlib
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dpa.core.config import RewardConfig
from dpa.core.errors import ConfigError, ModelFileError
from dpa.core.records import Messages, Scorer, stable_hash
from dpa.models.files import folder_revision
from dpa.models.http_scorer import http_scorer
from dpa.models.policy import default_device, ensure_pad_token
from dpa.models.quiet import quiet_libraries
from dpa.models.reward_model import (
    BF16_TOLERANCE,
    RELEASED_MODEL,
    RELEASED_SPEC,
    RewardSpec,
    check_pad_token,
    encode,
    forward,
    load_classifier,
    read_spec,
)

ScoreFunction = Callable[[Messages, str], float]

_log = logging.getLogger(__name__)


class RewardModelScorer:
    """A trained reward model. On loading it must reproduce its golden example, alone and beside a longer row.

    `spec` is for a model without a dpa_reward.json. bf16 on a GPU that has it, fp32 elsewhere. Raises ModelFileError
    when the folder is unsafe, or when the self-test fails: a wrong template, pad or EOS token scores plausibly and
    wrongly, so it must not pass quietly.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: RewardSpec | None = None,
        remote_code_revision: str | None = None,
        device: str | None = None,
        token_budget: int | None = None,
    ) -> None:
        device = device or default_device()
        bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if bf16 else torch.float32
        with quiet_libraries():
            self.model, self.tokenizer, path = load_classifier(folder, remote_code_revision, dtype)
        self.model.to(device).eval()
        self.spec = spec or read_spec(path)
        if spec is not None:  # a model from elsewhere may pad with EOS; its golden example says whether this is right
            ensure_pad_token(self.tokenizer)
            self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.attributes = self.spec.attributes
        self.revision = folder_revision(path)
        self._token_budget = token_budget
        self._self_test(path, BF16_TOLERANCE if bf16 else 0.0)

    def score(self, prompts: Sequence[Messages], responses: Sequence[str]) -> np.ndarray:
        """Return scores_NM; NaN for a row too long for the model, refused by its template, or scored not finite."""
        ids_N = encode(self.tokenizer, self.spec.template, self.spec.max_length, prompts, responses)
        usable = [row for row, ids in enumerate(ids_N) if ids is not None]
        scores_NM = np.full((len(ids_N), len(self.attributes)), np.nan)
        if usable:
            scores_NM[usable] = self._forward([ids_N[row] or [] for row in usable])
        scores_NM[~np.isfinite(scores_NM).all(axis=1)] = np.nan
        return scores_NM

    def _forward(self, ids_N: Sequence[Sequence[int]]) -> np.ndarray:
        return forward(self.model, ids_N, self.tokenizer.pad_token_id, self._token_budget)

    def _self_test(self, folder: Path, least_tolerance: float) -> None:
        golden, width = self.spec.golden, len(self.attributes)
        if self.model.config.num_labels != width or len(golden.scores) != width:
            raise ModelFileError(
                f"reward model: {folder} has {self.model.config.num_labels} outputs for {width} attributes; "
                "it is not the model its dpa_reward.json describes."
            )
        check_pad_token(self.tokenizer, self.model.config.get_text_config().pad_token_id, folder)
        if self.spec.template is None and not self.tokenizer.chat_template:
            raise ModelFileError(f"reward model: {folder} has lost its chat template; restore chat_template.jinja.")
        template, longest = self.spec.template, self.spec.max_length
        (ids,) = encode(self.tokenizer, template, longest, [golden.messages], [golden.response])
        if ids is None or (golden.token_ids is not None and tuple(ids) != golden.token_ids):
            raise ModelFileError(
                f"reward model: {folder} turns its golden example into other tokens than when it was trained; its "
                "template, its tokenizer or a special token was changed; restore them."
            )
        alone, padded = self._forward([ids])[0], self._forward([ids, [*ids, *ids][: min(longest, len(ids) + 8)]])[0]
        for scores in (alone, padded):
            difference = np.abs(scores - np.array(golden.scores))
            if not (difference <= max(golden.tolerance, least_tolerance)).all():
                worst = int(np.argmax(np.nan_to_num(difference, nan=np.inf)))
                raise ModelFileError(
                    f"reward model: {folder} scores its golden example {scores[worst]:.2f} on {self.attributes[worst]} "
                    f"instead of {golden.scores[worst]:.2f}; its weights, pad or EOS token were changed; restore them."
                )


class FunctionScorer:
    """Attributes that are Python functions f(messages, response) -> a number on 0-100.

    `functions`: attribute -> callable, `package.module:name` or `file.py:name`. A call that raises or returns no finite
    number makes its row NaN; the first such error of each attribute is logged. Raises ConfigError when a function
    cannot be found.
    """

    def __init__(self, functions: Mapping[str, str | ScoreFunction]) -> None:
        loaded = {name: _load_function(name, function) for name, function in functions.items()}
        self.attributes = tuple(loaded)
        self.revision = stable_hash(*(f"{name}={_source_hash(function)}" for name, function in loaded.items()))
        self._functions = tuple(loaded.values())
        self._complained: set[str] = set()

    def score(self, prompts: Sequence[Messages], responses: Sequence[str]) -> np.ndarray:
        """Return scores_NM; NaN rows where a function failed."""
        scores_NM = np.array(
            [
                [self._call(*named, messages, response) for named in zip(self.attributes, self._functions, strict=True)]
                for messages, response in zip(prompts, responses, strict=True)
            ],
            dtype=np.float64,
        ).reshape(len(responses), len(self.attributes))
        scores_NM[~np.isfinite(scores_NM).all(axis=1)] = np.nan
        return scores_NM

    def _call(self, name: str, function: ScoreFunction, messages: Messages, response: str) -> float:
        try:
            return float(function(messages, response))
        except Exception as error:  # the user's code: whatever it raises is a row that cannot be scored
            if name not in self._complained:
                self._complained.add(name)
                _log.warning("scorer: %s failed on a response (%r); such rows are not scored.", name, error)
            return float("nan")


class MixScorer:
    """Several scorers side by side: their attributes in order. Raises ConfigError when two rate the same attribute."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        names = [name for scorer in scorers for name in scorer.attributes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"reward: attribute {twice[0]!r} comes from two scorers; rename or drop one of them.")
        self.attributes = tuple(names)
        self.revision = stable_hash(*(scorer.revision for scorer in scorers))
        self._scorers = tuple(scorers)

    def score(self, prompts: Sequence[Messages], responses: Sequence[str]) -> np.ndarray:
        """Return scores_NM: the columns of each scorer after the other's."""
        return np.concatenate([scorer.score(prompts, responses) for scorer in self._scorers], axis=1)


def build_scorer(
    config: RewardConfig, reward_folder: str | Path | None = None, remote_code_revision: str | None = None
) -> Scorer:
    """The scorer a configuration describes; `reward_folder` is where `reward.train` was saved.

    The published reward model, named by its Hub id, is read by RELEASED_SPEC.
    """
    scorers: list[Scorer] = []
    if config.train is not None:
        if reward_folder is None:
            raise ValueError("reward.train needs the folder its model was saved in")
        scorers.append(RewardModelScorer(reward_folder))
    if config.folder is not None:
        spec = RELEASED_SPEC if config.folder == RELEASED_MODEL or config.preset == "dpa-v1" else None
        scorers.append(RewardModelScorer(config.folder, spec, remote_code_revision))
    if config.http is not None:
        scorers.append(http_scorer(config.http, remote_code_revision))
    if config.functions:
        scorers.append(FunctionScorer(config.functions))
    return scorers[0] if len(scorers) == 1 else MixScorer(scorers)


def _load_function(attribute: str, function: str | ScoreFunction) -> ScoreFunction:
    if not isinstance(function, str):
        return function
    where, colon, name = function.rpartition(":")
    if not colon or not where or not name:
        raise ConfigError(f"reward.functions.{attribute}: {function!r} is not `module:name` or `file.py:name`.")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # the user's module may raise anything when it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"reward.functions.{attribute}: {where} cannot be imported ({reason}); mend it.") from None
    found: Any = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"reward.functions.{attribute}: {where} has no function {name!r}; check the name.")
    return found


def _load_file(file: Path) -> ModuleType:
    """Import a file under a name of its own, so that two files of one name do not meet."""
    location = importlib.util.spec_from_file_location(f"dpa_function_{stable_hash(file.resolve())}", file)
    if location is None or location.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


def _source_hash(function: ScoreFunction) -> str:
    """Hash of the whole file a function is written in (it may call its neighbours), and its name."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        file = inspect.getsourcefile(inspect.unwrap(function) if inspect.isroutine(function) else type(function))
        source = Path(file).read_bytes() if file else b""
    except (TypeError, OSError):
        source = b""  # a builtin: the name is all there is
    return stable_hash(name, hashlib.sha256(source).hexdigest())
