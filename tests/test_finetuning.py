"""Finetuning: packing changes nothing, lengths survive, interruptions leave no trace, a NaN never reaches the weights.
pytest tests/test_finetuning.py
"""

import copy
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from forks import start
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_models import SPACE, save_tiny_model, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from dpa.core.errors import ConfigError, DataError, Interrupted, TrainingError
from dpa.core.records import Ledger
from dpa.core.sections.training import AdapterConfig, FinetuneConfig
from dpa.models import half_precision
from dpa.models.attention import packed_attention
from dpa.models.files import load_space
from dpa.models.policy import count_tokens, load_policy, make_steerable
from dpa.stages.finetune import finetune_policy
from dpa.storage.run_folder import StageFolder
from dpa.training.learner import RowEncoder, TrainingRecord
from dpa.training.optimizers import MuonInFloat32, MuonWithAdamW
from dpa.training.packing import Example, pack
from dpa.training.policy_training import train_policy
from dpa.training.sft import SFT, encode_examples
from dpa.training.trainers import WriteLog, kept_share, lora_adapters, merge_adapters

QUESTION = [{"role": "user", "content": "Why?"}]


def table_of(responses: list[str], questions: list[list] | None = None) -> pa.Table:
    """Select shard columns."""
    questions = questions or [QUESTION] * len(responses)
    return pa.table(
        {
            "prompt_id": [f"p{i}" for i in range(len(responses))],
            "messages": [json.dumps(question) for question in questions],
            "direction": pa.array([[0.8, -0.6]] * len(responses), pa.list_(pa.float64())),
            "candidate_id": [f"c{i}" for i in range(len(responses))],
            "response": responses,
            "utility": [0.0] * len(responses),
        }
    )


ROWS = table_of(["So it is. " * (1 + i * 7 % 9) for i in range(64)])
CONFIG = FinetuneConfig(
    learning_rate=3e-3, max_length=160, packed_rows_per_step=4, epochs=1, save_steps=2, warmup=0.2, schedule="linear"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def run(base: Path, folder: Path, config: FinetuneConfig = CONFIG, rows: pa.Table = ROWS) -> TrainingRecord:
    return train_policy(SFT(config, SPACE, 7), base, rows, folder / "policy", folder / "work")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy" / "model.safetensors")


def logged(folder: Path) -> list[tuple]:
    """(step, loss, learning rate, gradient norm) of each step."""
    entries = map(json.loads, (folder / "work" / "log.jsonl").read_text().splitlines())
    return [(e["step"], e["loss"], e["learning_rate"], e["grad_norm"]) for e in entries if "loss" in e]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingRecord]:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(base, folder)


# --- examples -----------------------------------------------------------------------------------------------------


def test_only_the_response_and_its_end_are_learned() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    (example,), rejects = encode_examples(table_of(["So."]), RowEncoder(model, tokenizer, SPACE, 200))
    sentence = SPACE.prompt(SPACE.direction([0.8, -0.6]))
    assert tokenizer.decode(example.ids) == f"<|system|>{sentence}<|user|>Why?<|assistant|>So.<|end|>"
    learned = [token for token in example.labels if token != -100]
    assert tokenizer.decode(learned) == "So.<|end|>" and example.labels[-4:] == learned
    assert rejects == []


def test_a_response_cut_at_a_limit_teaches_no_end() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    rows = table_of(["So.", "So."]).append_column("complete", pa.array([True, False]))
    (whole, cut), _ = encode_examples(rows, RowEncoder(model, tokenizer, SPACE, 200))
    assert whole.ids == [*cut.ids, tokenizer.convert_tokens_to_ids("<|end|>")]


def test_fault_26_rows_without_anything_to_learn_are_counted_with_their_reason() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    long = [{"role": "user", "content": "x" * 300}]
    rows = table_of(["So.", "", "So.", "So. " * 60, "So."], [QUESTION, QUESTION, long, QUESTION, [{"role": "user"}]])
    examples, rejects = encode_examples(rows, RowEncoder(model, tokenizer, SPACE, 200))
    assert len(examples) == 1
    assert [(reject.id, reject.reason) for reject in rejects] == [
        ("c1", "the response is empty"),
        ("c2", "the prompt fills the 200 tokens of an example"),
        ("c3", "prompt and response exceed the 200 tokens of an example"),
        ("c4", "cannot be written as tokens (KeyError)"),
    ]


def test_nothing_to_train_on_is_a_data_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 2 rows .*the response is empty"):
        run(base, tmp_path, rows=table_of(["", ""]))


def test_rows_that_cannot_be_shared_out_are_a_config_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"packed_rows_per_step: 4 is no multiple .*\(3\); take 6"):
        run(base, tmp_path, CONFIG.model_copy(update={"rows_per_device": 3}))


NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}

# --- packing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("mistral", {"sliding_window": 24}), ("qwen2", {}), ("gpt2", NO_DROPOUT)],
    ids=["llama", "mistral-sliding", "qwen2", "gpt2"],
)
@pytest.mark.parametrize("rows_per_device", [1, 2])
def test_packed_loss_and_gradients_are_those_of_padded_examples(
    architecture: str, changes: dict, rows_per_device: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(5, 261, int(length)).tolist(), 6) for length in rng.integers(10, 40, 12)]
    model = tiny_model(architecture, **changes)
    config = CONFIG.model_copy(update={"max_length": 100, "rows_per_device": rows_per_device})
    trainer = SFT(config, SPACE, 0).trainer(model, tiny_tokenizer(), examples, tmp_path)
    batches = list(trainer.get_train_dataloader())
    counted = sum(batch["count"] for batch in batches)
    with packed_attention(model):
        loss = sum(float(trainer.training_step(model, {**batch, "count": counted})) for batch in batches)
    model.eval()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model = tiny_model(architecture, **changes)
    width = max(len(example.ids) for example in examples)
    ids = torch.tensor([example.ids + [0] * (width - len(example.ids)) for example in examples])
    labels = torch.tensor([example.labels + [-100] * (width - len(example.ids)) for example in examples])
    seen = (torch.arange(width) < torch.tensor([[len(example.ids)] for example in examples])).long()
    logits = model(ids, attention_mask=seen).logits[:, :-1]
    padded = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
    padded.backward()
    assert counted == sum(len(example.ids) - 6 for example in examples)
    assert loss == pytest.approx(padded.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-3, atol=1e-5)


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 80))
def test_packing_keeps_every_example_whole(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[place] for place in row) <= capacity for row in rows)
    assert all(row == sorted(row) for row in rows)


def test_tokens_are_counted_before_as_they_are_read(base: Path, tmp_path: Path) -> None:
    """Three answers to each question on one of two texts; the ledger says what was read, a budget what will be."""
    texts = ["Once there was a fox. " * 5, "Two otters swam home. " * 6]
    asked = [f"{texts[number % 2]}\n\nQuestion {number}: why?" for number in range(8)]
    questions = [[{"role": "user", "content": question}] for question in asked for _ in range(3)]
    rows, space = (
        table_of(["So. " * (1 + i % 4) for i in range(24)], questions),
        replace(SPACE, placement="after_question"),
    )
    config = CONFIG.model_copy(update={"max_length": 600, "packed_rows_per_step": 2})
    learner = SFT(config, space, 0)
    record = train_policy(learner, str(base), rows, tmp_path / "policy", tmp_path / "work")
    assert record.tokens == count_tokens(str(base), rows, space, packed=600)
    assert record.tokens < 0.6 * count_tokens(str(base), rows, space)
    assert count_tokens(str(base), rows, space, longest=1) == 0, "a row that is rejected is not read"
    assert load_space(str(tmp_path / "policy")) == space


def test_packed_rows_are_full_and_mixed() -> None:
    """As full as TRL's best-fit decreasing nearly is, but each row holds short and long examples."""
    lengths = np.random.default_rng(0).integers(40, 160, 3000)
    rows = pack(lengths.tolist(), 512)
    assert lengths.sum() / (512 * len(rows)) > 0.95
    means = np.array([lengths[row].mean() for row in rows])
    assert means.std() < 0.6 * lengths.std()


def test_how_a_step_is_cut_into_passes_does_not_matter(base: Path, whole: tuple, tmp_path: Path) -> None:
    """Tokens are weighed over the whole step: four rows one by one, or all at once."""
    _, result = whole
    at_once = run(base, tmp_path, CONFIG.model_copy(update={"rows_per_device": 4}))
    assert at_once.logged("loss") == pytest.approx(result.logged("loss"), rel=1e-3)
    assert at_once.steps == result.steps


def test_the_length_distribution_of_the_data_survives(base: Path, tmp_path: Path) -> None:
    """Data that end after each full stop with probability 0.30 make a policy that does.

    Batches grouped by length with a mean per batch said 0.39, rows packed by length 0.34, and the policy turns terse.
    """
    sentences_N = np.random.default_rng(3).geometric(0.30, 1500)
    rows = table_of(["." * int(count) for count in sentences_N])
    config = FinetuneConfig(
        learning_rate=1e-2, max_length=512, packed_rows_per_step=8, epochs=3, optimizer="muon", save_steps=10_000
    )
    run(base, tmp_path, config, rows)
    model, tokenizer = load_policy(tmp_path / "policy")
    (example,), _ = encode_examples(table_of(["." * 8]), RowEncoder(model, tokenizer, SPACE, 512))
    with torch.no_grad():
        probability = model(torch.tensor([example.ids])).logits[0].softmax(-1)
    start = example.prompt_tokens  # the first full stop
    ends = probability[start : start + 4, tokenizer.eos_token_id]
    stops = probability[start : start + 4, example.ids[start]]
    assert torch.all(ends + stops > 0.97), "it has learned what the data look like"
    assert ends.mean().item() == pytest.approx(1 / sentences_N.mean(), abs=0.025)


# --- interruptions ------------------------------------------------------------------------------------------------

SCRIPT = """
import sys; sys.path.insert(0, "tests")
import torch; torch.set_num_threads(1)
from pathlib import Path
import test_finetuning as t
t.run(Path(sys.argv[1]), Path(sys.argv[2]), t.CONFIG.model_copy(update={"optimizer": sys.argv[3]}))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums of floats depend on the number of threads; the processes compared here use one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fault_23_killed_and_resumed_equals_undisturbed(
    base: Path, whole: tuple[Path, TrainingRecord], tmp_path: Path, optimizer: str
) -> None:
    """kill -9 once a checkpoint stands; then (fault 22) the newest checkpoint is made to look half-saved."""
    reference, config = whole[0], CONFIG.model_copy(update={"optimizer": optimizer})
    if optimizer == "muon":
        reference = tmp_path / "reference"
        run(base, reference, config)
    folder = tmp_path / "killed"
    child = start("-c", SCRIPT, base, folder, optimizer, cwd=Path(__file__).parents[1])
    second = folder / "work" / "checkpoint-4" / "trainer_state.json"
    while child.poll() is None and not second.exists():
        time.sleep(0.002)
    child.kill()
    child.wait()
    complete = sorted((folder / "work").glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
    assert len(complete) >= 2, "the older checkpoint is kept until the newer one is whole"
    complete[-1].unlink()
    run(base, folder, config)
    assert logged(folder) == logged(reference)
    assert all(torch.equal(tensor, weights(reference)[name]) for name, tensor in weights(folder).items())


def test_sigterm_finishes_the_step_saves_and_resumes_in_other_batches_too(
    base: Path, whole: tuple, tmp_path: Path
) -> None:
    on_log = WriteLog.on_log

    with pytest.MonkeyPatch.context() as patched:

        def terminate(*args: Any, **kwargs: Any) -> None:
            on_log(*args, **kwargs)
            patched.undo()  # once, after the first step
            os.kill(os.getpid(), signal.SIGTERM)

        patched.setattr(WriteLog, "on_log", terminate)
        with pytest.raises(Interrupted, match=r"SIGTERM with \d of \d+ steps finished; run the same command"):
            run(base, tmp_path)
    assert not (tmp_path / "policy").exists()
    kept = list((tmp_path / "work").glob("checkpoint-*/trainer_state.json"))
    assert kept
    for file in kept:
        state = json.loads(file.read_text())
        del state["stateful_callbacks"]["CountSeconds"]  # as a version before it wrote them
        file.write_text(json.dumps(state))
    identity = tmp_path / "work" / "inputs.json"
    written = identity.stat().st_mtime_ns
    run(base, tmp_path, CONFIG.model_copy(update={"rows_per_device": 2, "save_steps": 500}))
    assert identity.stat().st_mtime_ns == written, "the checkpoint counts"
    assert np.array(logged(tmp_path)) == pytest.approx(np.array(logged(whole[0])), rel=1e-3)


@pytest.mark.parametrize("epochs", [1, 0.5, 1.5])
def test_killed_after_the_last_step_only_saves(base: Path, tmp_path: Path, epochs: float) -> None:
    """A Trainer would go on with the epoch that `epochs` ends in, at full rate."""
    config = CONFIG.model_copy(update={"epochs": epochs, "schedule": "constant_with_warmup"})
    begun = time.monotonic()
    done = run(base, tmp_path, config)
    spent = time.monotonic() - begun
    first, log = weights(tmp_path), logged(tmp_path)
    again = run(base, tmp_path, config)
    assert done.earlier_s == 0 < again.earlier_s <= spent, "what the first process took is not lost"
    assert logged(tmp_path) == log and again.steps == done.steps
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(tmp_path).items())


def test_checkpoints_of_other_data_are_not_resumed_and_it_is_said(
    base: Path, whole: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(base, tmp_path, rows=ROWS.slice(0, 40))
    assert not caplog.text
    run(base, tmp_path)
    assert "its checkpoints are of other rows or settings; they are removed" in caplog.text
    assert logged(tmp_path) == logged(whole[0])


def test_checkpoints_of_another_start_policy_are_not_resumed(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = save_tiny_model(tmp_path / "other")
    tiny_model(seed=5).save_pretrained(other)
    for start_policy in (base, other):
        run(start_policy, tmp_path / "run", rows=ROWS.slice(0, 16))
    assert "its checkpoints are of other rows or settings" in caplog.text


# --- bad steps ----------------------------------------------------------------------------------------------------


def test_fault_24_a_nan_stops_before_the_step_and_is_in_the_log(base: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "warmup": 0.0, "save_steps": 1})
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) at step 2, .*learning_rate \(1e\+30\)"):
        run(base, tmp_path, config)
    last = json.loads((tmp_path / "work" / "log.jsonl").read_text().splitlines()[-1])
    assert last["loss"] in ("nan", "inf")
    assert (tmp_path / "work" / "checkpoint-1" / "trainer_state.json").exists()
    assert not (tmp_path / "work" / "checkpoint-2").exists()
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fault_24_a_bad_gradient_stops_before_the_step(bad: float, tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.model.norm.weight.register_hook(lambda gradient: gradient * bad)
    examples = [Example(list(range(5, 25)), 6)] * 8
    trainer = SFT(CONFIG, SPACE, 0).trainer(model, tiny_tokenizer(), examples, tmp_path)
    with pytest.raises(TrainingError, match=rf"gradient norm is (nan|{bad}) at step 1"):
        trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# --- adapters, optimizers, the stage ------------------------------------------------------------------------------


def test_adapters_are_merged_into_a_plain_policy(base: Path, tmp_path: Path) -> None:
    result = run(base, tmp_path, CONFIG.model_copy(update={"lora": AdapterConfig(rank=4, alpha=8), "epochs": 2}))
    assert result.logged("loss")[-1] < result.logged("loss")[0]
    before, after = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoModelForCausalLM.from_pretrained(tmp_path / "policy"),
    )
    changed = {
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed and all("proj" in name for name in changed), "only the linear layers inside"
    assert not (tmp_path / "policy" / "adapter_config.json").exists()


def test_a_mixture_trains_without_its_balancing_loss_and_keeps_its_config(tmp_path: Path) -> None:
    """TRL turns router logits on in the config, which then break every later batch of several rows."""
    base = tiny_model("mixtral", num_local_experts=2, router_aux_loss_coef=0.02)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    run(tmp_path / "base", tmp_path, CONFIG, ROWS.slice(0, 16))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").config
    assert after.output_router_logits is False and after.router_aux_loss_coef == 0.02


def test_adapters_of_a_mixtures_experts_are_merged_in_bf16_and_refuse_a_dropout(tmp_path: Path) -> None:
    """The weights are half precision on every newer card; what is kept of the update is then measured at the end."""
    base = tiny_model("mixtral", num_local_experts=2)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = CONFIG.model_copy(update={"lora": AdapterConfig(rank=4, alpha=8), "bf16": True})
    run(tmp_path / "base", tmp_path, config, ROWS.slice(0, 16))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    changed = {
        name for name, old in base.state_dict().items() if not torch.equal(old.to(after[name].dtype), after[name])
    }
    assert after["lm_head.weight"].dtype == torch.bfloat16 and any("q_proj" in name for name in changed)
    if not any("experts.0." in name for name in after):  # one parameter for all of them (transformers >= 5)
        assert any("experts" in name for name in changed)
        dropping = config.model_copy(update={"lora": AdapterConfig(rank=4, alpha=8, dropout=0.1)})
        with pytest.raises(ConfigError, match=r"finetune\.lora\.dropout: .* set it to 0"):
            run(tmp_path / "base", tmp_path / "dropping", dropping, ROWS.slice(0, 16))


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", "bfloat16"), ("gpt2", "bfloat16"), ("mixtral", "bfloat16"), ("llama", "float32")],
)
def test_an_update_that_is_rounded_away_is_said_with_the_rate(
    architecture: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As is seen from the weights before and after: changes below half a step of bf16 leave none."""
    narrow = getattr(torch, dtype)
    for size, said in ((1e-4, dtype == "bfloat16"), (1e-1, False)):
        caplog.clear()
        start = tiny_model(architecture).to(torch.bfloat16)
        before = {name: weight.float() for name, weight in start.state_dict().items()}
        model = get_peft_model(start, lora_adapters(AdapterConfig(rank=4, alpha=8), "CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = size * torch.randn(parameter.shape)
        exact = merge_adapters(copy.deepcopy(model), torch.float32).state_dict()
        update = {name: (exact[name] - weight).double() for name, weight in before.items()}
        share = kept_share(model, narrow)
        after = merge_adapters(model, narrow, rate="dpo.learning_rate: 1e-06").state_dict()
        kept = sum(((after[name].float() - weight).double() * update[name]).sum() for name, weight in before.items())
        assert share == pytest.approx(float(kept / sum(each.square().sum() for each in update.values())), rel=1e-3)
        assert (share < 0.5) == said
        assert ("dpo.learning_rate: 1e-06, but only" in caplog.text) == said


def test_muon_in_float32_takes_the_steps_of_torchs_muon() -> None:
    """Up to the rounding of torch's bf16, on flat, tall and square matrices, several of a shape and one alone."""
    shapes = [(24, 40), (40, 24), (24, 40), (32, 32)]
    draw = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=draw) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in first] for _ in range(2))
    optimizers = [
        kind(weights, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for kind, weights in ((MuonInFloat32, ours), (torch.optim.Muon, theirs))
    ]
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=draw)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for origin, mine, other in zip(first, ours, theirs, strict=True):
        assert torch.linalg.norm(mine - other) < 0.02 * torch.linalg.norm(other - origin)


def test_muon_with_adamw_is_each_on_its_share() -> None:
    together, apart = tiny_model(), tiny_model()
    optimizer = MuonWithAdamW(together, lr=0.01, weight_decay=0.1)
    named = dict(apart.named_parameters())
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    hidden = [p for name, p in named.items() if p.ndim == 2 and name not in ends]
    others = [
        {"params": [named[name] for name in sorted(ends & named.keys())], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    parts = [
        MuonInFloat32(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95)),
    ]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, *parts)]
    for step in range(4):
        if step == 2:  # through a checkpoint
            state = optimizer.state_dict()
            optimizer = MuonWithAdamW(together, lr=0.01, weight_decay=0.1)
            optimizer.load_state_dict(state)
            schedules[0] = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5, last_epoch=1)
            for group in optimizer.param_groups:
                group["lr"] = parts[1].param_groups[0]["lr"]
        for model in (together, apart):
            model.zero_grad()
            model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
        for one in (optimizer, *parts):
            one.step()
        for schedule in schedules:
            schedule.step()
    for name, parameter in together.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=0, atol=0)


def test_the_stage_finetunes_once_and_keeps_no_checkpoints(base: Path, tmp_path: Path) -> None:
    selection, stage = StageFolder(tmp_path / "select"), StageFolder(tmp_path / "finetune")
    rows = pa.concat_tables([ROWS, table_of([""])])
    selection.write_shard(0, rows, Ledger())
    selection.finish()
    out = tmp_path / "policy"
    ledger = finetune_policy(stage, selection, base, SFT(CONFIG, SPACE, 7), out)
    assert stage.done and load_space(out) == SPACE
    assert (ledger.rows, ledger.rejects) == (64, 1)
    assert ledger.training_tokens == sum(len(row.ids) for row in _examples(rows))
    assert not list(stage.path.glob("checkpoint-*"))
    assert "the response is empty" in (stage.path / "rejects.jsonl").read_text()
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert finetune_policy(stage, selection, base, SFT(CONFIG, SPACE, 7), out) == ledger
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def _examples(rows: pa.Table) -> list[Example]:
    tokenizer = tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    return encode_examples(rows, RowEncoder(tiny_model(), tokenizer, SPACE, CONFIG.max_length))[0]


@pytest.mark.parametrize(
    ("asked", "units", "expected"),
    [(False, True, False), (True, False, True), ("auto", False, False), ("auto", True, True)],
)
def test_bf16_auto_asks_the_processor(asked: Any, units: bool, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has no units for it, `auto` stays in fp32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(half_precision, "processor_has_bf16", lambda: units)
    assert half_precision.computes_in_bf16(asked) is expected
    assert half_precision.computes_in_bf16(FinetuneConfig(bf16=asked).bf16) is expected


@pytest.mark.parametrize("major", [7, 8], ids=["turing", "ampere"])
def test_a_card_that_emulates_bf16_computes_in_fp32_unless_told(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls bf16 supported on a T4, which emulates it; vLLM refuses it there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert half_precision.computes_in_bf16(False) is half_precision.computes_in_bf16("auto") is (major == 8)
    assert half_precision.computes_in_bf16(True) is True
    for file in Path(half_precision.__file__).parents[1].rglob("*.py"):
        if file.name != "half_precision.py":
            assert "is_bf16_supported" not in file.read_text(), f"{file.name} asks torch, which counts emulation"
