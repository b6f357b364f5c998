"""Packed rows: no sequence sees another, on every way that can run here, and a way that is wrong is never taken.
pytest tests/test_attention.py
"""

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch.nn import functional
from transformers import AttentionInterface

from dpa.models.attention import (
    SEGMENTS,
    best_way,
    gives_right_values,
    pack_inputs,
    packed_attention,
    varlen_attention,
)


def reference_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds_q: torch.Tensor,
    bounds_k: torch.Tensor,
    *_: object,
    **options: object,
) -> torch.Tensor:
    """What torch's varlen_attn computes, by a mask over the row: (T, H, C) -> (T, H, C). The last query of a sequence
    stands at its last key."""
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or options["enable_gqa"]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))

    def counted_from_the_end(bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        place = torch.arange(int(bounds[-1]))
        sequence = torch.bucketize(place, bounds[1:].long(), right=True)
        return sequence, place - bounds[1:].long()[sequence]

    sequence_T, place_T = counted_from_the_end(bounds_q)
    sequence_S, place_S = counted_from_the_end(bounds_k)
    left, right = options["window_size"]
    distance = place_T[:, None] - place_S[None]
    seen = sequence_T[:, None] == sequence_S[None]
    seen &= (distance >= 0) if right == 0 else torch.tensor(True)
    seen &= (distance <= left) if left >= 0 else torch.tensor(True)
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))
    out = functional.scaled_dot_product_attention(*parts, attn_mask=seen, scale=options["scale"])
    return out[0].transpose(0, 1)


AttentionInterface.register("reference_varlen", varlen_attention(reference_varlen, takes_groups=True))
AttentionInterface.register("reference_varlen_repeated", varlen_attention(reference_varlen, takes_groups=False))
WAYS = [SEGMENTS, "reference_varlen", "reference_varlen_repeated", "sdpa", "eager"]


def sequences(count: int = 6) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, 261, int(length)).tolist() for length in rng.integers(1, 40, count)]


def loss_and_gradients(model: torch.nn.Module, hidden_TH: torch.Tensor) -> list[torch.Tensor]:
    weight_H = torch.linspace(-1, 1, hidden_TH.shape[1])
    loss = (hidden_TH @ weight_H).square().mean()
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(weight.grad.clone() for weight in model.base_model.parameters())]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("architecture", "changes"), [("llama", {}), ("mistral", {"sliding_window": 9}), ("qwen3", {})]
)
def test_packed_sequences_give_the_loss_and_gradients_of_each_alone(way: str, architecture: str, changes: dict) -> None:
    ids_N, model = sequences(), tiny_model(architecture, **changes)
    alone = [model.base_model(torch.tensor([ids])).last_hidden_state[0] for ids in ids_N]
    expected = loss_and_gradients(model, torch.cat(alone))
    model.set_attn_implementation(way)
    got = loss_and_gradients(model, model.base_model(**pack_inputs(ids_N), use_cache=False).last_hidden_state[0])
    for ours, right in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize(("architecture", "changes"), [("llama", {}), ("mistral", {"sliding_window": 9})])
def test_sequences_that_go_on_from_one_give_the_loss_and_gradients_of_each_alone(
    way: str, architecture: str, changes: dict
) -> None:
    """Two families of a shared beginning, and one sequence that shares nothing."""
    parts, before = sequences(6), [-1, 0, 0, -1, -1, 4]
    wholes = [[0, 1], [0, 2], [3], [4, 5]]
    model = tiny_model(architecture, **changes)
    ends = []
    for whole in wholes:
        ids = [token for part in whole for token in parts[part]]
        ends.append(model.base_model(torch.tensor([ids])).last_hidden_state[0, -len(parts[whole[-1]]) :])
    expected = loss_and_gradients(model, torch.cat(ends))
    model.set_attn_implementation(way)
    hidden_TH = model.base_model(**pack_inputs(parts, before), use_cache=False).last_hidden_state[0]
    got = hidden_TH.split([len(part) for part in parts])
    found = loss_and_gradients(model, torch.cat([got[whole[-1]] for whole in wholes]))
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_rows_without_bounds_are_a_sequence_each(way: str) -> None:
    """Callbacks ask the model while it trains on packed rows, as of its listening."""
    ids = torch.tensor([sequences(1)[0], sequences(1)[0][::-1]])
    model = tiny_model("mistral", sliding_window=9)
    expected = model(ids, use_cache=False).logits
    model.set_attn_implementation(way)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_cpu_takes_segments_and_the_model_is_left_as_it_was() -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    with packed_attention(model) as way:
        assert way and model.config._attn_implementation == SEGMENTS == best_way(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    "changes", [{"attention_dropout": 0.1}, {"attn_logit_softcapping": 30.0}, {"layer_types": ["linear_attention"] * 2}]
)
def test_attention_that_the_kernels_lack_keeps_its_mask(changes: dict) -> None:
    model = tiny_model()
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert best_way(model) is None
    with packed_attention(model) as own:
        assert not own


def test_bf16_on_a_cpu_is_computed_in_fp32_and_given_back_in_bf16() -> None:
    model = tiny_model().to(torch.bfloat16)
    with packed_attention(model), torch.no_grad():
        hidden = model.base_model(**pack_inputs(sequences()), use_cache=False).last_hidden_state
    assert hidden.dtype == torch.bfloat16


CPU = torch.device("cpu")


def test_a_kernel_is_tried_before_it_is_taken() -> None:
    for takes_groups in (True, False):
        for goes_on in (True, False):
            attend = varlen_attention(reference_varlen, takes_groups)
            assert gives_right_values(attend, CPU, 4, 2, 8, torch.float32, goes_on)


def test_a_kernel_that_counts_from_the_beginning_does_not_go_on(caplog: pytest.LogCaptureFixture) -> None:
    """As scaled_dot_product_attention aligns a causal mask: the first query at the first key."""

    def upper_left(query, key, value, bounds_q, bounds_k, *rest, **options):  # type: ignore[no-untyped-def]
        lengths = zip(bounds_q.diff().tolist(), bounds_k.diff().tolist(), strict=True)
        parts = zip(query.split(bounds_q.diff().tolist()), key.split(bounds_k.diff().tolist()), strict=True)
        out = []
        for (q, k), v, (asked, _) in zip(parts, value.split(bounds_k.diff().tolist()), lengths, strict=True):
            bounds = torch.tensor([0, asked], dtype=torch.int32)
            out.append(reference_varlen(q, k[:asked], v[:asked], bounds, bounds, **options))
        return torch.cat(out)

    attend = varlen_attention(upper_left, takes_groups=True)
    assert gives_right_values(attend, CPU, 4, 2, 8, torch.float32)
    assert not gives_right_values(attend, CPU, 4, 2, 8, torch.float32, goes_on=True)
    assert "goes on from what is shared does not work here (it differs" in caplog.text


def off(query: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
    return reference_varlen(query * 2, *rest, **options)


@pytest.mark.parametrize(("broken", "said"), [(off, "differs"), (lambda *_: None, "unexpected keyword")])
def test_a_kernel_that_is_wrong_or_fails_is_not_taken_and_said(
    broken: object, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not gives_right_values(varlen_attention(broken, True), CPU, 4, 2, 8, torch.float32)
    assert said in caplog.text
