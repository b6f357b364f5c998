"""Preference training: TRL's loss is the one written by hand, the margin grows, interruptions leave no trace.
pytest tests/test_preference_training.py
"""

import json
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from forks import start
from safetensors.torch import load_file
from tiny_models import SPACE, save_tiny_model, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import DPOTrainer

from dpa.core.errors import ConfigError, DataError, TrainingError
from dpa.core.sections.training import AdapterConfig, PreferenceConfig
from dpa.models.files import load_space
from dpa.models.policy import make_steerable
from dpa.storage.stage_records import Reject
from dpa.training.dpo import DPO, EncodedPair
from dpa.training.learner import RowEncoder, TrainingRecord
from dpa.training.passes import StepInPasses
from dpa.training.policy_training import train_policy

QUESTION = json.dumps([{"role": "user", "content": "Why?"}])
CONFIG = PreferenceConfig(
    learning_rate=1e-3, max_length=160, pairs_per_step=8, pairs_per_device=4, save_steps=2, warmup=0.2, epochs=1
)


def pairs_of(chosen: list[str], rejected: list[str], direction: list[float] | None = None) -> pa.Table:
    """A pair table."""
    count = len(chosen)
    return pa.table(
        {
            "prompt_id": [f"p{i}" for i in range(count)],
            "messages": [QUESTION] * count,
            "direction": pa.array([direction] * count, pa.list_(pa.float64())),
            "chosen": chosen,
            "rejected": rejected,
            "utility_chosen": [1.0] * count,
            "utility_rejected": [0.0] * count,
        }
    )


ROWS = pairs_of(
    ["So it is. " * (1 + i * 7 % 4) for i in range(48)], ["No. " * (1 + i * 5 % 6) for i in range(48)], [0.8, -0.6]
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums of floats depend on the number of threads; the processes compared here use one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def run(base: Path, folder: Path, config: PreferenceConfig = CONFIG, rows: pa.Table = ROWS) -> TrainingRecord:
    return train_policy(DPO(config, SPACE, 7), base, rows, folder / "policy", folder / "work")


def encoded(rows: pa.Table, tokenizer: PreTrainedTokenizerBase) -> tuple[list[EncodedPair], list[Reject]]:
    return DPO(CONFIG, SPACE, 0).encode(rows, RowEncoder(tiny_model(), tokenizer, SPACE, 200))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy" / "model.safetensors")


def logged(folder: Path) -> list[tuple]:
    """(step, loss, learning rate, gradient norm, margin) of each step."""
    entries = map(json.loads, (folder / "work" / "log.jsonl").read_text().splitlines())
    names = ("step", "loss", "learning_rate", "grad_norm", "rewards/margins")
    return [tuple(entry[name] for name in names) for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingRecord]:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(base, folder)


# --- pairs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [[0.8, -0.6], None], ids=["direction", "no-direction"])
def test_both_responses_follow_the_prompt_that_the_sampler_shows(direction: list[float] | None) -> None:
    tokenizer = tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    (pair,), rejects = encoded(pairs_of(["So."], ["No!"], direction), tokenizer)
    sentence = f"<|system|>{SPACE.prompt(SPACE.direction(direction))}" if direction else ""
    assert tokenizer.decode(pair.prompt) == f"{sentence}<|user|>Why?<|assistant|>"
    assert tokenizer.decode(pair.chosen) == "So.<|end|>"
    assert tokenizer.decode(pair.rejected) == "No!<|end|>"
    assert pair.tokens == 2 * len(pair.prompt) + 8
    assert rejects == []


def test_of_a_pair_only_what_is_complete_has_an_end() -> None:
    tokenizer = tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    rows = pairs_of(["So."], ["So."], None).append_column("rejected_complete", pa.array([False]))
    (pair,), _ = encoded(rows, tokenizer)
    assert pair.chosen == [*pair.rejected, tokenizer.convert_tokens_to_ids("<|end|>")]


def test_fault_26_pairs_without_anything_to_learn_are_counted_with_their_reason(base: Path, tmp_path: Path) -> None:
    rows = pairs_of(["So.", "So.", "So. " * 60], ["", "No.", "No."])
    result = run(base, tmp_path, rows=rows)
    assert [(reject.id, reject.reason) for reject in result.rejects] == [
        ("p0", "the response is empty"),
        ("p2", "prompt and response exceed the 160 tokens of an example"),
    ]
    with pytest.raises(DataError, match=r"none of 2 rows"):
        run(base, tmp_path / "none", rows=rows.take([0, 2]))


def test_pairs_that_ranks_cannot_share_out_are_a_config_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpa.training.dpo.in_one_process", lambda: False)
    with pytest.raises(ConfigError, match=r"dpo.pairs_per_step: 8 is no multiple of pairs_per_device .*\(3\); take 9"):
        run(base, tmp_path, CONFIG.model_copy(update={"pairs_per_device": 3}))


# --- the loss -----------------------------------------------------------------------------------------------------


def _log_probability(model: nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + response])
    steps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return steps[torch.arange(len(response)), ids[0, len(prompt) :]].sum()


def step_loss(trainer: DPOTrainer) -> torch.Tensor:
    """The loss of one optimizer step over all pairs, whose gradients are left in the model."""
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 99, torch.device("cpu"))
    if isinstance(trainer, StepInPasses):
        return trainer.training_step(trainer.model, *batches).detach()
    losses = [trainer.compute_loss(trainer.model, batch) / len(batches) for batch in batches]
    sum(losses).backward()
    return sum(losses).detach()


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_the_loss_and_its_gradient_are_those_written_by_hand(sft_weight: float, tmp_path: Path) -> None:
    pairs = [
        EncodedPair([2, 7, 9, 4], [11, 12, 13, 1], [30, 1]),
        EncodedPair([2, 5, 4], [40, 1], [21, 22, 23, 24, 25, 1]),
        EncodedPair([2, 8, 8, 8, 8, 4], [50, 51, 1], [60, 61, 1]),
    ]
    config = CONFIG.model_copy(
        update={"beta": 0.3, "sft_weight": sft_weight, "pairs_per_step": 3, "pairs_per_device": 3}
    )
    model, reference = tiny_model(seed=0), tiny_model(seed=1)
    trainer = DPO(config, SPACE, 0).trainer(model, tiny_tokenizer(), pairs, tmp_path, lambda: reference)
    loss = step_loss(trainer)

    model_by_hand, reference = tiny_model(seed=0), tiny_model(seed=1)
    by_hand = torch.tensor(0.0)
    chosen_nats, chosen_tokens = torch.tensor(0.0), 0
    for pair in pairs:
        log_ratio = {}
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            with torch.no_grad():
                at_start = _log_probability(reference, pair.prompt, response)
            log_ratio[side] = _log_probability(model_by_hand, pair.prompt, response) - at_start
        by_hand = by_hand - nn.functional.logsigmoid(0.3 * (log_ratio["chosen"] - log_ratio["rejected"])) / 3
        chosen_nats = chosen_nats - _log_probability(model_by_hand, pair.prompt, pair.chosen)
        chosen_tokens += len(pair.chosen)
    by_hand = by_hand + sft_weight * chosen_nats / chosen_tokens
    by_hand.backward()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert loss.item() != pytest.approx(0.693, abs=0.05), "policy and reference differ"
    for parameter, hand in zip(model.parameters(), model_by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, hand.grad, rtol=1e-3, atol=1e-5)


def test_a_pairs_margin_is_taken_from_what_the_sigmoid_is_of(tmp_path: Path) -> None:
    """-log sigmoid(beta * difference - margin), equal to one written by hand; with a margin of 0 it is plain DPO."""
    ids = ([2, 7, 9, 4], [11, 12, 13, 1], [30, 1]), ([2, 5, 4], [40, 1], [21, 22, 23, 24, 25, 1])
    config = CONFIG.model_copy(update={"beta": 0.3, "pairs_per_step": 2, "pairs_per_device": 2})

    def loss(margins: tuple[float, float]) -> float:
        pairs = [EncodedPair(*own, margin=margin) for own, margin in zip(ids, margins, strict=True)]
        model, reference = tiny_model(seed=0), tiny_model(seed=1)
        trainer = DPO(config, SPACE, 0).trainer(model, tiny_tokenizer(), pairs, tmp_path, lambda: reference)
        return step_loss(trainer).item()

    model, reference = tiny_model(seed=0), tiny_model(seed=1)
    with torch.no_grad():
        difference = [
            (_log_probability(model, prompt, chosen) - _log_probability(reference, prompt, chosen))
            - (_log_probability(model, prompt, rejected) - _log_probability(reference, prompt, rejected))
            for prompt, chosen, rejected in ids
        ]
    for margins in ((0.0, 0.0), (1.5, -2.0), (0.0, 3.0)):
        inner = torch.stack([0.3 * d - m for d, m in zip(difference, margins, strict=True)])
        assert loss(margins) == pytest.approx(-nn.functional.logsigmoid(inner).mean().item(), rel=1e-4)


def test_the_margin_grows_from_nothing(whole: tuple[Path, TrainingRecord]) -> None:
    folder, result = whole
    assert result.steps == 6
    assert result.logged("rewards/margins")[0] == 0.0
    assert result.logged("loss")[0] == pytest.approx(0.6931, abs=1e-4)
    assert result.logged("rewards/margins")[-1] > 0.5
    assert result.logged("rewards/accuracies")[-1] == 1.0
    assert load_space(folder / "policy") == SPACE


def test_the_new_policy_prefers_what_was_chosen(base: Path, whole: tuple[Path, TrainingRecord]) -> None:
    tokenizer = tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    (pair,), _ = encoded(ROWS.slice(0, 1), tokenizer)
    gain = {}
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(base)
        after = AutoModelForCausalLM.from_pretrained(whole[0] / "policy")
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            gain[side] = _log_probability(after, pair.prompt, response) - _log_probability(
                before, pair.prompt, response
            )
    assert gain["chosen"] > gain["rejected"] + 5


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
@pytest.mark.parametrize("launched", [False, True])
def test_a_pair_weighs_the_same_in_a_short_pass_and_a_token_in_one_of_few(
    sft_weight: float, launched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of 7 pairs of unlike lengths, at once and in passes of 4 and 3, of 2, 2, 2 and 1, and one by one."""
    if launched:  # the Trainer of a launch, in which passes accumulate
        monkeypatch.setattr("dpa.training.dpo.in_one_process", lambda: False)
    pairs = [EncodedPair([2, 7, 4], [11 + i] * (1 + i * i) + [1], [30, 1 + i]) for i in range(7)]
    found = []
    for together in (8, 4, 2, 1):
        update = {"sft_weight": sft_weight, "pairs_per_step": 8, "pairs_per_device": together}
        model, reference = tiny_model(seed=0), tiny_model(seed=1)
        learner = DPO(CONFIG.model_copy(update=update), SPACE, 0)
        trainer = learner.trainer(model, tiny_tokenizer(), pairs, tmp_path, lambda start=reference: start)
        assert isinstance(trainer, StepInPasses) is not launched
        found.append([step_loss(trainer), *(parameter.grad for parameter in model.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_fault_52_memory_that_runs_out_halves_the_pass_and_the_step_is_the_same(
    base: Path, whole: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a machine on which two pairs fit; the reference reads a pass before the policy does."""
    loss = DPOTrainer.compute_loss

    def refuse(trainer: DPOTrainer, model: nn.Module, inputs: dict, *more: object) -> torch.Tensor:
        found = loss(trainer, model, inputs, *more)
        if len(inputs["input_ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return found

    monkeypatch.setattr(DPOTrainer, "compute_loss", refuse)
    halved = run(base, tmp_path)
    assert caplog.text.count("goes on with 2 pairs a pass") == 1
    # A pass may be asked for that holds more than a step has.
    larger = run(base, tmp_path / "larger", CONFIG.model_copy(update={"pairs_per_device": 64}))
    for done in (halved, larger):
        for name in ("loss", "rewards/margins", "rewards/accuracies", "num_tokens"):
            assert done.logged(name) == pytest.approx(whole[1].logged(name), rel=1e-3, abs=1e-5)


def test_figures_of_unequal_passes_are_those_of_the_step(base: Path, whole: tuple, tmp_path: Path) -> None:
    seven_and_one = run(base, tmp_path, CONFIG.model_copy(update={"pairs_per_device": 7}))
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert seven_and_one.logged(name) == pytest.approx(whole[1].logged(name), rel=1e-3, abs=1e-5)


def test_how_a_step_is_cut_into_passes_does_not_matter(base: Path, whole: tuple, tmp_path: Path) -> None:
    one_by_one = run(base, tmp_path, CONFIG.model_copy(update={"pairs_per_device": 1}))
    assert one_by_one.logged("loss") == pytest.approx(whole[1].logged("loss"), rel=1e-3)


def test_a_stronger_pull_stays_closer_to_the_start(base: Path, whole: tuple, tmp_path: Path) -> None:
    """The margin, beta taken out, is how far the policy moved."""
    held = run(base, tmp_path, CONFIG.model_copy(update={"beta": 2.0, "epochs": 3}))
    loose = run(base, tmp_path / "loose", CONFIG.model_copy(update={"beta": 0.05, "epochs": 3}))
    assert held.logged("rewards/margins")[-1] / 2.0 < loose.logged("rewards/margins")[-1] / 0.05


def test_checkpoints_of_another_seed_are_not_resumed(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its pairs are the same; their order is not."""
    for seed in (1, 2):
        train_policy(DPO(CONFIG, SPACE, seed), base, ROWS.slice(0, 16), tmp_path / "policy", tmp_path / "work")
    assert "its checkpoints are of other rows or settings" in caplog.text


# --- interruptions, bad steps, adapters -----------------------------------------------------------------------------

SCRIPT = """
import sys; sys.path.insert(0, "tests")
import torch; torch.set_num_threads(1)
from pathlib import Path
import test_preference_training as t
t.run(Path(sys.argv[1]), Path(sys.argv[2]), t.CONFIG.model_copy(update={"optimizer": "muon"}))
"""


def test_fault_23_killed_and_resumed_equals_undisturbed(base: Path, tmp_path: Path) -> None:
    """With Muon, whose state the Trainer keeps by another way than AdamW's; see also tests/test_finetuning.py."""
    config = CONFIG.model_copy(update={"optimizer": "muon"})
    reference, folder = tmp_path / "reference", tmp_path / "killed"
    run(base, reference, config)
    child = start("-c", SCRIPT, base, folder, cwd=Path(__file__).parents[1])
    while len(list((folder / "work").glob("checkpoint-*/trainer_state.json"))) < 2:
        assert child.poll() is None, "it ended before its second checkpoint"
        time.sleep(0.002)
    child.kill()
    child.wait()
    run(base, folder, config)
    assert logged(folder) == logged(reference)
    assert all(torch.equal(tensor, weights(reference)[name]) for name, tensor in weights(folder).items())


def test_the_examples_of_an_earlier_version_keep_their_name() -> None:
    """It is in the hash that stands beside a checkpoint, so one that an earlier version left is gone on with."""
    assert repr(EncodedPair([1], [2], [3])) == "Pair(prompt=[1], chosen=[2], rejected=[3])"


def test_fault_24_a_nan_stops_before_the_step_and_is_in_the_log(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"is (nan|inf) at step \d, .*learning_rate \(1e\+30\)"):
        run(base, tmp_path, CONFIG.model_copy(update={"learning_rate": 1e30, "warmup": 0.0}))
    assert not (tmp_path / "policy").exists()


def test_adapters_are_merged_into_a_plain_policy(base: Path, tmp_path: Path) -> None:
    """The reference is the policy with its adapters off, so the first margin is 0."""
    config = CONFIG.model_copy(update={"lora": AdapterConfig(rank=4, alpha=8), "epochs": 2, "learning_rate": 1e-2})
    result = run(base, tmp_path, config)
    assert result.logged("rewards/margins")[0] == 0.0
    assert result.logged("rewards/margins")[-1] > 0.05
    before, after = load_file(base / "model.safetensors"), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed), "only the linear layers inside"
    assert not (tmp_path / "policy" / "adapter_config.json").exists()
