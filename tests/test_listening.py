"""Listening is measured on held-out rows while training: the flip gap, its interval, what is held out, who is warned.
pytest tests/test_listening.py
"""

import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_contrastive import AHEAD, DOWN, UP, rows_of
from test_finetuning import CONFIG
from tiny_models import SPACE, save_tiny_model, tiny_model, tiny_tokenizer

from dpa.core.config_identity import of_results
from dpa.core.errors import ConfigError, TrainingError
from dpa.core.records import Ledger
from dpa.core.sections.training import FinetuneConfig, PreferenceConfig
from dpa.models.policy import make_steerable
from dpa.stages.finetune import finetune_policy, listening_curve
from dpa.storage.run_folder import StageFolder
from dpa.training.dpo import DPO
from dpa.training.learner import RowEncoder
from dpa.training.listening import (
    WHERE_NOT_FOLLOWING,
    Listening,
    MeasureListening,
    advice,
    held_out_rows,
    hold_out,
    listening,
)
from dpa.training.sft import SFT

ROWS = rows_of([[(UP, "So it is. " * (1 + i % 3)), (DOWN, "No." + "!" * (i % 3))] for i in range(12)])
MEASURED = CONFIG.model_copy(update={"listening_rows": 8, "listening_steps": 2})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def finetuned(
    base: Path, folder: Path, config: FinetuneConfig | PreferenceConfig = MEASURED, rows: pa.Table = ROWS
) -> tuple[StageFolder, Ledger]:
    selection, stage = StageFolder(folder / "select"), StageFolder(folder / "finetune")
    if not selection.done:
        selection.write_shard(0, rows, Ledger())
        selection.finish()
    learn = DPO if isinstance(config, PreferenceConfig) else SFT
    return stage, finetune_policy(stage, selection, base, learn(config, SPACE, 7), folder / "policy")


# --- the figures --------------------------------------------------------------------------------------------------


def test_the_flip_gap_is_the_difference_of_losses_under_the_two_prompts() -> None:
    rows = rows_of([[(UP, "long"), (DOWN, "no")], [(UP, "alone")], [(AHEAD, "center")]])
    model, tokenizer = tiny_model(), tiny_tokenizer()
    make_steerable(tokenizer, SPACE)
    held = held_out_rows(rows, SPACE, 0, RowEncoder(model, tokenizer, SPACE, 200).encode)
    assert held is not None
    assert held.prompts == ("p0", "p0", "p1"), "the center has no other side"
    texts = [[tokenizer.decode(part) for part in row] for row in held.rows]
    assert [row[2] for row in texts] == ["long<|end|>", "no<|end|>", "alone<|end|>"]
    assert all("verbosity*60" in own and "verbosity*-60" in other for own, other, _ in (texts[0], texts[2]))
    assert "verbosity*-60" in texts[1][0] and "verbosity*60" in texts[1][1]

    model.train()
    found = held.measure(model)
    assert model.training, "left as it was"
    gaps = []
    for own, other, response in held.rows:
        sums = []
        for prompt in (own, other):
            log_p = model.eval()(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
            sums.append(sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)))
        gaps.append(sums[0] - sums[1])
    assert found.gap_response == pytest.approx(np.mean(gaps), abs=1e-5)
    assert found.gap_token == pytest.approx(sum(gaps) / sum(len(row[2]) for row in held.rows), abs=1e-6)
    assert found.share == np.mean([gap > 0 for gap in gaps])
    assert held.tokens == sum(len(own) + len(other) + 2 * len(response) for own, other, response in held.rows)


def test_what_nothing_could_be_measured_on_is_not_held_out() -> None:
    rows = rows_of([[(UP, "a")]] * 20 + [[(UP, "a"), (DOWN, "b")]] * 2)
    asked = [[] if n % 4 else DOWN for n in range(20)] + [[]] * 4
    rows = rows.append_column("negative_direction", pa.array(asked, pa.list_(pa.float64())))
    kept, held = hold_out(rows, 9)
    assert len(held) == 9 and len(kept) == 15
    assert set(held["prompt_id"].to_pylist()) == {f"p{n}" for n in (0, 4, 8, 12, 16, 20, 21)}


@given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from("abcd")), min_size=1, max_size=30))
def test_intervals_hold_the_figures_and_are_the_same_twice(rows: list[tuple[float, str]]) -> None:
    gaps, names = [gap for gap, _ in rows], [name for _, name in rows]
    found = listening(gaps, [0.0] * len(gaps), [3] * len(gaps), names)
    assert found == listening(gaps, [0.0] * len(gaps), [3] * len(gaps), names)
    assert 0 <= found.share_low <= found.share_high <= 1
    assert found.gap_response == pytest.approx(3 * found.gap_token)
    if len(set(names)) == 1:
        assert found.share_low == found.share_high == pytest.approx(found.share), "one prompt says nothing of others"


def test_a_policy_that_reads_nothing_is_not_heard_and_one_that_does_is() -> None:
    names = [f"p{i // 4}" for i in range(64)]
    deaf = listening([0.0] * 64, [0.0] * 64, [9] * 64, names)
    assert deaf.share == 0.5 and not deaf.heard
    gaps = np.random.default_rng(0).normal(1.0, 1.0, 64)
    assert listening(gaps.tolist(), [0.0] * 64, [9] * 64, names).heard
    assert "84% " in str(listening([1.0] * 54 + [-1.0] * 10, [0.0] * 64, [9] * 64, names))


def test_a_policy_is_heard_by_the_least_that_its_share_may_be() -> None:
    figures = {"rows": 64, "gap_token": 0.0, "gap_response": 0.0, "gap_response_low": 0.0, "gap_response_high": 0.0}
    assert not Listening(share=0.6, share_low=0.5, share_high=0.7, **figures).heard
    assert Listening(share=0.6, share_low=0.55, share_high=0.7, **figures).heard


# --- what is held out ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), max_size=120), st.none() | st.integers(0, 60))
def test_whole_prompts_are_held_out_and_nothing_is_lost(prompts: list[int], count: int | None) -> None:
    rows = rows_of([[(UP, "x")] * 1 for _ in prompts])
    rows = rows.set_column(0, "prompt_id", pa.array([f"p{number}" for number in prompts], pa.string()))
    kept, held = hold_out(rows, count)
    assert len(kept) + len(held) == len(rows)
    assert not set(kept["prompt_id"].to_pylist()) & set(held["prompt_id"].to_pylist())
    assert len(held) <= min(len(rows) // 2, 64 if count is None else count)
    assert kept["candidate_id"].to_pylist() == sorted(kept["candidate_id"].to_pylist(), key=lambda name: int(name[1:]))


def test_small_data_lose_nothing_and_large_ones_a_fiftieth_at_most() -> None:
    def held(count: int) -> int:
        return len(hold_out(rows_of([[(UP, "x"), (DOWN, "y")]] * count), None)[1])

    assert (held(100), held(200), held(500), held(5000)) == (0, 8, 20, 64)


def test_rows_without_a_direction_are_not_held_out() -> None:
    rows = rows_of([[(UP, "x")]] * 20)
    rows = rows.set_column(2, "direction", pa.nulls(20, pa.list_(pa.float64())))
    assert len(hold_out(rows, 10)[1]) == 0


# --- in a training ------------------------------------------------------------------------------------------------


def test_it_is_in_the_log_the_ledger_and_the_curve(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        stage, ledger = finetuned(base, tmp_path)
    curve = listening_curve(stage)
    steps = int(ledger.extra["steps"])
    assert [entry["step"] for entry in curve] == sorted({*range(2, steps + 1, 2), steps})
    for name, value in curve[-1].items():
        assert name == "step" or ledger.extra[f"listening_{name}"] == value
    assert ledger.extra["listening_rows"] == 8 and ledger.rows == len(ROWS) - 8
    assert ledger.extra["listening_tokens"] > 0
    if curve[-1]["share_low"] < 0.55:
        assert "hardly reads its direction" in caplog.text and "finetune.contrastive" in caplog.text


def test_what_to_change_is_what_the_documentation_found_and_no_higher_rate() -> None:
    """With the paper's loss a higher rate unlearned the direction (docs/findings.md)."""
    found = listening([0.0, 0.0], [0.0, 0.0], [1, 1], ["a", "b"])
    said = advice(found, SFT.advice)
    assert "learning_rate" not in said and "epochs" not in said
    assert "prompts.count, selection.directions), or raise finetune.contrastive; more in docs/learning.md" in said
    page, section = re.findall(r"docs/\S+\.md|(?<=').*(?=')", WHERE_NOT_FOLLOWING)
    assert f"\n## {section}\n" in (Path(__file__).parents[1] / page).read_text(encoding="utf-8")


def test_the_figures_of_the_ledger_are_those_measured_last(base: Path, tmp_path: Path) -> None:
    each_row = {"packed_rows_per_step": 1, "rows_per_device": 1, "listening_steps": 1}
    stage, ledger = finetuned(base, tmp_path, MEASURED.model_copy(update=each_row))
    curve = listening_curve(stage)
    assert curve[0]["gap_token"] != curve[-1]["gap_token"] == ledger.extra["listening_gap_token"]


def test_measuring_changes_no_step(base: Path, tmp_path: Path) -> None:
    """Another number of measurements, and a resumed training: the same losses, and the same last figures."""
    _, often = finetuned(base, tmp_path / "often")
    seldom_stage, seldom = finetuned(base, tmp_path / "seldom", MEASURED.model_copy(update={"listening_steps": 99}))
    losses = [
        [
            entry["loss"]
            for line in (folder / "finetune" / "log.jsonl").read_text().splitlines()
            if "loss" in (entry := json.loads(line))
        ]
        for folder in (tmp_path / "often", tmp_path / "seldom")
    ]
    assert losses[0] == losses[1] and len(listening_curve(seldom_stage)) == 1
    figures = [{k: v for k, v in ledger.extra.items() if k != "listening_tokens"} for ledger in (often, seldom)]
    assert figures[0] == figures[1]


def test_a_run_that_is_to_stop_by_it_measures_it_on_few_rows_too_or_says_why_not(base: Path, tmp_path: Path) -> None:
    few = rows_of([[(UP, "x"), (DOWN, "y")]] * 50)
    assert len(hold_out(few, None)[1]) == 0 and len(hold_out(few, None, gated=True)[1]) == 8
    large = rows_of([[(UP, "x")] * 20] * 3)
    assert len(hold_out(large, None, gated=True)[1]) == 20, "a prompt is held out whole"
    none = MEASURED.model_copy(update={"min_listening": 0.6, "listening_rows": 0})
    with pytest.raises(ConfigError, match=r"finetune\.min_listening: nothing is held out .* finetune\.listening_rows"):
        finetuned(base, tmp_path, none)


def test_min_listening_stops_before_a_policy_is_saved_and_can_be_lowered(base: Path, tmp_path: Path) -> None:
    strict = MEASURED.model_copy(update={"min_listening": 1.0, "learning_rate": 1e-9})
    with pytest.raises(TrainingError, match=r"finetune\.min_listening: 1, but the policy hardly reads its direction"):
        finetuned(base, tmp_path, strict)
    assert not (tmp_path / "policy").exists()
    before = (tmp_path / "finetune" / "log.jsonl").read_text()
    finetuned(base, tmp_path, strict.model_copy(update={"min_listening": None}))
    assert (tmp_path / "policy").exists()
    lines = [json.loads(line) for line in (tmp_path / "finetune" / "log.jsonl").read_text().splitlines()]
    assert [e for e in lines if "loss" in e] == [e for e in map(json.loads, before.splitlines()) if "loss" in e]
    assert of_results(strict) == of_results(strict.model_copy(update={"min_listening": None}))


def test_min_listening_is_compared_with_the_share_and_not_with_its_interval(base: Path, tmp_path: Path) -> None:
    rows = rows_of([[(UP if i % 3 else DOWN, "So it is. " * (1 + i % 4))] for i in range(24)])
    slow = MEASURED.model_copy(update={"learning_rate": 1e-9})
    _, ledger = finetuned(base, tmp_path / "measured", slow, rows)
    share, high = ledger.extra["listening_share"], ledger.extra["listening_share_high"]
    assert share < high
    between = slow.model_copy(update={"min_listening": (share + high) / 2})
    with pytest.raises(TrainingError, match="min_listening"):
        finetuned(base, tmp_path / "refused", between, rows)


def test_replay_leaves_out_the_prompts_that_listening_is_measured_on(base: Path, tmp_path: Path) -> None:
    stages = [StageFolder(tmp_path / name, f"{name}/select") for name in ("iter_0", "iter_1")]
    for stage in stages:
        stage.write_shard(0, ROWS, Ledger())
        stage.finish()
    learner = SFT(MEASURED.model_copy(update={"replay": 9.0}), SPACE, 7)
    before, now = stages
    ledger = finetune_policy(StageFolder(tmp_path / "finetune"), now, base, learner, tmp_path / "policy", [before])
    assert ledger.extra["replayed"] == len(ROWS) - 8


def test_pairs_are_measured_by_their_chosen_response(base: Path, tmp_path: Path) -> None:
    pairs = ROWS.rename_columns(
        [{"response": "chosen", "utility": "utility_chosen"}.get(n, n) for n in ROWS.column_names]
    )
    pairs = pairs.append_column("rejected", pa.array(["Other."] * len(pairs)))
    config = PreferenceConfig(max_length=160, pairs_per_step=4, listening_rows=8, listening_steps=99)
    _, ledger = finetuned(base, tmp_path, config, pairs)
    assert ledger.extra["listening_rows"] == 8


def test_a_step_that_fails_is_not_measured_under_the_number_of_the_one_before() -> None:
    measured: list[int] = []
    held_out = SimpleNamespace(measure=lambda model: measured.append(model) or SimpleNamespace(to_log=dict))
    callback = MeasureListening(held_out, 2, SimpleNamespace(log=lambda entry: None))  # type: ignore[arg-type]
    for step, loss in ((0, math.nan), (1, 1.0), (2, 1.0), (2, math.nan), (3, 1.0), (4, 1.0)):
        state = SimpleNamespace(global_step=step, max_steps=10)
        callback.on_log(None, state, None, logs={"loss": loss}, model=step)  # type: ignore[arg-type]
    assert measured == [2, 4]


def test_nothing_is_measured_where_nothing_is_held_out(base: Path, tmp_path: Path) -> None:
    stage, ledger = finetuned(base, tmp_path, MEASURED.model_copy(update={"listening_rows": 0}))
    assert listening_curve(stage) == [] and ledger.rows == len(ROWS)
    assert not any(name.startswith("listening") for name in ledger.extra)


def test_a_damaged_log_line_is_left_out_of_the_curve(tmp_path: Path) -> None:
    good = Listening(8, 0.5, 0.4, 0.6, 0.0, 0.0, 0.0, 0.0).to_log() | {"step": 4}
    (tmp_path / "log.jsonl").write_text("{\n" + json.dumps(good) + "\n[1]\n\n")
    assert listening_curve(StageFolder(tmp_path))[0]["share_high"] == 0.6
