"""Compiled layers: the same training, the same names in what is saved, eager layers where compiling fails.
pytest tests/test_compiling.py
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SPACE, save_tiny_model, tiny_model, tiny_tokenizer

from dpa.core.config_identity import of_results
from dpa.core.sections.reward import RewardTrainConfig
from dpa.core.sections.training import FinetuneConfig
from dpa.models.attention import pack_inputs, packed_attention
from dpa.models.compiling import CompiledLayers, worth_compiling
from dpa.scoring.reward_scorer import RewardModelScorer
from dpa.training.packing import Example
from dpa.training.reward_rows import RatedExample
from dpa.training.reward_training import train_reward_model
from dpa.training.sft import SFT

CONFIG = FinetuneConfig(max_length=64, packed_rows_per_step=2, learning_rate=1e-3, save_steps=2)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    """torch keeps what it compiled of a function, and compiles it so many times and no more."""
    torch.compiler.reset()


def refuses(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here")


class Backend:
    """Runs graphs as they are, and counts them; with `backward`, what it makes fails in the backward pass."""

    def __init__(self, backward: bool = False) -> None:
        self.graphs, self.backward = 0, backward

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        if not self.backward:
            return graph.forward

        def call(*args: Any) -> Any:
            outputs = graph.forward(*args)
            for output in outputs:
                if isinstance(output, torch.Tensor) and output.requires_grad:
                    output.register_hook(fails)
            return outputs

        return call


def fails(_: torch.Tensor) -> None:
    raise ValueError("no backward pass here")


def train(folder: Path, backend: Any = None, **changes: Any) -> tuple[list[float], list[str], list[str]]:
    """Losses of the steps, names in the model's state, names in a checkpoint."""
    from safetensors import safe_open

    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(3, 100, 20).tolist(), 5) for _ in range(24)]
    config = CONFIG.model_copy(update={"compile": backend is not None, **changes})
    torch.manual_seed(0)
    trainer: Any = SFT(config, SPACE, 0).trainer(tiny_model("llama"), tiny_tokenizer(), examples, folder)
    trainer.compile_backend = backend
    trainer.train()
    (weights,) = list(folder.glob("checkpoint-4/*model.safetensors"))
    with safe_open(weights, "pt") as saved:
        names = sorted(saved.keys())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, sorted(trainer.model.state_dict()), names


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 4}}], ids=str)
def test_a_compiled_training_gives_the_same_losses_and_saves_the_same_names(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {name: FinetuneConfig(**changes).__getattribute__(name) for name in changes}
    backend = Backend()
    eager, compiled = train(tmp_path / "eager", **changes), train(tmp_path / "compiled", backend, **changes)
    # torch.utils.checkpoint switches compiling off within: activations that are computed twice are computed eagerly.
    assert (backend.graphs > 0) == ("gradient_checkpointing" not in changes)
    assert compiled[0] == pytest.approx(eager[0], rel=1e-4) and len(eager[0]) == 4
    assert compiled[1:] == eager[1:]


@pytest.mark.parametrize("backend", [refuses, Backend(backward=True)], ids=["forward", "backward"])
def test_where_compiling_fails_the_training_goes_on_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, backend: Any
) -> None:
    eager = train(tmp_path / "eager")
    with caplog.at_level(logging.WARNING, "dpa.models.compiling"):
        fallen = train(tmp_path / "fallen", backend)
    assert fallen[0] == pytest.approx(eager[0], rel=1e-4)
    assert fallen[1:] == eager[1:]
    assert sum("goes on without" in record.message for record in caplog.records) == 1


def test_layers_are_eager_in_the_other_mode_and_after_the_end() -> None:
    model, backend, ids = tiny_model("llama").eval(), Backend(), torch.tensor([[5, 6, 7]])
    layers = CompiledLayers(model, training=True, backend=backend)
    before = model(ids).logits
    assert backend.graphs == 0
    model.train()
    torch.testing.assert_close(model(ids).logits, before)
    made = backend.graphs
    assert made > 0
    layers.stop()
    model(torch.tensor([[5, 6, 7, 8]]))
    assert backend.graphs == made
    assert not layers.give_up(ValueError("a mistake of the model's own"))


def test_packed_rows_of_any_lengths_are_compiled_for_once() -> None:
    """On a processor attention goes over the sequences of a row one by one: that loop is not compiled, or every list of
    lengths would be compiled for anew."""
    model, backend = tiny_model("llama").train(), Backend()
    layers = CompiledLayers(model, training=True, backend=backend)
    made = []
    with packed_attention(model) as packed:
        for lengths in ([5, 9], [4, 4, 6], [7, 20], [3, 3, 3, 3], [11, 2, 8, 1, 5]):
            model(**pack_inputs([list(range(5, 5 + length)) for length in lengths]), use_cache=False)
            made.append(backend.graphs)
    layers.stop()
    assert packed and 0 < made[0] < made[2] == made[-1], "once for one length, once for any: " + str(made)


def test_packed_rows_that_share_beginnings_are_compiled_for_once_too() -> None:
    model, backend = tiny_model("llama").train(), Backend()
    layers = CompiledLayers(model, training=True, backend=backend)
    made = []
    rows = [([5, 9], None), ([9, 4, 6], [-1, 0, 0]), ([7, 20, 3, 8], [-1, 0, -1, -1]), ([4, 4], None)]
    with packed_attention(model):
        for lengths, before in [*rows, ([5, 1, 1, 1, 1, 9], [-1, 0, 0, 0, 0, -1]), ([3, 30], [-1, 0]), ([6], None)]:
            model(**pack_inputs([list(range(5, 5 + length)) for length in lengths], before), use_cache=False)
            made.append(backend.graphs)
    layers.stop()
    assert made[3] == made[-1], made


def test_an_error_that_is_not_the_compilers_is_raised_by_the_eager_layer() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].register_forward_pre_hook(lambda *_: fails(torch.zeros(1)))
    CompiledLayers(model, training=True, backend=Backend())
    with pytest.raises(ValueError, match="no backward pass here"):
        model(torch.tensor([[5, 6, 7]]))


def test_auto_compiles_long_work_on_a_card_alone() -> None:
    card, cpu = torch.device("cuda"), torch.device("cpu")
    assert worth_compiling("auto", card, 200, 200) and not worth_compiling("auto", card, 199, 200)
    assert not worth_compiling("auto", cpu, 10**9, 200)
    assert worth_compiling(True, cpu, 1, 200) and not worth_compiling(False, card, 10**9, 200)


def test_compiling_alters_no_result_so_a_resumed_run_may_change_it() -> None:
    assert of_results(FinetuneConfig(compile=True)) == of_results(FinetuneConfig(compile=False))
    assert of_results(RewardTrainConfig(backbone="x", compile=True)) == of_results(RewardTrainConfig(backbone="x"))


def test_a_reward_model_trains_and_scores_with_compiled_layers_or_without(tmp_path: Path) -> None:
    backbone = save_tiny_model(tmp_path / "backbone", "llama")
    rows = [
        RatedExample(
            f"p{n // 2}", [{"role": "user", "content": f"Ask {n // 2}"}], "yes " * (n % 5 + 1), (10.0 * (n % 5),)
        )
        for n in range(20)
    ]
    config = RewardTrainConfig(backbone=str(backbone), batch_size=4, max_length=128, held_out=0.2, compile=False)
    train_reward_model(rows, ("length",), {"length": (0.0, 100.0)}, config, tmp_path / "reward")
    asked = [row.messages for row in rows], [row.response for row in rows]
    eager = RewardModelScorer(tmp_path / "reward").score(*asked)
    scorer = RewardModelScorer(tmp_path / "reward", compile=True)
    for backend in (Backend(), refuses):
        scorer._compiled = True
        scorer._compile_layers(backend)
        np.testing.assert_allclose(scorer.score(*asked), eager, atol=1e-3)
        assert not isinstance(backend, Backend) or backend.graphs > 0, "it was compiled"
