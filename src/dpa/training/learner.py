"""A learner: which table it reads, its section of the configuration, how a row becomes tokens, and its Trainer.
Run its tests: pytest tests/test_learners.py

A new one is a file with a class like SFT (sft.py), DPO (dpo.py) or GRPO (grpo.py), and a line in learners.py. The rest
is shared (policy_training.py): checkpoints, log, listening, what is saved.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import pyarrow as pa
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from dpa.core.config import RunConfig
from dpa.core.directions import DirectionSpace
from dpa.core.records import Ledger, Scorer
from dpa.core.sections.rollout import RolloutConfig
from dpa.core.targets import Held
from dpa.models.policy import encode_prompt, turn_end_id
from dpa.storage.stage_records import Reject
from dpa.training.listening import Listening
from dpa.training.trainers import trackers

UNSHARED = "unshared_tokens"
"""In a ledger's `extra`: training tokens, if what prompts share had been read with each."""

Reads = Literal["winners", "pairs", "prompts"]
"""What a selection keeps, winners or pairs; or prompts with their directions, and the learner samples for itself."""


class Encoded(Protocol):
    """A training example as token ids. Its `repr` tells it from any other."""

    @property
    def tokens(self) -> int:
        """Tokens the policy reads when it trains on it."""
        ...


E = TypeVar("E", bound=Encoded)


class RowEncoder:
    """Turns rows into token ids: the prompt as the sampler shows it, then a response as its own tokens, then the token
    that ends a turn, unless the response was cut at a limit. `longest`: tokens of an example, at most; `shares`:
    whether what prompts begin with can be read once."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        space: DirectionSpace,
        longest: int,
        shares: bool = False,
    ) -> None:
        self.shares = shares
        self._tokenizer, self._space, self._longest = tokenizer, space, longest
        self._end = turn_end_id(model, tokenizer)

    def encode(
        self,
        messages: str,
        direction: Sequence[float] | None,
        responses: Sequence[str] = (),
        complete: Sequence[bool] = (),
        held: Held | None = None,
    ) -> tuple[list[int], list[list[int]]] | str:
        """Ids of the prompt (`messages`: JSON text; with `held` values a target's) and of each response, or the reason
        why there are none.

        A response that is not `complete` gets no end token: it would teach the policy to stop in mid-sentence.
        """
        try:
            prompt = encode_prompt(self._tokenizer, self._space, json.loads(messages), direction, held)
            texts = [
                self._tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
                for response in responses
            ]
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            return f"cannot be written as tokens ({type(error).__name__})"
        if not all(texts):
            return "the response is empty"
        if len(prompt) + 1 >= self._longest:
            return f"the prompt fills the {self._longest} tokens of an example"
        if len(prompt) + max(map(len, texts), default=0) + 1 > self._longest:
            return f"prompt and response exceed the {self._longest} tokens of an example"
        return prompt, [[*text, self._end] if whole else text for text, whole in zip(texts, complete, strict=True)]


@dataclass(frozen=True)
class TrainingRecord:
    """What a training did: `tokens` read in one pass over its `examples` (`alone` of them, if they shared nothing), its
    optimizer `steps` and the Trainer's `log`.
    `listening` was measured after the last step; all measurements read `listening_tokens`, forward only. `earlier_s`:
    the seconds of the processes before this one, up to the checkpoint it went on from."""

    tokens: int
    alone: int
    examples: int
    steps: int
    log: tuple[dict[str, Any], ...]
    rejects: tuple[Reject, ...]
    listening: Listening | None = None
    listening_tokens: int = 0
    earlier_s: float = 0.0

    def logged(self, name: str) -> tuple[float, ...]:
        """The values of one number, one per optimizer step."""
        return tuple(entry[name] for entry in self.log if name in entry)


@dataclass(frozen=True)
class Learner(ABC, Generic[E]):
    """One training: `config` is the learner's own section, `seed` that of its random choices. What samples for itself
    is also given how (`rollout`) and what scores its answers (`scorer`)."""

    reads: ClassVar[Reads] = "winners"
    section: ClassVar[str] = "finetune"
    advice: ClassVar[str] = ""
    """What may make its policies read their direction, beside more questions."""

    config: Any
    space: DirectionSpace
    seed: int
    rollout: RolloutConfig = field(default_factory=RolloutConfig)  # type: ignore[arg-type]
    scorer: Scorer | None = None

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Refuse a configuration it cannot learn from, before any work. Raises ConfigError."""
        trackers(getattr(run, cls.section).report_to, cls.section)

    @abstractmethod
    def encode(self, rows: pa.Table, encoder: RowEncoder) -> tuple[list[E], list[Reject]]:
        """Its examples in the order of training, and the rows that cannot be trained on."""

    @abstractmethod
    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[E],
        work: Path,
        start: Callable[[], PreTrainedModel],
    ) -> Trainer:
        """The Trainer over the examples, checkpoints in `work`; `start` loads the policy that training starts from once
        more. Raises ConfigError."""

    def tokens(self, examples: Sequence[E], trainer: Trainer) -> int:
        """Read in one pass over the examples."""
        return sum(example.tokens for example in examples)

    def cost(self, done: TrainingRecord) -> Ledger:
        """Tokens trained on (and generated), and figures of its own in `extra`."""
        ledger = Ledger(training_tokens=round(done.tokens * self.config.epochs))
        if done.alone != done.tokens:
            ledger.extra[UNSHARED] = round(done.alone * self.config.epochs)
        return ledger

    @property
    def identity(self) -> tuple[object, ...]:
        """What the result depends on beside examples, section and seed: checkpoints of another are not gone on with."""
        return ()
