"""A selection trains elsewhere and comes back: TRL reads it by the card's own lines, token for token as dpa's learner.

pytest tests/test_elsewhere.py
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from damage import damage
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import CHAT_TEMPLATE, SPACE, save_tiny_model, tiny_model, tiny_tokenizer
from toy_run import toy_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dpa.cli.commands import app
from dpa.core.config import RunConfig
from dpa.core.errors import ConfigError, DataError, ModelFileError, RunFolderError, UserError
from dpa.core.records import Ledger, SampleRequest, messages_text
from dpa.models.chat_template import PLAIN_TEMPLATE, steerable_template
from dpa.models.policy import load_policy, make_steerable, save_policy
from dpa.recipes.dpa import Loop
from dpa.recipes.elsewhere import _named_anywhere, from_data, hand_over, newest_selection, take_in
from dpa.sampling.samplers import SamplerSpec
from dpa.stages.adopt import adopt
from dpa.stages.data import DataSettings
from dpa.storage.schemas import PAIRS, WINNERS, with_held, with_numbers
from dpa.training.learner import RowEncoder

QUESTIONS = ["Why?", "Who was it, and when?", "Où est-ce ? 🦦"]
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{% if message['role'] == 'assistant' %}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def open_run(folder: Path, template: str | None = CHAT_TEMPLATE, **changes: Any) -> Loop:
    """An open run whose iteration 1 can be filled with a selection."""
    inputs = folder / "inputs"
    if not inputs.is_dir():
        toy_config(inputs, folder / "run")
        shutil.rmtree(inputs / "policy")
        save_tiny_model(inputs / "policy", chat_template=template, context=512)
    config: RunConfig = toy_config(inputs, folder / "run", **changes)
    return Loop(config)


def fill(loop: Loop, shards: int = 2, cut: int = 0, pairs: bool = False, targets: bool = False) -> list[dict[str, Any]]:
    """Select by hand: each question under three directions, the last one holding verbosity where there are `targets`;
    the first `cut` answers were cut at a limit."""
    stage, rows = loop.stage(1, "select"), []
    schema = with_numbers(PAIRS if pairs else with_held(WINNERS) if targets else WINNERS, loop.space.names)
    for shard in range(shards):
        mine = []
        for n, question in enumerate(QUESTIONS):
            system = [{"role": "system", "content": "Be brief."}] if n == 1 else []
            messages = messages_text([*system, {"role": "user", "content": f"{question} ({shard})"}])
            for d, direction in enumerate(loop.space.grid(3)):
                row = {"prompt_id": f"p{shard}-{n}", "messages": messages, "direction": direction.tolist()}
                if targets and d == 2:
                    row |= {"direction": [1.0, 0.0], "held": [None, 40]}
                said, whole = f"Because {n} {d}.", len(rows) + len(mine) >= cut
                if pairs:
                    row |= {"chosen": said, "rejected": f"{said} No…", "utility_chosen": 2.0, "utility_rejected": 1.0}
                    row |= {"chosen_complete": whole, "rejected_complete": True, "chosen_id": "a", "rejected_id": "b"}
                else:
                    row |= {"candidate_id": f"c{n}{d}", "response": said, "complete": whole, "utility": 1.0}
                mine.append(row | {"helpfulness": 50.0 + d, "verbosity": 40.0})
        stage.write_shard(shard, pa.Table.from_pylist(mine, schema), Ledger(rows=len(mine)))
        rows += mine
    stage.finish()
    return rows


def card_code(folder: Path) -> str:
    """The card's lines of Python."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    return code


def train_by_card(folder: Path, monkeypatch: pytest.MonkeyPatch, changes: str = "") -> Any:
    """Run the card's lines in its folder; the trainer they leave behind. `changes`: what is added to its config."""
    monkeypatch.chdir(folder)
    code = card_code(folder).replace('output_dir="trained",', f'output_dir="trained", report_to="none", {changes}')
    code = code.replace('split="train")', f'split="train", cache_dir="{folder.parent / "cache"}")')
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names["trainer"]


def own_ids(loop: Loop, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Prompt and answer of a selected row as dpa's own learner reads them."""
    model, tokenizer = load_policy(loop.policy(0))
    make_steerable(tokenizer, loop.space)
    encoded = RowEncoder(model, tokenizer, loop.space, 512).encode(
        row["messages"], row["direction"], [row["response"]], [True]
    )
    assert not isinstance(encoded, str)
    return encoded[0], encoded[1][0]


def test_trl_trains_by_the_cards_lines_on_dpas_own_tokens_and_the_run_goes_on_from_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(tmp_path, iterations=2) as loop:
        rows = fill(loop)
        written = hand_over(loop, 1, tmp_path / "data", DataSettings())
        assert (written.rows, written.checked, written.other, written.after) == ({"train": 18}, 18, 0, "")
        trainer = train_by_card(tmp_path / "data", monkeypatch, "per_device_train_batch_size=4, use_cpu=True,")
        for row, read in zip(rows, trainer.train_dataset, strict=True):
            prompt, answer = own_ids(loop, row)
            assert read["input_ids"] == prompt + answer
            assert read["labels"] == [-100] * len(prompt) + answer  # the loss is on the answer and its end only

        trained = tmp_path / "data" / "trained"
        assert take_in(loop, 1, trained) == []  # nothing had to be mended
        policy = loop.policy_folder(1)
        ours, theirs = load_file(policy / "model.safetensors"), load_file(trained / "model.safetensors")
        begun = load_file(tmp_path / "inputs" / "policy" / "model.safetensors")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert not all(torch.equal(ours[name], begun[name]) for name in begun)

        found = loop.evaluate(1)
        loop.report()
        assert found["answers"] > 0
        results = json.loads((loop.path / "results.json").read_text())
        assert results["policies"][0]["name"] == "t = 1, trained elsewhere"
        assert results["policies"][0]["trained_elsewhere"]["data"]["iteration"] == 1
        card = (policy / "README.md").read_text()
        assert "**Trained elsewhere.** Another program trained these weights on iteration 1" in card
        sampler = SamplerSpec(str(policy), loop.space, 4, revision="x").build()
        asked = SampleRequest([{"role": "user", "content": "Why?"}], (0.8, -0.6), (1,))
        assert len(sampler.sample([asked])[0]) == 1
        assert loop.rollout(2).rows == 16  # the next iteration samples from what came back
        with pytest.raises(RunFolderError, match="has a policy already"):
            take_in(loop, 1, trained)
    with open_run(tmp_path, iterations=2) as again:
        assert again.stage(1, "finetune").done  # sealed: `dpa run` goes on from it
        for name, way, source in (
            ("model.safetensors", "a flipped bit", ".*data/trained"),
            ("dpa_config.json", "a flipped bit", ".*"),
            ("dpa_config.json", "truncated", "FOLDER"),
            ("dpa_config.json", "deleted", "FOLDER"),
        ):
            damage(again.policy_folder(1) / name, way)
            assert not again.stage(1, "finetune").done
            with pytest.raises(RunFolderError, match=rf"`dpa adopt {source} .*run -t 1`\), or delete"):
                again.finetune(1)  # never replaced by another one without a word
            assert take_in(again, 1, trained) == []
        shutil.rmtree(again.policy_folder(1))
        assert again.finetune(1).training_tokens > 0


def test_a_direction_is_what_makes_the_difference_and_none_is_the_bare_question(tmp_path: Path) -> None:
    with open_run(tmp_path) as loop:
        rows = fill(loop, shards=1)
        hand_over(loop, 1, tmp_path / "data", DataSettings())
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "policy")
        read = load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache"))
        bare = tokenizer.apply_chat_template(read[0]["prompt"], add_generation_prompt=True)["input_ids"]
        own = own_ids(loop, {**rows[0], "direction": None})[0]
        steered = tokenizer.apply_chat_template(
            read[0]["prompt"], add_generation_prompt=True, **read[0]["chat_template_kwargs"]
        )["input_ids"]
        assert (bare, steered) == (own, own_ids(loop, rows[0])[0])
        assert bare != steered


def test_pairs_go_to_dpo_and_a_row_without_a_direction_is_left_unsteered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(tmp_path, learner="dpo") as loop:
        rows = fill(loop, shards=1, pairs=True)
        unsteered = [{**row, "direction": None if n == 1 else row["direction"]} for n, row in enumerate(rows)]
        schema = with_numbers(PAIRS, loop.space.names)
        stage = loop.stage(1, "select")
        stage.write_shard(0, pa.Table.from_pylist(unsteered, schema), Ledger(rows=len(rows)))
        stage.finish()
        written = hand_over(loop, 1, tmp_path / "data", DataSettings(format="jsonl"))
        assert (written.pairs, written.rows, written.other) == (True, {"train": 9}, 0)
        trainer = train_by_card(tmp_path / "data", monkeypatch, "max_steps=1, use_cpu=True,")
        for row, read in zip(unsteered, trainer.train_dataset, strict=True):
            prompt, answer = own_ids(loop, {**row, "response": row["chosen"]})
            assert (read["prompt_ids"], read["chosen_ids"]) == (prompt, answer)
            assert read["rejected_ids"] == own_ids(loop, {**row, "response": row["rejected"]})[1]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_SYSTEM, None], ids=["system", "no system role", "plain"])
def test_the_sentence_in_the_messages_makes_the_same_tokens_for_programs_without_template_variables(
    tmp_path: Path, template: str | None
) -> None:
    with open_run(tmp_path, template) as loop:
        rows = fill(loop, shards=1)
        rows = [row for row in rows if template != NO_SYSTEM or "Be brief" not in row["messages"]]
        written = hand_over(loop, 1, tmp_path / "data", DataSettings(form="messages", format="jsonl"))
        assert written.other == 0
        assert written.after == ("\n" if template == NO_SYSTEM else "")  # what comes after the end is said
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "policy")
        lines = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text("utf-8").splitlines()]
        by_question = {(line["prompt_id"], line["direction"]): line for line in lines}
        for row in rows:
            line = by_question[row["prompt_id"], str(loop.space.direction(row["direction"]))]
            prompt, answer = own_ids(loop, row)
            ids = tokenizer.apply_chat_template(line["messages"])["input_ids"]
            assert ids[: len(prompt + answer)] == prompt + answer
        described = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
        (entry,) = described.values()
        assert (entry["file_name"], entry["formatting"]) == ("train.jsonl", "sharegpt")
        assert yaml.safe_load((tmp_path / "data" / "axolotl.yaml").read_text())["datasets"][0]["path"] == "train.jsonl"
        llama_factory = yaml.safe_load((tmp_path / "data" / "llamafactory.yaml").read_text())
        assert llama_factory["dataset"] in described


@pytest.mark.parametrize("form", ["trl", "messages"])
def test_the_sentence_of_a_target_stands_in_the_messages_and_makes_the_same_tokens(tmp_path: Path, form: str) -> None:
    with open_run(tmp_path, selection={"targets": 0.3}) as loop:
        fill(loop, shards=1, targets=True)
        written = hand_over(loop, 1, tmp_path / "data", DataSettings(form=form, format="jsonl"))
        assert written.checked and written.other == 0
    lines = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text("utf-8").splitlines()]
    told = [line for line in lines if "with verbosity = 40" in json.dumps(line)]
    assert len(told) == len(lines) // 3
    for line in told:
        if form == "trl":
            assert line["chat_template_kwargs"]["preference"] is None
        else:
            assert line["direction"] == "helpfulness*100; verbosity=40"


def test_a_plain_language_model_goes_out_with_a_template_that_ends_its_answers(tmp_path: Path) -> None:
    with open_run(tmp_path, None) as loop:
        fill(loop, shards=1)
        assert hand_over(loop, 1, tmp_path / "data", DataSettings()).other == 0
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "policy")
        question = [{"role": "user", "content": "Why?"}]
        assert tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False) == "Why?"
        talk = [*question, {"role": "assistant", "content": "So."}]
        assert tokenizer.apply_chat_template(talk, tokenize=False) == "Why?So.<|end|>"
        for form in ("trl", "messages"):
            with pytest.raises(ConfigError, match=r"--no-policy: the chat template of .* ends no answer"):
                hand_over(loop, 1, tmp_path / form, DataSettings(form), with_policy=False)
            assert not (tmp_path / form).exists()


def test_other_programs_find_the_policy_from_the_folder_they_run_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_run(Path()) as loop:
        fill(loop, shards=1)
        hand_over(loop, 1, Path("data"), DataSettings("messages"), with_policy=False)
        start = yaml.safe_load(Path("data/llamafactory.yaml").read_text())["model_name_or_path"]
        assert start == yaml.safe_load(Path("data/axolotl.yaml").read_text())["base_model"]
        assert start == str(Path(loop.policy(0).name).absolute())
    assert _named_anywhere("me/model") == "me/model"


def test_both_formats_hold_the_same_rows_and_no_held_out_question_is_trained_on(tmp_path: Path) -> None:
    with open_run(tmp_path) as loop:
        fill(loop, cut=4)
        read: dict[str, Any] = {}
        for form in ("parquet", "jsonl"):
            settings = DataSettings(format=form, held_out=0.4, seed=3)
            written = hand_over(loop, 1, tmp_path / form, settings, with_policy=False)
            assert sum(written.rows.values()) == 14
            assert list(written.left_out.values()) == [4]
            assert not (tmp_path / form / "policy").exists()
            read[form] = load_dataset(str(tmp_path / form), cache_dir=str(tmp_path / "cache"))
            record = json.loads((tmp_path / form / "dpa_data.json").read_text())
            assert set(record["files"]) == {f"train.{form}", f"test.{form}"}
        for split in ("train", "test"):
            assert read["parquet"][split].to_list() == read["jsonl"][split].to_list()
        questions = {split: {str(row) for row in read["parquet"][split]["prompt"]} for split in ("train", "test")}
        assert questions["train"] and questions["test"] and not questions["train"] & questions["test"]
        few = hand_over(loop, 1, tmp_path / "parquet", DataSettings(count=5, keep_cut=True), with_policy=False)
        assert (few.rows, few.left_out) == ({"train": 5}, {})


def test_what_cannot_be_handed_over_is_said_in_one_sentence(tmp_path: Path) -> None:
    with open_run(tmp_path) as loop:
        with pytest.raises(RunFolderError, match="no iteration has selected anything yet"):
            newest_selection(loop)
        with pytest.raises(RunFolderError, match="not finished"):
            hand_over(loop, 1, tmp_path / "data", DataSettings())
        fill(loop, cut=99)
        with pytest.raises(DataError, match="--keep-cut takes them all the same"):
            hand_over(loop, 1, tmp_path / "data", DataSettings())
        (tmp_path / "mine").mkdir()
        with pytest.raises(ConfigError, match="no data set that dpa wrote"):
            hand_over(loop, 1, tmp_path / "mine", DataSettings())
        assert not (tmp_path / "data").exists()


def test_what_was_trained_in_the_folder_is_not_replaced_with_it(tmp_path: Path) -> None:
    with open_run(tmp_path) as loop:
        fill(loop, shards=1)
        for form, held_out in (("messages", 0.4), ("trl", 0.0)):  # what dpa wrote is
            hand_over(loop, 1, tmp_path / "data", DataSettings(form=form, held_out=held_out))
        (tmp_path / "data" / "trained").mkdir()
        (tmp_path / "data" / "trained" / "model.safetensors").write_bytes(b"hours")
        with pytest.raises(ConfigError, match="holds trained, which dpa did not write and would delete; move it away"):
            hand_over(loop, 1, tmp_path / "data", DataSettings())
        assert (tmp_path / "data" / "trained" / "model.safetensors").read_bytes() == b"hours"


def test_lora_adapters_are_merged_into_the_policy_they_were_trained_on(tmp_path: Path) -> None:
    with open_run(tmp_path) as loop:
        base, tokenizer = load_policy(loop.policy(0), device="cpu")
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules=r".*\.(q_proj|v_proj)", init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "adapters")
        ids = torch.tensor([tokenizer("Why was it?")["input_ids"]])
        with torch.no_grad():
            expected = adapted.eval()(ids).logits
        notes = take_in(loop, 1, tmp_path / "adapters")
        assert len(notes) == 1 and "adapters were merged into" in notes[0]
        merged = AutoModelForCausalLM.from_pretrained(loop.policy_folder(1))
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert not isinstance(merged, PeftModel)


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"]},
        {"target_modules": ["v_proj"], "target_parameters": ["self_attn.q_proj.weight"]},
        {"target_modules": "all-linear"},
        {"r": 64, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, "v_proj": 3}},
    ],
    ids=["experts", "one of their parameters", "a weight by its name", "all", "a rank that no weight has"],
)
def test_adapters_of_experts_and_of_ranks_by_name_are_merged_as_peft_merges_them(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    base = tiny_model("mixtral", num_local_experts=2)
    save_policy(base, tiny_tokenizer(CHAT_TEMPLATE), tmp_path / "base", SPACE, {})
    adapted: Any = get_peft_model(base, LoraConfig(**{"r": 4, "init_lora_weights": False, **given}))
    adapted.save_pretrained(tmp_path / "adapters")
    ids = torch.arange(8)[None] + 20
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
    adopt(tmp_path / "adapters", str(tmp_path / "base"), SPACE, tmp_path / "out", {})
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)


def test_a_template_or_tokenizer_that_got_lost_on_the_way_is_mended_and_said(tmp_path: Path) -> None:
    with open_run(tmp_path) as loop:
        trained = tmp_path / "trained"
        tiny_model(context=512, seed=1).save_pretrained(trained)
        notes = adopt(trained, loop.policy(0), loop.space, tmp_path / "a", {})
        assert len(notes) == 1 and "no tokenizer was saved with it" in notes[0]
        tiny_tokenizer(None).save_pretrained(trained)
        notes = adopt(trained, loop.policy(0), loop.space, tmp_path / "b", {})
        assert len(notes) == 1 and "no chat template was saved with it" in notes[0]
        tiny_tokenizer(PLAIN_TEMPLATE).save_pretrained(trained)
        notes = adopt(trained, loop.policy(0), loop.space, tmp_path / "c", {})
        assert "it was taught to" in notes[0] and "prompts are written as its own writes them" in notes[1]
        for name, base in (("a", CHAT_TEMPLATE), ("b", CHAT_TEMPLATE), ("c", PLAIN_TEMPLATE)):
            template = AutoTokenizer.from_pretrained(tmp_path / name).chat_template
            assert template == steerable_template(base, loop.space)


def broken(folder: Path, how: str) -> Path:
    """A folder that came back broken."""
    save_tiny_model(folder, context=512)
    weights = load_file(folder / "model.safetensors")
    if how == "nan":
        weights["model.norm.weight"] = weights["model.norm.weight"].fill_(float("nan"))
    if how == "lost":
        del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if how == "vocabulary":
        said = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = said["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (folder / "tokenizer.json").write_text(json.dumps(said))
    if how == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if how.startswith("adapter"):
        (folder / "config.json").unlink()
        kind = "IA3" if how == "adapters of another kind" else "LORA"
        start = "pissa" if how == "adapters over changed weights" else True
        said = {"peft_type": kind, "init_lora_weights": start, "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        said |= {"adapters by another library": {"megatron_config": {"a": 1}}}.get(how, {})
        said |= {
            "adapters with parts missing": {"target_modules": r"(\w+\.?)+!"},  # never tried: it would take for ever
            "adapters by pattern": {"rank_pattern": {r"(\w+\.?)+!": 4}},
            "adapters and modules by pattern": {"modules_to_save": [r"(\w+\.?)+!"]},
            "adapters of a great rank": {"r": 10**9},
            "adapters of no rank": {"r": "4"},
            "adapters of no weight": {"lora_alpha": None},
            "adapters of too much weight": {"alpha_pattern": {"q_proj": 10**400}},
            "adapters of experts by pattern": {"target_parameters": [r"(\w+\.?)+!"]},
            "adapters over layers again": {"layer_replication": [[0, 2]] * 9},
        }.get(how, {})
        (folder / "adapter_config.json").write_text(json.dumps(said))
        tensor = torch.ones(4, 7 if how == "adapters of another model" else 32)
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        if how != "adapters in a pickle":
            save_file({name: tensor}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("nan", r"weights that are no finite numbers \(model.norm.weight\)"),
        ("lost", "lacks 1 weight"),
        ("vocabulary", "2 of 261 tokens differ"),
        ("pickle", "only pickle weights"),
        ("adapters in a pickle", "a pickle .* is not opened"),
        ("adapters of another kind", "adapters of type IA3"),
        ("adapters over changed weights", "init_lora_weights='pissa'"),
        ("adapters of another model", "do not fit"),
        ("adapters with parts missing", "do not fit"),
        ("adapters by another library", "do not fit .*megatron"),
        ("adapters by pattern", "whose rank_pattern is by pattern"),
        ("adapters and modules by pattern", "modules_to_save is by pattern .*merge them"),
        ("adapters of a great rank", r"has the rank 1000000000 \(r\), but the largest of its weights has 4"),
        ("adapters of no rank", "has the rank '4'"),
        ("adapters of no weight", r"the alpha None \(lora_alpha\), which says how much"),
        ("adapters of too much weight", r"the alpha 10+ \(q_proj\)"),
        ("adapters of experts by pattern", "target_parameters is by pattern"),
        ("adapters over layers again", "several times"),
    ],
)
def test_what_cannot_be_a_policy_is_refused_in_one_sentence(tmp_path: Path, how: str, said: str) -> None:
    with open_run(tmp_path) as loop:
        with pytest.raises(ModelFileError, match=said) as refused:
            take_in(loop, 1, broken(tmp_path / "trained", how))
        assert "\n" not in str(refused.value)
        assert not loop.policy_folder(1).exists()
        assert not loop.stage(1, "finetune").done


def test_the_commands_say_what_they_did_and_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path) as loop:
        fill(loop, cut=1)

    def dpa(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
        if isinstance(result.exception, UserError):
            return str(result.exception)
        assert result.exit_code == 0, result.exception
        return result.output

    run = tmp_path / "run"
    said = dpa("data", run, "--held-out", 0.3, "--seed", 1)
    assert f"{run}-t1-data: " in said and "winners (train)" in said and "left out: 1 rows" in said
    assert "unknown; known: trl, messages" in dpa("data", run, "--form", "alpaca")
    assert "no config.yaml" in dpa("data", tmp_path / "inputs")
    written = (run / "config.yaml").read_bytes()
    monkeypatch.chdir(tmp_path / "inputs")
    dpa("data", "../run", "--out", tmp_path / "again")
    assert (run / "config.yaml").read_bytes() == written, "the run is where it was, wherever it is named from"
    assert "reads no `preference`" in dpa("data", run, "--no-policy", "--out", tmp_path / "deaf")
    trained = tmp_path / "run-t1-data" / "policy"
    assert "say what it becomes" in dpa("adopt", trained, run)
    assert "there is no folder" in dpa("adopt", tmp_path / "nowhere", run, "-t", 1)
    assert "a policy, trained elsewhere" in dpa("adopt", trained, run, "--out", tmp_path / "mine")
    assert "dpa run CONFIG goes on from it" in dpa("adopt", trained, run, "-t", 1)
    record = json.loads((run / "iter_1" / "policy" / "dpa_config.json").read_text())
    assert record["provenance"]["trained_elsewhere"]["data"] == {
        "run": "run",
        "iteration": 1,
        "files": json.loads((tmp_path / "run-t1-data" / "dpa_data.json").read_text())["files"],
    }


@pytest.mark.parametrize("record", ['{"run": "x"}', "[]", '{"run": "x", "iteration": "1", "files": {}}'])
def test_a_record_that_dpa_data_did_not_write_is_none(tmp_path: Path, record: str) -> None:
    (tmp_path / "dpa_data.json").write_text(record)
    assert from_data(tmp_path / "policy") == {}


def test_rows_are_drawn_over_all_shards_alike(tmp_path: Path) -> None:
    with open_run(tmp_path) as loop:
        fill(loop, shards=3)
        hand_over(loop, 1, tmp_path / "data", DataSettings(count=9, format="jsonl"), with_policy=False)
        lines = Dataset.from_json(str(tmp_path / "data" / "train.jsonl"), cache_dir=str(tmp_path / "cache"))
        shards = np.array([int(name[1]) for name in lines["prompt_id"]])
        assert len(shards) == 9 and len(set(shards)) == 3
