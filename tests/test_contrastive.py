"""The contrastive term: equal to an explicit softmax, whatever is packed beside what and however a step is cut.
pytest tests/test_contrastive.py
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from fakes import space_of
from hypothesis import given
from hypothesis import strategies as st
from test_finetuning import CONFIG, NO_DROPOUT, logged, run, table_of
from tiny_models import SPACE, save_tiny_model, tiny_model, tiny_tokenizer

from dpa.core.directions import DirectionSpace
from dpa.core.objective import Objective
from dpa.core.sections.training import AdapterConfig, FinetuneConfig
from dpa.models.attention import packed_attention
from dpa.models.policy import make_steerable
from dpa.training.contrastive import info_nce, label_log_probabilities, negative_directions
from dpa.training.learner import RowEncoder
from dpa.training.packing import Example
from dpa.training.sft import SFT, encode_examples
from dpa.training.target_negatives import negatives

CONTRASTIVE = CONFIG.model_copy(update={"contrastive": 0.7, "contrastive_negatives": 2, "max_length": 300})


def rows_of(pools: list[list[tuple[list[float], str]]]) -> pa.Table:
    """Select shard columns of pools of (direction, response)."""
    flat = [(f"p{p}", direction, response) for p, pool in enumerate(pools) for direction, response in pool]
    table = table_of([response for _, _, response in flat])
    table = table.set_column(0, "prompt_id", pa.array([prompt for prompt, _, _ in flat]))
    return table.set_column(2, "direction", pa.array([d for _, d, _ in flat], pa.list_(pa.float64())))


def random_examples(count: int = 10) -> list[Example]:
    """Of random tokens, with 0 to 2 negatives each."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return rng.integers(5, 261, length).tolist()

    return [
        Example(ids(6) + ids(int(rng.integers(3, 20))), 6, tuple(ids(int(rng.integers(4, 9))) for _ in range(i % 3)))
        for i in range(count)
    ]


def sharing_examples(count: int = 10) -> list[Example]:
    """The same, whose prompts begin alike: all of them, and by more those of every second example."""
    rng = np.random.default_rng(1)
    text, question = rng.integers(5, 261, 80).tolist(), rng.integers(5, 261, 10).tolist()
    return [
        Example(
            [*text, *question[: 10 * (i % 2)], *example.ids],
            len(text) + 10 * (i % 2) + example.prompt_tokens,
            tuple([*text, *question[: 10 * (i % 2)], *negative] for negative in example.negatives),
        )
        for i, example in enumerate(random_examples(count))
    ]


def reference(model: torch.nn.Module, examples: list[Example], weight: float) -> torch.Tensor:
    """The loss as docs/learning.md writes it, one segment at a time."""
    nll, tokens, terms = torch.tensor(0.0), 0, []
    for example in examples:
        sums = []
        for segment in example.segments:
            log_p = model(torch.tensor([segment.ids])).logits[0].log_softmax(-1)
            places = range(segment.prompt_tokens, len(segment.ids))
            sums.append(torch.stack([log_p[i - 1, segment.ids[i]] for i in places]).sum())
        nll, tokens = nll - sums[0], tokens + len(example.ids) - example.prompt_tokens
        terms.append(-torch.stack(sums).log_softmax(0)[0])
    return nll / tokens + weight * torch.stack(terms).mean()


# --- the term -----------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-50, 0), min_size=1, max_size=4), min_size=1, max_size=6))
def test_the_term_is_the_explicit_softmax(log_p_RJ: list[list[float]]) -> None:
    most = max(map(len, log_p_RJ))
    terms = info_nce(torch.tensor([[*row, *[-np.inf] * (most - len(row))] for row in log_p_RJ]))
    expected = [-torch.tensor(row).softmax(0)[0].log() for row in log_p_RJ]
    torch.testing.assert_close(terms, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_with_one_negative_it_is_a_softplus_and_its_gradient_pulls_both_ways() -> None:
    log_p = torch.tensor([[-3.0, -2.5, -np.inf]], requires_grad=True)
    term = info_nce(log_p)
    term.sum().backward()
    assert term.item() == pytest.approx(np.log1p(np.exp(0.5)))
    assert log_p.grad is not None
    assert log_p.grad[0].tolist() == pytest.approx([-1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(-0.5)), 0.0])


def test_log_probabilities_in_parts_are_those_at_once() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2500, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (2500,))
    expected = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    found = label_log_probabilities(logits, labels)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad((x.double() * torch.arange(2500)).sum(), logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)


# --- the loss of a step -------------------------------------------------------------------------------------------


def assert_equals_reference(
    model: torch.nn.Module, loss: float, architecture: str, examples: Sequence[Example]
) -> None:
    """The loss, and the gradients that `model` has by now."""
    separate = tiny_model(architecture)
    expected = reference(separate, list(examples), weight=0.7)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for (name, found), parameter in zip(model.named_parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(found.grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("rows_per_device", [1, 3])
def test_packed_loss_and_gradients_are_those_of_separate_segments(
    architecture: str, rows_per_device: int, tmp_path: Path
) -> None:
    model = tiny_model(architecture, **(NO_DROPOUT if architecture == "gpt2" else {}))
    changes = {"max_length": 100, "rows_per_device": rows_per_device, "packed_rows_per_step": 99}
    config = CONTRASTIVE.model_copy(update={**changes, "save_steps": 99})
    trainer = SFT(config, SPACE, 0).trainer(model, tiny_tokenizer(), random_examples(), tmp_path)
    (batch,) = trainer.get_train_dataloader()
    assert len(trainer.cut(batch["rows"].rows, rows_per_device)) > 1, "in several passes"
    with packed_attention(model):
        loss = trainer.training_step(model, batch)
    assert_equals_reference(model, float(loss), architecture, random_examples())


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("rows_per_device", [1, 3])
def test_what_prompts_begin_with_is_read_once_with_the_same_loss_and_gradients(
    architecture: str, rows_per_device: int, tmp_path: Path
) -> None:
    model, examples = tiny_model(architecture), sharing_examples()
    changes = {"max_length": 300, "rows_per_device": rows_per_device, "packed_rows_per_step": 99, "save_steps": 99}
    trainer = SFT(CONTRASTIVE.model_copy(update=changes), SPACE, 0).trainer(model, tiny_tokenizer(), examples, tmp_path)
    rows = trainer.train_dataset
    read, alone = sum(row.ids_T.numel() for row in rows), sum(example.tokens for example in examples)
    assert len(rows) > 1 and read < 0.6 * alone
    (batch,) = trainer.get_train_dataloader()
    with packed_attention(model):
        loss = trainer.training_step(model, batch)
    assert_equals_reference(model, float(loss), architecture, examples)


@pytest.mark.parametrize("rows_per_device", [1, 3])
def test_accumulated_passes_have_the_same_loss_and_gradients(rows_per_device: int, tmp_path: Path) -> None:
    """As ranks of a launch compute it, and a model whose logits are more than hidden states times a matrix."""
    model = tiny_model(logits_scaling=1.0)
    config = CONTRASTIVE.model_copy(
        update={"max_length": 100, "rows_per_device": rows_per_device, "packed_rows_per_step": 3}
    )
    trainer = SFT(config, SPACE, 0).trainer(model, tiny_tokenizer(), random_examples(), tmp_path)
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 99, torch.device("cpu"))
    assert len(batches) > 1
    loss = 0.0
    with packed_attention(model):
        for batch in batches:
            part = trainer.compute_loss(model, batch)
            part.backward()
            loss += part.item()
    assert_equals_reference(model, loss, "llama", random_examples())


def test_fault_52_memory_that_runs_out_in_a_step_counts_nothing_twice(tmp_path: Path) -> None:
    logs = []
    for forgetful in (False, True):
        model, calls = tiny_model(), 0
        config = CONTRASTIVE.model_copy(update={"max_length": 100, "rows_per_device": 2, "save_steps": 99})
        trainer = SFT(config, SPACE, 0).trainer(model, tiny_tokenizer(), random_examples(20), tmp_path)

        def refuse(*_: object, forgetful: bool = forgetful) -> None:
            nonlocal calls
            calls += 1
            if forgetful and calls == 2:  # the first pass of the step has been counted
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

        model.model.layers[-1].register_forward_pre_hook(refuse)
        trainer.train()
        assert trainer.pass_size == (1 if forgetful else 2)
        names = ("loss", "nll", "contrast", "own_likelier")
        logs.append([[entry[name] for name in names] for entry in trainer.state.log_history if "nll" in entry])
    assert len(logs[0]) > 1
    np.testing.assert_allclose(logs[1], logs[0], rtol=1e-4)


def test_a_row_and_its_negatives_share_a_packed_row(tmp_path: Path) -> None:
    examples = random_examples(40)
    config = CONTRASTIVE.model_copy(update={"max_length": 100})
    rows = SFT(config, SPACE, 0).trainer(tiny_model(), tiny_tokenizer(), examples, tmp_path).train_dataset
    assert all(sum(row.lengths) == row.ids_T.numel() <= 100 for row in rows)
    assert all(sum(row.sizes) == len(row.lengths) for row in rows)
    assert sum(len(row.sizes) for row in rows) == sum(row.learned for row in rows) == 40
    assert sum(row.ids_T.numel() for row in rows) == sum(example.tokens for example in examples)
    assert sum(row.labels for row in rows) == sum(len(e.ids) - e.prompt_tokens for e in examples), "negatives' aside"


def test_off_it_leaves_rows_and_trainer_as_they_are(tmp_path: Path) -> None:
    examples = [Example(example.ids, example.prompt_tokens) for example in random_examples()]
    off = SFT(CONFIG, SPACE, 0).trainer(tiny_model(), tiny_tokenizer(), examples, tmp_path)
    assert sum(row.ids_T.numel() for row in off.train_dataset) == sum(example.tokens for example in examples)
    assert not hasattr(off, "contrastive") and FinetuneConfig().contrastive == 0


# --- which directions ---------------------------------------------------------------------------------------------

UP, DOWN, AHEAD = [0.8, 0.6], [0.8, -0.6], [1.0, 0.0]


def test_negatives_are_directions_of_the_pool_that_chose_another_response() -> None:
    rows = rows_of([[(UP, "long"), (DOWN, "short"), ([0.9, 0.1], "long"), (AHEAD, "middle")], [(UP, "x"), (DOWN, "y")]])
    found = negative_directions(rows, SPACE, count=9, seed=0)
    assert [sorted(row) for row in found[:4]] == [
        sorted([DOWN, AHEAD]),
        sorted([UP, [0.9, 0.1], AHEAD]),
        sorted([DOWN, AHEAD]),
        sorted([UP, DOWN, [0.9, 0.1]]),
    ]
    assert found[4:] == [[DOWN], [UP]], "another prompt is another pool"
    assert [row[:1] for row in found] == negative_directions(rows, SPACE, count=1, seed=0)


def test_where_the_pool_has_none_the_direction_is_mirrored() -> None:
    rows = rows_of([[(UP, "a")], [(UP, "b"), ([0.9, 0.1], "b")], [(AHEAD, "c")]])
    found = negative_directions(rows, SPACE, count=2, seed=0)
    assert found[0] == found[1] == [pytest.approx(DOWN)]
    assert found[3] == [], "the center is its own mirror image"


def test_a_direction_known_to_choose_the_response_is_no_negative() -> None:
    """(0.9, -0.436) lies between two directions that chose the response, so it chooses it as well."""
    rows = rows_of([[([0.9, 0.436], "a"), (DOWN, "a")]])
    assert negative_directions(rows, SPACE, count=1, seed=0) == [[], [pytest.approx(UP)]]


def test_where_no_row_tells_the_selection_does_which_saw_the_pool() -> None:
    rows = rows_of([[(UP, "a")], [(UP, "b")], [(UP, "c")], [(UP, "d")], [(UP, "e"), (DOWN, "f")]])
    asked = pa.array([[], AHEAD, None, AHEAD, AHEAD, AHEAD], pa.list_(pa.float64()))
    found = negative_directions(rows.append_column("negative_direction", asked), SPACE, count=1, seed=0)
    assert found == [[], [AHEAD], [pytest.approx(DOWN)], [AHEAD], [DOWN], [UP]]


def test_rows_of_another_pool_are_no_negatives_though_the_prompt_is_the_same() -> None:
    rows = rows_of([[(UP, "long"), (DOWN, "short")]]).append_column("pool", pa.array(["p0", "p0@1"]))
    assert negative_directions(rows, SPACE, count=1, seed=0) == [[pytest.approx(DOWN)], [pytest.approx(UP)]]


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3).filter(lambda v: np.linalg.norm(v) > 0.1), st.booleans())
def test_a_mirrored_direction_lies_as_far_from_the_center_on_the_other_side(weights: list[float], tilted: bool) -> None:
    objectives = tuple(Objective(name, {name: 1.0}) for name in "abc")
    space = DirectionSpace(objectives, center=[1.0, 0.3, 0.2] if tilted else None)
    own, other = space.direction(weights), space.mirrored(weights)
    degrees = space.angle_to_center(np.array([own.weights, other.weights]))
    assert degrees[0] == pytest.approx(degrees[1], abs=1e-5)
    np.testing.assert_allclose(space.mirrored(other.weights).weights, own.weights, atol=1e-9)
    if not tilted:
        np.testing.assert_allclose(other.weights, np.array(own.weights) * [1, -1, -1], atol=1e-9)


def test_a_negative_is_the_same_response_behind_the_prompt_of_another_direction() -> None:
    rows = rows_of([[(UP, "long"), (DOWN, "no")]])
    model, tokenizer = tiny_model(), tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    others = negatives(rows, SPACE, 1, seed=0)
    (first, second), _ = encode_examples(rows, RowEncoder(model, tokenizer, SPACE, 200), others, room=400)
    own, other = first.segments
    response = own.ids[own.prompt_tokens :]
    assert other.ids == [*second.ids[: second.prompt_tokens], *response] and other.labels[-len(response) :] == response
    assert first.tokens == len(own.ids) + len(other.ids)
    (alone, _), _ = encode_examples(rows, RowEncoder(model, tokenizer, SPACE, 200), others, room=first.tokens - 1)
    assert alone.negatives == () and alone.ids == first.ids


def test_a_target_is_contrasted_with_what_is_not_true_of_its_response() -> None:
    scored = [(None, 40, None, 75.0), (None, 40, None, 42.0), (None, 50, None, 51.0), (None, 20, 75, 75.0), None]
    rows = [
        {
            "prompt_id": "p",
            "direction": [0.8, 0.0, 0.6] if one else [0.6, 0.8, 0.0],
            "held": list(one[:3]) if one else None,
            "response": f"{n}",
            "helpfulness": 50.0,
            "verbosity": float(one[1]) if one else 10.0,
            "warmth": one[3] if one else 10.0,
        }
        for n, one in enumerate(scored)
    ]
    space = space_of("helpfulness", "verbosity", "warmth")
    found = negatives(pa.Table.from_pylist(rows), space, 9, seed=0)
    assert [{stated.held for stated in own} for own in found] == [
        {(None, None, 40), (None, 60, None)},  # whose number it is, and which number
        {(None, 60, None)},  # warmth is 42: to say 40 of it is no lie
        set(),
        {(None, 75, 20), (None, 80, 25)},
        {None},  # the mirrored direction: a target is no direction's negative
    ]
    for stated in found[0]:
        held = np.array([value is not None for value in stated.held])
        assert not np.array(stated.direction)[held].any() and np.linalg.norm(stated.direction) == pytest.approx(1)


@pytest.mark.parametrize(("step", "value", "score"), [(25, 50, 40.0), (50, 50, 30.0)])
def test_what_a_coarse_step_says_of_a_response_is_not_wrong_of_it(step: int, value: int, score: float) -> None:
    row = {"prompt_id": "p", "direction": [1.0, 0.0], "held": [None, value], "response": "So."}
    rows = pa.Table.from_pylist([row | {"helpfulness": 50.0, "verbosity": score}])
    space = replace(space_of("helpfulness", "verbosity"), target_step=step)
    assert value not in {stated.held[1] for stated in negatives(rows, space, 9, seed=0)[0]}


def test_a_number_stated_of_what_was_weighed_leaves_the_rest_of_the_center_free() -> None:
    row = {"prompt_id": "p", "direction": [1.0, 0.0], "held": [None, 40], "response": "So."}
    rows = pa.Table.from_pylist([row | {"helpfulness": 90.0, "verbosity": 40.0}])
    space = space_of("helpfulness", "verbosity", center={"helpfulness": 0.8, "verbosity": -0.6})
    found = {stated.held: tuple(stated.direction) for stated in negatives(rows, space, 9, seed=0)[0]}
    assert found == {(40, None): (0.0, -1.0), (None, 60): (1.0, 0.0)}


# --- whole trainings ----------------------------------------------------------------------------------------------

POOLS = rows_of([[(UP, "So it is. " * (1 + i % 3)), (DOWN, "No." + "!" * (i % 3))] for i in range(8)])
POOLS_TOKENS = sum(
    len(SPACE.prompt(SPACE.direction(direction)))
    + len("Why?")
    + len(response)
    + len(["system", "user", "assistant", "end"])
    for direction, response in zip(POOLS["direction"].to_pylist(), POOLS["response"].to_pylist(), strict=True)
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"lora": AdapterConfig(rank=4, alpha=8)}])
def test_how_a_step_is_cut_into_passes_does_not_matter(base: Path, tmp_path: Path, changes: dict) -> None:
    config = CONTRASTIVE.model_copy(update={**changes, "save_steps": 99})
    one = run(base, tmp_path / "one", config, POOLS)
    together = run(base, tmp_path / "together", config.model_copy(update={"rows_per_device": 4}), POOLS)
    assert together.logged("loss") == pytest.approx(one.logged("loss"), rel=1e-3)
    assert SFT(config, SPACE, 7).cost(one).training_tokens == 2 * POOLS_TOKENS
    entries = [json.loads(line) for line in (tmp_path / "one" / "work" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    assert all(e["loss"] == pytest.approx(e["nll"] + 0.7 * e["contrast"], rel=1e-4) for e in steps)
    assert all(0 <= entry["own_likelier"] <= 1 for entry in steps)


def test_interrupted_and_resumed_equals_undisturbed(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "whole", CONTRASTIVE, POOLS)
    run(base, tmp_path / "resumed", CONTRASTIVE, POOLS)
    work = tmp_path / "resumed" / "work"
    newest = max(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    (newest / "trainer_state.json").unlink()  # half saved: the one before is taken
    run(base, tmp_path / "resumed", CONTRASTIVE, POOLS)
    assert logged(tmp_path / "resumed") == logged(tmp_path / "whole")


def test_it_teaches_to_read_the_direction(base: Path, tmp_path: Path) -> None:
    config = CONTRASTIVE.model_copy(update={"contrastive": 1.0, "epochs": 20, "save_steps": 100, "rows_per_device": 4})
    run(base, tmp_path, config, POOLS)
    last = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()][-2]
    assert last["own_likelier"] > 0.8 and last["contrast"] < 0.5
