"""Python functions as a scorer (`reward.functions`, `evaluate.gold`).
Run its tests: pytest tests/test_scorers.py
"""

import hashlib
import importlib
import importlib.util
import inspect
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dpa.core.errors import ConfigError
from dpa.core.records import Messages, Scorer, stable_hash
from dpa.scoring.scorer_source import ScorerSource

ScoreFunction = Callable[[Messages, str], float]

_log = logging.getLogger(__name__)


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
                _log.warning("scorer: %s failed on a response (%s); such rows are not scored.", name, _where(error))
            return float("nan")


def _where(error: Exception) -> str:
    """The kind of an error and the line of the user's file. Not its words: they may hold the response, and a server's
    log holds no text of users."""
    _, *theirs = traceback.extract_tb(error.__traceback__)
    if not theirs:
        return f"{type(error).__name__}: it does not take (messages, response), or returned no number"
    place = next(frame for frame in reversed(theirs) if frame.filename == theirs[0].filename)
    return f"{type(error).__name__} at {place.filename}:{place.lineno}"


class FunctionSource(ScorerSource):
    """`reward.functions`."""

    def check(self) -> None:
        """The functions are found."""
        self.open()

    def attributes(self, rated: Sequence[str]) -> tuple[str, ...]:
        return tuple(self.given)

    def open(self) -> Scorer:
        return FunctionScorer(self.given)

    def described(self) -> str:
        return f"Python functions for {', '.join(self.given)}"

    def on_every_node(self) -> dict[str, str]:
        """Files by their whole paths; importable modules stay."""
        files = {name: function_file(function) for name, function in self.given.items()}
        return {
            name: function if (file := files[name]) is None else f"{file.resolve()}:{function.rpartition(':')[2]}"
            for name, function in self.given.items()
        }


def function_file(function: str) -> Path | None:
    """The file of `file.py:name`; None where a module is named."""
    where = function.rpartition(":")[0]
    return Path(where) if where.endswith(".py") else None


def function_source(function: str) -> Path | None:
    """The file a function stands in, `file.py:name` or `package.module:name`; None where it cannot be said, and for
    those of this package, which are as its version is."""
    where = function.rpartition(":")[0]
    if (file := function_file(function)) is not None or where.partition(".")[0] == __package__.partition(".")[0]:
        return file
    try:
        spec = importlib.util.find_spec(where)
    except Exception:  # importing the packages above it may raise anything; loading it will say so
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _load_function(field: str, function: str | ScoreFunction) -> ScoreFunction:
    if not isinstance(function, str):
        return function
    where, colon, name = function.rpartition(":")
    if not colon or not where or not name:
        raise ConfigError(f"{field}: {function!r} is not `module:name` or `file.py:name`.")
    try:
        module = importlib.import_module(where) if (file := function_file(function)) is None else _load_file(file)
    except Exception as error:  # the user's module may raise anything when it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{field}: {where} cannot be imported ({reason}); mend it.") from None
    found: Any = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{field}: {where} has no function {name!r}; check the name.")
    return found


class _AsItStands(SourceFileLoader):
    """Compiles a file whenever it is imported: bytecode is told apart by whole seconds and sizes, the revision by what
    is written."""

    def path_stats(self, path: str) -> dict[str, Any]:
        """Without them nothing is read from a cache, nor laid into one."""
        raise OSError("not asked")


def _load_file(file: Path) -> ModuleType:
    """Import a file under a name of its own, so that two files of one name do not meet."""
    name = f"dpa_function_{stable_hash(file.resolve())}"
    location = importlib.util.spec_from_file_location(name, file, loader=_AsItStands(name, str(file)))
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
