"""A policy that samples in this process, and what makes one anywhere.
Run its tests: pytest tests/test_samplers.py
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpa.core.directions import DirectionSpace
from dpa.core.errors import EngineError
from dpa.core.records import Sample, SampleRequest
from dpa.core.reference import Model, ModelReference
from dpa.core.sections.rollout import RolloutConfig
from dpa.core.sections.section import MixedBf16
from dpa.models.files import folder_revision, load_space, resolve_model
from dpa.models.half_precision import computes_in_bf16
from dpa.models.policy import context_length, default_device, end_token_ids, is_out_of_memory, load_policy
from dpa.sampling.decoding import Decoder, Decoding, decode
from dpa.sampling.prompting import Prompting
from dpa.sampling.strided_cache import STRIDE
from dpa.storage.memory import free_memory_of_machine
from dpa.storage.seals import check_in_run

PROCESSOR_ROWS = 256
"""Sequences decoded together on a processor by `batch_size: auto`, where they fit: more are hardly faster there."""
_SHARE_OF_FREE = 0.8  # of the free memory that caches may take

_log = logging.getLogger(__name__)


class TransformersSampler:
    """A Hugging Face causal language model that samples in this process, `batch_size` sequences at a time.

    `batch_size: auto` takes as many as fit in the free memory of the device, which `sharing` samplers divide; where a
    batch does not fit, it and those after it are halved. Neither changes what a sequence says.
    `temperature` > 0, `top_p` in (0, 1]; a response has at most `max_new_tokens` tokens, or as many as the context
    still holds. A prompt that fills the context gets no samples. The tokenizer's chat template is made steerable over
    `space`. `revision` names the weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        space: DirectionSpace,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int | Literal["auto"] = "auto",
        revision: str = "unnamed",
        sharing: int = 1,
    ) -> None:
        self._decoder = Decoder(model)
        self.revision = revision
        self.prompting = Prompting(tokenizer, space, context_length(model), end_token_ids(model, tokenizer))
        self._model, self._batch_size, self._sharing = model, batch_size, sharing
        self._most: int | None = None  # rows, once a batch did not fit
        self._how = Decoding(temperature, top_p, max_new_tokens, self.prompting.end_ids)

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace the model's weights, all of them; whoever does it names them in `revision`."""
        self._model.load_state_dict(weights)

    def release(self) -> None:
        """Give back the memory that is kept for the next sequences."""
        self._decoder.release()

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """One Sample per seed of each request (core.records.Sampler). Raises EngineError."""
        prompts = self.prompting.encode_all(requests)
        # Longest prompts first: neighbours need little padding, and a batch too big for the device fails at once.
        order = sorted((i for i, ids in enumerate(prompts) if ids), key=lambda i: -len(prompts[i]))
        # Where many begin alike, those beside each other: what they share is then read once.
        order = [order[place] for part in self._decoder.parts([prompts[i] for i in order]) for place in part]
        rows = [(i, j) for i in order for j in range(len(requests[i].seeds))]
        samples: dict[tuple[int, int], Sample] = {}
        while rows:
            size = self._rows_at_once(max(len(prompts[i]) for i, _ in rows))
            batch, rows = rows[:size], rows[size:]
            seeds = [requests[i].seeds[j] for i, j in batch]
            samples.update(zip(batch, self._sample_batch([prompts[i] for i, _ in batch], seeds), strict=True))
        return [
            [samples[i, j] for j in range(len(request.seeds))] if ids else []
            for i, (request, ids) in enumerate(zip(requests, prompts, strict=True))
        ]

    def _sample_batch(self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int]) -> list[Sample]:
        distinct = {ids: place for place, ids in enumerate(dict.fromkeys(prompts))}
        limits = [self.prompting.room(len(ids), self._how.max_new_tokens) for ids in prompts]
        rows: list[list[int]] | None
        try:
            places = [distinct[ids] for ids in prompts]
            rows = decode(self._decoder, list(distinct), places, seeds, limits, self._how)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            rows = None
        if rows is None:  # outside the `except`, whose traceback would keep the cache that did not fit
            self.release()  # buffers of as many rows as did not fit
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(prompts) == 1:
                raise EngineError("sampler: one sequence does not fit in memory; lower rollout.max_new_tokens.")
            half = len(prompts) // 2
            if self._most is None or half < self._most:
                self._most = max(half, 1)
                _log.warning("sampler: memory ran out; goes on with %s sequences at a time.", f"{self._most:,}")
            return self._sample_batch(prompts[:half], seeds[:half]) + self._sample_batch(prompts[half:], seeds[half:])
        texts = self.prompting.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [
            Sample(text, len(row), "stop" if row[-1] in self._how.end_ids else "length", tuple(row))
            for text, row in zip(texts, rows, strict=True)
        ]

    def _rows_at_once(self, prompt_tokens: int) -> int:
        """Sequences of such prompts, and of shorter ones, to decode together."""
        most = self._most or sys.maxsize
        if self._batch_size != "auto":
            return min(self._batch_size, most)
        longest = prompt_tokens + self.prompting.room(prompt_tokens, self._how.max_new_tokens)
        each = row_bytes(self._model, longest, self._how.top_p)
        device = self._model.device
        if device.type != "cuda":
            fits = int(_SHARE_OF_FREE * free_memory_of_machine() / self._sharing / each)
            return max(1, min(fits, most, PROCESSOR_ROWS))
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        held = torch.cuda.memory_allocated(device) - self._decoder.held_bytes
        return max(1, min(int(_SHARE_OF_FREE * (free - held) / self._sharing / each), most))


def row_bytes(model: PreTrainedModel, length: int, top_p: float = 1.0) -> int:
    """Most bytes that one more sequence of `length` tokens takes while it is decoded: keys and values, which stand in
    two places while they are moved, and what its distribution over the vocabulary is worked out in."""
    config, element = model.config.get_text_config(), model.dtype.itemsize
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    layer = 2 * groups * width * element * (length + STRIDE)
    # Fixed buffers hold the longest shape; growing ones are copied layer by layer: one layer more than there are.
    return layer * (config.num_hidden_layers + 1) + config.vocab_size * (16 if top_p == 1 else 48)


@dataclass(frozen=True)
class SamplerSpec:
    """What a worker process needs to make its TransformersSampler: the fields of that class, and where to run.

    `policy` is a model folder; `threads` of torch are as many as it likes where None.
    """

    policy: Model
    space: DirectionSpace
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int | Literal["auto"] = "auto"
    revision: str = "unnamed"
    sharing: int = 1
    threads: int | None = None
    device: str | None = None
    bf16: MixedBf16 = False

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The policy's model, in the precision that `bf16` asks for, and its tokenizer. Raises ModelFileError."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = self.device or default_device()
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # CUDA graphs are recorded on the current one
        dtype = torch.bfloat16 if computes_in_bf16(self.bf16, device) else torch.float32
        return load_policy(self.policy, dtype=dtype, device=device)

    def build(self) -> TransformersSampler:
        """Load the policy. Raises ModelFileError."""
        model, tokenizer = self.load()
        return TransformersSampler(
            model,
            tokenizer,
            self.space,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            batch_size=self.batch_size,
            revision=self.revision,
            sharing=self.sharing,
        )


def sampler_spec(
    policy: Model,
    config: RolloutConfig,
    space: DirectionSpace | None = None,
) -> SamplerSpec:
    """How a rollout samples `policy`; `space` defaults to the one saved with it. Raises ModelFileError."""
    path = resolve_model(policy).path
    return SamplerSpec(
        policy=replace(ModelReference.of(policy), name=path),
        space=space or load_space(path),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        batch_size=config.batch_size,
        revision=folder_revision(path),
        bf16=config.bf16,
    )


def open_policy(
    policy: Model, max_new_tokens: int = 256, temperature: float = 0.7, space: DirectionSpace | None = None
) -> tuple[DirectionSpace, TransformersSampler]:
    """A policy's space (by default the one saved with it) and its sampler in this process. Raises ModelFileError; of a
    policy of a run that was damaged RunFolderError."""
    path = resolve_model(policy).path
    check_in_run(path)
    space = space or load_space(path)
    named = replace(ModelReference.of(policy), name=path)
    return space, SamplerSpec(named, space, max_new_tokens, temperature, revision=folder_revision(path)).build()
