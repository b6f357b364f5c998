"""The templates of every page: what is put into them is escaped, and a name that is missing is an error.
Run its tests: pytest tests/test_report.py
"""

import json
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpa.pages import writing

_TEMPLATES = Environment(
    loader=PackageLoader("dpa", "pages/templates"),
    autoescape=lambda name: not str(name).endswith(".md"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_FILTERS = (
    writing.number,
    writing.value_and_range,
    writing.spread,
    writing.percent,
    writing.degrees,
    writing.ratio,
    writing.duration,
    writing.memory,
    writing.reward_title,
    writing.titled_measures,
    writing.listed,
    writing.scale,
)
_TEMPLATES.filters |= {written.__name__: written for written in _FILTERS}
_TEMPLATES.filters["pretty_json"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)


def render(template: str, **values: Any) -> str:
    """The template of that name, filled in: markup, its values escaped; a text as it is where the name ends in .md."""
    return _TEMPLATES.get_template(template).render(**values)
