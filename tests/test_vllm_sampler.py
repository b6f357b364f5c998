"""Sampling by vLLM: what it is asked, what is made of its answers, and that its engine is shut down.
pytest tests/test_vllm_sampler.py

vLLM needs a GPU, so a stand-in with its interface takes its place, given as an argument. It samples by the token loop
of this package, so that the answers must be those of TransformersSampler: prompts, seeds, limits and ends are right.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import all_rows, prompts_of
from tiny_models import SPACE, save_tiny_model

from dpa.core.config import EngineConfig, RolloutConfig, VllmEngineConfig
from dpa.core.errors import ConfigError, EngineError
from dpa.core.records import SampleRequest
from dpa.models.decoding import Decoding, decode
from dpa.models.files import SafeModel, folder_revision, resolve_model
from dpa.models.policy import load_policy
from dpa.models.samplers import build_samplers
from dpa.models.vllm_sampler import vllm_sampler
from dpa.stages.rollout import rollout
from dpa.storage.run_folder import StageFolder

HOW = VllmEngineConfig(tensor_parallel=2, memory=0.5, arguments={"max_model_len": 200, "enforce_eager": True})
CONFIG = RolloutConfig(
    directions=2, samples=2, prompts_per_shard=4, max_new_tokens=24, engine=EngineConfig(kind="vllm", vllm=HOW)
)


class EngineDeadError(Exception):
    """vLLM's own, by name."""


class FakeVllm:
    """Stands for the module `vllm`. `trouble`: what the next call of generate does."""

    def __init__(self) -> None:
        self.made: list[dict] = []
        self.calls: list[tuple[list[dict], list[SimpleNamespace]]] = []
        self.shut_down = 0
        self.trouble = ""

    def SamplingParams(self, **fields: object) -> SimpleNamespace:
        known = {"n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "stop_token_ids"}
        assert set(fields) == known | {"skip_special_tokens"}
        return SimpleNamespace(**fields)

    def LLM(self, **fields: object) -> SimpleNamespace:
        self.made.append(fields)
        model, tokenizer = load_policy(fields["model"])

        def generate(prompts: list[dict], params: list[SimpleNamespace], use_tqdm: bool) -> list[SimpleNamespace]:
            self.calls.append((prompts, params))
            assert not use_tqdm
            if self.trouble == "dead":
                raise EngineDeadError("EngineCore encountered an issue")
            ids = [tuple(prompt["prompt_token_ids"]) for prompt in prompts]
            distinct = list(dict.fromkeys(ids))
            first = params[0]
            how = Decoding(first.temperature, first.top_p, 24, tuple(first.stop_token_ids), tokenizer.pad_token_id)
            rows = decode(
                model,
                distinct,
                [distinct.index(prompt) for prompt in ids],
                [one.seed for one in params],
                [one.max_tokens for one in params],
                how,
            )
            texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
            outputs = []
            for text, row in zip(texts, rows, strict=True):
                finish = "stop" if row[-1] in first.stop_token_ids else "length"
                finish = "abort" if self.trouble == "aborts" and len(outputs) == 1 else finish
                one = SimpleNamespace(text=text, token_ids=row, finish_reason=finish)
                outputs.append(SimpleNamespace(outputs=[one]))
            return outputs[:-1] if self.trouble == "drops" else outputs

        def shutdown() -> None:
            self.shut_down += 1

        return SimpleNamespace(
            generate=generate, llm_engine=SimpleNamespace(engine_core=SimpleNamespace(shutdown=shutdown))
        )


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> SafeModel:
    return resolve_model(save_tiny_model(tmp_path_factory.mktemp("vllm") / "policy"))


def requests() -> list[SampleRequest]:
    texts = ["Why?", "x" * 300, "What is this long thing over there?"]
    return [SampleRequest([{"role": "user", "content": text}], (0.8, -0.6), (1, 2, 2**62)) for text in texts]


def test_answers_are_those_of_the_transformers_sampler(policy: SafeModel) -> None:
    vllm = FakeVllm()
    with vllm_sampler(policy, SPACE, CONFIG, vllm) as sampler:
        answers = sampler.sample(requests())
        assert sampler.revision == folder_revision(policy.path)
    with build_samplers(policy.path, RolloutConfig(max_new_tokens=24), SPACE) as (in_process,):
        assert answers == in_process.sample(requests())
    assert [len(samples) for samples in answers] == [3, 0, 3]


def test_what_vllm_is_given(policy: SafeModel) -> None:
    vllm = FakeVllm()
    with vllm_sampler(policy, SPACE, CONFIG, vllm) as sampler:
        sampler.sample(requests())
        assert sampler.sample(requests()[1:2]) == [[]]
        assert vllm.shut_down == 0
    assert vllm.shut_down == 1
    (made,) = vllm.made
    assert made == {
        "model": policy.path,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "max_model_len": 200,
        "trust_remote_code": False,
        "enable_prefix_caching": True,
        "enforce_eager": True,
    }
    ((prompts, params),) = vllm.calls
    assert len(prompts) == len(params) == 6
    assert [one.seed for one in params] == [1, 2, 2**62] * 2
    room = 200 - len(prompts[-1]["prompt_token_ids"])
    assert {one.max_tokens for one in params} == {24, min(24, room)}
    assert (params[0].n, params[0].top_k, params[0].min_p) == (1, -1, 0.0)


def test_fault_11_a_dead_engine_is_a_clear_error_and_still_shut_down(policy: SafeModel) -> None:
    vllm = FakeVllm()
    with (
        pytest.raises(EngineError, match=r"vLLM's engine died .* run the same command"),
        vllm_sampler(policy, SPACE, CONFIG, vllm) as sampler,
    ):
        vllm.trouble = "dead"
        sampler.sample(requests())
    assert vllm.shut_down == 1


@pytest.mark.parametrize("trouble", ["aborts", "drops"])
def test_fault_13_missing_samples_are_detected(policy: SafeModel, tmp_path: Path, trouble: str) -> None:
    vllm = FakeVllm()
    rows = []
    for name in ("", trouble):
        vllm.trouble = name
        stage = StageFolder(tmp_path / f"_{name}", "iter_1/rollout")
        with vllm_sampler(policy, SPACE, CONFIG, vllm) as sampler:
            ending = vllm.calls
            rollout(stage, prompts_of(3), SPACE, [sampler], CONFIG.model_copy(update={"max_reject_rate": 1.0}), 0)
            rows.append((all_rows(stage), stage.ledger.rejects))
        assert ending
    (clean, none), (found, rejects) = rows
    assert none == 0 and len(clean) == 3 * 4
    assert found == [row for row in clean if row["prompt_id"] in {row["prompt_id"] for row in found}]
    assert len(found) + rejects * 4 == 3 * 4


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_one_sentence_says_how_to_get_it(policy: SafeModel) -> None:
    with (
        pytest.raises(ConfigError, match=r"vllm cannot be imported .* .pip install 'dpa\[vllm\]'"),
        build_samplers(policy.path, CONFIG, SPACE),
    ):
        raise AssertionError("never entered")
