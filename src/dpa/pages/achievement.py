"""What a run achieved, in one plain sentence of measured figures; also where it achieved nothing.
Run its tests: pytest tests/test_achievement.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpa.core.comparison import main_objective
from dpa.core.directions import DirectionSpace
from dpa.pages.writing import listed, number, reward_title

Record = Mapping[str, Any]

SAID = {
    "obeyed": "asks for less or more {names} are obeyed: {figures}",
    "uneven": "asks for less or more {names} are obeyed at the ends ({figures}) but not in order between them",
    "unclear": "whether asks for less or more {names} are obeyed is unclear ({figures}, within the error)",
    "ignored": "asks for less or more {names} are ignored ({figures})",
    "reversed": "asks for less or more {names} are answered the wrong way round ({figures})",
    "unknown": "what asks for less or more {names} give is not known (no scored answer at an end)",
}
"""Outcome of what is asked along an arc -> how it is said.

obeyed: in order (Kendall's tau reaches the threshold) and the 95% intervals of the ends apart; uneven: apart, not in
order; unclear: in order, not apart; reversed: apart the wrong way round; ignored: neither.
"""

HELD = 1.0
"""Points by which an objective may fall and is still said to be held."""


@dataclass(frozen=True)
class Achievement:
    """`tone`: good, all that is asked is obeyed and the front did not fall; bad, nothing is; plain, between them."""

    sentence: str
    tone: Literal["good", "plain", "bad"]


@dataclass(frozen=True)
class Ends:
    """Of an arc: the objective it leads to, its outcome (a key of SAID), and the direction records that were asked for
    least of it, for neither and for most of it; None where one end has no scored answer."""

    arc: str
    outcome: str
    asked: tuple[Record, Record, Record] | None


def achievement(policies: Sequence[Record], space: DirectionSpace) -> Achievement:
    """Of the last policy, by the reward its verdict rests on; `policies` (one at least) as in dpa.pages.report."""
    evaluation = policies[-1]["evaluation"]
    by, upward = evaluation["listens"]["by"], main_objective(space)
    arcs = [_ends(evaluation, arc, by) for arc in space.arc_names if arc != upward]
    in_words = max(arcs, key=_words_apart)
    said = []
    for outcome, sentence in SAID.items():
        found = [ends for ends in arcs if ends.outcome == outcome]
        figures = [_figures(ends, by, space, words=ends is in_words and _words_apart(ends) > 0) for ends in found]
        if len(found) > 1:
            figures = [f"{ends.arc} {figure}" for ends, figure in zip(found, figures, strict=True)]
        if found:
            said.append(sentence.format(names=listed([ends.arc for ends in found]), figures=", ".join(figures)))
    follows, fell = evaluation["listens"]["verdict"], _front(policies, by)
    if follows:
        said += [clause for clause in (_cost(arcs, upward, by, space), fell) if clause]
    sentence = f"By the {reward_title(by)}, {'; '.join(said)}."
    if not follows:
        tau = [found["value"] for found in evaluation["measures"][by]["kendall_tau"].values()]
        by_chance = any(value is not None and value >= evaluation["listens"]["threshold"] for value in tau)
        return Achievement(f"THE POLICY {'MAY' if by_chance else 'DOES'} NOT FOLLOW ITS DIRECTION. {sentence}", "bad")
    return Achievement(sentence, "plain" if fell or {ends.outcome for ends in arcs} != {"obeyed"} else "good")


def _ends(evaluation: Record, arc: str, by: str) -> Ends:
    on_arc = sorted((d for d in evaluation["directions"] if arc in d["angles"]), key=lambda d: d["angles"][arc])
    middle = min(on_arc, key=lambda d: abs(d["angles"][arc]))
    low, high = (on_arc[place]["objectives"][by][arc] for place in (0, -1))
    tau = evaluation["measures"][by]["kendall_tau"][arc]["value"]
    if None in (low["value"], high["value"], tau):
        return Ends(arc, "unknown", None)
    apart, in_order = _apart(low, high), tau >= evaluation["listens"]["threshold"]
    outcome = {(1, True): "obeyed", (1, False): "uneven", (0, True): "unclear", (0, False): "ignored"}
    return Ends(arc, outcome.get((apart, in_order), "reversed"), (on_arc[0], middle, on_arc[-1]))


def _apart(low: Record, high: Record) -> int:
    """1: the second interval lies above the first; -1: below it; 0: they meet, or one is not known."""
    if None in (low["low"], low["high"], high["low"], high["high"]):
        return 0
    return int(low["high"] < high["low"]) - int(high["high"] < low["low"])


def _words_apart(ends: Ends) -> float:
    """By how many words both ends differ; 0 where the intervals meet."""
    if ends.asked is None:
        return 0.0
    low, _, high = (direction["words"] for direction in ends.asked)
    return abs(high["value"] - low["value"]) if _apart(low, high) else 0.0


def _figures(ends: Ends, by: str, space: DirectionSpace, words: bool) -> str:
    """`20 to 88 of 100`, or with words `14 to 71 words (20 to 88 of 100)`; from what asks for least of it gave. `of` is
    said of an objective that begins at 0."""
    if ends.asked is None:
        return ""
    low, _, high = ends.asked
    least, most = space.ranges[ends.arc]
    scores = " to ".join(number(end["objectives"][by][ends.arc]["value"], 0) for end in (low, high))
    scores += f" of {most:g}" if least == 0 else ""
    counts = " to ".join(number(end["words"]["value"], 0) for end in (low, high))
    return f"{counts} words ({scores})" if words else scores


def _cost(arcs: Sequence[Ends], upward: str, by: str, space: DirectionSpace) -> str:
    """What the main objective loses at the ends, against what is asked for at the center."""
    wanted = 1 if space.center_K[space.names.index(upward)] > 0 else -1
    lost = []
    for ends in arcs:
        if ends.asked is not None:
            low, middle, high = (direction["objectives"][by][upward]["value"] for direction in ends.asked)
            lost += [wanted * (middle - end) for end in (low, high) if None not in (middle, end)]
    if not lost:
        return ""
    if max(lost) < HELD:
        return f"{upward} is held at the ends"
    return f"{upward} {'falls' if wanted > 0 else 'rises'} by up to {number(max(lost), 0)} at the ends"


def _front(policies: Sequence[Record], by: str) -> str:
    """That the last policy gives its users less than an earlier one, or no more than the first; "" where it does."""
    utility = [policy["evaluation"]["measures"][by]["expected_utility"] for policy in policies]
    if len(policies) < 2 or any(one["value"] is None for one in utility):
        return ""
    name, last = policies[-1]["name"], utility[-1]
    best = max(range(len(policies)), key=lambda place: utility[place]["value"])
    if _apart(last, utility[best]) == 1:
        fall = f"{number(utility[best]['value'])} to {number(last['value'])}"
        return f"expected utility fell from {policies[best]['name']} to {name}, {fall}"
    if _apart(utility[0], last) != 1:
        rise = f"{number(utility[0]['value'])} to {number(last['value'])}"
        return f"from {policies[0]['name']} to {name} expected utility did not rise beyond the error ({rise})"
    return ""
