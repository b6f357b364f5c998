"""Which marks of rated data a user should first be able to weigh, and which ready-made directions that gives.
Run its tests: pytest tests/test_init.py
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dpa.recipes.starting.look import LENGTH, FirstLook, Mark
from dpa.storage.columns import plain, without_scale
from dpa.storage.schemas import selection_schema

WORDINESS = "dpa.scoring.wordiness:wordiness"
MOST_OBJECTIVES = 3
AGREE, APART = 0.6, 0.4
"""Marks that correlate more than AGREE want the same answers; a third objective must correlate less than APART."""
MOST_MISSING = 0.6
"""Share of rows without the mark of an objective."""
ASIDE = 0.64
"""Weight of the other objective in a preset, about 40 degrees off the main one."""

_MAIN = (
    *("overall", "overall_score", "helpfulness", "helpful", "quality", "overall_quality", "score", "rating", "grade"),
    *("usefulness", "useful", "preference", "correctness", "correct", "accuracy", "truthfulness", "truthful"),
)
"""Names of a mark that says how good a response is, the surest first."""
_LONG = ("verbosity", "length", "wordiness", "verbose")
_BAD = re.compile(
    r"(?<!no_)(?<!non)(?<!non_)(?<!not_)(?<!un)(?<!in)"
    r"(?:toxic|harm(?!less|on)|bias|hallucinat|error|rude|repetit|offens|unsafe|risk|violat)(?!.*_free)"
)
_AVOIDED = (
    *("avoidance", "avoided", "avoids", "prevention", "mitigation", "handling", "awareness", "correction"),
    *("resistance", "reduction", "detection", "refusal", "low", "less", "free", "safe"),
)

_TAKEN = {"balanced", "terse", "full"} | {
    name for pairs in (False, True) for name in selection_schema(pairs, held=True).names
}
"""Names that no objective can have: those of presets, and of the columns of a selection."""


@dataclass(frozen=True)
class Objectives:
    """Objective -> the mark it is made of, the main one first; `by_function`: of them what a Python function scores.
    `why`: a sentence each on what was chosen. `left`: as `marks`, of marks that are left out."""

    marks: dict[str, str]
    by_function: dict[str, str]
    why: tuple[str, ...]
    left: dict[str, str]

    @property
    def presets(self) -> dict[str, dict[str, float]]:
        """Directions with a name: the main objective alone, and each other one wished more or less of.

        First what most people want: fewer words, but more of any other mark; of a bad one nobody wishes more.
        """
        main, center = self.center
        found: dict[str, dict[str, float]] = {"balanced": {main: center}}
        for name in list(self.marks)[1:]:
            wishes = {f"more-{name}": ASIDE, f"less-{name}": -ASIDE}
            if is_bad(self.marks[name]):
                del wishes[f"more-{name}"]
            elif _has_word(name, _LONG):
                wishes = {"terse": -ASIDE, "full": ASIDE}
            found |= {wish: {main: 0.77 * center, name: weight} for wish, weight in wishes.items()}
        return found

    @property
    def center(self) -> tuple[str, float]:
        """The main objective, and 1; or -1 where the data have bad marks only, so that less of it is better."""
        main = next(iter(self.marks))
        return main, _sense(self.marks[main])


def choose(look: FirstLook) -> Objectives:
    """The mark that says how good a response is, with what pulls against it most: another mark, or the length."""
    main = _main(look)
    names = [mark.name for mark in look.marks]
    has = "lacks" if is_bad(main.name) else "has"
    chosen, why = [main.name], [f"{main.name} is taken as what a good response {has} (the center of all directions)"]
    rivals = [mark.name for mark in look.marks if mark != main and mark.missing <= MOST_MISSING]
    while rivals and len(chosen) < MOST_OBJECTIVES:
        known = {name: [_agreement(look, name, other) for other in chosen] for name in rivals}
        together = {name: max(r) for name, r in known.items() if None not in r}  # type: ignore[type-var]
        if not together:
            break
        best = min(together, key=lambda name: together[name] or 0.0)
        r = together[best] or 0.0
        if r > (AGREE if len(chosen) == 1 else APART):
            break
        how = "pulls against it most" if len(chosen) == 1 else "goes its own way too"
        turned = ", its sign turned: more of it is worse" if is_bad(best) else ""
        why.append(f"{best} {how} (r = {r:+.2f}{turned})")
        chosen.append(best)
        rivals.remove(best)
    functions: dict[str, str] = {}
    if len(chosen) == 1:
        turned = ", its sign turned where more is worse" if any(map(is_bad, names)) else ""
        agree = f"the other marks agree with it (r > {AGREE:g}{turned})"
        reason = "there is no other mark" if len(names) == 1 else agree
        length = look.correlation(main.name, LENGTH)
        said = "" if length is None else f"; {main.name} and length: r = {length:+.2f}"
        why.append(f"verbosity is added: the words of a response, counted ({reason}{said})")
    objectives = _named(chosen)
    if len(chosen) == 1:
        attribute = _free("verbosity", names)
        objectives[_free("verbosity", objectives)] = attribute
        functions[attribute] = WORDINESS
    left = _named([name for name in names if name not in chosen], objectives)
    return Objectives(objectives, functions, tuple(why), left)


def is_bad(name: str) -> bool:
    """Whether more of this mark is worse, by its name: of toxicity, not of how well it is avoided."""
    return _BAD.search(plain(name)) is not None and not _has_word(plain(name), _AVOIDED)


def _sense(mark: str) -> float:
    return -1.0 if is_bad(mark) else 1.0


def _agreement(look: FirstLook, first: str, second: str) -> float | None:
    """r of two marks, less of a bad one being better."""
    r = look.correlation(first, second)
    return None if r is None else r * _sense(first) * _sense(second)


def _main(look: FirstLook) -> Mark:
    def rank(mark: Mark) -> tuple[float, float, float]:
        name = plain(_short(mark.name))
        words = name.split("_")
        place = next((n for n, known in enumerate(_MAIN) if name == known), None)
        if place is None:
            place = next((n + len(_MAIN) for n, known in enumerate(_MAIN) if known in words), 2 * len(_MAIN))
        others = [_agreement(look, mark.name, other.name) for other in look.marks if other != mark]
        agreement = sum(r for r in others if r is not None) / max(1, len(others))
        return (is_bad(mark.name) or _has_word(name, _LONG)) + (mark.missing > MOST_MISSING), place, -agreement

    return min(look.marks, key=rank)


def _named(marks: Sequence[str], others: Iterable[str] = ()) -> dict[str, str]:
    """Objective -> mark: its name without that of the data set, in letters a direction may have, and none of others."""
    found: dict[str, str] = {}
    for mark in marks:
        found[_free(_objective_name(mark), [*found, *others, *_TAKEN])] = mark
    return found


def _objective_name(mark: str) -> str:
    """What a mark is called as an objective: without the name of its data set, and without its scale."""
    name = plain(_short(mark))[:40].strip("_")
    return name if name[:1].isalpha() else f"mark_{name}".strip("_")


def _short(mark: str) -> str:
    return mark.rpartition("-")[2] if mark.startswith(("helpsteer", "ultrafeedback")) else without_scale(mark)


def _free(name: str, taken: Iterable[str]) -> str:
    """The name, or with a number behind it."""
    known = set(taken)
    return next(one for one in (name, *(f"{name}_{n}" for n in range(2, 1000))) if one not in known)


def _has_word(name: str, words: Sequence[str]) -> bool:
    return any(word in words for word in plain(name).split("_"))
