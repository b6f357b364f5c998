"""A policy sampled by vLLM in this process (extra `vllm`): `LLM.generate` over token ids, a seed for each sample.
Run its tests: pytest tests/test_vllm_sampler.py

Written against vLLM's documented interface (LLM, SamplingParams, TokensPrompt as a mapping of `prompt_token_ids`), and
tested with a stand-in for it: nothing here was run with vLLM itself. vLLM keeps the weights in engine processes of its
own, which end with the block, so that finetuning finds the card free.
"""

import gc
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpa.core.config import RolloutConfig
from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, EngineError
from dpa.core.records import Sample, SampleRequest
from dpa.models.files import SafeModel, folder_revision
from dpa.models.policy import encode_prompt, load_prompting, make_steerable


class VllmSampler:
    """A policy that vLLM holds. `llm` is a `vllm.LLM`, `vllm` that module; see TransformersSampler for the rest.

    The prompts are token ids of the policy's own template, so vLLM sees what the other samplers show.
    """

    def __init__(
        self,
        vllm: Any,
        llm: Any,
        tokenizer: PreTrainedTokenizerBase,
        space: DirectionSpace,
        context: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        revision: str = "unnamed",
        end_ids: Sequence[int] = (),
    ) -> None:
        make_steerable(tokenizer, space)
        self.revision = revision
        self._vllm, self._llm, self._tokenizer, self._space = vllm, llm, tokenizer, space
        self._context, self._max_new_tokens, self._end_ids = context, max_new_tokens, list(end_ids)
        self._temperature, self._top_p = temperature, top_p

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """One Sample per seed of each request (core.records.Sampler). Raises EngineError when the engine died."""
        prompts = [self._encode(request) for request in requests]
        rows = [(i, seed) for i, request in enumerate(requests) if prompts[i] for seed in request.seeds]
        if not rows:
            return [[] for _ in requests]
        asked = [{"prompt_token_ids": prompts[i]} for i, _ in rows]
        how = [self._how(len(prompts[i]), seed) for i, seed in rows]
        try:
            outputs = self._llm.generate(asked, how, use_tqdm=False)
        except Exception as error:
            if type(error).__name__ in ("EngineDeadError", "EngineGenerateError"):  # vllm.v1.engine.exceptions
                raise EngineError(
                    f"vLLM's engine died ({' '.join(str(error).split())[:200]}); see its output above, then run the "
                    "same command to go on."
                ) from None
            raise
        if len(outputs) != len(rows):
            raise RuntimeError(f"vLLM answered {len(outputs)} of {len(rows)} prompts")
        samples: list[list[Sample]] = [[] for _ in requests]
        for (i, _), output in zip(rows, outputs, strict=True):
            # Any other end (an abort) leaves the request short of a sample, which the rollout sees and asks again.
            samples[i] += [
                Sample(one.text, len(one.token_ids), one.finish_reason)
                for one in output.outputs
                if one.finish_reason in ("stop", "length")
            ]
        return samples

    def _encode(self, request: SampleRequest) -> list[int]:
        """Token ids of the prompt; none where it cannot be written or leaves no room for an answer."""
        try:
            ids = encode_prompt(self._tokenizer, self._space, request.messages, request.direction)
        except (TemplateError, KeyError, TypeError, UnicodeError):
            return []
        return ids if len(ids) < self._context else []

    def _how(self, prompt_tokens: int, seed: int) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            temperature=self._temperature,
            top_p=self._top_p,
            top_k=-1,
            min_p=0.0,
            seed=seed,
            max_tokens=min(self._max_new_tokens, self._context - prompt_tokens),
            stop_token_ids=self._end_ids,
            skip_special_tokens=True,
        )


@contextmanager
def vllm_sampler(
    policy: SafeModel, space: DirectionSpace, config: RolloutConfig, vllm: Any = None
) -> Iterator[VllmSampler]:
    """A VllmSampler on the policy's folder; at the end of the block its engine is shut down and the cards are free.

    `vllm` is the module (default: the installed one). Raises ModelFileError, ConfigError.
    """
    settings = config.engine.vllm
    if vllm is None:
        try:
            vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ConfigError(
                f"rollout.engine.kind: vllm cannot be imported ({' '.join(str(error).split())}); "
                "`pip install 'dpa[vllm]'` brings it, or serve it elsewhere and take `http`."
            ) from None
    tokenizer, context, end_ids = load_prompting(policy)
    llm = vllm.LLM(
        model=policy.path,
        tensor_parallel_size=settings.tensor_parallel,
        gpu_memory_utilization=settings.memory,
        **{
            "max_model_len": context if context < 1_000_000 else None,
            "trust_remote_code": policy.kwargs["trust_remote_code"],
            "enable_prefix_caching": True,  # the samples of a prompt share its cache
            **settings.arguments,
        },
    )
    context = min(context, settings.arguments.get("max_model_len") or context)
    try:
        yield VllmSampler(
            vllm,
            llm,
            tokenizer,
            space,
            context,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            revision=folder_revision(policy.path),
            end_ids=end_ids,
        )
    finally:
        engine = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
        if engine is not None and hasattr(engine, "shutdown"):
            engine.shutdown()
        del llm, engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
