"""Memory: what there is, container limits included, and where a training begins.
pytest tests/test_memory.py
"""

import ctypes

import psutil
import pytest
import torch
from tiny_models import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from dpa.core.errors import ConfigError
from dpa.models.memory import TrainingMemory, available_memory, plan
from dpa.storage import memory as storage_memory
from dpa.storage.memory import free_memory_of_machine, give_back_heap, give_back_heap_where_scarce

GB = 10**9
CPU = torch.device("cpu")


def smollm2() -> LlamaForCausalLM:
    """Its shape, without memory for its weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                vocab_size=49_152,
                tie_word_embeddings=True,
            )
        )


def test_on_a_processor_it_is_what_the_machine_and_its_container_leave() -> None:
    assert available_memory(CPU) == pytest.approx(free_memory_of_machine(), rel=0.2)


def test_smollm2_with_four_rows_of_2048_fits_24_gigabytes() -> None:
    memory = TrainingMemory.of(smollm2(), mixed=False)
    assert plan(memory, 20 * GB, 2048, 4, None, "finetune", sure=True).units == 4
    assert 10 * GB < memory.fixed + memory.kept * 8192 < 15 * GB


def test_a_pass_is_as_large_as_memory_allows_and_recomputes_only_where_it_must() -> None:
    memory = TrainingMemory(fixed=1 * GB, kept=1_000_000, recomputed=100_000)
    begins = [plan(memory, gigabytes * GB, 1000, 8, None, "finetune", sure=True) for gigabytes in (20, 4, 1.5)]
    assert [(each.units, each.recompute) for each in begins] == [(8, False), (3, False), (5, True)]


def test_fault_52_what_cannot_fit_is_refused_before_work_with_the_number_and_the_field() -> None:
    memory = TrainingMemory(fixed=1 * GB, kept=1_000_000, recomputed=100_000)
    with pytest.raises(
        ConfigError, match=r"finetune\.max_length: .* 9,000 tokens needs about 1\.9 GB .* 1\.5 GB .* 5,000"
    ):
        plan(memory, round(1.5 * GB), 9000, 8, None, "finetune", sure=True)
    with pytest.raises(ConfigError, match=r"let dpo\.gradient_checkpointing be true"):
        plan(memory, 2 * GB, 9000, 8, False, "dpo", sure=True)
    with pytest.raises(ConfigError, match=r"train finetune\.lora"):
        plan(memory, GB // 2, 9000, 8, None, "finetune", sure=True)


def test_a_card_is_tried_where_the_estimate_is_not_far_off() -> None:
    memory = TrainingMemory(fixed=1 * GB, kept=1_000_000, recomputed=100_000)
    begins = plan(memory, round(1.5 * GB), 9000, 8, None, "finetune", sure=False)
    assert (begins.units, begins.recompute) == (1, True)


def test_adapters_need_no_moments_of_the_frozen_weights() -> None:
    model = tiny_model()
    weights = sum(weight.numel() for weight in model.parameters())
    whole, adapted = (TrainingMemory.of(model, mixed=False, adapters=adapters) for adapters in (False, True))
    assert whole.fixed - adapted.fixed == 12 * weights


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="a C library that keeps nothing")
def test_what_was_freed_behind_what_lives_goes_back_to_the_system() -> None:
    blocks = [bytearray(100_000) for _ in range(4000)]  # of the heap: larger ones are mapped by themselves
    held, last = psutil.Process().memory_info().rss, blocks.pop()
    blocks.clear()
    give_back_heap()
    assert psutil.Process().memory_info().rss < held - 300_000_000
    assert len(last) == 100_000


@pytest.mark.parametrize(("free", "given"), [(2.6, 0), (2.4, 1)])
def test_it_is_given_back_where_less_is_free_than_half_of_what_is_held(
    free: float, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    resident = psutil.Process().memory_info()._replace(rss=5 * GB)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: resident)
    monkeypatch.setattr(storage_memory, "free_memory_of_machine", lambda: round(free * GB))
    monkeypatch.setattr(storage_memory, "give_back_heap", lambda: calls.append(None))
    give_back_heap_where_scarce()
    assert len(calls) == given
