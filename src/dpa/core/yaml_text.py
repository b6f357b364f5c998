"""YAML as it was meant: no key twice, no swelling by aliases, and every fault one sentence.
Run its tests: pytest tests/test_config.py
"""

import re
from typing import Any, NamedTuple

import yaml

from dpa.core.errors import ConfigError

MAX_CHARACTERS = 1_000_000
"""A longer configuration is none."""
MAX_VALUES = 100_000
"""Values a document may hold once its aliases are written out: nine lines of anchors can stand for a billion."""
MAX_DEPTH = 100

_OLD_NUMBER = re.compile(r"[-+]?0[0-7_]+|[-+]?\d[\d_]*(:\d+)+(\.\d*)?")
"""010 is 8 and 1:30 is 90 to YAML 1.1, which nobody means any more."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Extent(NamedTuple):
    values: int
    depth: int


class _Loader(yaml.SafeLoader):
    """Stops while it scans: what is nested deep costs the square of its depth before a parser sees it."""

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        self._check_depth(self.flow_level)
        super().fetch_flow_collection_start(token_class)

    def add_indent(self, column: int) -> bool:
        self._check_depth(len(self.indents))
        return super().add_indent(column)

    def _check_depth(self, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep, write it flatter")


def parse_yaml(text: str, name: str) -> Any:
    """The one document of `text`, as `yaml.safe_load` gives it; `name` says in errors where it came from.

    Raises ConfigError for what is not YAML, for a key given twice in one mapping (the later one would win in silence),
    and for documents that are too long, too deep, or swell or recur through their aliases.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{name} has {len(text):,} characters, more than {MAX_CHARACTERS:,}; is it a configuration?")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, name, "", {}, frozenset())
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date such as 2026-13-01 is a ValueError
        raise ConfigError(f"{name} is not readable YAML: {' '.join(str(error).split())}.") from None


def _check(node: yaml.Node, name: str, field: str, known: dict[int, _Extent], above: frozenset[int]) -> _Extent:
    """What the node stands for, aliases written out; none of its mappings has a key twice. Raises ConfigError.

    It is done on the composed nodes, before merge keys (<<) are written into them: an own key may replace a merged one.
    """
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise ConfigError(f"{name}: `{field}` holds itself through an alias; write it out.")
    below: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.ScalarNode) and _OLD_NUMBER.fullmatch(node.value) and node.tag in _NUMBERS:
        raise ConfigError(
            f"{name}: `{field}`: {node.value} in line {node.start_mark.line + 1} is a number to base 8 or 60 in YAML; "
            "write it to base 10 without a leading zero, or in quotes."
        )
    if isinstance(node, yaml.ScalarNode) and any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise ConfigError(
            f"{name}: `{field}` in line {node.start_mark.line + 1} holds half a character, {node.value!a:.60}; "
            "write the character itself."
        )
    if isinstance(node, yaml.MappingNode):
        seen: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            dotted, line = field, key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                dotted = f"{field}.{key.value}".strip(".")
                if (first := seen.get((key.tag, key.value))) is not None:
                    where = f"in line {line}" if first == line else f"in lines {first} and {line}"
                    raise ConfigError(f"{name}: `{dotted}` is given twice, {where}; keep one of them.")
                seen[key.tag, key.value] = line
            below += [(dotted, key), (dotted, value)]
    elif isinstance(node, yaml.SequenceNode):
        below = [(f"{field}.{place}".strip("."), item) for place, item in enumerate(node.value)]
    children = [_check(child, name, where, known, above | {id(node)}) for where, child in below]
    found = _Extent(
        1 + sum(child.values for child in children), 1 + max((child.depth for child in children), default=0)
    )
    if found.values > MAX_VALUES:
        raise ConfigError(f"{name} stands for more than {MAX_VALUES:,} values through its aliases; write it out.")
    if found.depth > MAX_DEPTH + 2:  # the document and a scalar at the end are no nesting
        raise ConfigError(f"{name} is nested more than {MAX_DEPTH} deep through its aliases; write it flatter.")
    known[id(node)] = found
    return found
