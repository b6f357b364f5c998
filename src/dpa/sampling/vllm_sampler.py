"""Policies sampled by vLLM in this process (extra `vllm`): `LLM.generate` over token ids, one engine for all of a run.
Run its tests: pytest tests/test_vllm_sampler.py

Written against vLLM's documented interface (LLM, SamplingParams, TokensPrompt as a mapping of `prompt_token_ids`,
sleep mode, `reload_weights` of 0.23) and tested with a stand-in for it. vLLM keeps the weights in engine processes of
its own. Between two policies the engine sleeps, its memory given back, and takes the next one's weights in place; where
that cannot be it is ended and started again. vLLM 0.23 spoils some models without a word when they take weights in
place (its pull request 44371), so an engine first takes those it had: where it then says otherwise, it takes no more.
"""

import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, EngineError
from dpa.core.records import Sample, Sampler, SampleRequest
from dpa.core.reference import Model
from dpa.core.sections.rollout import RolloutConfig
from dpa.models.files import SafeModel, folder_revision, resolve_model
from dpa.models.half_precision import computes_in_bf16
from dpa.models.memory import free_memory
from dpa.sampling.engine import SamplingEngine
from dpa.sampling.prompting import Prompting

_DEAD = ("EngineDeadError", "EngineGenerateError")  # vllm.v1.engine.exceptions
_SEEDS = 2**62  # vLLM adds a sample's number to its request's seed: both are 64 bits, signed
_SAME_ENGINE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""What a policy's config.json may say otherwise without an engine being another."""

_WITNESS = "One, two, three: whoever takes the same weights again goes on with these words as before, and"
_WITNESS_TOKENS = 16

_log = logging.getLogger(__name__)


class VllmSampler:
    """A policy that vLLM holds. `llm` is a `vllm.LLM`, `vllm` that module.

    The prompts are token ids of the policy's own template and the answers are written by its own tokenizer, so that
    vLLM sees and says what the other samplers do. A request is one of `n` samples with the first one's seed.
    """

    def __init__(self, vllm: Any, llm: Any, prompting: Prompting, config: RolloutConfig, revision: str) -> None:
        self.revision = revision
        self._vllm, self._llm, self._prompting, self._config = vllm, llm, prompting, config

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """One Sample per seed of each request (core.records.Sampler). Raises EngineError when the engine died."""
        prompts = self._prompting.encode_all(requests)
        asked = [i for i, request in enumerate(requests) if prompts[i] and request.seeds]
        if not asked:
            return [[] for _ in requests]
        try:
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(prompts[i])} for i in asked],
                [self._how(len(prompts[i]), requests[i].seeds) for i in asked],
                use_tqdm=False,
            )
        except Exception as error:
            if type(error).__name__ in _DEAD:
                raise EngineError(
                    f"vLLM's engine died ({' '.join(str(error).split())[:200]}); see its output above, then run the "
                    "same command to go on."
                ) from None
            raise
        if len(outputs) != len(asked):
            raise RuntimeError(f"vLLM answered {len(outputs)} of {len(asked)} prompts")
        samples: list[list[Sample]] = [[] for _ in requests]
        for i, output in zip(asked, outputs, strict=True):
            # Any other end (an abort) leaves the request short of a sample, which the rollout sees and asks again.
            whole = [one for one in output.outputs if one.finish_reason in ("stop", "length")]
            rows = [list(one.token_ids) for one in sorted(whole, key=lambda one: one.index)]
            texts = self._prompting.tokenizer.batch_decode(rows, skip_special_tokens=True)
            samples[i] = [
                Sample(text, len(row), "stop" if row and row[-1] in self._prompting.end_ids else "length")
                for text, row in zip(texts, rows, strict=True)
            ]
        return samples

    def _how(self, prompt_tokens: int, seeds: Sequence[int]) -> Any:
        return self._vllm.SamplingParams(
            n=len(seeds),
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            top_k=-1,
            min_p=0.0,
            seed=seeds[0] % _SEEDS,
            max_tokens=self._prompting.room(prompt_tokens, self._config.max_new_tokens),
            stop_token_ids=list(self._prompting.end_ids),
            detokenize=False,
        )


class VllmEngine(SamplingEngine):
    """One `vllm.LLM` for the policies of a run, one after another. `vllm` is the module (default: the installed one).

    After the block of `samplers` it sleeps and the cards are free. Not for several threads.
    """

    def __init__(self, vllm: Any = None) -> None:
        self._vllm = vllm
        self._llm: Any = None
        self._made_of: Any = None
        self._policy = ""
        """The folder whose weights the engine has, or had when it fell asleep."""
        self._in_place: bool | None = None
        """Whether it may take weights in place; None before that was tried with those it has."""
        self._witness: tuple[list[int], list[int]] = [], []
        """A prompt, and how those weights go on with it."""
        self.starts = 0

    def wants_card(self, config: RolloutConfig) -> bool:
        return True

    @contextmanager
    def samplers(self, policy: Model, space: DirectionSpace, config: RolloutConfig) -> Iterator[list[Sampler]]:
        safe = resolve_model(policy)
        prompting = Prompting.of(safe, space)
        arguments = _arguments(safe, prompting.context, config)
        self._take(safe, arguments)
        # The engine may have found it out (-1), or know a limit that the policy does not declare.
        started_with = getattr(getattr(self._llm, "model_config", None), "max_model_len", None)
        longest = started_with or arguments["max_model_len"] or prompting.context
        prompting = replace(prompting, context=min(prompting.context, longest))
        try:
            yield [VllmSampler(self._vllm, self._llm, prompting, config, folder_revision(safe.path))]
        except BaseException:
            self.close()
            raise
        self._sleep(prompting)

    def close(self) -> None:
        """Shut the engine down, where one was started."""
        if self._llm is None:
            return  # to look for what can be freed takes half a second
        engine = getattr(getattr(self._llm, "llm_engine", None), "engine_core", None)
        if engine is not None and hasattr(engine, "shutdown"):
            engine.shutdown()
        self._llm = self._made_of = engine = None
        free_memory()

    def _take(self, policy: SafeModel, arguments: dict[str, Any]) -> None:
        """Let the engine hold the policy: by its weights alone where the engine is asleep and made like it."""
        made_of = ({name: value for name, value in arguments.items() if name != "model"}, _shape(policy))
        free_memory()
        if self._llm is not None and made_of == self._made_of:
            try:
                if self._in_place is None:
                    self._load(self._policy)
                    self._in_place = self._goes_on(self._witness[0]) == self._witness[1]
                    self._llm.sleep(level=2)
                if self._in_place:
                    self._load(policy.path)
                    return
                _log.warning(
                    "vLLM says otherwise once it has taken the weights it had again, so this model's are not taken in "
                    "place; an engine is started for each rollout."
                )
            except Exception as error:  # whatever an engine process says: a fresh one holds the same
                said = " ".join(str(error).split())[:200]
                _log.warning(
                    "vLLM takes no weights in place (%s: %s); it is started again.", type(error).__name__, said
                )
        self.close()
        self._llm = self._module().LLM(**arguments)
        self._made_of, self._policy = made_of, policy.path
        self._in_place = None if self._in_place else self._in_place  # another engine is tried anew
        self.starts += 1

    def _load(self, folder: str) -> None:
        """Wake up with a policy's weights."""
        self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._llm.wake_up(tags=["kv_cache"])
        self._policy = folder

    def _goes_on(self, prompt: list[int]) -> list[int]:
        """The likeliest tokens after a prompt."""
        greedy = self._vllm.SamplingParams(
            n=1,
            temperature=0.0,
            top_p=1.0,
            top_k=-1,
            min_p=0.0,
            seed=0,
            max_tokens=_WITNESS_TOKENS,
            stop_token_ids=[],
            detokenize=False,
        )
        (output,) = self._llm.generate([{"prompt_token_ids": prompt}], [greedy], use_tqdm=False)
        return list(output.outputs[0].token_ids)

    def _sleep(self, prompting: Prompting) -> None:
        """Give the memory back; where the engine cannot sleep, or could not take weights after it, it ends."""
        if self._in_place is False or self._made_of is None or not self._made_of[0].get("enable_sleep_mode"):
            self.close()
            return
        try:
            if self._in_place is None:
                # Bare text: no prompt of the rollout begins like it, so nothing of it is read from the prefix cache.
                prompt = prompting.tokenizer(_WITNESS, add_special_tokens=False)["input_ids"]
                self._witness = prompt, self._goes_on(prompt)
            self._llm.sleep(level=2)
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            _log.warning("vLLM's engine does not sleep (%s: %s); it is ended.", type(error).__name__, said)
            self.close()

    def _module(self) -> Any:
        if self._vllm is None:
            if importlib.util.find_spec("flashinfer") is None:  # vLLM 0.23 would sample by it all the same
                os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
            try:
                self._vllm = importlib.import_module("vllm")
            except ImportError as error:
                raise ConfigError(
                    f"rollout.engine.kind: vllm cannot be imported ({' '.join(str(error).split())}); "
                    "`pip install 'dpa[vllm]'` brings it, or serve it elsewhere and take `http`."
                ) from None
        return self._vllm


def _arguments(policy: SafeModel, context: int, config: RolloutConfig) -> dict[str, Any]:
    """Of `vllm.LLM`."""
    settings = config.engine.vllm
    narrow = computes_in_bf16(False)
    return {
        "model": policy.path,
        "tensor_parallel_size": settings.tensor_parallel,
        "gpu_memory_utilization": settings.memory,
        "max_model_len": context if context < 1_000_000 else None,
        "dtype": "bfloat16" if narrow else "auto",  # of every policy of the run, however it was saved
        "trust_remote_code": policy.kwargs["trust_remote_code"],
        "enable_prefix_caching": True,  # the samples of a prompt, and its directions, share its cache
        "enable_sleep_mode": True,
        **settings.arguments,
    }


def _shape(policy: SafeModel) -> dict[str, Any]:
    """What of a policy an engine is made for: all of its configuration that its weights do not replace."""
    about = json.loads(Path(policy.path, "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in about.items() if name not in _SAME_ENGINE}
