"""The estimate counts what the loop will do, by measured speeds where there are any, and by named arithmetic elsewhere.
Run: pytest tests/test_estimate.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import python
from tiny_models import save_tiny_model, tiny_model

from dpa.core.config import load_config
from dpa.core.errors import ConfigError, DpaError, RunFolderError
from dpa.core.records import Ledger
from dpa.recipes.costs.data_sizes import count_rows, rated_size
from dpa.recipes.costs.devices import DEVICES, Device, device_named, matrix_rate
from dpa.recipes.costs.model_sizes import KNOWN, size_of
from dpa.recipes.costs.speeds import read_speeds
from dpa.recipes.costs.stages import StageEstimate
from dpa.recipes.costs.wording import HEADINGS, cells, heading, notes, span
from dpa.recipes.costs.work import FUNCTION_ROW_S, LIKELY, QUICK, SLOW, Clock, Sampling, Training
from dpa.recipes.estimate import estimate, estimate_of, run_needs, run_span
from dpa.storage.run_folder import RunFolder

RECIPES = Path(__file__).parents[1] / "recipes"
SHARDED = RECIPES / "accelerate" / "fsdp2.yaml"
GB = 10**9
HOUR = 3600
PROMPT, ANSWER = 40 + 10, 30
"""Tokens of `question N` with its direction and of a rated response: the tiny tokenizer's, a byte each."""


def stages_of(*args: Any, **more: Any) -> dict[str, StageEstimate]:
    """The estimate by the names of its stages; on a card whose peaks are published, which costs nothing to know."""
    return {stage.name: stage for stage in estimate(*args, **{"device": DEVICES["l40s"], **more})}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A configuration over a tiny model, 30 prompts and 40 rated rows of 10 prompts."""
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"question {n % 10}"}) + "\n" for n in range(30))
    )
    rows = "".join(f'why {n % 10},"{"in two" * 4}\nlines",1\n' for n in range(40))
    (tmp_path / "rated.csv").write_text("prompt,response,a\n" + rows)
    config = {
        "out": str(tmp_path / "run"),
        "policy": str(model),
        "iterations": 2,
        "space": {"objectives": {"a": None, "b": None}},
        "ratings": [{"path": str(tmp_path / "rated.csv"), "scales": {"a": [0, 1]}}],
        "reward": {"functions": {"a": "m:f", "b": "m:f"}},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "count": 20},
        "rollout": {"directions": 2, "samples": 4, "max_new_tokens": 100},
        "selection": {"directions": 3},
        "finetune": {"epochs": 2},
        "evaluate": {"prompts": {"path": str(tmp_path / "prompts.jsonl")}, "directions": 3},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_amounts_are_those_of_the_loop(recipe: Path) -> None:
    stages = stages_of(load_config(recipe))
    names = [f"iter_{t}/{stage}" for t in (1, 2) for stage in ("rollout", "score", "finetune", "evaluate")]
    assert list(stages) == ["iter_0/score", "iter_0/finetune", "iter_0/evaluate", *names]
    assert stages["iter_0/score"].rows == 40
    assert stages["iter_0/finetune"].rows == 10 * 3, "each prompt of the ratings serves three directions"
    assert stages["iter_1/rollout"].rows == stages["iter_2/score"].rows == 20 * 2 * 4
    assert stages["iter_1/rollout"].tokens == 20 * 2 * 4 * ANSWER, "answers are as long as those that were rated"
    assert stages["iter_2/finetune"].rows == 20 * 3
    assert stages["iter_2/finetune"].tokens == 20 * 3 * (PROMPT + ANSWER) * 2, "the prompts' own length"
    grid = len(load_config(recipe).space.build().grid(3))
    assert stages["iter_1/evaluate"].rows == 30 * grid
    assert not any(stage.measured or stage.misfit or stage.unknown for stage in stages.values())
    seconds, memory, disk = run_needs(list(stages.values()))
    assert seconds == pytest.approx(sum(stage.seconds or 0 for stage in stages.values()))
    assert memory > 0 and disk > 0
    low, high = run_span(list(stages.values()))
    assert low < seconds < high < 20 * low
    unrated = stages_of(load_config(recipe, {"ratings": "[]"}))
    assert unrated["iter_1/rollout"].tokens == 20 * 2 * 4 * 50, "half of max_new_tokens"


def test_measured_speeds_replace_arithmetic(recipe: Path) -> None:
    config = load_config(recipe)
    with RunFolder(config.out).open(config) as run:
        run.stage(0, "finetune").finish(Ledger(training_tokens=9_000, rows=45, wall_s=3.0, peak_memory=7))
        run.stage(1, "rollout").finish(Ledger(tokens_generated=3_200, rows=160, wall_s=4.0, peak_memory=5))
        run.stage(1, "evaluate/rollout").finish(Ledger(tokens_generated=800, rows=40, wall_s=1.0))
        run.stage(1, "score").finish(Ledger(candidates_scored=160, rows=160, wall_s=2.0))
    stages = stages_of(config)
    rollout = stages["iter_2/rollout"]
    assert (rollout.tokens, rollout.seconds) == (160 * 20, pytest.approx(4.0))
    assert rollout.low is not None and rollout.high is not None
    assert 3 < rollout.low < 4 < rollout.high < 6, "what was measured is known better than what was not"
    assert stages["iter_2/score"].seconds == pytest.approx(2.0)
    assert stages["iter_0/finetune"].rows == 45
    assert stages["iter_0/finetune"].seconds == pytest.approx(3.0), "what it took is what it is said to take"
    assert stages["iter_2/finetune"].tokens == 60 * 100 * 2, "100 tokens an example and epoch"
    evaluate = stages["iter_2/evaluate"]
    assert evaluate.rows and evaluate.seconds == pytest.approx(evaluate.rows * (20 / 800 + 1 / 80)), (
        "sampled and scored"
    )
    assert {stage.measured for stage in stages.values()} == {"run"}
    elsewhere = load_config(recipe, {"out": "nowhere"})
    assert estimate(elsewhere, [Path(config.out)], device=DEVICES["l40s"])[1].measured == "run"
    assert read_speeds([Path("nowhere")]).source == ""


def test_measured_memory_is_a_processors_and_this_runs_own_and_hides_no_misfit(recipe: Path) -> None:
    large = {"policy": "somebody/secret-model"}
    config = load_config(recipe, large)
    with RunFolder(config.out).open(config) as run:
        run.stage(1, "rollout").finish(Ledger(tokens_generated=3_200, rows=160, wall_s=4.0, peak_memory=5))
        run.stage(1, "finetune").finish(Ledger(training_tokens=9_000, rows=30, wall_s=3.0, peak_memory=7))
    small = Device("cpu", 1e11, 1e10, 4 * GB, card=False)
    for device, out, measured in ((small, None, True), (small, "nowhere", False), (DEVICES["4090"], None, False)):
        asked = load_config(recipe, large | ({"out": out} if out else {}))
        stages = stages_of(asked, [Path(config.out)], parameters=30e9, device=device)
        rollout, finetune = stages["iter_1/rollout"], stages["iter_1/finetune"]
        assert rollout.measured == finetune.measured == "run", "the speed is taken from it"
        assert ((rollout.memory, finetune.memory) == (5, 7)) == measured, device.name
        assert [bool(stage.misfit) for stage in (rollout, finetune)] == [not measured] * 2, device.name
        assert measured or rollout.memory > 2 * 30e9


def test_answers_are_no_longer_than_this_run_lets_them_be_however_long_they_were_elsewhere(recipe: Path) -> None:
    config = load_config(recipe)
    with RunFolder(config.out).open(config) as run:
        run.stage(1, "rollout").finish(Ledger(tokens_generated=160 * 90, rows=160, wall_s=4.0))
    shorter = load_config(recipe, {"out": "nowhere", "rollout.max_new_tokens": "50"})
    for asked, answer in ((config, 90), (shorter, 50)):
        stages = stages_of(asked, [Path(config.out)])
        assert stages["iter_1/rollout"].tokens == 160 * answer
        assert stages["iter_1/rollout"].seconds == pytest.approx(4.0 * answer / 90)


def test_a_measurement_starts_once_also_where_only_functions_score(recipe: Path) -> None:
    config, model = load_config(recipe), {"reward": f"{{folder: {recipe.parent / 'model'}}}"}
    rows = 30 * len(config.direction_space().grid(3))
    for asked in (config, load_config(recipe, model)):
        assert LIKELY.start < (stages_of(asked)["iter_1/evaluate"].seconds or 0) < LIKELY.start + 2
    with RunFolder(config.out).open(config) as run:
        run.stage(1, "rollout").finish(Ledger(tokens_generated=3_200, rows=160, wall_s=0.5))
    sampled = rows * 0.5 / 160
    assert stages_of(config)["iter_1/evaluate"].seconds == pytest.approx(sampled + rows * FUNCTION_ROW_S)


def test_only_its_own_folder_says_how_many_winners_a_run_has_at_t_0(recipe: Path) -> None:
    config = load_config(recipe)
    elsewhere = load_config(recipe, {"out": "nowhere"})
    with RunFolder(config.out).open(config) as run:
        run.stage(0, "finetune").finish(Ledger(training_tokens=1_200, rows=6, wall_s=3.0))
    small, own = stages_of(elsewhere, [Path(config.out)]), stages_of(config)
    assert (small["iter_0/finetune"].rows, own["iter_0/finetune"].rows) == (10 * 3, 6)
    assert small["iter_0/finetune"].seconds == pytest.approx(5 * 3.0), "the small run's speed, this run's winners"


def test_a_run_whose_t_0_was_adopted_has_counted_no_winners(recipe: Path) -> None:
    config = load_config(recipe)
    with RunFolder(config.out).open(config) as run:
        run.stage(0, "finetune").finish(Ledger(wall_s=3.0))
    assert stages_of(config)["iter_0/finetune"].rows == 10 * 3


def test_dpo_counts_both_responses_of_a_pair_and_the_reference(recipe: Path) -> None:
    winners = stages_of(load_config(recipe))
    config = load_config(recipe, {"learner": "dpo", "dpo.epochs": "3"})
    pairs = stages_of(config)
    assert pairs["iter_0/finetune"].tokens == winners["iter_0/finetune"].tokens, "t = 0 learns from winners"
    assert pairs["iter_1/finetune"].tokens == 2 * 20 * 3 * (PROMPT + ANSWER) * 3
    large = {"policy": "somebody/secret-model"}
    alone, held = (
        stages_of(load_config(recipe, {**large, "learner": learner}), parameters=7e9)["iter_1/finetune"].memory
        for learner in ("sft", "dpo")
    )
    assert held > alone + 3.5 * 7e9, "the reference's weights in fp32"
    with RunFolder(config.out).open(config) as run:
        run.stage(0, "finetune").finish(Ledger(training_tokens=9_000, rows=45, wall_s=3.0))
        run.stage(1, "finetune").finish(Ledger(training_tokens=36_000, rows=60, wall_s=6.0))
    measured = stages_of(config)
    assert measured["iter_2/finetune"].tokens == 2 * 20 * 3 * 100 * 3, "an example's length is that of a winner"
    assert measured["iter_2/finetune"].seconds == pytest.approx(6.0)


def test_every_policy_is_kept_and_the_checkpoints_of_one_training_beside_them(recipe: Path) -> None:
    by = {"policy": "somebody/secret-model", "iterations": "3"}
    whole = estimate(load_config(recipe, by), parameters=7e9, device=DEVICES["l40s"])
    adapters = estimate(
        load_config(recipe, {**by, "finetune.lora": "{rank: 8}"}), parameters=7e9, device=DEVICES["l40s"]
    )
    policies = 4 * 4 * 7e9
    assert run_needs(adapters)[2] == pytest.approx(policies, rel=0.01), "four finetunings, no checkpoint of all weights"
    assert run_needs(whole)[2] == pytest.approx(policies + 3 * 12 * 7e9, rel=0.01)


def test_winners_are_counted_as_the_selection_keeps_them(recipe: Path) -> None:
    few = "{method: best_mean, directions: 1, online_directions: 5, advantage_share: 0.5}"
    stages = stages_of(load_config(recipe, {"selection": few}))
    assert (stages["iter_0/finetune"].rows, stages["iter_1/finetune"].rows) == (10 * 1, 20 * 5 / 2)
    stages = stages_of(load_config(recipe, {"selection": "{method: per_direction}"}))
    assert stages["iter_1/finetune"].rows == 20 * 2, "those it was asked under"


def test_behind_the_question_a_prompt_is_read_once_for_all_that_is_stated_there(recipe: Path) -> None:
    """Three winners of a prompt, each contrasted with one direction: six endings. It is sampled under two."""
    contrast = {"finetune.contrastive": "0.3", "finetune.epochs": "1"}
    behind = {**contrast, "space.placement": "after_question"}
    cpu = {"device": Device("cpu", 1e11, 1e10, 24 * GB, card=False)}
    short = [stages_of(load_config(recipe, fields), **cpu)["iter_1/finetune"].tokens for fields in (contrast, behind)]
    assert short == [20 * 3 * 2 * (PROMPT + ANSWER)] * 2, "a question of ten tokens is not worth it"
    text = "x" * 190
    prompts = Path(load_config(recipe).prompts.path)  # type: ignore[union-attr]
    prompts.write_text("".join(json.dumps({"prompt": f"{text}{n % 10}"}) + "\n" for n in range(30)))
    before, after = (stages_of(load_config(recipe, fields), **cpu) for fields in (contrast, behind))
    own, shared = 40 + ANSWER, before["iter_1/finetune"].tokens / (20 * 3 * 2) - 40 - ANSWER  # type: ignore[operator]
    assert shared > 180
    assert after["iter_1/finetune"].tokens == pytest.approx(20 * (3 * 2 * own + shared))
    assert (after["iter_1/rollout"].seconds or 0) < (before["iter_1/rollout"].seconds or 0)


def test_grpo_counts_the_answers_it_makes_scores_and_reads_as_its_finetuning(recipe: Path) -> None:
    config = load_config(recipe, {"learner": "grpo", "grpo.epochs": "3"})
    stages = stages_of(config)
    assert [name for name in stages if name.startswith("iter_1/")] == ["iter_1/finetune", "iter_1/evaluate"]
    assert stages["iter_1/finetune"].rows == 20 * 2, "a prompt under each of its directions"
    assert stages["iter_1/finetune"].tokens == 20 * 2 * 4 * (PROMPT + ANSWER) * 3
    winners = stages_of(load_config(recipe))
    learned, finetuned = stages["iter_1/finetune"].seconds, winners["iter_1/finetune"].seconds
    assert learned is not None and finetuned is not None and learned > finetuned
    with RunFolder(config.out).open(config) as run:
        run.stage(1, "rollout").finish(Ledger(rows=40))
        run.stage(1, "finetune").finish(Ledger(training_tokens=96_000, rows=40, wall_s=6.0))
    assert stages_of(config)["iter_2/finetune"].seconds == pytest.approx(6.0)


def test_what_a_winner_is_contrasted_with_is_trained_on_too_and_so_are_replayed_rows(recipe: Path) -> None:
    plain = stages_of(load_config(recipe))["iter_2/finetune"].tokens
    more = {"finetune.contrastive": "0.3", "finetune.contrastive_negatives": "2", "finetune.replay": "0.5"}
    dearer = stages_of(load_config(recipe, more))["iter_2/finetune"].tokens
    assert plain is not None and dearer == plain * 3 * 1.5
    config = load_config(recipe, more)
    with RunFolder(config.out).open(config) as run:
        run.stage(0, "finetune").finish(Ledger(training_tokens=27_000, rows=45, wall_s=3.0))
    stages = stages_of(config)
    assert stages["iter_0/finetune"].tokens == 27_000, "a ledger's tokens are those of the negatives too"
    assert stages["iter_0/finetune"].seconds == pytest.approx(3.0)
    plain = stages_of(load_config(recipe, {"out": "nowhere"}), [Path(config.out)])["iter_0/finetune"].tokens
    assert plain == 6_000, "an example without its negatives, for the winners of this run's own prompts"
    pairs = {"learner": "dpo", "dpo.replay": "0.5"}
    first, second = (stages_of(load_config(recipe, pairs))[f"iter_{t}/finetune"].tokens for t in (1, 2))
    assert first is not None and second == 1.5 * first, "no earlier pairs, only winners"


def test_sizes_are_read_from_headers_from_config_json_or_known_by_name(recipe: Path, tmp_path: Path) -> None:
    size = size_of(str(tmp_path / "model"), None, "policy", "")
    assert size.parameters == sum(parameter.numel() for parameter in tiny_model().parameters())
    assert size.cache_bytes == 2 * 2 * 2 * 8, "keys and values, layers, heads, width"
    (tmp_path / "model" / "model.safetensors").unlink()
    assert size_of(str(tmp_path / "model"), None, "policy", "").parameters == pytest.approx(size.parameters, rel=1e-3)
    assert count_rows(str(tmp_path / "rated.csv")) == 40, "a line break inside a field is no row"
    (tmp_path / "few" / "below").mkdir(parents=True)
    for file in ("few/a.csv", "few/below/b.csv"):
        (tmp_path / file).write_text("prompt,response,good\nQ?,A.,1\nonly one\nQ?,B.,2\n")
    assert count_rows(str(tmp_path / "few")) == 2, "rows and files that a run reads"
    (tmp_path / "few" / "c.JSONL").write_text("{}\n")
    assert count_rows(str(tmp_path / "few")) == 3, "a suffix is one however it is written"
    assert 1e8 < matrix_rate(0.02) < 1e16
    published = {  # parameters, as the Hub states them
        "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
        "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
        "Qwen/Qwen3-8B": 8_190_735_360,
        "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
        "meta-llama/Llama-3.2-1B": 1_235_814_400,
        "HuggingFaceH4/mistral-7b-sft-beta": 7_241_732_096,
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
        "google/gemma-2-2b-it": 2_614_341_888,
    }
    for name, parameters in published.items():
        assert size_of(name, None, "policy", "").parameters == pytest.approx(parameters, rel=2e-4), name
    (tmp_path / "model" / "config.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"policy: .*config\.json is no model's"):
        size_of(str(tmp_path / "model"), None, "policy", "")


def test_a_policy_that_is_not_known_needs_its_size(recipe: Path) -> None:
    config = load_config(recipe, {"policy": "somebody/secret-model"})
    with pytest.raises(ConfigError, match=r"policy: somebody/secret-model is not on this machine.*--parameters"):
        stages_of(config)
    seven = stages_of(config, parameters=7e9)["iter_1/finetune"]
    assert 18 * 7e9 < seven.memory < 20 * 7e9, "weight, gradient, two moments, a copy in bf16, a pass"
    with pytest.raises(ConfigError, match=r"prompts\.path: none\.jsonl is not on this machine; give prompts\.count"):
        estimate(load_config(recipe, {"prompts.path": "none.jsonl", "prompts.count": "null"}))


def test_data_of_the_hub_is_as_published_or_unknown_and_never_0(recipe: Path) -> None:
    hub = {"prompts.path": "somebody/prompts", "prompts.count": "null"}
    hub |= {"ratings": "[{path: somebody/rated, scales: {a: [0, 1]}}]"}
    inputs, stages = estimate_of(load_config(recipe, hub), device=DEVICES["l40s"])
    found = {stage.name: stage for stage in stages}
    for name in ("iter_0/score", "iter_0/finetune", "iter_1/rollout", "iter_1/score", "iter_2/finetune"):
        assert (found[name].rows, found[name].seconds) == (None, None), name
        assert "not here" in found[name].unknown
    assert found["iter_1/evaluate"].seconds, "its prompts are here"
    assert [row[3] for row in cells(stages)].count("unknown") == 8
    assert cells(stages)[-1][3].endswith("and more"), "the run takes more than what is known"
    assert any(note.startswith("unknown: iter_0/score, iter_0/finetune") for note in notes(stages, inputs))
    known = load_config(recipe, {"ratings": "[{path: openbmb/UltraFeedback, format: ultrafeedback}]"})
    assert stages_of(known)["iter_0/score"].rows == 4 * 63_967
    other = load_config(recipe, {"ratings": "[{path: nvidia/HelpSteer2, format: helpsteer2, split: validation}]"})
    assert rated_size(other.ratings[0]) is None, "published is the split for training"


@pytest.mark.parametrize(
    ("one", "four", "gains"),
    [
        ("{kind: vllm}", {"rollout.engine.vllm.tensor_parallel": "4"}, (3.4, 3.4)),
        ("{kind: http, http: {command: 'serve {policy} {port}'}}", {"rollout.engine.http.replicas": "4"}, (4, 4)),
        ("{kind: transformers}", {"rollout.workers": "4"}, (1, 4)),
        ("{kind: auto}", {"rollout.workers": "4"}, (1, 4)),
    ],
)
def test_cards_and_servers_share_a_shard_and_processes_take_whole_ones(
    recipe: Path, one: str, four: dict[str, str], gains: tuple[float, float]
) -> None:
    many = {"policy": "somebody/secret-model", "rollout.samples": "1000", "rollout.batch_size": "100"}
    many |= {"prompts.count": "16", "rollout.engine": one, "rollout.max_new_tokens": str(ANSWER)}
    many |= {"cluster.engine": "ray"} if "auto" in one else {}  # which is transformers there

    def gain(**fields: str) -> float:
        found = (
            stages_of(load_config(recipe, many | fields | more), parameters=1e9, cards=4)["iter_1/rollout"].seconds
            for more in ({}, four)
        )
        alone, shared = (seconds - LIKELY.start for seconds in found if seconds is not None)
        return alone / shared

    assert (gain(), gain(**{"rollout.prompts_per_shard": "2"})) == pytest.approx(gains), "one shard, and eight"
    if "http" in one:
        few = gain(**{"rollout.samples": "4", "prompts.count": "8"})
        assert 1 < few < 3, "servers that have hardly anything to do"


def test_rated_rows_are_counted_as_they_are_read(tmp_path: Path) -> None:
    marks = {name: {"Rating": "3"} for name in ("instruction_following", "truthfulness", "honesty", "helpfulness")}
    answers = [{"response": "x" * 400, "overall_score": 5.0, "annotations": marks} for _ in range(4)]
    row = {"instruction": "y" * 80, "source": "s", "completions": answers}
    (tmp_path / "uf.jsonl").write_text((json.dumps(row) + "\n") * 3)
    fields = {"ratings": [{"path": str(tmp_path / "uf.jsonl"), "format": "ultrafeedback"}]}
    config = yaml.safe_load((RECIPES / "mistral-7b-dpa.yaml").read_text()) | fields
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = rated_size(load_config(tmp_path / "config.yaml").ratings[0])
    assert found is not None and (found.rows, found.prompts) == (12, 1), "four responses a line, one prompt"
    assert (found.prompt_tokens, found.response_tokens) == (40 + 20, 100)


def test_a_processor_reads_a_prompt_once_for_all_that_is_scored_of_it(tmp_path: Path, recipe: Path) -> None:
    reward = {"reward": f"{{train: {{backbone: {tmp_path / 'model'}}}}}"}
    processor = Device("two cores", 0.2e12, 20e9, 24 * GB, card=False)

    def seconds(prompts: int, samples: int, device: Device) -> float:
        sizes = {"prompts.count": str(prompts), "rollout.samples": str(samples)}
        found = stages_of(load_config(recipe, {**reward, **sizes}), device=device)["iter_1/score"].seconds
        assert found is not None
        return found

    answers = seconds(20, 16, processor) - seconds(20, 4, processor)  # 480 more to as many prompts
    prompts = seconds(20, 4, processor) - seconds(10, 8, processor)  # as many to 10 prompts more
    assert prompts / answers == pytest.approx(10 * PROMPT / (480 * ANSWER), rel=1e-3)
    card = DEVICES["l40s"]
    assert seconds(20, 4, card) == pytest.approx(seconds(10, 8, card), rel=1e-9)


def test_a_judge_is_counted_in_requests_and_tokens_and_its_time_is_unknown(recipe: Path) -> None:
    rubrics = "{a: 'How kind it is. 0: rude, 100: kind.', b: 'How long. 0: a word, 100: a page.'}"
    judge = {"reward": f"{{judge: {{model: m, servers: ['http://x/v1'], attributes: {rubrics}}}}}"}
    inputs, stages = estimate_of(load_config(recipe, judge), device=DEVICES["l40s"])
    score = {stage.name: stage for stage in stages}["iter_1/score"]
    assert score.seconds is None and "reward.judge" in score.unknown and score.judge is not None
    assert score.judge.requests == score.rows == 160
    assert 160 * 100 < score.judge.tokens_in < 160 * 400 and score.judge.tokens_out == 160 * 16
    (said,) = (note for note in notes(stages, inputs) if note.startswith("the judge: "))
    assert "requests" in said and "at most" not in said


@pytest.mark.parametrize(
    "fields",
    ["max_tokens: 4000", "arguments: {temperature: null, max_tokens: null, max_completion_tokens: 4000}"],
)
def test_of_a_judge_that_may_reason_all_that_it_may_write_is_counted(recipe: Path, fields: str) -> None:
    judge = f"{{judge: {{model: m, servers: ['http://x/v1'], attributes: {{a: kind, b: long}}, {fields}}}}}"
    inputs, stages = estimate_of(load_config(recipe, {"reward": judge}), device=DEVICES["l40s"])
    asked = {stage.name: stage for stage in stages}["iter_1/score"].judge
    assert asked is not None and asked.tokens_out == 160 * 4000
    (said,) = (note for note in notes(stages, inputs) if note.startswith("the judge: "))
    assert "at most" in said and said.endswith("written (each reply as long as it may be).")


def test_what_does_not_fit_says_so_with_the_field_to_change() -> None:
    config = load_config(RECIPES / "mistral-7b-dpa.yaml")
    inputs, stages = estimate_of(config, device=device_named("A100-80G"))
    found = {stage.name: stage for stage in stages}
    assert "finetune.lora" in found["iter_1/finetune"].misfit and "fsdp2" in found["iter_1/finetune"].misfit
    assert "reward.train.method: lora" in found["train_reward"].misfit
    assert not found["iter_1/rollout"].misfit
    assert any(note.startswith("! does not fit: iter_0/finetune") and "80 GB" in note for note in notes(stages, inputs))
    assert not any(stage.misfit for stage in estimate(config, device=device_named("h200"))), "one card of 141 GB"
    sharded = {"cluster.accelerate": str(SHARDED), "cluster.processes": "8"}
    on_eight = stages_of(load_config(RECIPES / "mistral-7b-dpa.yaml", sharded), device=DEVICES["a100-80g"])
    assert not on_eight["iter_1/finetune"].misfit and on_eight["iter_1/finetune"].memory < 40 * GB
    alone = found["iter_1/finetune"].seconds
    assert alone is not None and on_eight["iter_1/finetune"].seconds is not None
    assert alone / 8 < on_eight["iter_1/finetune"].seconds < alone / 3, "eight cards, and no eightfold speed"


@pytest.mark.parametrize(
    ("recipe_name", "card", "least", "most"),
    [
        ("mistral-7b-dpa", "h200", 15, 60),
        ("mistral-7b-dpa-lora", "a6000", 60, 210),
        ("mistral-7b-dpa-lora", "4090", 60, 210),
        ("qwen2.5-0.5b", "4090", 0.7, 4),
        ("three-objectives", "4090", 3, 30),
        ("smollm2-135m", "h200", 0.03, 0.6),
    ],
)
def test_the_recipes_fit_their_card_in_hours_a_practitioner_would_expect(
    recipe_name: str, card: str, least: float, most: float
) -> None:
    stages = estimate(load_config(RECIPES / f"{recipe_name}.yaml"), device=device_named(card))
    low, high = run_span(stages)
    assert least * HOUR < low < run_needs(stages)[0] < high < most * HOUR
    assert not any(stage.misfit for stage in stages)


def test_rlhflows_loop_is_counted_as_it_is_published() -> None:
    """docs/estimate.md; its hours are not published, those of the same DPO on like cards are (TRAININGS)."""
    config = load_config(Path(__file__).parent / "rlhflow.yaml", {"cluster.accelerate": str(SHARDED)})
    stages = stages_of(config, device=DEVICES["a100-80g"])
    assert stages["iter_1/rollout"].rows == stages["iter_3/score"].rows == 20_000 * 8
    assert stages["iter_2/finetune"].rows == 20_000, "a pair a prompt, and no earlier ones"
    assert stages["iter_2/finetune"].tokens == 20_000 * 2 * (150 + 512) * 2, "both responses, two epochs"
    assert not any(stage.misfit or stage.unknown for stage in stages.values())
    low, high = run_span(list(stages.values()))
    assert 2 * HOUR < low < run_needs(list(stages.values()))[0] < high < 24 * HOUR


def test_devices_are_named_as_people_name_them() -> None:
    assert device_named("NVIDIA RTX 4090") is DEVICES["4090"] and device_named("A100") is DEVICES["a100-80g"]
    with pytest.raises(ConfigError, match=r"--device: 'h20' is not known; did you mean `h200`"):
        device_named("h20")
    for device in DEVICES.values():
        assert 50e12 < device.peak < 3e15 and 2e11 < device.bandwidth < 1e13 and 20 * GB < device.memory < 200 * GB


SMOLLM2, MISTRAL, LLAMA = KNOWN["smollm2-135m"], KNOWN["mistral-7b"], KNOWN["llama-3-8b"]
TRAININGS = [  # model, card, cards, what, published seconds, and how far from them the likely estimate may lie
    (SMOLLM2, "h200", 1, Training(16_384, 0.5, 1, 1), 16_384 / 118_367, 1.1),
    (SMOLLM2, "h200", 1, Training(32_768, 0.5, 1, 1), 32_768 / 160_011, 1.1),
    (SMOLLM2, "h200", 1, Training(16_384, 0.5, 1, 1, compiled=True), 16_384 / 227_843, 1.1),
    # alignment-handbook/zephyr-7b-dpo-full: 61,135 pairs of 970 tokens on eight cards in 5,328 s
    (MISTRAL, "a100-80g", 8, Training(59.3e6, 0.64, 478, 1, recompute=True, reference=59.3e6), 5328, 1.5),
    # monsterapi/mistral_7b_norobots: two epochs of 9,500 rows of about 300 tokens, adapters, one A6000, 1 h 15 min
    (MISTRAL, "a6000", 1, Training(5.7e6, 0.7, 297, 64, adapters=True, recompute=True), 4503, 1.5),
]


@pytest.mark.parametrize(("size", "card", "cards", "work", "took", "within"), TRAININGS)
def test_trainings_that_were_measured_or_published_lie_between_quick_and_slow(
    size: Any, card: str, cards: int, work: Training, took: float, within: float
) -> None:
    quick, likely, slow = (Clock(DEVICES[card], cards, one).training(size, work) for one in (QUICK, LIKELY, SLOW))
    assert quick < took < slow
    assert 1 / within < likely / took < within


def test_work_on_a_processor_with_units_for_bf16_that_was_measured_is_met() -> None:
    xeon = Device("two cores with AMX", 0.37e12, 26.6e9, 24 * GB, False, "measured there", 1.25e12)
    eager, compiled = Training(4096, 0.1, 1, 4), Training(4096, 0.1, 1, 2, compiled=True)
    grid = Sampling(rows=2160, answer=16, longest=80, prompts=2160, prompt=260, together=240, batches=9)
    quick, likely, slow = (
        (clock.training(SMOLLM2, eager), clock.training(SMOLLM2, compiled), clock.sampling(SMOLLM2, grid))
        for clock in (Clock(xeon, 1, one) for one in (QUICK, LIKELY, SLOW))
    )
    for fast, mean, long, took in zip(quick, likely, slow, (4096 / 493, 4096 / 713, 506), strict=True):
        assert fast < took < long
        assert 1 / 1.25 < mean / took < 1.25


@pytest.mark.parametrize(
    ("size", "card", "rows", "prompt", "answer", "step_s", "within"),
    [
        (SMOLLM2, "h200", 64, 100, 256, 3.6e-3, 1.25),
        (SMOLLM2, "h200", 256, 100, 256, 4.6e-3, 1.25),
        (SMOLLM2, "h200", 1024, 100, 256, 8.0e-3, 1.25),
        (SMOLLM2, "h200", 4096, 100, 256, 23.0e-3, 1.25),
        (LLAMA, "a100-40g", 1, 1024, 128, 1 / 75, 1.25),  # vLLM 0.23, one request at a time
        (LLAMA, "h100", 256, 256, 256, 256 / 12_500, 1.5),  # vLLM, many requests; their lengths are our guess
    ],
)
def test_decoding_that_was_measured_or_published_is_met(
    size: Any, card: str, rows: int, prompt: int, answer: int, step_s: float, within: float
) -> None:
    prompts = rows if card != "h200" else 0
    work = Sampling(rows, answer, answer, prompts, prompt, rows, 1)
    likely = Clock(DEVICES[card], 1, LIKELY).sampling(size, work) / answer
    assert 1 / within < likely / step_s < within


def test_a_card_that_was_benched_replaces_published_peaks_and_assumed_shares(recipe: Path, tmp_path: Path) -> None:
    card = tmp_path / "card"
    card.mkdir()

    def phase(name: str, *rows: dict[str, Any]) -> None:
        (card / f"{name}.json").write_text(json.dumps({"phase": name, "status": "done", "rows": rows}))

    phase("rates", {"what": "matrix", "figure": 6.69e14}, {"what": "copy", "figure": 4.24e12})
    config = load_config(RECIPES / "smollm2-135m.yaml")
    published, benched = (stages_of(config, folders, device=DEVICES["h200"]) for folders in ([], [card]))
    for name in ("iter_1/rollout", "iter_1/finetune"):
        before, now = published[name].seconds, benched[name].seconds
        assert before is not None and now == pytest.approx(before, rel=0.02), "an H200 is an H200"
    phase("finetune", {"what": "finetuning", "figure": 1.0, "share": 0.01, "of": "matrix"})
    slower = stages_of(config, [card], device=DEVICES["h200"])["iter_1/finetune"].seconds
    before = published["iter_1/finetune"].seconds
    assert before is not None and slower is not None and slower > 1.5 * before, "a card that is badly filled"
    inputs, _ = estimate_of(config, [card], device=DEVICES["h200"])
    assert "measured in card" in heading(inputs)
    (card / "finetune.json").write_text('{"rows": [1]}')
    with pytest.raises(RunFolderError, match=r"finetune\.json is no result of bench/card\.py"):
        read_speeds([card])


def test_times_are_written_with_two_digits_and_their_span() -> None:
    assert span(7.6 * HOUR, 5.9 * HOUR, 12.6 * HOUR) == "7.6 h [5.9, 13]"
    assert span(90, 40, 200) == "1.5 min [0.7, 3.3]" and span(3 * 86_400, None, None) == "3.0 d"
    assert span(None, None, None) == "unknown"


def test_the_command_prints_a_table_of_a_hundred_columns_and_starts_nothing(recipe: Path, tmp_path: Path) -> None:
    done = python("-m", "dpa", "estimate", recipe)
    assert done.returncode == 0, done.stderr
    assert "iter_2/evaluate" in done.stdout and "arithmetic" in done.stdout and "the run" in done.stdout
    assert "measured here" in done.stdout and "[quick, slow]" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert len(HEADINGS) == 7
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}, b"no header"),
        ({"hidden_size": 10**400, "num_hidden_layers": 2, "num_attention_heads": 2}, None),
        ("[" * 100_000, None),
    ],
)
def test_a_damaged_model_is_said_in_one_sentence(tmp_path: Path, config: Any, weights: bytes | None) -> None:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights is not None:
        (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(DpaError) as refused:
        size_of(str(tmp_path), None, "policy", "--parameters 7.2e9")
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("figure", ["1" + "0" * 400, "[]", "[" * 100_000, "1}, 3, {"])
def test_a_damaged_bench_is_said_in_one_sentence(tmp_path: Path, figure: str) -> None:
    (tmp_path / "rates.json").write_text(f'{{"rows": [{{"what": "x", "figure": {figure}}}]}}')
    with pytest.raises(RunFolderError, match=r"is no result of bench/card.py"):
        read_speeds([tmp_path])


def test_a_figure_that_is_not_finite_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text('{"rows": [{"what": "x", "figure": Infinity}, {"what": "y", "figure": 3}]}')
    card = read_speeds([tmp_path]).card
    assert card is not None and dict(card.rates) == {"y": 3.0}
