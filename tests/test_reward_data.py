"""What little or long rated data does to a reward model: its penalty is chosen, what is left out is said, a model that
is no better than the mean is used by nobody who did not ask for it.
pytest tests/test_reward_data.py
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from test_reward_training import ATTRIBUTES, SCALES, config, examples
from tiny_models import save_tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from dpa.core.errors import ConfigError, DataError, TrainingError
from dpa.core.records import Messages, stable_hash
from dpa.recipes.dpa import Loop
from dpa.scoring.reward_model import PLAIN_CONVERSATION, encode
from dpa.stages.train_reward import no_better_than_mean, print_quality, require_better_than_mean
from dpa.training.cutting import cut_prompt
from dpa.training.reward_rows import RatedExample
from dpa.training.reward_training import train_reward_model
from dpa.training.ridge import FOLDS, PENALTIES_PER_ROW, choose_constant, choose_penalties, fit_ridge

NAN = float("nan")

# The penalty of a ridge


def few_prompts_many_features(
    prompts: int, features: int, signal: float, seed: int, rows: int = 16
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """As in SummEval: many responses to few prompts. Features are mostly the prompt's, marks only a little."""
    random = np.random.default_rng(seed)
    of_prompt = np.repeat(random.normal(size=(prompts, features)), rows, axis=0)
    own = random.normal(size=(prompts * rows, features)) * random.uniform(0.2, 1, features)
    marks_N = 60 + signal * own[:, :8].sum(axis=1) + np.repeat(random.normal(size=prompts) * 8, rows)
    marks_N += random.normal(size=len(marks_N)) * 8
    return (
        random.normal(size=features) * 2 + of_prompt + own,
        marks_N[:, None],
        [f"p{row // rows}" for row in range(prompts * rows)],
    )


def errors_of_new_prompts(penalty: Any, intercept: bool, signal: float = 8.0) -> tuple[float, float]:
    """RMSE of the ridge and of the mean, on prompts it was not fitted to."""
    features_NH, marks_NM, groups = few_prompts_many_features(100, 800, signal, seed=1)
    train, constant = np.array([int(group[1:]) < 60 for group in groups]), 1e-6
    if penalty == "auto":
        known = np.array(groups)[train].tolist()
        constant = constant if intercept else choose_constant(features_NH[train], known)
        penalty = choose_penalties(features_NH[train], marks_NM[train], known, intercept, constant)
    weight_MH, bias_M = fit_ridge(features_NH[train], marks_NM[train], penalty, intercept, constant=constant)
    off = features_NH[~train] @ weight_MH.T + bias_M - marks_NM[~train]
    return float((off**2).mean() ** 0.5), float((marks_NM[~train] - marks_NM[train].mean()).std())


@pytest.mark.parametrize("intercept", [True, False])
def test_a_chosen_penalty_beats_the_mean_where_the_old_one_is_far_worse(intercept: bool) -> None:
    old, mean = errors_of_new_prompts(1.0, intercept)
    chosen, _ = errors_of_new_prompts("auto", intercept)
    assert old > 2 * mean, "the fault is there"
    assert chosen < 0.97 * mean


def test_where_nothing_predicts_the_mean_is_chosen() -> None:
    features_NH, marks_NM, groups = few_prompts_many_features(60, 300, signal=0.0, seed=0)
    assert choose_penalties(features_NH, marks_NM, groups) == [np.inf]
    weight_MH, bias_M = fit_ridge(features_NH, marks_NM, [np.inf])
    assert not weight_MH.any()
    assert bias_M[0] == pytest.approx(marks_NM.mean())
    without, none = fit_ridge(np.c_[features_NH, np.full(len(marks_NM), 2.0)], marks_NM, np.inf, intercept=False)
    assert not none.any()
    said_N = np.c_[features_NH, np.full(len(marks_NM), 2.0)] @ without[0]
    assert np.allclose(said_N, marks_NM.mean(), atol=0.5)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("features", "seed"), [(5, 6), (5, 7), (300, 1), (300, 5)])
def test_the_choice_is_the_one_of_least_error_where_it_is_surely_better_than_the_mean(
    intercept: bool, features: int, seed: int
) -> None:
    """As when every penalty is tried by itself; by less than a standard error over the prompts it is the mean."""
    features_NH, marks_NM, groups = few_prompts_many_features(12, features, 8.0, seed, rows=6)
    features_NH[:, -1] = 1.5
    marks_NM[::3] = NAN
    (chosen,) = choose_penalties(features_NH, marks_NM, groups, intercept)
    order = sorted(set(groups), key=lambda group: stable_hash("fold", group))
    fold_N = np.array([order.index(group) % FOLDS for group in groups])
    rated = ~np.isnan(marks_NM[:, 0])
    errors = {}
    for penalty in [rated.sum() * share for share in PENALTIES_PER_ROW] + [np.inf]:
        errors[penalty] = np.zeros(len(marks_NM))
        for fold in range(FOLDS):
            weight_MH, bias_M = fit_ridge(
                features_NH[rated & (fold_N != fold)], marks_NM[rated & (fold_N != fold)], penalty, intercept
            )
            test = rated & (fold_N == fold)
            errors[penalty][test] = (features_NH[test] @ weight_MH[0] + bias_M[0] - marks_NM[test, 0]) ** 2
    best = min(errors, key=lambda penalty: errors[penalty].sum())
    gain_N = errors[np.inf] - errors[best]
    gain_G = np.array([gain_N[np.array(groups) == group].sum() for group in order])
    assert best < np.inf
    assert chosen == (best if gain_G.sum() > gain_G.std(ddof=1) * len(gain_G) ** 0.5 else np.inf)


def test_each_output_has_its_own_penalty_and_one_prompt_gives_the_mean() -> None:
    features_NH, marks_NM, groups = few_prompts_many_features(30, 50, 8.0, seed=0)
    noise_N = np.random.default_rng(5).normal(size=len(marks_NM))
    only_one_N = np.where(np.array(groups) == "p0", marks_NM[:, 0], NAN)
    nobody_N = np.full(len(marks_NM), NAN)
    chosen = choose_penalties(features_NH, np.c_[marks_NM, noise_N, only_one_N, nobody_N], groups)
    assert np.isfinite(chosen[0])
    assert chosen[2:] == [np.inf, np.inf]
    weight_MH, _ = fit_ridge(features_NH, np.c_[marks_NM, nobody_N], [chosen[0], np.inf])
    assert weight_MH[0].any()
    assert not weight_MH[1].any()


def test_the_chosen_penalties_are_on_record(tmp_path: Path) -> None:
    backbone = save_tiny_model(tmp_path / "backbone")
    random = np.random.default_rng(0)
    rows = [
        RatedExample(row.prompt_id, row.messages, row.response, (row.marks[0], float(random.integers(0, 100))))
        for row in examples()
    ]
    facts = train_reward_model(rows, ATTRIBUTES, SCALES, config(backbone, method="ridge"), tmp_path / "auto")
    assert facts["training"]["ridge_penalty"]["long"] > 0
    assert facts["quality"]["long"]["mse"] < 0.6 * facts["baselines"]["mean"]["long"]["mse"]
    fixed = config(backbone, method="ridge", ridge_penalty=7.0)
    facts = train_reward_model(rows, ATTRIBUTES, SCALES, fixed, tmp_path / "fixed")
    assert facts["training"]["ridge_penalty"] == {"long": 7.0, "short": 7.0}


# No better than the mean


def facts_of(own: float | None, mean: float | None, n: int = 80) -> dict[str, Any]:
    quality = {"a": {"mse": own, "mae": 1.0, "n": n, "pearson": None, "kendall": None, "pairwise_accuracy": None}}
    mean_only = {"a": {"mse": mean}}
    training = {"held_out_prompts": 10, "train_rows": 700, "held_out_rows": n, "max_length": 256, "left_out_rows": 20}
    return {"quality": quality, "baselines": {"mean": mean_only, "length": mean_only}, "training": training}


@pytest.mark.parametrize(
    ("own", "mean", "worse"),
    [
        (4356.0, 256.0, True),
        (256.0, 256.0, True),
        (255.9, 256.0, True),  # rounding, not skill
        (250.0, 256.0, False),
        (None, None, False),  # nobody was held out: not measured
        (0.0, 0.0, False),  # marks that never vary: nothing to predict
    ],
)
def test_a_model_has_to_beat_the_mean(own: float | None, mean: float | None, worse: bool) -> None:
    facts = facts_of(own, mean)
    assert bool(no_better_than_mean(facts)) is worse
    require_better_than_mean(facts, {"another"})
    if worse:
        with pytest.raises(TrainingError, match=r"RMSE .* on 80 rows of 10 held-out .*allow_worse_than_mean") as caught:
            require_better_than_mean(facts, {"a"})
        assert "\n" not in str(caught.value)


def test_it_is_said_loudly_with_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    print_quality(facts_of(4356.0, 256.0), Console(width=200))
    said = capsys.readouterr().out
    assert "a: NO BETTER THAN ALWAYS SAYING THE MEAN (RMSE 66.0 against 16.0 on 80 rows of 10 held-out prompts)" in said
    assert "LEFT OUT: 20 of 800 rated rows (2%), longer than 256 tokens" in said


# Rows that are too long


def with_long_prompts(share: float) -> list[RatedExample]:
    rows = examples()
    for place in range(round(share * len(rows))):
        row = rows[place]
        long: Messages = [{"role": "user", "content": "wool " * 60 + row.messages[0]["content"]}]
        rows[place] = RatedExample(row.prompt_id, long, row.response, row.marks)
    return rows


def test_more_left_out_than_allowed_stops_before_training(tmp_path: Path) -> None:
    backbone = save_tiny_model(tmp_path / "backbone")
    said = r"LEFT OUT: 80 of 160 rated rows \(50%\) are longer than 128 tokens, up to \d+, and train nothing; "
    said += r"raise reward\.train\.max_length \(128\), or set reward\.train\.too_long: cut_prompt, or raise "
    with pytest.raises(DataError, match=said + r"reward\.train\.max_left_out \(0\.2\)") as caught:
        train_reward_model(
            with_long_prompts(0.5), ATTRIBUTES, SCALES, config(backbone, method="ridge"), tmp_path / "reward"
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "reward").exists()


def test_fewer_left_out_are_said_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = save_tiny_model(tmp_path / "backbone")
    with caplog.at_level(logging.WARNING):
        facts = train_reward_model(
            with_long_prompts(0.1), ATTRIBUTES, SCALES, config(backbone, method="ridge"), tmp_path / "reward"
        )
    assert facts["training"]["left_out_rows"] == 16
    assert "LEFT OUT: 16 of 160 rated rows (10%)" in caplog.text


def test_cut_by_choice_all_rows_train_and_the_saved_model_still_passes_its_self_test(tmp_path: Path) -> None:
    backbone = save_tiny_model(tmp_path / "backbone")
    settings = config(backbone, method="ridge", too_long="cut_prompt")
    facts = train_reward_model(with_long_prompts(1.0), ATTRIBUTES, SCALES, settings, tmp_path / "reward")
    assert (facts["training"]["left_out_rows"], facts["training"]["cut_rows"]) == (0, 160)
    assert facts["quality"]["long"]["mse"] < 0.6 * facts["baselines"]["mean"]["long"]["mse"]
    AutoTokenizer.from_pretrained(tmp_path / "reward")


@pytest.mark.parametrize("template", [None, PLAIN_CONVERSATION])
def test_what_is_cut_is_the_start_of_the_prompt(template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    turns: Messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first " * 20},
        {"role": "assistant", "content": "answer " * 10},
        {"role": "user", "content": "".join(f"word{place} " for place in range(40)) + "why?"},
    ]
    whole = encode(tokenizer, template, 10_000, [turns], ["Because."])[0]
    assert whole is not None
    for limit in (len(whole), len(whole) - 1, 400, 150):
        found = cut_prompt(tokenizer, template, limit, turns, "Because.")
        assert found is not None
        kept, ids = found
        assert ids == encode(tokenizer, template, limit, [kept], ["Because."])[0]
        assert len(ids) <= limit
        if limit != 400:  # there a turn goes as a whole
            assert limit - 8 <= len(ids)
        assert kept[0] == turns[0], "the system message stays"
        assert kept[-1]["content"].endswith("why?")
        assert turns[-1]["content"].endswith(kept[-1]["content"])
    assert cut_prompt(tokenizer, template, len(whole), turns, "Because.")[0] == turns  # type: ignore[index]
    assert cut_prompt(tokenizer, template, 100, turns, "x" * 200) is None


# What nobody rates


def run_config(tmp_path: Path, **fields: Any) -> Any:
    from dpa.core.config import parse_config

    rated = tmp_path / "rated.jsonl"
    rated.write_text('{"prompt": "Q?", "response": "A.", "good": 3, "warm": null}\n')
    (tmp_path / "p.jsonl").write_text('{"prompt": "Why?"}\n')
    (tmp_path / "h.jsonl").write_text('{"prompt": "How?"}\n')
    data = {
        "out": str(tmp_path / "run"),
        "policy": str(tmp_path / "none"),
        "space": {"objectives": {"good": None, "warm": None}},
        "ratings": [{"path": str(rated), "scales": {"good": [0, 4], "warm": [0, 4]}}],
        "reward": {"train": {"backbone": str(tmp_path / "none")}},
        "prompts": {"path": str(tmp_path / "p.jsonl")},
        "evaluate": {"prompts": {"path": str(tmp_path / "h.jsonl")}},
        **fields,
    }
    return parse_config(data)


def test_an_objective_nobody_rates_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    brave = {"objectives": {"good": None, "brave": {"brave": 1.0}}}
    with pytest.raises(ConfigError, match=r"space\.objectives\.brave: nothing scores 'brave'; scored are: good, warm"):
        Loop(run_config(tmp_path, space=brave))
    some = {"train": {"backbone": "x", "attributes": ["good"]}}
    with pytest.raises(ConfigError, match=r"objectives\.warm: nothing scores 'warm'; scored are: good\."):
        Loop(run_config(tmp_path, reward=some))
    counted = {"train": {"backbone": "x"}, "functions": {"warm": "dpa.scoring.wordiness:wordiness"}}
    with pytest.raises(ConfigError, match=r"'warm' is scored by two sources; .* reward\.train\.attributes"):
        Loop(run_config(tmp_path, reward=counted))
    misspelt = {"train": {"backbone": "x", "attributes": ["good", "worm"]}}
    with pytest.raises(ConfigError, match=r"reward\.train\.attributes: nobody rates 'worm'; rated are: good, warm"):
        Loop(run_config(tmp_path, reward=misspelt))
    twice = {"train": {"backbone": "x", "attributes": ["good", "warm", "good"]}}
    with pytest.raises(ConfigError, match=r"reward\.train\.attributes: 'good' is there twice; name it once"):
        Loop(run_config(tmp_path, reward=twice))
    assert not (tmp_path / "run").exists()


def test_a_function_may_score_what_nobody_rates(tmp_path: Path) -> None:
    brave = {"objectives": {"good": None, "brave": None}}
    reward = {"train": {"backbone": "x", "attributes": ["good"]}, "functions": {"brave": "os:getpid"}}
    with Loop(run_config(tmp_path, space=brave, reward=reward)) as loop:
        loop.read_ratings()


def test_a_column_without_a_mark_is_refused_with_the_ratings(tmp_path: Path) -> None:
    with Loop(run_config(tmp_path)) as loop, pytest.raises(DataError, match=r"no row has a mark on 'warm'.*\(good\)"):
        loop.read_ratings()


def test_a_run_stops_at_a_model_no_better_than_the_mean_and_goes_on_where_that_is_allowed(tmp_path: Path) -> None:
    backbone, random = save_tiny_model(tmp_path / "backbone"), np.random.default_rng(0)
    names = [(prompt, response) for prompt in range(20) for response in "ab"]
    rows = [{"prompt": f"Q{p}?", "response": f"A{r}.", "good": int(random.integers(0, 5))} for p, r in names]
    train = {"backbone": str(backbone), "method": "ridge", "max_length": 128}
    space = {"objectives": {"good": None, "same": {"good": 1.0}}}

    def loop(**fields: Any) -> Loop:
        rated = [{"path": str(tmp_path / "rated.jsonl"), "scales": {"good": [0, 4]}}]
        reward = {"train": {**train, **fields}}
        config = run_config(tmp_path, policy=str(backbone), space=space, ratings=rated, reward=reward)
        (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Loop(config)

    with loop() as first, pytest.raises(TrainingError, match=r"good: NO BETTER THAN .*allow_worse_than_mean: true"):
        first.run()
    written = (tmp_path / "run" / "reward_model" / "model.safetensors").stat().st_mtime_ns
    with loop(allow_worse_than_mean=True) as second:
        second.train_reward()
        assert second.scorer.attributes == ("good",)
    assert (tmp_path / "run" / "reward_model" / "model.safetensors").stat().st_mtime_ns == written, "not made again"
