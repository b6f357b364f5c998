"""Silence for the libraries underneath, without importing any that is not in use: a server must start at once.
Run its tests: pytest tests/test_engine.py
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the notices and bars of transformers, TRL and datasets: this package says what a user needs to know."""
    datasets = sys.modules.get("datasets")
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled(), datasets is None or datasets.are_progress_bars_disabled()
    trl = logging.getLogger("trl")
    trl_level = trl.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if datasets is not None:
        datasets.disable_progress_bars()
    trl.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # fields that TRL sets and transformers renames
            yield
    finally:
        transformers_logging.set_verbosity(level)
        trl.setLevel(trl_level)
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if datasets is not None and not bars[1]:
            datasets.enable_progress_bars()
