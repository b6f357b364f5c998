"""Samplers: a policy that answers, in this process or in worker processes of its own.
Run its tests: pytest tests/test_samplers.py
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpa.core.config import RolloutConfig
from dpa.core.directions import DirectionSpace
from dpa.core.errors import DpaError, EngineError
from dpa.core.records import Sample, Sampler, SampleRequest
from dpa.core.reference import Model, ModelReference
from dpa.models.decoding import Decoder, Decoding, decode
from dpa.models.files import SafeModel, folder_revision, load_space, resolve_model
from dpa.models.http_sampler import http_samplers
from dpa.models.policy import (
    context_length,
    default_device,
    encode_prompt,
    end_token_ids,
    is_out_of_memory,
    load_policy,
    make_steerable,
)
from dpa.models.strided_cache import STRIDE
from dpa.models.vllm_sampler import VllmEngine, VllmSampler, vllm_is_at_hand
from dpa.storage.memory import free_memory_of_machine

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
        make_steerable(tokenizer, space)
        self.revision = revision
        self._model, self._tokenizer, self._space = model, tokenizer, space
        self._context, self._batch_size, self._sharing = context_length(model), batch_size, sharing
        self._most: int | None = None  # rows, once a batch did not fit
        self._how = Decoding(temperature, top_p, max_new_tokens, end_token_ids(model, tokenizer))

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace the model's weights, all of them; whoever does it names them in `revision`."""
        self._model.load_state_dict(weights)

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """One Sample per seed of each request (core.records.Sampler). Raises EngineError."""
        prompts = [self._encode(request) for request in requests]
        # Longest prompts first: neighbours need little padding, and a batch too big for the device fails at once.
        order = sorted((i for i, ids in enumerate(prompts) if ids), key=lambda i: -len(prompts[i]))
        rows = [(i, j) for i in order for j in range(len(requests[i].seeds))]
        samples: dict[tuple[int, int], Sample] = {}
        while rows:
            size = self._rows_at_once(len(prompts[rows[0][0]]))
            batch, rows = rows[:size], rows[size:]
            seeds = [requests[i].seeds[j] for i, j in batch]
            samples.update(zip(batch, self._sample_batch([prompts[i] for i, _ in batch], seeds), strict=True))
        return [
            [samples[i, j] for j in range(len(request.seeds))] if ids else []
            for i, (request, ids) in enumerate(zip(requests, prompts, strict=True))
        ]

    def _encode(self, request: SampleRequest) -> tuple[int, ...]:
        """Token ids of the prompt; none where it cannot be written or leaves no room for an answer."""
        try:
            ids = encode_prompt(self._tokenizer, self._space, request.messages, request.direction)
        except (TemplateError, KeyError, TypeError, UnicodeError):
            return ()
        return tuple(ids) if len(ids) < self._context else ()

    def _sample_batch(self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int]) -> list[Sample]:
        distinct = {ids: place for place, ids in enumerate(dict.fromkeys(prompts))}
        limits = [min(self._how.max_new_tokens, self._context - len(ids)) for ids in prompts]
        rows: list[list[int]] | None
        try:
            places = [distinct[ids] for ids in prompts]
            rows = decode(self._decoder, list(distinct), places, seeds, limits, self._how)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            rows = None
        if rows is None:  # outside the `except`, whose traceback would keep the cache that did not fit
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(prompts) == 1:
                raise EngineError("sampler: one sequence does not fit in memory; lower rollout.max_new_tokens.")
            half = len(prompts) // 2
            if self._most is None or half < self._most:
                self._most = max(half, 1)
                _log.warning("sampler: memory ran out; goes on with %s sequences at a time.", f"{self._most:,}")
            return self._sample_batch(prompts[:half], seeds[:half]) + self._sample_batch(prompts[half:], seeds[half:])
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [
            Sample(text, len(row), "stop" if row[-1] in self._how.end_ids else "length", tuple(row))
            for text, row in zip(texts, rows, strict=True)
        ]

    def _rows_at_once(self, prompt_tokens: int) -> int:
        """Sequences of such prompts, and of shorter ones, to decode together."""
        most = self._most or sys.maxsize
        if self._batch_size != "auto":
            return min(self._batch_size, most)
        each = row_bytes(self._model, min(prompt_tokens + self._how.max_new_tokens, self._context), self._how.top_p)
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

    def build(self) -> TransformersSampler:
        """Load the policy, in bf16 on a card that has it, else in fp32. Raises ModelFileError."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = self.device or default_device()
        dtype = torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float32
        model, tokenizer = load_policy(self.policy, dtype=dtype, device=device)
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


class ProcessSampler:
    """A TransformersSampler in a process of its own, so that several use several cores or cards.

    A process that dies is started again after `backoff_s`, twice as long each time, and asked the same; when it dies
    after `max_restarts` of them EngineError is raised. `close` (or leaving the `with` block) ends the process, and so
    does the end of this one, kill -9 included.
    """

    def __init__(self, spec: SamplerSpec, max_restarts: int = 3, backoff_s: float = 1.0) -> None:
        self._spec, self._max_restarts, self._backoff_s = spec, max_restarts, backoff_s
        self.revision = spec.revision
        self._process: Any = None
        self._connection: Connection | None = None
        self._start()  # it loads the policy while others start

    @property
    def pid(self) -> int | None:
        """Process id of the worker."""
        return self._process.pid if self._process is not None else None

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """As TransformersSampler.sample. Raises EngineError."""
        for death in range(self._max_restarts + 1):
            try:
                if self._connection is None:
                    self._start()
                assert self._connection is not None
                self._connection.send(list(requests))
                answer = self._connection.recv()
            except (EOFError, OSError):  # the pipe broke: the process died
                self._process.join()
                code = self._process.exitcode
                self.close()
                if death < self._max_restarts:
                    time.sleep(self._backoff_s * 2**death)
                continue
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise EngineError(
            f"sampler: the worker process for {self._spec.policy} died {self._max_restarts + 1} times in a row "
            f"(exit code {code}); look for memory or driver trouble, or lower rollout.batch_size."
        )

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._connection = self._process = None

    def __enter__(self) -> "ProcessSampler":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._spec, theirs), daemon=True)
        self._process.start()
        theirs.close()


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
    )


def engine_kind(config: RolloutConfig) -> str:
    """What `config.engine.kind` stands for here: `auto` is vLLM where it and a CUDA card are at hand, else
    transformers."""
    if config.engine.kind != "auto":
        return config.engine.kind
    return "vllm" if vllm_is_at_hand() else "transformers"


@contextmanager
def build_samplers(
    policy: Model,
    config: RolloutConfig,
    space: DirectionSpace | None = None,
    vllm: VllmEngine | None = None,
) -> Iterator[list[Sampler]]:
    """The samplers a rollout asks for: one in this process, or `config.workers` processes that share the cores (or,
    one after another, the cards), or what `config.engine` names. They are closed at the end of the block.

    `space` defaults to the one saved with the policy. `vllm` is an engine to take where vLLM samples: it outlives the
    block, so that several policies pay one start. Raises ModelFileError.
    """
    kind = engine_kind(config)
    if kind in ("http", "vllm"):
        safe = resolve_model(policy)
        space = space or load_space(safe.path)
        if kind == "http":
            with http_samplers(safe, space, config) as over_http:
                yield list(over_http)
            return
        if config.engine.kind == "vllm" or not (vllm and vllm.failed):
            with ExitStack() as stack:
                engine = vllm or stack.enter_context(VllmEngine())
                sampler = started(engine, stack, safe, space, config)
                if sampler is not None:
                    yield [sampler]
                    return
    spec = sampler_spec(policy, config, space)
    if config.workers == 1:
        yield [spec.build()]
        return
    cards = torch.cuda.device_count()
    threads = max(1, (os.cpu_count() or 1) // config.workers)
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                ProcessSampler(
                    replace(
                        spec,
                        threads=threads,
                        device=f"cuda:{i % cards}" if cards else "cpu",
                        sharing=-(-config.workers // max(cards, 1)),
                    )
                )
            )
            for i in range(config.workers)
        ]


def started(
    engine: VllmEngine, stack: ExitStack, policy: SafeModel, space: DirectionSpace, config: RolloutConfig
) -> VllmSampler | None:
    """vLLM on the policy; None, with one sentence, where `auto` chose it and it does not start."""
    try:
        return stack.enter_context(engine.sampler(policy, space, config))
    except Exception as error:  # what a start can raise is vLLM's, CUDA's and Python's
        if config.engine.kind != "auto":
            raise
        said = " ".join(str(error).split())[:200]
        _log.warning("vLLM does not start (%s: %s); transformers samples instead.", type(error).__name__, said)
        engine.failed = True
        return None


def _serve(spec: SamplerSpec, connection: Connection) -> None:
    """What the worker process does until its parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    threading.Thread(target=die_with_parent, daemon=True).start()
    sampler: TransformersSampler | None = None
    while True:
        try:
            requests = connection.recv()
        except EOFError:
            return
        try:
            sampler = sampler or spec.build()
            connection.send(sampler.sample(requests))
        except DpaError as error:
            connection.send(error)
        except torch.AcceleratorError:
            raise  # the card's state is lost: the parent starts another process
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            connection.send(RuntimeError(f"{type(error).__name__}: {error}"))  # any class may not survive the pipe


def die_with_parent() -> None:
    """Leave at once when the parent ends, even by kill -9 in the middle of a batch."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
