"""Rows behind the prompt they share give the scores of each alone, read once.
Run: pytest tests/test_row_layouts.py
"""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, LlamaConfig, MistralConfig, Qwen2Config

from dpa.scoring.reward_model import Logits, forward
from dpa.scoring.row_layouts import RowsAlone, SharedPrompts

PAD = 0
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_labels": 3,
    "pad_token_id": PAD,
}
KINDS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen": Qwen2Config(**SHAPE),
    "mistral, a window shorter than its prompts": MistralConfig(**SHAPE, sliding_window=7),
}


def classifier(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(KINDS[kind], attn_implementation="sdpa").eval()


def rows_of(prompts: int, answers: int, prompt: int = 20, seed: int = 0) -> tuple[list[list[int]], list[str]]:
    """ids_N of `answers` rows to each prompt, in no order of prompts, and the prompts' names."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return rng.integers(1, 50, length).tolist()

    asked = [ids(int(rng.integers(prompt // 2, prompt + 1))) for _ in range(prompts)]
    rows = [(asked[p] + ids(int(rng.integers(1, 8))), f"p{p}") for p in range(prompts) for _ in range(answers)]
    rows = [rows[place] for place in rng.permutation(len(rows))]
    return [ids for ids, _ in rows], [name for _, name in rows]


class Reads:
    """How many tokens a model was given, in how many passes; more than `at_once` do not fit."""

    def __init__(self, model: torch.nn.Module, at_once: int = 10**9) -> None:
        self.passes: list[int] = []
        self.at_once = at_once
        model.get_input_embeddings().register_forward_pre_hook(self._look)  # type: ignore[operator]

    def _look(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() > self.at_once:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more.")
        self.passes.append(inputs[0].numel())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_behind_a_shared_prompt_are_those_of_each_row_alone(kind: str) -> None:
    model, (ids_N, prompts_N) = classifier(kind), rows_of(5, 6)
    alone = np.concatenate([forward(model, [ids], PAD) for ids in ids_N])
    reads = Reads(model)
    shared = Logits(model, PAD).add(ids_N, prompts_N).collect()
    np.testing.assert_allclose(shared, alone, rtol=1e-4, atol=1e-5)
    assert sum(reads.passes) == SharedPrompts(ids_N, prompts_N).tokens(range(len(ids_N)))
    assert sum(reads.passes) < 0.5 * sum(map(len, ids_N))
    assert model.config._attn_implementation == "sdpa", "the model is left as it was"


def test_an_answer_that_is_the_prompts_own_beginning_keeps_a_token_of_its_own() -> None:
    model, prompt = classifier("llama"), [3, 4, 5, 6, 7, 8, 9, 10]
    ids_N = [prompt, [*prompt, 11], prompt]
    shared = Logits(model, PAD).add(ids_N, ["p"] * 3).collect()
    np.testing.assert_allclose(shared, np.concatenate([forward(model, [ids], PAD) for ids in ids_N]), atol=1e-5)


def test_rows_that_share_little_are_read_as_before() -> None:
    model, (ids_N, _) = classifier("llama"), rows_of(12, 1)
    (expected, mine), reads = (Logits(model, PAD) for _ in range(2)), Reads(model)
    before = expected.add(ids_N).collect()
    passes, reads.passes = reads.passes, []
    after = mine.add(ids_N, [str(place) for place in range(12)]).collect()
    assert reads.passes == passes
    np.testing.assert_array_equal(after, before)


def test_prompts_that_have_one_name_and_no_token_in_common_share_nothing() -> None:
    ids_N = [[1, 2, 3], [4, 5, 6]]
    layout = SharedPrompts(ids_N, ["same", "same"])
    assert layout.tokens([0, 1]) == 6 and not layout.worth_it
    inputs, ends_B = layout.inputs([1, 0])
    assert inputs["input_ids"].tolist() == [[4, 5, 6, 1, 2, 3]] and ends_B.tolist() == [2, 5]


def test_fault_16_memory_that_runs_out_halves_shared_batches_too() -> None:
    ids_N, prompts_N = rows_of(6, 8)
    expected = Logits(classifier("llama"), PAD).add(ids_N, prompts_N).collect()
    model = classifier("llama")
    reads = Reads(model, at_once=64)
    found = Logits(model, PAD).add(ids_N, prompts_N).collect()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert max(reads.passes) <= 64 and len(reads.passes) > 1


ROW = st.lists(st.integers(1, 3), min_size=1, max_size=9)


@given(st.lists(st.tuples(ROW, st.integers(0, 3)), min_size=1, max_size=12), st.integers(1, 40))
def test_every_row_is_in_one_batch_within_the_budget_or_alone(rows: list[tuple[list[int], int]], budget: int) -> None:
    ids_N, prompts_N = [ids for ids, _ in rows], [prompt for _, prompt in rows]
    for layout in (SharedPrompts(ids_N, prompts_N), RowsAlone(ids_N, PAD, True), RowsAlone(ids_N, PAD, False)):
        batches = list(layout.batches(budget))
        assert sorted(chain.from_iterable(batches)) == list(range(len(rows)))
        for batch in batches:
            assert layout.tokens(batch) <= budget or len(batch) == 1
            inputs, ends_B = layout.inputs(batch)
            assert inputs["input_ids"].numel() == layout.tokens(batch)
            if ends_B is not None:
                read_T = inputs["input_ids"][0]
                assert [int(read_T[end]) for end in ends_B] == [ids_N[row][-1] for row in batch]


def test_what_is_shared_is_what_all_rows_of_a_prompt_begin_with() -> None:
    ids_N = [[1, 2, 3, 9], [1, 2, 4], [1, 2, 3, 7, 7], [5]]
    layout = SharedPrompts(ids_N, ["a", "a", "a", "b"])
    assert layout.tokens([0, 1, 2]) == 2 + 2 + 1 + 3
    assert layout.tokens([3]) == 1
    inputs, _ = layout.inputs([0, 1])
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 9, 4]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert inputs["goes_on_from"].tolist() == [-1, 0, 0]
