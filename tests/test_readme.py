"""What README says in Python works as it stands.
Run: pytest tests/test_readme.py
"""

import re
from ast import literal_eval
from pathlib import Path

import numpy as np

README = Path(__file__).parents[1] / "README.md"


def test_the_python_of_the_readme_runs_and_gives_what_its_comments_say() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        known: dict = {"scores_PNK": np.random.default_rng(0).uniform(0, 100, (5, 7, 2))}
        exec(block, known)
        space, direction = known["space"], known["direction"]
        assert "weighted rating = helpfulness*80 + verbosity*-60" in space.prompt(direction)
        assert known["winners_PD"].shape == (5, 9)
        for form in re.findall(r'or (\{[^}]*\}|"-\d+deg")', block):
            assert np.allclose(space.parse(literal_eval(form)).weights, direction.weights, atol=0.01)
