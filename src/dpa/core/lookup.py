"""A name looked up in a table of named things: a method, an engine, a learner, a key of a configuration.
Run its tests: pytest tests/test_config.py -k look_up
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from dpa.core.errors import ConfigError

Thing = TypeVar("Thing")


def look_up(table: Mapping[str, Thing], name: str, field: str) -> Thing:
    """What the table has under a name that `field` of a configuration gives. Raises ConfigError, naming the nearest."""
    if name not in table:
        raise ConfigError(f"{field}: {name!r:.80} is not known; {nearest(name, table)}")
    return table[name]


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The end of a refusal: the known name most like this one, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(names)}."
