"""Steps in passes: memory that runs out cuts them smaller, with the same result; what cannot fit ends in one sentence.
pytest tests/test_passes.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import SPACE, tiny_model, tiny_tokenizer

from dpa.core.errors import TrainingError
from dpa.core.sections.training import FinetuneConfig
from dpa.models.attention import packed_attention
from dpa.models.memory import Plan
from dpa.training.packing import Example
from dpa.training.passes import StepInPasses
from dpa.training.sft import SFT

CONFIG = FinetuneConfig(learning_rate=1e-3, max_length=64, packed_rows_per_step=4, rows_per_device=4, save_steps=10**6)


def train(folder: Path, tokens_that_fit: int | None, config: FinetuneConfig = CONFIG) -> tuple[list[float], object]:
    """Losses of a training on a machine on which no pass of more tokens fits."""
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(5, 261, int(length)).tolist(), 6) for length in rng.integers(10, 40, 30)]
    model = tiny_model()
    trainer = SFT(config, SPACE, 0).trainer(model, tiny_tokenizer(), examples, folder)

    def refuse(module: torch.nn.Module, inputs: tuple) -> None:
        recomputed = model.model.gradient_checkpointing
        if tokens_that_fit is not None and inputs[0].shape[1] > tokens_that_fit * (2 if recomputed else 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    model.model.layers[-1].input_layernorm.register_forward_pre_hook(refuse)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def test_fault_52_memory_that_runs_out_halves_the_pass_and_the_result_is_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = train(tmp_path, None)
    halved, trainer = train(tmp_path, 128)
    assert trainer.pass_size == 2 and "goes on with 2 packed rows a pass" in caplog.text
    assert halved == pytest.approx(whole, rel=1e-5)


def test_fault_52_memory_that_runs_out_in_mid_step_leaves_the_gradient_of_the_step(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(5, 261, int(length)).tolist(), 6) for length in rng.integers(30, 60, 4)]
    gradients = []
    for runs_out in (False, True):
        model, passes = tiny_model(), 0
        trainer = SFT(CONFIG.model_copy(update={"rows_per_device": 2}), SPACE, 0).trainer(
            model, tiny_tokenizer(), examples, tmp_path
        )

        def refuse(*_: object, runs_out: bool = runs_out) -> None:
            nonlocal passes
            passes += 1
            if runs_out and passes == 2:  # the gradient of the first pass is there
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

        model.model.layers[-1].register_forward_pre_hook(refuse)
        (batch,) = trainer.get_train_dataloader()
        with packed_attention(model):
            trainer.training_step(model, batch)
        assert passes == (6 if runs_out else 2), "two, and where the second ran out four anew"
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_fault_52_a_row_that_does_not_fit_is_recomputed(tmp_path: Path) -> None:
    whole, _ = train(tmp_path, None)
    recomputed, trainer = train(tmp_path, 40)
    assert trainer.model.model.gradient_checkpointing and recomputed == pytest.approx(whole, rel=1e-5)


def test_fault_52_where_no_row_fits_otherwise_recomputing_begins_with_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(tmp_path, None)
    monkeypatch.setattr("dpa.training.sft.first_plan", lambda *_, **__: Plan(4, True))
    recomputed, trainer = train(tmp_path, 40 * 4)
    assert trainer.pass_size == 4 and recomputed == pytest.approx(whole, rel=1e-5)


def test_fault_52_what_cannot_fit_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"does not fit in memory; lower finetune\.max_length"):
        train(tmp_path, 10)


@pytest.mark.parametrize(("rows", "smaller"), [(2, 1), (5, 4), (64, 32), (100, 32), (1, None)])
def test_a_step_of_fewer_rows_than_a_pass_may_hold_is_cut_all_the_same(rows: int, smaller: int | None) -> None:
    """Smaller is what makes more passes; of one row nothing does."""

    class Steps(StepInPasses):
        pass_size = 64

    assert Steps()._smaller(range(rows)) == smaller


def test_another_error_is_not_taken_for_memory(tmp_path: Path) -> None:
    trainer = SFT(CONFIG, SPACE, 0).trainer(tiny_model(), tiny_tokenizer(), [Example(list(range(5, 25)), 6)], tmp_path)
    trainer.pass_loss = lambda *_: (_ for _ in ()).throw(RuntimeError("a shape is wrong"))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        trainer.train()
