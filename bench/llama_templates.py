"""Whether llama.cpp's own template engine writes what Jinja writes: built from its source, and asked.

    pip download --no-deps --no-binary :all: llama-cpp-python    # its sdist holds the source of llama.cpp; unpack it
    python bench/llama_templates.py llama_cpp_python-0.3.36/vendor/llama.cpp

Chat templates with a system role, without one, and of a plain language model; the sentence in the system message and
behind the question, weights zero-padded, targets, a baked default; random preferences and refused ones. Needs g++.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from dpa.core.directions import DirectionSpace
from dpa.core.objective import Objective
from dpa.models.chat_template import steerable_template
from dpa.models.template_rendering import render

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "And then?"},
]
REFUSED: list[Any] = [{"warmth": 1}, {"helpfulness": 0}, {"helpfulness": "x"}, [1, 0], {"helpfulness": True}]


def main() -> None:
    """A line for each template, with how many prompts are the same; exit 1 where one is not."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="llama.cpp's source")
    parser.add_argument("--preferences", type=int, default=300)
    args = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        engine = build(args.source, Path(folder))
        for name, space, template in templates():
            asked = [*preferences(space, args.preferences), *REFUSED, None]
            variables = [variables_of(preference) for preference in asked]
            theirs = in_llama(engine, Path(folder) / "template.jinja", template, variables)
            ours = [in_jinja(template, given) for given in variables]
            wrong = [place for place, pair in enumerate(zip(ours, theirs, strict=True)) if not same(*pair)]
            print(f"{name}: {len(asked) - len(wrong)} of {len(asked)} the same", flush=True)
            if wrong:
                print(f"  {asked[wrong[0]]}\n  {ours[wrong[0]]!r}\n  {theirs[wrong[0]]!r}")
            different += len(wrong)
    sys.exit(different > 0)


def build(source: Path, folder: Path) -> Path:
    """The engine as a program."""
    common, program = source / "common", folder / "llama_templates"
    files = [*(common / "jinja").glob("*.cpp"), common / "json.cpp", common / "unicode.cpp"]
    include = [f"-I{source / part}" for part in ("common", "vendor", "ggml/include", "include")]
    own = Path(__file__).with_suffix(".cpp")
    subprocess.run(["g++", "-std=c++17", "-O1", *include, "-o", program, own, *files], check=True)
    return program


def templates() -> Iterator[tuple[str, DirectionSpace, str]]:
    """(name, space, steerable template)."""
    plain = DirectionSpace((Objective("helpfulness"), Objective("verbosity")), max_angle=180)
    bases = {"chatml": CHATML, "no system role": NO_SYSTEM, "plain": None}
    kinds = {
        "published": plain,
        "zero-padded": replace(plain, zero_padded=True),
        "after the question": replace(plain, placement="after_question"),
        "targets": replace(plain, target_template="{weighted_rating} with {values}", target_step=5),
    }
    for base, template in bases.items():
        for kind, space in kinds.items():
            if template is not None or space.placement == "system":
                yield f"{base}, {kind}", space, steerable_template(template, space)
    baked = plain.direction([6e-17, -1.0])
    yield "chatml, baked", plain, steerable_template(CHATML, plain, baked)


def preferences(space: DirectionSpace, count: int) -> Iterator[dict[str, Any]]:
    """Random ones, some that lie on a tie of rounding, some of extreme size, and targets where the space knows them."""
    rng = np.random.default_rng(0)
    for number in range(count):
        first, second = rng.normal(size=2)
        if number % 5 == 1:
            second = (number % 100 + 0.5) / 100
            first = (1 - second * second) ** 0.5
        if number % 5 == 2:
            first, second = (float(part) * 10.0 ** rng.integers(-90, 90) for part in (first, second))
        preference: dict[str, Any] = {"helpfulness": float(first), "verbosity": float(second)}
        if number % 5 == 3 and space.target_template is not None:
            preference = {"helpfulness": 1, "verbosity": f"={number * 100 / count:g}"}
        yield preference


def variables_of(preference: Any) -> dict[str, Any]:
    given = {"messages": TALK, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    return given if preference is None else given | {"preference": preference}


def in_llama(engine: Path, file: Path, template: str, variables: list[dict[str, Any]]) -> list[str]:
    file.write_text(template, encoding="utf-8")
    lines = "".join(json.dumps(given) + "\n" for given in variables)
    said = subprocess.run([engine, file], input=lines, capture_output=True, text=True, check=True).stdout
    return said.split("\x01")[:-1]


def in_jinja(template: str, variables: dict[str, Any]) -> str:
    try:
        return render(template, variables)
    except TemplateError as error:
        return f"ERROR {error}"


def same(ours: str, theirs: str) -> bool:
    """Equal, or refused by both with the same words."""
    if ours.startswith("ERROR "):
        return theirs.startswith("ERROR ") and ours.removeprefix("ERROR ") in theirs
    return ours == theirs


if __name__ == "__main__":
    main()
