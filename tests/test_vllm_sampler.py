"""Sampling by vLLM: what it is asked, what is made of its answers, and that its engine is shut down.
pytest tests/test_vllm_sampler.py

vLLM needs a GPU, so a stand-in with its interface takes its place, given as an argument. It samples by the token loop
of this package, so that the answers must be those of TransformersSampler: prompts, seeds, limits and ends are right.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import all_rows, prompts_of
from tiny_models import SPACE, save_tiny_model, tiny_model, tiny_tokenizer

from dpa.core.errors import ConfigError, EngineError
from dpa.core.records import SampleRequest
from dpa.core.sections.rollout import EngineConfig, RolloutConfig, VllmEngineConfig
from dpa.models.files import SafeModel, folder_revision, resolve_model
from dpa.models.policy import load_policy
from dpa.sampling.auto_engine import AutoEngine
from dpa.sampling.decoding import Decoder, Decoding, decode
from dpa.sampling.engines import build_samplers
from dpa.sampling.vllm_sampler import VllmEngine
from dpa.stages.rollout import rollout
from dpa.storage.run_folder import StageFolder

HOW = VllmEngineConfig(tensor_parallel=2, memory=0.5, arguments={"max_model_len": 200, "enforce_eager": True})
CONFIG = RolloutConfig(
    directions=2, samples=2, prompts_per_shard=4, max_new_tokens=24, engine=EngineConfig(kind="vllm", vllm=HOW)
)


class EngineDeadError(Exception):
    """vLLM's own, by name."""


class FakeVllm:
    """Stands for the module `vllm` and keeps what it was asked. `trouble`: what its engines do instead."""

    def __init__(self, trouble: str = "") -> None:
        self.engines: list[FakeEngine] = []
        self.trouble = trouble

    @property
    def shut_down(self) -> int:
        return sum(engine.shut_down for engine in self.engines)

    @property
    def calls(self) -> list[tuple[list[dict], list[SimpleNamespace]]]:
        return [call for engine in self.engines for call in engine.calls]

    def SamplingParams(self, **fields: object) -> SimpleNamespace:
        known = {"n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "stop_token_ids"}
        assert set(fields) == known | {"detokenize"}
        return SimpleNamespace(**fields)

    def LLM(self, **fields: object) -> "FakeEngine":
        if self.trouble == "does not start":
            raise RuntimeError("no kernel image is available")
        self.engines.append(FakeEngine(self, fields))
        return self.engines[-1]


class FakeEngine:
    """Stands for a `vllm.LLM`: what may be asked of it depends on what of it is awake."""

    def __init__(self, module: FakeVllm, fields: dict) -> None:
        self.module, self.fields = module, fields
        self.model, self.tokenizer = load_policy(fields["model"])
        self.awake = {"weights", "kv_cache"}
        self.calls: list[tuple[list[dict], list[SimpleNamespace]]] = []
        self.taken: list[str] = []
        self.shut_down = 0
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._shutdown))

    def _shutdown(self) -> None:
        self.shut_down += 1

    def sleep(self, level: int) -> None:
        assert level == 2 and self.fields["enable_sleep_mode"] and self.awake == {"weights", "kv_cache"}
        self.awake, self.model = set(), None

    def wake_up(self, tags: list[str]) -> None:
        assert self.awake.isdisjoint(tags)
        self.awake.update(tags)

    def collective_rpc(self, method: str, kwargs: dict) -> None:
        assert method == "reload_weights" and self.awake == {"weights"}, "weights first, so that both never fit"
        if self.module.trouble == "keeps its weights":
            raise TypeError("reload_weights() got an unexpected keyword argument")
        self.taken.append(kwargs["weights_path"])
        self.model, _ = load_policy(kwargs["weights_path"])
        if self.module.trouble == "loses a buffer":
            with torch.no_grad():
                self.model.get_output_embeddings().weight.neg_()

    def generate(self, prompts: list[dict], params: list[SimpleNamespace], use_tqdm: bool) -> list[SimpleNamespace]:
        assert not use_tqdm and self.awake == {"weights", "kv_cache"}
        self.calls.append((prompts, params))
        if self.module.trouble == "dead":
            raise EngineDeadError("EngineCore encountered an issue")
        ids = [tuple(prompt["prompt_token_ids"]) for prompt in prompts for _ in range(params[0].n)]
        distinct = list(dict.fromkeys(ids))
        first = params[0]
        how = Decoding(first.temperature or 1e-4, first.top_p, 24, tuple(first.stop_token_ids))
        rows = decode(
            Decoder(self.model),
            distinct,
            [distinct.index(prompt) for prompt in ids],
            [one.seed + number for one in params for number in range(one.n)],
            [one.max_tokens for one in params for _ in range(one.n)],
            how,
        )
        outputs = []
        for place in range(len(prompts)):
            mine = []
            for number, row in enumerate(rows[place * first.n : (place + 1) * first.n]):
                finish = "stop" if row[-1] in first.stop_token_ids else "length"
                finish = "abort" if self.module.trouble == "aborts" and place == number == 1 else finish
                mine.append(SimpleNamespace(index=number, text="", token_ids=tuple(row), finish_reason=finish))
            outputs.append(SimpleNamespace(outputs=mine[::-1]))  # in no order one may count on
        return outputs[:-1] if self.module.trouble == "drops" else outputs


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> SafeModel:
    return resolve_model(save_tiny_model(tmp_path_factory.mktemp("vllm") / "policy"))


def requests(seeds: tuple[int, ...] = (5, 6, 7)) -> list[SampleRequest]:
    texts = ["Why?", "x" * 300, "What is this long thing over there?"]
    return [SampleRequest([{"role": "user", "content": text}], (0.8, -0.6), seeds) for text in texts]


def test_answers_are_those_of_the_transformers_sampler_under_the_first_seed_and_its_successors(
    policy: SafeModel,
) -> None:
    with VllmEngine(FakeVllm()) as engine, engine.samplers(policy.path, SPACE, CONFIG) as (sampler,):
        answers = sampler.sample(requests())
        assert sampler.revision == folder_revision(policy.path)
        assert sampler.sample(requests((5, 600, 2**62))) == answers, "the other seeds are names only"
    with build_samplers(policy.path, RolloutConfig(max_new_tokens=24), SPACE) as (in_process,):
        assert answers == in_process.sample(requests())
    assert [len(samples) for samples in answers] == [3, 0, 3]


def test_what_vllm_is_given(policy: SafeModel) -> None:
    vllm = FakeVllm()
    with VllmEngine(vllm) as engine:
        with engine.samplers(policy.path, SPACE, CONFIG) as (sampler,):
            sampler.sample(requests((2**62 + 3, 2, 1)))
            assert sampler.sample(requests()[1:2]) == [[]]
        assert vllm.shut_down == 0 and vllm.engines[0].awake == set()
    assert vllm.shut_down == 1
    (made,) = vllm.engines
    assert made.fields == {
        "model": policy.path,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "max_model_len": 200,
        "dtype": made.fields["dtype"],
        "trust_remote_code": False,
        "enable_prefix_caching": True,
        "enable_sleep_mode": True,
        "enforce_eager": True,
    }
    (prompts, params), (_, (witness,)) = vllm.calls
    assert (witness.n, witness.temperature, witness.max_tokens) == (1, 0.0, 16)
    assert len(prompts) == len(params) == 2
    assert [(one.n, one.seed) for one in params] == [(3, 3), (3, 3)]
    assert all(one.seed + one.n < 2**63 for one in params)
    room = 200 - len(prompts[-1]["prompt_token_ids"])
    assert {one.max_tokens for one in params} == {24, min(24, room)}
    assert (params[0].top_k, params[0].min_p, params[0].detokenize) == (-1, 0.0, False)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[SafeModel]:
    """Two of one shape, and one that is deeper."""
    folder = tmp_path_factory.mktemp("policies")
    for seed, changes in enumerate(({}, {}, {"num_hidden_layers": 3})):
        tiny_model(seed=seed, **changes).save_pretrained(folder / str(seed))
        tiny_tokenizer().save_pretrained(folder / str(seed))
    return [resolve_model(folder / str(seed)) for seed in range(3)]


def answers_of(engine: VllmEngine, policy: SafeModel, config: RolloutConfig = CONFIG) -> list:
    with build_samplers(policy.path, config, SPACE, engine) as (sampler,):
        return sampler.sample(requests())


def expected_of(policy: SafeModel) -> list:
    config = RolloutConfig(max_new_tokens=24, engine=EngineConfig(kind="transformers"))
    with build_samplers(policy.path, config, SPACE) as (sampler,):
        return sampler.sample(requests())


def test_one_engine_takes_the_weights_of_one_policy_after_another(policies: list[SafeModel]) -> None:
    """Also of one it had before; a policy of another shape, or other arguments, make another engine."""
    first, second, deeper = policies
    vllm = FakeVllm()
    with VllmEngine(vllm) as engine:
        for policy in (first, second, first):
            assert answers_of(engine, policy) == expected_of(policy)
        assert (engine.starts, vllm.shut_down) == (1, 0)
        assert vllm.engines[0].taken == [one.path for one in (first, second, first)], "once those it has, to compare"
        assert answers_of(engine, deeper) == expected_of(deeper)
        assert (engine.starts, vllm.shut_down) == (2, 1)
        larger = CONFIG.model_copy(update={"engine": EngineConfig(kind="vllm", vllm=VllmEngineConfig(memory=0.8))})
        assert answers_of(engine, deeper, larger) == expected_of(deeper)
        assert (engine.starts, vllm.shut_down) == (3, 2)
    assert vllm.shut_down == 3


def test_an_engine_that_takes_no_weights_or_does_not_sleep_is_started_again(
    policies: list[SafeModel], caplog: pytest.LogCaptureFixture
) -> None:
    vllm = FakeVllm("keeps its weights")
    awake = VllmEngineConfig(arguments={"enable_sleep_mode": False, "max_model_len": 200})
    for config, said in (
        (CONFIG, True),
        (CONFIG.model_copy(update={"engine": EngineConfig(kind="vllm", vllm=awake)}), False),
    ):
        caplog.clear()
        with VllmEngine(vllm) as engine:
            for policy in policies[:2]:
                assert answers_of(engine, policy, config) == expected_of(policy)
            assert engine.starts == 2
        assert ("takes no weights in place (TypeError" in caplog.text) == said
    assert vllm.shut_down == len(vllm.engines) == 4


def test_an_engine_that_is_spoilt_by_taking_weights_is_found_out_and_started_for_each_rollout(
    policies: list[SafeModel], caplog: pytest.LogCaptureFixture
) -> None:
    """As vLLM 0.23 spoils Gemma 4, without a word."""
    vllm = FakeVllm("loses a buffer")
    with VllmEngine(vllm) as engine:
        for policy in (*policies[:2], policies[0]):
            assert answers_of(engine, policy) == expected_of(policy)
        assert engine.starts == vllm.shut_down == 3
    assert [one.taken for one in vllm.engines] == [[policies[0].path], [], []]
    assert caplog.text.count("vLLM says otherwise once it has taken the weights it had again") == 1


def test_auto_is_transformers_without_a_card_and_where_vllm_does_not_start(
    policies: list[SafeModel], caplog: pytest.LogCaptureFixture
) -> None:
    auto = CONFIG.model_copy(update={"engine": EngineConfig()})
    assert auto.engine.kind == "auto"
    assert AutoEngine().wants_card(auto) == torch.cuda.is_available()
    vllm = FakeVllm("does not start")
    with AutoEngine(VllmEngine(vllm)) as engine:
        assert engine.wants_card(auto)
        for policy in policies[:2]:
            with build_samplers(policy.path, auto, SPACE, engine) as (sampler,):
                assert sampler.sample(requests()) == expected_of(policy)
        assert engine.wants_card(auto) == torch.cuda.is_available()
    assert caplog.text.count("vLLM does not start (RuntimeError: no kernel image") == 1
    with VllmEngine(vllm) as engine, pytest.raises(RuntimeError, match="no kernel image"):
        answers_of(engine, policies[0])


def test_fault_11_a_dead_engine_is_a_clear_error_and_still_shut_down(policy: SafeModel) -> None:
    vllm = FakeVllm("dead")
    with (
        VllmEngine(vllm) as engine,
        pytest.raises(EngineError, match=r"vLLM's engine died .* run the same command"),
        engine.samplers(policy.path, SPACE, CONFIG) as (sampler,),
    ):
        sampler.sample(requests())
    assert vllm.shut_down == 1


@pytest.mark.parametrize("trouble", ["aborts", "drops"])
def test_fault_13_missing_samples_are_detected(policy: SafeModel, tmp_path: Path, trouble: str) -> None:
    vllm = FakeVllm()
    rows = []
    for name in ("", trouble):
        vllm.trouble = name
        stage = StageFolder(tmp_path / f"_{name}", "iter_1/rollout")
        with VllmEngine(vllm) as engine, engine.samplers(policy.path, SPACE, CONFIG) as (sampler,):
            rollout(stage, prompts_of(3), SPACE, [sampler], CONFIG.model_copy(update={"max_reject_rate": 1.0}), 0)
            rows.append((all_rows(stage), stage.ledger.rejects))
        assert vllm.calls
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
