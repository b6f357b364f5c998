"""Scorers: a reward model, Python functions, or several side by side; all give scores_NM on the 0-100 scale.
Run its tests: pytest tests/test_scorers.py
"""

import hashlib
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from dpa.core.config import RewardConfig
from dpa.core.errors import ConfigError, ModelFileError
from dpa.core.records import Messages, Scored, Scorer, add_costs, score_in_full, stable_hash
from dpa.core.reference import Model, ModelReference
from dpa.models.compiling import SCORED_ROWS, Choice, CompiledLayers, worth_compiling
from dpa.models.files import folder_revision, resolve_model
from dpa.models.http_scorer import http_scorer
from dpa.models.judge_scorer import judge_scorer
from dpa.models.loading import check_weights, load_tokenizer
from dpa.models.policy import default_device, ensure_pad_token
from dpa.models.precision import say_fp32, self_test
from dpa.models.quiet import quiet_libraries
from dpa.models.reward_model import (
    RELEASED_MODEL,
    RELEASED_SPEC,
    Logits,
    RewardSpec,
    encode,
    load_classifier,
    read_spec,
)
from dpa.storage.seals import check_in_run

ScoreFunction = Callable[[Messages, str], float]

_log = logging.getLogger(__name__)


class RewardModelScorer:
    """A trained reward model. On loading it must reproduce its golden example, alone and beside a longer row.

    `spec` is for a model without a dpa_reward.json. `dtype`: bf16 by default on a GPU that has it, fp32 elsewhere and
    where bf16 would change the order of scores (see models/precision.py). `compile`: the layers (models/compiling.py);
    auto: on a card, once SCORED_ROWS are asked for, and only if they pass the self-test so.

    Raises ModelFileError when the folder is unsafe, or when the self-test fails: a wrong template, pad or EOS token
    scores plausibly and wrongly, so it must not pass quietly.
    """

    rows_ahead = 512
    """Rows that become tokens while a card scores the ones before."""

    def __init__(
        self,
        model: Model,
        spec: RewardSpec | None = None,
        device: str | None = None,
        token_budget: int | None = None,
        dtype: torch.dtype | None = None,
        compile: Choice = "auto",
    ) -> None:
        device = device or default_device()
        if dtype is None:
            bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
            dtype = torch.bfloat16 if bf16 else torch.float32
        with quiet_libraries():
            self.model, self.tokenizer, path = load_classifier(model, dtype)
        self.spec = spec or read_spec(path)
        measured = self.spec.precision
        if dtype != torch.float32 and measured is not None and not measured.keeps_order:
            say_fp32(path, f"in bf16 Kendall's tau within prompts is {measured.kendall:.3f} of what it is in fp32")
            self._stay_in_fp32(model)
        self.model.to(device).eval()
        if spec is not None:  # a model from elsewhere may pad with EOS; its golden example says whether this is right
            ensure_pad_token(self.tokenizer)
            self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.attributes = self.spec.attributes
        self.revision = folder_revision(path)
        self._token_budget = token_budget
        self._path, self._compile, self._asked, self._compiled = path, compile, 0, False
        try:
            self_test(self.model, self.tokenizer, self.spec, path, token_budget)
        except ModelFileError:
            # Where nobody measured what bf16 costs, it may be that; fp32 tells it from damage.
            if self.model.dtype == torch.float32 or measured is not None:
                raise
            self._stay_in_fp32(model)
            self.model.to(device).eval()
            self_test(self.model, self.tokenizer, self.spec, path, token_budget)
            say_fp32(path, "in bf16 it is further from its golden scores than rounding should be")

    def score(self, prompts: Sequence[Messages], responses: Sequence[str]) -> np.ndarray:
        """Return scores_NM; NaN for a row too long for the model, refused by its template, or scored not finite."""
        count = len(responses)
        self._asked += count
        if not self._compiled and worth_compiling(self._compile, self.model.device, self._asked, SCORED_ROWS):
            self._compiled = True
            self._compile_layers()
        at_once = self.rows_ahead if self.model.device.type == "cuda" else max(1, count)
        logits, usable = Logits(self.model, self.tokenizer.pad_token_id, self._token_budget), []

        def tokens(first: int) -> list[list[int] | None]:
            rows = slice(first, first + at_once)
            return encode(self.tokenizer, self.spec.template, self.spec.max_length, prompts[rows], responses[rows])

        with ThreadPoolExecutor(1) as ahead:  # a card works on one part while the next becomes tokens
            parts = [(first, ahead.submit(tokens, first)) for first in range(0, count, at_once)]
            for first, part in parts:
                kept = [(first + row, ids) for row, ids in enumerate(part.result()) if ids is not None]
                usable += [row for row, _ in kept]
                logits.add([ids for _, ids in kept])
        scores_NM = np.full((count, len(self.attributes)), np.nan)
        if usable:
            scores_NM[usable] = logits.collect()
        scores_NM[~np.isfinite(scores_NM).all(axis=1)] = np.nan
        return scores_NM

    def _compile_layers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the layers, if they still give the golden scores."""
        compiled = CompiledLayers(self.model, False, backend)
        try:
            self_test(self.model, self.tokenizer, self.spec, self._path, self._token_budget)
        except ModelFileError as error:
            compiled.give_up(error)

    def _stay_in_fp32(self, model: Model) -> None:
        pad = self.model.config.get_text_config().pad_token_id
        with quiet_libraries():
            self.model, _, _ = load_classifier(model, torch.float32)
        self.model.config.get_text_config().pad_token_id = pad


class FunctionScorer:
    """Attributes that are Python functions f(messages, response) -> a number on 0-100; `field` opens the refusals.

    `functions`: attribute -> callable, `package.module:name` or `file.py:name`. A call that raises or returns no finite
    number makes its row NaN; the first such error of each attribute is logged. Raises ConfigError when a function
    cannot be found.
    """

    def __init__(self, functions: Mapping[str, str | ScoreFunction], field: str = "reward.functions") -> None:
        loaded = {name: _load_function(f"{field}.{name}", function) for name, function in functions.items()}
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
        return self.score_in_full(prompts, responses).scores_NM

    def score_in_full(self, prompts: Sequence[Messages], responses: Sequence[str]) -> Scored:
        """The same, with the reasons and costs of all."""
        given = [score_in_full(scorer, prompts, responses) for scorer in self._scorers]
        reasons = {row: reason for one in reversed(given) for row, reason in one.reasons.items()}
        costs: dict[str, float] = {}
        for one in given:
            add_costs(costs, one.costs)
        return Scored(np.concatenate([one.scores_NM for one in given], axis=1), reasons, costs)


def build_scorer(config: RewardConfig, trained: Model | None = None, code_revision: str | None = None) -> Scorer:
    """The scorer a configuration describes; `trained` is the model that `reward.train` saved, `code_revision` what the
    other models it names may run (core/reference.py).

    The published reward model, named by its Hub id, is read by RELEASED_SPEC.
    """
    scorers: list[Scorer] = []
    if config.train is not None:
        if trained is None:
            raise ValueError("reward.train needs the folder its model was saved in")
        scorers.append(RewardModelScorer(trained, compile=config.train.compile))
    if config.folder is not None:
        spec = RELEASED_SPEC if config.folder == RELEASED_MODEL or config.preset == "dpa-v1" else None
        scorers.append(RewardModelScorer(ModelReference(config.folder, code_revision), spec))
    if config.http is not None:
        scorers.append(http_scorer(config.http, code_revision))
    if config.judge is not None:
        scorers.append(judge_scorer(config.judge))
    if config.functions:
        scorers.append(FunctionScorer(config.functions))
    return scorers[0] if len(scorers) == 1 else MixScorer(scorers)


def check_scorers(config: RewardConfig, code_revision: str | None = None) -> None:
    """What can be known of finished scorers before hours are spent: functions are found, folders hold their files.

    Weights are compared by name and shape, not read, and no server is asked. Raises ConfigError, ModelFileError,
    RunFolderError.
    """
    FunctionScorer(config.functions)
    for folder in (config.folder, config.http.folder if config.http else None):
        if folder is None:
            continue
        safe = resolve_model(ModelReference(folder, code_revision))
        check_in_run(safe.path)
        with quiet_libraries():
            load_tokenizer(safe, "reward model")
            if folder == config.folder:
                check_weights(AutoModelForSequenceClassification, safe, "reward model")
        if folder != RELEASED_MODEL and config.preset != "dpa-v1":
            read_spec(Path(safe.path))


def _load_function(field: str, function: str | ScoreFunction) -> ScoreFunction:
    if not isinstance(function, str):
        return function
    where, colon, name = function.rpartition(":")
    if not colon or not where or not name:
        raise ConfigError(f"{field}: {function!r} is not `module:name` or `file.py:name`.")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # the user's module may raise anything when it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{field}: {where} cannot be imported ({reason}); mend it.") from None
    found: Any = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{field}: {where} has no function {name!r}; check the name.")
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
