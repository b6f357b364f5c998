"""Multi-objective decoding: several policies of one vocabulary asked together, their log-probabilities mixed at every
token (arXiv 2406.18853).
Run its tests: pytest tests/test_mixed_logits.py

    sampler = MixedLogitsSampler([one, other], lambda direction: (0.7, 0.3), sampler_spec(one, rollout))
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpa.core.errors import ModelFileError
from dpa.core.records import Sample, SampleRequest, places_of, stable_hash
from dpa.core.reference import ModelReference
from dpa.models.files import folder_revision
from dpa.sampling.decoding import Decoder
from dpa.sampling.samplers import SamplerSpec, TransformersSampler

Shares = Callable[[tuple[float, ...] | None], Sequence[float]]
"""Each policy's share for a direction; they add up to 1."""


class MixedDecoder(Decoder):
    """Several decoders over the same rows, each with its cache: logits_BV = sum_i share_i logits_i, which is, up to a
    number for each row, the sum of their log-probabilities.

    `mix` sets the shares and forgets the rows; models whose share is 0 are not asked, so that one with a share of 1 is
    that model exactly.
    """

    def __init__(self, models: Sequence[PreTrainedModel]) -> None:
        self._decoders = [Decoder(model) for model in models]
        self.model = models[0]
        self.mix([1.0, *[0.0] * (len(models) - 1)])

    def mix(self, shares: Sequence[float]) -> None:
        """From now on these shares. Raises ValueError."""
        if len(shares) != len(self._decoders) or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"{len(shares)} shares that add up to {sum(shares):g} for {len(self._decoders)} policies")
        for decoder in self._decoders:
            decoder.begin()
        self._asked = [(decoder, share) for decoder, share in zip(self._decoders, shares, strict=True) if share]

    @property
    def held_bytes(self) -> int:
        return sum(decoder.held_bytes for decoder in self._decoders)

    @property
    def width(self) -> int:
        return self._asked[0][0].width

    def begin(self, rows: int = 0, length: int = 0) -> None:
        for decoder, _ in self._asked:
            decoder.begin(rows, length)

    def release(self) -> None:
        for decoder in self._decoders:
            decoder.release()

    def parts(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        return max((decoder.parts(prompts) for decoder, _ in self._asked), key=len)

    def read(self, prompts: Sequence[Sequence[int]]) -> Any:
        """What each asked model has read."""
        return [decoder.read(prompts) for decoder, _ in self._asked]

    def enter(self, read: Any, prompt_of_B: Sequence[int]) -> torch.Tensor:
        return self._mixed(
            [decoder.enter(own, prompt_of_B) for (decoder, _), own in zip(self._asked, read, strict=True)]
        )

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        return self._mixed([decoder.step(token_B) for decoder, _ in self._asked])

    def is_worth_leaving(self, going_on: int) -> bool:
        return self._asked[0][0].is_worth_leaving(going_on)

    def keep(self, staying: torch.Tensor) -> None:
        for decoder, _ in self._asked:
            decoder.keep(staying)

    def _mixed(self, logits_IBV: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(logits_IBV) == 1:
            return logits_IBV[0]
        return torch.stack([share * own for own, (_, share) in zip(logits_IBV, self._asked, strict=True)]).sum(0)


class MixedLogitsSampler(TransformersSampler):
    """A Sampler of log pi(y_t) = sum_i share_i log pi_i(y_t) + constant, the shares following from the direction.

    `spec` says how it samples; the prompt is written by the first policy's chat template. It states no direction, which
    picks the shares, unless `states_direction`. Requests are served shares by shares. Raises ModelFileError where a
    policy has another vocabulary than the first.
    """

    def __init__(
        self, policies: Sequence[str], shares: Shares, spec: SamplerSpec, states_direction: bool = False
    ) -> None:
        start = ModelReference.of(spec.policy)
        loaded = [replace(spec, policy=replace(start, name=folder)).load() for folder in policies]
        model, tokenizer = loaded[0]
        for folder, other in zip(policies, loaded, strict=True):
            if _vocabulary(*other) != _vocabulary(model, tokenizer):
                raise ModelFileError(
                    f"mixing: {folder} has another vocabulary than {policies[0]}, so their probabilities are of other "
                    "tokens; mix policies of one tokenizer."
                )
        super().__init__(
            model,
            tokenizer,
            spec.space,
            spec.max_new_tokens,
            spec.temperature,
            spec.top_p,
            spec.batch_size,
            stable_hash("mixed logits", *map(folder_revision, policies)),
            spec.sharing * len(policies),
        )
        self._decoder: MixedDecoder = MixedDecoder([model for model, _ in loaded])
        self._shares, self._states_direction = shares, states_direction

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """One Sample per seed of each request (core.records.Sampler). Raises EngineError."""
        if not self._states_direction and any(request.held is not None for request in requests):
            raise ValueError("a mixture that states no direction can be asked for no target")
        answers: list[list[Sample]] = [[] for _ in requests]
        shares = [tuple(self._shares(request.direction)) for request in requests]
        for own, places in places_of(shares).items():
            self._decoder.mix(own)
            asked = [requests[place] for place in places]
            if not self._states_direction:
                asked = [replace(request, direction=None) for request in asked]
            for place, samples in zip(places, super().sample(asked), strict=True):
                answers[place] = samples
        return answers


def _vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, dict[str, int]]:
    """How many logits, and which token each is of."""
    return model.config.get_text_config().vocab_size, tokenizer.get_vocab()
