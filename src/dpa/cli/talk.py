"""`dpa generate` and `dpa chat`: try a policy under a direction.
Run its tests: pytest tests/test_talk.py
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from dpa.cli.ecosystem import read_space
from dpa.core.direction_text import printable
from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, DataError, DirectionError, OutsideConeError
from dpa.core.records import Messages, SampleRequest, seed_of
from dpa.core.reference import ModelReference
from dpa.core.targets import Target, Wish, numbers_of, wish_or_center
from dpa.models.files import SPACE_FILE, resolve_model
from dpa.models.policy import encode_prompt
from dpa.sampling.best_of import BestOfSampler, RobustSampler
from dpa.sampling.prompting import Prompting
from dpa.sampling.samplers import open_policy
from dpa.scoring.given_reward import GivenReward, reward_of_run

if TYPE_CHECKING:
    from dpa.core.records import Sampler


def answer(
    model: ModelReference, prompts: list[str], direction: str | None, samples: int, temperature: float,
    max_new_tokens: int, seed: int, clamp: bool, best_of: int = 1, robust: bool = False, reward: str | None = None,
    named: str | None = None,
) -> Iterator[str]:  # fmt: skip
    """Answers to each prompt under the direction, in order, as they come; the best of `best_of` candidates for each.

    What cannot be asked at all is refused before the first is.
    """
    if robust and best_of == 1:
        raise ConfigError("--robust: it picks among candidates; add --best-of 4 or more.")
    if reward is not None and best_of == 1:
        raise ConfigError("--reward: it picks among candidates; add --best-of 4 or more.")
    given = None if best_of == 1 else _reward(model, reward)
    space, sampler, chosen = _open(model, direction, temperature, max_new_tokens, clamp, named)
    if robust and chosen is None:
        raise ConfigError("--robust: no direction has no neighbours; give one by --direction, or leave it out.")
    if robust and isinstance(chosen, Target):
        raise ConfigError("--robust: a target has no neighbours; leave it out, --best-of picks among answers to it.")
    if given is not None:
        given.check(space)
        kind = RobustSampler if robust else BestOfSampler
        sampler = kind(sampler, given.open(), space, best_of)
    return (
        text
        for prompt in prompts
        for text in _ask(model, space, sampler, [{"role": "user", "content": prompt}], chosen, samples, seed)
    )


def converse(
    model: ModelReference, direction: str | None, temperature: float, max_new_tokens: int, seed: int,
    named: str | None = None,
) -> None:  # fmt: skip
    """A conversation on the terminal."""
    space, sampler, chosen = _open(model, direction, temperature, max_new_tokens, False, named)
    print(f"objectives: {', '.join(space.names)}; direction: {chosen or 'none'}; /direction TEXT, /reset, /quit")
    messages: Messages = []
    while True:
        try:
            text = input("you> ").encode(errors="replace").decode().strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text in {"/quit", "/exit"}:
            return
        if text == "/reset":
            messages = []
        elif text.startswith("/direction"):
            try:
                chosen = wish_or_center(space, text.removeprefix("/direction").strip())
                print(f"direction: {chosen or 'none'}")
            except DirectionError as error:
                print(error)
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                (reply,) = _ask(model, space, sampler, messages, chosen, 1, seed + len(messages))
            except DataError as error:
                print(for_screen(str(error)))
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": reply})
            print(for_screen(reply))


def for_screen(text: str) -> str:
    """What a model wrote, as standard output is to have it: a terminal must not obey it, anything else gets all."""
    return printable(text, kept="\n\t") if sys.stdout.isatty() else text


def _open(
    model: ModelReference, direction: str | None, temperature: float, max_new_tokens: int, clamp: bool,
    named: str | None,
) -> tuple[DirectionSpace, "Sampler", Wish | None]:  # fmt: skip
    path = resolve_model(model).path
    space = read_space(named or path)
    trained = Path(path, SPACE_FILE).is_file()
    if not trained:
        print(
            f"note: {model} has no {SPACE_FILE}: nothing says that it was trained to follow a direction, and a model "
            "that was not answers alike under all of them.",
            file=sys.stderr,
        )
    try:
        asked = direction is not None or trained  # a model that was never told one is told none
        chosen = wish_or_center(space, direction, "clamp" if clamp else "error") if asked else None
    except OutsideConeError as error:
        raise OutsideConeError(error.finding, "take `dpa generate --clamp`, which moves it to the edge") from None
    return *open_policy(replace(model, name=path), max_new_tokens, temperature, space), chosen


def _reward(model: ModelReference, reward: str | None) -> GivenReward:
    """The reward given, or that of the run which the policy lies in (RUN/iter_t/policy)."""
    parents = Path(model.name).resolve().parents
    if reward is None and len(parents) < 2:
        raise ConfigError(f"--reward: {model} lies in no run; give the folder of a reward model, or of a run.")
    return GivenReward(reward or reward_of_run(parents[1]), model.code_revision)


def _ask(
    model: ModelReference, space: DirectionSpace, sampler: "Sampler", messages: Messages, direction: Wish | None,
    samples: int, seed: int,
) -> list[str]:  # fmt: skip
    seeds = tuple(seed_of(f"{seed}-{k}") for k in range(samples))
    weights, held = numbers_of(direction)
    (answers,) = sampler.sample([SampleRequest(messages, weights, seeds, held)])
    if not answers:
        raise DataError(_why_not(model, space, messages, direction))
    return [sample.text for sample in answers]


def _why_not(model: ModelReference, space: DirectionSpace, messages: Messages, direction: Wish | None) -> str:
    """Why a sampler gave a prompt no answer: it is written and counted once more."""
    prompting = Prompting.of(resolve_model(model), space)
    weights, held = numbers_of(direction)
    try:
        ids = encode_prompt(prompting.tokenizer, space, messages, weights, held)
    except TemplateError as error:
        return f"prompt: the chat template of {model} refuses it ({error}); change it, or restore the template."
    except (KeyError, TypeError, UnicodeError) as error:
        reason = " ".join(str(error).split())[:200]
        return f"prompt: it cannot be written as tokens ({reason}); take out what is no Unicode text."
    if len(ids) >= prompting.context:
        return (
            f"prompt: it takes {len(ids):,} tokens, direction and template included, and the model's context holds "
            f"{prompting.context:,}; shorten it."
        )
    return f"prompt: the model gave no answer to its {len(ids)} tokens; write something else."
