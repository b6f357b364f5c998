"""Renders chat templates of strangers, in a process that may work for a second and take half a gigabyte.
Run by: dpa.models.template_rendering. Run its tests: pytest tests/test_chat_template.py

One JSON line in: {"template", "variables"}, one out: {"text"}, or {"error", "kind"}. Or several conversations in:
{"template", "variables", "chats"}, a chat being variables of its own, and {"texts"} out, within the limits of one. It
ends when its input does. It imports nothing but Jinja, so that it starts at once, and sets Jinja up as
transformers.utils.chat_template_utils does.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

CPU_S = 1.0
"""Seconds of CPU time for one rendering: a busy machine refuses no template. One of today's takes under 1 ms."""
MEMORY = 512_000_000
"""Bytes beyond those the process starts with."""
TEXT = 8_000_000
"""Characters of a rendering: who asked has to cut them into tokens."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what the assistant wrote and prints what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict(...)` in a template: no class whose attributes lead elsewhere."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, attributes = args[0], dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}; rename the attribute.")


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _short(text: str) -> str:
    if len(text) > TEXT:
        raise ValueError(f"the chat template writes {len(text):,} characters, more than {TEXT:,}")
    return text


def _answer(line: bytes) -> dict[str, Any]:
    asked = json.loads(line.decode("utf-8", "surrogatepass"))
    try:
        template, variables = _compiled(asked["template"]), asked["variables"]
        if "chats" in asked:
            return {"texts": [_short(template.render(**{**variables, **chat})) for chat in asked["chats"]]}
        return {"text": _short(template.render(**variables))}
    except MemoryError:
        return {"error": f"the chat template takes more than {MEMORY // 1_000_000} MB", "kind": "memory"}
    except Exception as error:  # whatever a template does wrong is the reason why it does not render
        kind = "security" if isinstance(error, SecurityError) else "template"
        return {"error": str(error) or type(error).__name__, "kind": kind}


def main() -> None:
    """Answer until the input ends. A rendering that takes too long ends the process (SIGPROF, also within C code)."""
    if sys.platform == "linux":
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(hard, most), hard))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        answer = _answer(line)
        try:
            written = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
        except MemoryError:
            answer = {"error": "the chat template writes too much text", "kind": "memory"}
            written = json.dumps(answer).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(written + b"\n")
        sys.stdout.buffer.flush()
        if answer.get("kind") == "memory":
            return  # what it still holds goes with it


if __name__ == "__main__":
    main()
