"""Log-probabilities where a label is: those of the whole logits, with the same gradients.
pytest tests/test_label_logprobs.py
"""

import pytest
import torch
from tiny_models import tiny_model

from dpa.models.attention import pack_inputs, packed_attention
from dpa.training.label_logprobs import IGNORED, has_plain_head, label_logprobs, label_places


@pytest.mark.parametrize(("architecture", "changes"), [("llama", {}), ("qwen2", {"tie_word_embeddings": True})])
def test_they_are_those_of_the_whole_logits(architecture: str, changes: dict) -> None:
    model = tiny_model(architecture, **changes)
    ids_N = [[5, 9, 7, 30, 12], [8, 100, 6]]
    labels_T = torch.tensor([IGNORED, IGNORED, 7, 30, 12, IGNORED, IGNORED, 6])
    weights_L = torch.tensor([1.0, -2.0, 0.5, 3.0])
    logits = torch.cat([model(torch.tensor([ids])).logits[0] for ids in ids_N])
    right_L = logits[:-1].log_softmax(-1).gather(1, labels_T[1:, None].clamp(min=0))[labels_T[1:] != IGNORED][:, 0]
    (right_L * weights_L).sum().backward()
    right = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    with packed_attention(model):
        ours_L = label_logprobs(model, {**pack_inputs(ids_N), "labels": labels_T[None]})
    (ours_L * weights_L).sum().backward()
    assert label_places(labels_T).tolist() == [2, 3, 4, 7]
    torch.testing.assert_close(ours_L, right_L, rtol=1e-5, atol=1e-5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, right[name], rtol=1e-3, atol=1e-5)


def test_a_row_without_a_label_gives_none_and_its_loss_has_a_gradient() -> None:
    model = tiny_model()
    logprobs_L = label_logprobs(model, {**pack_inputs([[5, 6]]), "labels": torch.full((1, 2), IGNORED)})
    logprobs_L.sum().backward()
    assert len(logprobs_L) == 0 and not model.base_model.norm.weight.grad.any()


def test_heads_that_scale_their_logits_in_other_ways_are_told_apart() -> None:
    model = tiny_model()
    assert has_plain_head(model)
    model.config.logits_scaling = 8.0
    assert not has_plain_head(model)
