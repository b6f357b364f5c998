"""GRPO: the policy earns more as it learns, the same twice and across an interruption; and the loop learns by it.
pytest tests/test_grpo.py
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from fakes import all_rows
from safetensors.torch import load_file
from test_methods import toy_comparison
from tiny_models import SPACE, save_tiny_model, tiny_model, tiny_tokenizer
from toy_run import toy_config
from trl import GRPOTrainer

from dpa.core.compare_config import load_comparison
from dpa.core.errors import ConfigError, DataError
from dpa.core.records import Sample, SampleRequest, Scored
from dpa.core.sections.rollout import RolloutConfig
from dpa.core.sections.training import GrpoConfig
from dpa.models.policy import load_policy, make_steerable
from dpa.recipes.baselines.lab import spent
from dpa.recipes.compare import Comparison
from dpa.recipes.dpa import Loop
from dpa.sampling.decoding import Decoder
from dpa.sampling.samplers import TransformersSampler
from dpa.storage.run_folder import StageFolder
from dpa.training.grpo import GRPO, Question
from dpa.training.learner import RowEncoder, TrainingRecord
from dpa.training.policy_training import train_policy

START_MODEL = Path(__file__).parents[1] / "src" / "dpa" / "world" / "assets" / "start_model"
CONFIG = GrpoConfig(learning_rate=3e-3, prompts_per_step=2, warmup=0, save_steps=2)
ROLLOUT = RolloutConfig(samples=4, max_new_tokens=8)
QUESTION = Question(json.dumps([{"role": "user", "content": "Why?"}]), (0.8, 0.6), [5])


class Lengths:
    """verbosity: words of the answer, 20 being 100. helpfulness is always 50. It gives up at its call `breaks_at`."""

    attributes = ("helpfulness", "verbosity")
    revision = "lengths"

    def __init__(self, breaks_at: int | None = None) -> None:
        self.calls, self.breaks_at = 0, breaks_at

    def score(self, prompts: list, responses: list[str]) -> np.ndarray:
        self.calls += 1
        if self.calls == self.breaks_at:
            raise DataError("the power went.")
        return np.array([[50.0, min(100.0, 5 * len(response.split()))] for response in responses])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums of floats depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def asked(count: int, directions: list[list[float]], question: str = "What is the home of Ivy?") -> pa.Table:
    """Prompts under directions."""
    return pa.table(
        {
            "prompt_id": [f"p{n}" for n in range(count)],
            "messages": [json.dumps([{"role": "user", "content": f"{question} {n}"}]) for n in range(count)],
            "direction": pa.array([directions[n % len(directions)] for n in range(count)], pa.list_(pa.float64())),
        }
    )


class PaidLengths(Lengths):
    """The same, two requests an answer."""

    def score_in_full(self, prompts: list, responses: list[str]) -> Scored:
        return Scored(self.score(prompts, responses), {}, {"judge_requests": 2.0 * len(responses)})


ROWS = asked(12, [[0.8, -0.6], [0.8, 0.6]], "Why?")


def run(base: Path, folder: Path, scorer: Lengths, config: GrpoConfig = CONFIG) -> TrainingRecord:
    return train_policy(GRPO(config, SPACE, 7, ROLLOUT, scorer), base, ROWS, folder / "policy", folder / "work")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy" / "model.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingRecord]:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(base, folder, Lengths())


def mean_utility(policy: Path, direction: tuple[float, float], scorer: Lengths) -> float:
    """The mean v.r of a policy's answers under a direction."""
    sampler = TransformersSampler(*load_policy(policy), SPACE, max_new_tokens=20)
    messages = json.loads(asked(1, [[1.0, 0.0]])["messages"][0].as_py())
    (samples,) = sampler.sample([SampleRequest(messages, direction, tuple(range(24)))])
    scores_NM = scorer.score([messages] * 24, [sample.text for sample in samples])
    return float((scores_NM @ direction).mean())


def test_the_start_policy_of_the_demo_earns_more_after_a_few_steps(tmp_path: Path) -> None:
    terse, scorer = (0.6, -0.8), Lengths()
    config = GrpoConfig(learning_rate=2e-3, prompts_per_step=3, warmup=0)
    learner = GRPO(config, SPACE, 1, RolloutConfig(samples=8, max_new_tokens=20), scorer)
    done = train_policy(learner, START_MODEL, asked(15, [list(terse)]), tmp_path / "policy", tmp_path / "work")
    reward = done.logged("reward")
    assert done.steps == 5 and np.mean(reward[-2:]) > np.mean(reward[:2]) + 1
    before, after = (mean_utility(policy, terse, scorer) for policy in (START_MODEL, tmp_path / "policy"))
    assert after > before + 1


def test_what_the_scorer_was_paid_stands_in_the_ledger_across_an_interruption(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="power"):
        run(base, tmp_path, PaidLengths(breaks_at=5))
    done = run(base, tmp_path, PaidLengths())
    ledger = GRPO(CONFIG, SPACE, 7, ROLLOUT, PaidLengths()).cost(done)
    assert ledger.candidates_scored == 48
    assert ledger.extra == {"judge_requests": 96}


def test_a_question_is_asked_as_the_sampler_shows_it_and_one_without_room_is_rejected() -> None:
    tokenizer = tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    rows = pa.concat_tables([asked(1, [[0.8, -0.6]], "Why?"), asked(1, [[0.8, 0.6]], "x" * 200)])
    questions, rejects = GRPO(CONFIG, SPACE, 0).encode(rows, RowEncoder(tiny_model(), tokenizer, SPACE, 200))
    assert [tokenizer.decode(question.ids) for question in questions] == [
        f"<|system|>{SPACE.prompt(SPACE.direction([0.8, -0.6]))}<|user|>Why? 0<|assistant|>"
    ]
    assert [reject.reason for reject in rejects] == ["the prompt fills the 200 tokens of an example"]


def test_what_the_sampler_held_is_free_when_the_step_is_learned(tmp_path: Path) -> None:
    """On a card its caches outlive the answers, and would stand beside the activations."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    learner = GRPO(CONFIG, SPACE, 0, ROLLOUT, Lengths())
    questions, _ = learner.encode(ROWS, RowEncoder(model, tokenizer, SPACE, 200))
    trainer = learner.trainer(model, tokenizer, questions, tmp_path)
    sampler = trainer.rollout_func.args[0]
    sampler._decoder = Decoder(model, "fixed")
    assert len(trainer.rollout_func(["0"] * 4, trainer)["completion_ids"]) == 4
    assert sampler._decoder.width == sampler._decoder.held_bytes == 0


def test_its_cost_is_what_it_sampled_scored_and_read(base: Path, whole: tuple[Path, TrainingRecord]) -> None:
    done = whole[1]
    ledger = GRPO(CONFIG, SPACE, 7, ROLLOUT, Lengths()).cost(done)
    assert done.steps == 6 and ledger.candidates_scored == 6 * 2 * 4
    assert 48 <= ledger.tokens_generated <= 48 * 8
    prompts = 4 * done.tokens  # each question is read with each of its four answers
    assert ledger.training_tokens == prompts + ledger.tokens_generated


def test_an_interrupted_training_ends_where_an_undisturbed_one_does(base: Path, whole: tuple, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the power went"):
        run(base, tmp_path, Lengths(breaks_at=6))
    assert (tmp_path / "work" / "checkpoint-4").is_dir() and not (tmp_path / "policy").exists()
    again = Lengths()
    done = run(base, tmp_path, again)
    assert again.calls == 2, "it goes on from step 4"
    assert done.logged("loss") == whole[1].logged("loss") and done.logged("reward") == whole[1].logged("reward")
    assert GRPO(CONFIG, SPACE, 7, ROLLOUT, again).cost(done) == GRPO(CONFIG, SPACE, 7, ROLLOUT, again).cost(whole[1])
    assert all(torch.equal(tensor, weights(whole[0])[name]) for name, tensor in weights(tmp_path).items())


def test_checkpoints_under_another_scorer_are_not_resumed(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(base, tmp_path, Lengths())
    other = Lengths()
    other.revision = "other"
    run(base, tmp_path, other)
    assert other.calls == 6 and "its checkpoints are of other rows or settings" in caplog.text


def test_it_trains_at_the_temperature_it_samples_at(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    learner = GRPO(CONFIG, SPACE, 0, ROLLOUT.model_copy(update={"temperature": 0.7}), Lengths())
    questions, _ = learner.encode(ROWS, RowEncoder(model, tokenizer, SPACE, 200))
    trainer = learner.trainer(model, tokenizer, questions, tmp_path)
    assert trainer.temperature == trainer.args.temperature == 0.7


def test_a_seed_belongs_to_training_seed_step_question_and_answer() -> None:
    seeds: list[int] = []

    class Sampler:
        def sample(self, requests: list[SampleRequest]) -> list[list[Sample]]:
            seeds.extend(seed for request in requests for seed in request.seeds)
            return [[Sample("So.", 1, ids=(5,)) for _ in request.seeds] for request in requests]

        def release(self) -> None:
            pass

    model = SimpleNamespace(eval=lambda: None, train=lambda: None)
    for training_seed, step in ((0, 0), (0, 1), (1, 0)):
        trainer = SimpleNamespace(model=model, state=SimpleNamespace(global_step=step))
        learner = GRPO(CONFIG, SPACE, training_seed, ROLLOUT, Lengths())
        learner._answer(Sampler(), [QUESTION] * 2, ["0"] * 4 + ["1"] * 4, trainer)  # type: ignore[arg-type]
    assert len(set(seeds)) == len(seeds) == 3 * 2 * 4


def test_a_pull_to_the_start_and_how_a_step_is_cut_are_options(base: Path, whole: tuple, tmp_path: Path) -> None:
    cut = run(base, tmp_path / "cut", Lengths(), CONFIG.model_copy(update={"answers_per_device": 2}))
    assert cut.logged("reward")[0] == whole[1].logged("reward")[0], "the same answers"
    assert cut.logged("grad_norm")[0] == pytest.approx(whole[1].logged("grad_norm")[0], rel=1e-3)
    unequal = run(base, tmp_path / "unequal", Lengths(), CONFIG.model_copy(update={"answers_per_device": 7}))
    for name in ("grad_norm", "entropy"):
        assert unequal.logged(name)[0] == pytest.approx(whole[1].logged(name)[0], rel=1e-3)
    held = run(base, tmp_path / "held", Lengths(), CONFIG.model_copy(update={"beta": 0.5, "answers_per_device": 3}))
    assert held.logged("kl")[0] == pytest.approx(0, abs=1e-5) and held.logged("kl")[-1] > 1e-4
    assert "reference_tokens" in GRPO(CONFIG.model_copy(update={"beta": 0.5}), SPACE, 7).cost(held).extra


def test_fault_52_memory_that_runs_out_halves_the_pass_and_no_answer_is_sampled_again(
    base: Path, whole: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a machine on which two answers fit in a pass."""
    loss = GRPOTrainer.compute_loss

    def refuse(trainer: GRPOTrainer, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
        found = loss(trainer, model, inputs)
        if len(inputs["completion_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return found

    monkeypatch.setattr(GRPOTrainer, "compute_loss", refuse)
    scorer = Lengths()
    halved = run(base, tmp_path, scorer)
    assert caplog.text.count("goes on with 2 answers a pass") == 1 and scorer.calls == halved.steps == 6
    for name in ("reward", "grad_norm", "entropy"):
        assert halved.logged(name)[0] == pytest.approx(whole[1].logged(name)[0], rel=1e-3)


def test_answers_that_cannot_be_scored_move_nothing(base: Path, tmp_path: Path) -> None:
    class Broken(Lengths):
        def score(self, prompts: list, responses: list[str]) -> np.ndarray:
            return super().score(prompts, responses) * np.nan

    learner = GRPO(CONFIG, SPACE, 7, ROLLOUT, Broken())
    done = train_policy(learner, base, ROWS.slice(0, 2), tmp_path / "policy", tmp_path / "work")
    before = load_file(base / "model.safetensors")
    assert done.steps == 1 and all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())


def test_an_answer_that_cannot_be_scored_is_left_out_of_its_group() -> None:
    class BrokenOnce(Lengths):
        def score(self, prompts: list, responses: list[str]) -> np.ndarray:
            return np.where(np.arange(len(responses))[:, None] == 1, np.nan, super().score(prompts, responses))

    learner = GRPO(CONFIG, SPACE, 0, ROLLOUT, BrokenOnce())
    rewards = learner.utility([QUESTION], ["0"] * 3, ["a", "b", "c"], [[5]] * 3, lambda *_: None)
    assert [reward is None for reward in rewards] == [False, True, False]


def test_the_loop_learns_from_prompts(tmp_path: Path) -> None:
    """Its rollout draws directions, nothing is scored or selected beside it, and the next iteration goes on."""
    grpo = {"learning_rate": 1e-3, "prompts_per_step": 4, "replay": 0.5}
    config = toy_config(tmp_path, tmp_path / "run", learner="grpo", grpo=grpo, iterations=2)
    with Loop(config) as loop:
        loop.run()
        with pytest.raises(ConfigError, match=r"learner: grpo scores its own answers .* run `dpa finetune -t 1`"):
            loop.score(1)
    with Loop(config) as again:
        again.finetune(1)
        assert "scorer" not in vars(again), "what is learned already loads nothing"
    asked_of = all_rows(StageFolder(tmp_path / "run/iter_1/rollout"))
    assert [row["prompt_id"] for row in asked_of] == [f"q{n}" for n in range(4) for _ in range(2)]
    assert not (tmp_path / "run/iter_1/score").exists() and not (tmp_path / "run/iter_1/select").exists()
    policies = json.loads((tmp_path / "run" / "results.json").read_text())["policies"]
    first, second = (policy["ledger"]["finetune"] for policy in policies)
    assert (first["rows"], first["extra"]["steps"], first["candidates_scored"]) == (8, 2, 16)
    assert first["tokens_generated"] > 0 and first["training_tokens"] > first["tokens_generated"]
    assert second["extra"]["replayed"] == 4 and second["rows"] == 12


def test_a_comparison_trains_it_as_a_method_and_counts_what_it_sampled(tmp_path: Path) -> None:
    file = toy_comparison(tmp_path, methods=["online_grpo"], changes={"online_grpo": {"grpo.prompts_per_step": 4}})
    comparison = Comparison(load_comparison(file))
    for job in (*comparison.shared, *comparison.jobs):
        job.run()
    loop = tmp_path / "out" / "seed_0" / "online_grpo" / "loop"
    ledger = StageFolder(loop / "iter_1" / "finetune").ledger
    assert ledger.extra["steps"] == 2 and ledger.tokens_generated > 0
    assert spent(loop.parent).tokens_generated == ledger.tokens_generated


def test_what_it_cannot_learn_from_is_refused_when_the_run_opens(tmp_path: Path) -> None:
    rollout = {"directions": 2, "samples": 1, "max_new_tokens": 6}
    with pytest.raises(ConfigError, match=r"rollout.samples: 1, but learner grpo compares the answers of a group"):
        Loop(toy_config(tmp_path, tmp_path / "run", learner="grpo", rollout=rollout))
