"""Sampling: equal to plain `generate` where that can be, seeded per row, and in worker processes that may die.
pytest tests/test_samplers.py
"""

import multiprocessing
import os
import signal
import subprocess
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from forks import alive, interpreter, within
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import SPACE, save_tiny_model, tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

from dpa.core.errors import EngineError, ModelFileError
from dpa.core.records import SampleRequest
from dpa.core.sections.rollout import RolloutConfig
from dpa.models.files import folder_revision
from dpa.sampling.decoding import Decoder, Decoding, decode
from dpa.sampling.drawing import BLOCK, draw
from dpa.sampling.engines import build_samplers
from dpa.sampling.process_sampler import ProcessSampler
from dpa.sampling.prompting import Prompting
from dpa.sampling.samplers import (
    PROCESSOR_ROWS,
    SamplerSpec,
    TransformersSampler,
    row_bytes,
    sampler_spec,
)

QUESTIONS = ["Why?", "What is this long thing over there, and who made it?", "a", "Hello there"]
MANY_ENDS = [1, *range(60, 80)]  # so that a random model ends its answers at many lengths


def asked(seeds: tuple[int, ...], direction: tuple[float, float] | None = (0.8, -0.6)) -> list[SampleRequest]:
    return [SampleRequest([{"role": "user", "content": text}], direction, seeds) for text in QUESTIONS]


def sampler_of(model, **fields) -> TransformersSampler:
    return TransformersSampler(model, tiny_tokenizer(), SPACE, **{"max_new_tokens": 24, **fields})


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("mistral", {}), ("mistral", {"sliding_window": 16}), ("qwen2", {}), ("gpt2", {})],
    ids=["llama", "mistral", "mistral-sliding", "qwen2", "gpt2"],
)
def test_cold_samples_are_what_generate_says(architecture: str, changes: dict) -> None:
    """Temperature towards 0, left padding, cache, leaving rows: the same tokens as one greedy prompt at a time."""
    model, tokenizer = tiny_model(architecture, **changes), tiny_tokenizer()
    model.generation_config.eos_token_id = MANY_ENDS
    sampler = sampler_of(model, temperature=1e-6, batch_size=10)
    for request, samples in zip(asked((1, 2, 3)), sampler.sample(asked((1, 2, 3))), strict=True):
        preference = {"helpfulness": 0.8, "verbosity": -0.6}
        ids = torch.tensor(
            [
                sampler.prompting.tokenizer.apply_chat_template(
                    request.messages, preference=preference, add_generation_prompt=True, return_dict=False
                )
            ]
        )
        seen = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=seen, do_sample=False, max_new_tokens=24, pad_token_id=0)[0]
        answer = output[ids.shape[1] :].tolist()
        for sample in samples:
            assert sample.text == tokenizer.decode(answer, skip_special_tokens=True)
            assert sample.tokens == len(answer)
            assert sample.finish_reason == ("stop" if answer[-1] in MANY_ENDS else "length")


def test_a_processor_samples_in_bf16_where_it_is_asked_to(tmp_path: Path) -> None:
    """Its weights and what it remembers take half the room; its logits differ by rounding."""
    save_tiny_model(tmp_path)
    config = RolloutConfig(max_new_tokens=8, temperature=1e-6)
    spec = SamplerSpec(str(tmp_path), SPACE, config.max_new_tokens, config.temperature)
    exact, rounded = spec.build(), replace(spec, bf16=True).build()
    assert sampler_spec(str(tmp_path), config.model_copy(update={"bf16": True}), SPACE).bf16 is True
    models = [sampler._model for sampler in (exact, rounded)]
    assert [model.dtype for model in models] == [torch.float32, torch.bfloat16]
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        logits, others = (model(ids).logits.float() for model in models)
    assert 0 < float((logits - others).abs().max()) < 0.05 * float(logits.abs().max())
    assert [len(samples) for samples in rounded.sample(asked((1, 2)))] == [2, 2, 2, 2]


@pytest.fixture(scope="module")
def ending_model():
    model = tiny_model()
    model.generation_config.eos_token_id = MANY_ENDS
    return model


def test_a_sample_does_not_depend_on_its_batch(ending_model) -> None:
    requests = asked(tuple(range(100, 120)))
    together = sampler_of(ending_model, max_new_tokens=30).sample(requests)
    assert len({sample.tokens for samples in together for sample in samples}) > 10, "rows end at many lengths"
    assert {sample.finish_reason for samples in together for sample in samples} == {"stop", "length"}
    for batch_size in (1, 7):
        assert sampler_of(ending_model, max_new_tokens=30, batch_size=batch_size).sample(requests) == together
    backwards = sampler_of(ending_model, max_new_tokens=30).sample(requests[::-1])[::-1]
    assert backwards == together
    one = SampleRequest(requests[2].messages, requests[2].direction, (105,))
    assert sampler_of(ending_model, max_new_tokens=30).sample([one]) == [[together[2][5]]]


def test_seeds_and_directions_decide(ending_model) -> None:
    sampler = sampler_of(ending_model)
    first, again = sampler.sample(asked((1, 1, 2)))[1], sampler.sample(asked((1, 1, 2)))[1]
    assert first == again and first[0] == first[1] != first[2]
    assert sampler.sample(asked((1,), (0.6, 0.8)))[1] != sampler.sample(asked((1,)))[1]
    assert sampler.sample(asked((1,), None))[1] != sampler.sample(asked((1,)))[1]


def test_prompts_that_cannot_be_served_get_nothing_and_neighbours_their_samples(ending_model) -> None:
    good, bad = asked((1, 2))[0], "not messages"
    requests = [
        SampleRequest([{"role": "user", "content": "x" * 300}], None, (1,)),  # over the context of 256
        good,
        SampleRequest([{"role": "user", "content": "\ud800"}], None, (1,)),
        SampleRequest([bad], None, (1,)),
        SampleRequest(good.messages, good.direction, ()),
    ]
    sampler = sampler_of(ending_model)
    assert sampler.sample(requests) == [[], sampler.sample([good])[0], [], [], []]


@pytest.mark.parametrize("odd", [None, "a system message alone", "\ud800", 7], ids=repr)
def test_prompts_together_are_the_tokens_of_each_alone(odd: object, tmp_path: Path) -> None:
    """Whatever one of them is: a template's refusal, half a character, no text."""
    tokenizer = tiny_tokenizer()
    prompting = Prompting(tokenizer, SPACE, 200, (1,))
    directions = [None, *map(tuple, SPACE.grid(3).tolist())]
    requests = [
        SampleRequest([{"role": "user", "content": f"Why {n}?" + "x" * (n % 3 == 0) * 250}], directions[n % 4], (n,))
        for n in range(70)
    ]
    if odd is not None:
        role = "system" if odd == "a system message alone" else "user"
        requests[5] = SampleRequest([{"role": role, "content": odd}], None, (1,))  # type: ignore[typeddict-item]
    alone = [prompting.encode(request.messages, request.direction, request.held) for request in requests]
    assert prompting.encode_all(requests) == alone
    assert sum(map(bool, alone)) > 40 and not alone[0] and prompting.encode_all([]) == []


def test_the_context_bounds_a_response() -> None:
    sampler = sampler_of(tiny_model(context=64), max_new_tokens=1000)
    (sample,) = sampler.sample([SampleRequest([{"role": "user", "content": "x" * 50}], None, (4,))])[0]
    assert sample.tokens <= 64 - 52
    assert sample.finish_reason == "length"


def test_damaged_weights_are_an_engine_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EngineError, match="NaN"):
        sampler_of(model).sample(asked((1,)))


class SmallMemory(LlamaForCausalLM):
    """A device that holds `capacity` sequences. What a failed batch took must be free when the next one begins."""

    capacity = 3
    error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory")

    def forward(self, input_ids: torch.Tensor, **kwargs):
        taken = self.__dict__.setdefault("taken", [])
        assert not any(reference() is not None for reference in taken)
        if len(input_ids) > self.capacity:
            cache = torch.zeros(1)
            taken.append(weakref.ref(cache))
            raise type(self.error)(*self.error.args)  # a new one: an error keeps the frames it went through
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["gpu", "cpu"],
)
def test_fault_16_out_of_memory_means_smaller_batches(ending_model, error: RuntimeError) -> None:
    small = SmallMemory(ending_model.config).eval()
    small.error = error
    small.load_state_dict(ending_model.state_dict())
    small.generation_config.eos_token_id = MANY_ENDS
    requests = asked(tuple(range(5)))
    assert sampler_of(small).sample(requests) == sampler_of(ending_model).sample(requests)
    small.capacity = 0
    with pytest.raises(EngineError, match="does not fit in memory"):
        sampler_of(small).sample(requests)


def test_after_a_batch_that_did_not_fit_no_larger_one_is_tried(ending_model, caplog: pytest.LogCaptureFixture) -> None:
    small = SmallMemory(ending_model.config).eval()
    small.load_state_dict(ending_model.state_dict())
    sampler = sampler_of(small)
    sampler.sample(asked((1, 2)))
    failed = len(small.taken)
    assert failed and "goes on with 2 sequences at a time" in caplog.text
    sampler.sample(asked((1, 2)))
    assert len(small.taken) == failed


def test_what_a_batch_that_did_not_fit_took_is_given_back(ending_model) -> None:
    """Buffers of fixed shape outlive the rows, and smaller batches would go on in those that left no room."""

    def refuse(_: torch.nn.Module, inputs: tuple) -> None:
        if len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    requests = asked(tuple(range(5)))[:1]
    sampler, expected = sampler_of(ending_model), sampler_of(ending_model).sample(requests)
    sampler._decoder = Decoder(ending_model, "fixed")
    hook = ending_model.model.layers[0].input_layernorm.register_forward_pre_hook(refuse)
    assert sampler.sample(requests) == expected
    hook.remove()
    assert sampler._most is not None and sampler._decoder._cache._rows <= 3


def test_a_batch_is_as_large_as_the_free_memory_and_a_processor_allow(ending_model) -> None:
    """Bytes a row against the cache that decoding really holds; sixteen samplers on one device take a part each."""
    decoder = Decoder(ending_model, "fixed")
    decode(decoder, [[90] * 100], [0] * 8, list(range(8)), [92] * 8, Decoding(1.0, 1.0, 92, (-1,)))
    assert decoder.held_bytes <= 8 * row_bytes(ending_model, 192) <= 2.5 * decoder.held_bytes
    for sharing, most in ((1, PROCESSOR_ROWS), (10**6, PROCESSOR_ROWS), (10**12, 1)):
        assert 1 <= sampler_of(ending_model, sharing=sharing)._rows_at_once(100) <= most
    assert sampler_of(ending_model, batch_size=7)._rows_at_once(100) == 7


def test_recurrent_models_are_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=261, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ModelFileError, match="attention-only"):
        sampler_of(model)


rows = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1.0)), min_size=1, max_size=12).filter(any)


@settings(max_examples=300)
@given(rows, st.floats(0, 1, exclude_max=True), st.floats(0.05, 1.0))
def test_draw_inverts_the_distribution(weights: list[float], uniform: float, top_p: float) -> None:
    """Against brute force: walk the kept tokens and stop where their mass passes the uniform number."""
    logits = torch.tensor([weights]).log()
    token = int(draw(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, top_p))
    probability = torch.softmax(logits, -1)[0].double().numpy()
    order = np.argsort(-probability, kind="stable") if top_p < 1 else np.arange(len(weights))
    kept, before = [], 0.0
    for index in order:
        if top_p == 1 or before < top_p - 1e-6:
            kept.append(index)
        elif before < top_p + 1e-6:
            return  # too close to the edge of the nucleus for single precision to tell
        before += probability[index]
    mass = np.cumsum(probability[kept])
    if np.abs(mass / mass[-1] - uniform).min() > 1e-6:
        assert token == kept[int(np.searchsorted(mass, uniform * mass[-1], side="right"))]
    assert weights[token] > 0


def test_draw_in_blocks_is_the_inversion_of_the_whole_row() -> None:
    """A vocabulary of many blocks, most tokens impossible, numbers up to the largest below 1."""
    rng = np.random.default_rng(5)
    weights = rng.random((64, 3 * BLOCK + 17)) * (rng.random((64, 3 * BLOCK + 17)) < 0.03)
    weights[:, BLOCK : 2 * BLOCK] = 0  # a block nobody draws from
    logits = torch.from_numpy(weights).float().log()
    uniforms = np.concatenate([rng.random(62), [0.0, np.nextafter(1, 0)]])
    tokens = draw(logits, torch.from_numpy(uniforms), 1.0, 1.0).numpy()
    mass = torch.softmax(logits, -1).double().cumsum(-1).numpy()
    assert (tokens == (mass <= (uniforms * mass[:, -1])[:, None]).sum(1).clip(max=weights.shape[1] - 1)).mean() > 0.98
    assert (weights[np.arange(64), tokens] > 0).all()
    assert tokens[-2] == np.flatnonzero(weights[-2])[0] and tokens[-1] == np.flatnonzero(weights[-1])[-1]


def test_frequencies_follow_the_temperature() -> None:
    logits, count = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), 20_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(count))
    for temperature in (0.5, 1.0, 2.0):
        tokens = draw(logits.expand(count, -1), uniforms, temperature, 1.0)
        expected = torch.softmax(logits[0] / temperature, -1)
        assert torch.allclose(torch.bincount(tokens, minlength=4) / count, expected, atol=0.015)


# --- worker processes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[ProcessSampler]:
    spec = SamplerSpec(str(folder), SPACE, max_new_tokens=8, revision="r1", threads=1)
    with ProcessSampler(spec, backoff_s=0.01) as sampler:
        yield sampler


def test_a_worker_says_what_this_process_would(folder: Path, worker: ProcessSampler) -> None:
    config = RolloutConfig(max_new_tokens=8)
    with build_samplers(folder, config, SPACE) as (local,):
        assert (worker.revision, local.revision) == ("r1", folder_revision(folder))
        assert worker.sample(asked((1, 2))) == local.sample(asked((1, 2)))


def test_fault_10_a_request_that_raises_leaves_the_worker_alive(worker: ProcessSampler) -> None:
    """The stage asks again, one by one; a direction of three weights here is a programmer's mistake."""
    before, pid = worker.sample(asked((5,))), worker.pid
    with pytest.raises(RuntimeError, match="ValueError"):
        worker.sample([*asked((5,)), SampleRequest(asked((1,))[0].messages, (1.0, 0.0, 0.0), (1,))])
    assert (worker.sample(asked((5,))), worker.pid) == (before, pid)


def test_fault_11_a_dead_worker_is_started_again(worker: ProcessSampler) -> None:
    before, pid = worker.sample(asked((5,))), worker.pid
    os.kill(pid, signal.SIGKILL)
    assert worker.sample(asked((5,))) == before
    assert worker.pid != pid and not psutil.pid_exists(pid)


@dataclass(frozen=True)
class DyingSpec(SamplerSpec):
    """A worker whose engine kills its process, as a driver crash would."""

    def build(self) -> TransformersSampler:
        os._exit(86)


def test_fault_11_a_worker_that_keeps_dying_is_given_up() -> None:
    before = set(multiprocessing.active_children())
    sampler = ProcessSampler(DyingSpec("nowhere", SPACE, max_new_tokens=8), max_restarts=1, backoff_s=0.01)
    with pytest.raises(EngineError, match=r"died 2 times in a row \(exit code 86\)"):
        sampler.sample(asked((1,)))
    assert set(multiprocessing.active_children()) == before


def test_a_worker_that_cannot_be_started_again_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ProcessSampler(SamplerSpec(str(folder), SPACE, max_new_tokens=4), max_restarts=1, backoff_s=0.01) as sampler:
        os.kill(sampler.pid, signal.SIGKILL)

        def no_memory(_: ProcessSampler) -> None:
            raise OSError("Cannot allocate memory")

        monkeypatch.setattr(ProcessSampler, "_start", no_memory)
        with pytest.raises(EngineError, match="died 2 times in a row"):
            sampler.sample(asked((1,)))


def test_a_users_mistake_reaches_the_user(tmp_path: Path) -> None:
    with (
        pytest.raises(ModelFileError, match="no folder"),
        build_samplers(tmp_path / "missing", RolloutConfig(workers=2), SPACE),
    ):
        raise AssertionError("never entered")
    with (
        ProcessSampler(SamplerSpec(str(tmp_path / "missing"), SPACE, max_new_tokens=8)) as sampler,
        pytest.raises(ModelFileError, match="no folder"),
    ):
        sampler.sample(asked((1,)))


def test_workers_end_with_the_block(folder: Path) -> None:
    with build_samplers(folder, RolloutConfig(workers=2, max_new_tokens=4), SPACE) as samplers:
        pids = [sampler.pid for sampler in samplers]
        assert len(set(pids)) == 2 and all(map(psutil.pid_exists, pids))
    assert not any(map(psutil.pid_exists, pids))


def test_fault_11_no_orphans_after_kill_9_of_the_parent(folder: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from tiny_models import SPACE\n"
        "from dpa.core.records import SampleRequest\n"
        "from dpa.sampling.process_sampler import ProcessSampler\n"
        "from dpa.sampling.samplers import SamplerSpec\n"
        "if __name__ == '__main__':\n"
        f"    worker = ProcessSampler(SamplerSpec({str(folder)!r}, SPACE, max_new_tokens=200, threads=1))\n"
        "    print(worker.pid, flush=True)\n"
        "    while True:\n"
        "        worker.sample([SampleRequest([{'role': 'user', 'content': 'Why?'}], None, tuple(range(2000)))])\n"
    )
    repository = Path(__file__).parents[1]
    parent = subprocess.Popen([interpreter(), "-c", code], cwd=repository, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert within(60, lambda: not alive(pid)), "the worker outlives its parent"
