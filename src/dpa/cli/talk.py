"""`dpa generate` and `dpa chat`: try a policy under a direction."""

from pathlib import Path
from typing import TYPE_CHECKING

from dpa.cli.ecosystem import read_space
from dpa.core.directions import Direction, DirectionSpace
from dpa.core.errors import ConfigError, DirectionError, EngineError
from dpa.core.records import Messages, SampleRequest, seed_of
from dpa.models.best_of import BestOfSampler, RobustSampler
from dpa.models.files import folder_revision, resolve_model
from dpa.models.samplers import SamplerSpec
from dpa.models.scorers import RewardModelScorer

if TYPE_CHECKING:
    from dpa.core.records import Sampler


def answer(
    model: str, prompts: list[str], direction: str | None, samples: int, temperature: float, max_new_tokens: int,
    seed: int, clamp: bool, best_of: int = 1, robust: bool = False, reward: str | None = None,
    named: str | None = None,
) -> list[str]:  # fmt: skip
    """Answers to each prompt under the direction, in order; the best of `best_of` candidates for each."""
    if robust and best_of == 1:
        raise ConfigError("--robust: it picks among candidates; add --best-of 4 or more.")
    folder = None if best_of == 1 else _reward_folder(model, reward)
    space, sampler, chosen = _open(model, direction, temperature, max_new_tokens, clamp, named)
    if folder is not None:
        kind = RobustSampler if robust else BestOfSampler
        sampler = kind(sampler, RewardModelScorer(folder), space, best_of)
    return [
        text
        for prompt in prompts
        for text in _ask(sampler, [{"role": "user", "content": prompt}], chosen, samples, seed)
    ]


def converse(
    model: str, direction: str | None, temperature: float, max_new_tokens: int, seed: int, named: str | None = None
) -> None:
    """A conversation on the terminal."""
    space, sampler, chosen = _open(model, direction, temperature, max_new_tokens, False, named)
    print(f"objectives: {', '.join(space.names)}; direction: {chosen or 'none'}; /direction TEXT, /reset, /quit")
    messages: Messages = []
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            return
        if text in {"/quit", "/exit"}:
            return
        if text == "/reset":
            messages = []
        elif text.startswith("/direction"):
            try:
                chosen = space.parse(text.removeprefix("/direction").strip())
                print(f"direction: {chosen}")
            except DirectionError as error:
                print(error)
        elif text:
            messages.append({"role": "user", "content": text})
            (reply,) = _ask(sampler, messages, chosen, 1, seed + len(messages))
            messages.append({"role": "assistant", "content": reply})
            print(reply)


def _open(
    model: str, direction: str | None, temperature: float, max_new_tokens: int, clamp: bool, named: str | None
) -> tuple[DirectionSpace, "Sampler", Direction | None]:
    path = resolve_model(model).path
    space = read_space(named or path)
    chosen = None if direction is None else space.parse(direction, outside="clamp" if clamp else "error")
    spec = SamplerSpec(path, space, max_new_tokens, temperature, revision=folder_revision(path))
    return space, spec.build(), chosen


def _reward_folder(model: str, reward: str | None) -> str:
    """The reward model given, or the one of the run folder that the policy lies in (RUN/iter_t/policy)."""
    beside = Path(model).resolve().parents[1] / "reward_model" if len(Path(model).resolve().parents) > 1 else None
    if reward is None and (beside is None or not beside.is_dir()):
        raise ConfigError(f"--reward: no reward model is found beside {model}; give the folder of one for --best-of.")
    return reward or str(beside)


def _ask(sampler: "Sampler", messages: Messages, direction: Direction | None, samples: int, seed: int) -> list[str]:
    seeds = tuple(seed_of(f"{seed}-{k}") for k in range(samples))
    (answers,) = sampler.sample([SampleRequest(messages, direction.weights if direction else None, seeds)])
    if not answers:
        raise EngineError("the prompt is longer than the model's context; shorten it.")
    return [sample.text for sample in answers]
