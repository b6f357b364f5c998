"""Configuration files: YAML that swells, recurs or says a thing twice is refused, and `~` is written out everywhere.
pytest tests/test_config.py
"""

import re
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from fakes import run_config
from pydantic import BaseModel

from dpa.core.compare_config import CompareConfig
from dpa.core.config import RunConfig, load_config, parse_config
from dpa.core.config_identity import resolved
from dpa.core.errors import ConfigError
from dpa.core.lookup import look_up
from dpa.core.sections.evaluate import EvaluateConfig
from dpa.core.sections.reward import HttpRewardConfig, RewardConfig
from dpa.core.sections.rollout import PromptsConfig
from dpa.core.sections.section import PathText
from dpa.core.yaml_text import parse_yaml

CASES = Path(__file__).parents[1].parent / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="no ../shared/cases")

# A key given twice


@needs_cases
def test_the_case_of_a_key_given_twice() -> None:
    with pytest.raises(ConfigError, match=r"`iterations` is given twice, in lines 1 and 2; keep one"):
        load_config(CASES / "base_dup.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\n'a': 3", "`a` is given twice, in lines 1 and 3"),
        ("rollout:\n  samples: 1\n\n  samples: 1", "`rollout.samples` is given twice, in lines 2 and 4"),
        ("a: [{x: 1, x: 2}]", "`a.0.x` is given twice, in line 1"),
        ("a: &x {b: 1}\nc: {<<: *x, <<: *x}", "given twice"),
    ],
)
def test_a_key_given_twice_is_named_with_both_lines(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_yaml(text, "config: x")
    assert "\n" not in str(caught.value)


def test_equal_keys_in_different_mappings_and_merged_ones_are_no_repetition() -> None:
    assert parse_yaml("a: {x: 1}\nb: {x: 1}", "x") == {"a": {"x": 1}, "b": {"x": 1}}
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: *a", "x")["b"] == {"x": 3, "y": 2}


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    file = yaml_of(tmp_path)
    rated = "{path: r.jsonl, scales: {a: [0, 4]}}"
    file.write_text(file.read_text()[:-1] + f", ratings: [{rated}]}}")
    assert load_config(file, {"ratings.0.count": "16"}).ratings[0].count == 16
    for dotted, said in (("ratings.1.count", "number one of its parts, 0 to 0"), ("ratings.count", "asked of a list")):
        with pytest.raises(ConfigError, match=said):
            load_config(file, {dotted: "16"})


def test_an_override_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("out: x\n")
    with pytest.raises(ConfigError, match=r"rollout: .*`samples` is given twice, in line 1"):
        load_config(file, {"rollout": "{samples: 1, samples: 2}"})


# Hostile YAML


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9)), "aliases"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 20_000, "nested"),
        ("{a: " * 20_000, "nested"),
        ("- " * 20_000, "nested"),
        ("\n".join(" " * i + "a:" for i in range(400)), "nested"),
        ("\n".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else 'x'}]" for i in range(400)), "nested"),
        ("[" * 200 + "]" * 200, "nested"),
        ("a: " * 20_000, "not readable YAML"),
        ("x" * 1_000_001, "characters"),
        ("seed: " + "9" * 5000, "not readable YAML"),
        ("a: 2026-13-45", "not readable YAML"),
        ("? [a]\n: 1", "not readable YAML"),
        ("!!python/object/apply:os.system [id]", "not readable YAML"),
        ("a: \x00", "not readable YAML"),
        ("a: 1\n--- \nb: 2", "not readable YAML"),
    ],
)
def test_hostile_yaml_is_one_sentence_within_a_second(text: str, said: str) -> None:
    begun = time.thread_time()  # of this thread: what else the machine does takes none of it
    with pytest.raises(ConfigError, match=said) as caught:
        parse_yaml(text, "config: x")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.thread_time() - begun < 1


# The home folder

NO_PATHS = {
    *(
        "learner",
        "rollout.engine.kind",
        "grpo.report_to",
        "name",
        "remote_code_revision",
        "space.target_template",
        "space.template",
        "ratings.split",
        "reward.train.template",
    ),
    *("ratings.columns", "reward.http.model", "reward.http.api_key_env", "rollout.engine.http.model"),
    *("rollout.engine.http.api_key_env", "prompts.split", "prompts.column", "evaluate.prompts.split"),
    *(
        "evaluate.prompts.column",
        "cluster.address",
        "space.objectives",
        "space.center",
        "space.presets",
        "ratings.scales",
    ),
    *(
        "ratings.attributes",
        "reward.train.attributes",
        "reward.train.report_to",
        "finetune.report_to",
        "dpo.report_to",
        "reward.http.servers",
    ),
    "rollout.engine.http.servers",
    *(f"reward.judge.{name}" for name in ("attributes", "model", "servers", "template", "arguments", "api_key_env")),
    "reward.sources",
}
"""Text fields that hold no path. A new text field is either PathText or named here."""

ELSEWISE = {"rollout.engine.http.command", "rollout.engine.vllm.arguments"}
"""Fields that hold paths among other things."""


def text_fields(model: type[BaseModel], prefix: str = "") -> dict[str, bool]:
    """Dotted name of every field that takes free text -> whether it is a PathText."""
    found: dict[str, bool] = {}
    for name, field in model.model_fields.items():
        parts = [field.annotation, *_inside(field.annotation)]
        sections = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        for section in sections:
            found |= text_fields(section, f"{prefix}{name}.")
        path = any(PathText.__metadata__[0] in getattr(part, "__metadata__", ()) for part in parts)
        path = path or PathText.__metadata__[0] in field.metadata
        if not sections and (path or str in parts or Any in parts):
            found[f"{prefix}{name}"] = path
    return found


def _inside(annotation: Any) -> list[Any]:
    if hasattr(annotation, "__metadata__"):
        return []
    return [part for argument in get_args(annotation) for part in (argument, *_inside(argument))]


def test_every_text_field_is_a_path_or_known_to_be_none() -> None:
    fields = text_fields(RunConfig)
    paths = {name for name, path in fields.items() if path}
    assert fields.keys() - paths - ELSEWISE == NO_PATHS
    assert {"out", "policy", "prompts.path", "evaluate.prompts.path", "ratings.path"} <= paths
    assert {"reward.folder", "reward.http.folder", "reward.train.backbone", "reward.functions"} <= paths
    assert {"evaluate.gold", "cluster.accelerate"} <= paths
    assert text_fields(CompareConfig)["out"]


def test_the_home_folder_is_written_out_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ivy tree")
    data = {
        "out": "~/runs/x",
        "policy": "~/model",
        "space": {"objectives": {"a": None, "b": None}},
        "ratings": [{"path": "~/rated.jsonl"}],
        "reward": {
            "train": {"backbone": "~/backbone"},
            "folder": "~/reward",
            "http": {"servers": ["http://x"], "folder": "~/reward"},
            "functions": {"a": "~/rules.py:a"},
        },
        "prompts": {"path": "~/p.jsonl"},
        "rollout": {
            "engine": {
                "kind": "vllm",
                "http": {"command": "~/bin/serve {policy} --port {port} --log=~/x --dir ~/y"},
                "vllm": {"arguments": {"download_dir": "~/hub", "seed": 1}},
            }
        },
        "evaluate": {"prompts": {"path": "~/h.jsonl"}, "gold": {"a": "~/gold.py:a"}},
        "cluster": {"accelerate": "~/fsdp.yaml"},
    }
    config = parse_config(data)
    text = str(resolved(config))
    assert config.out == "/home/ivy tree/runs/x"
    assert config.rollout.engine.http.command == (
        "'/home/ivy tree'/bin/serve {policy} --port {port} --log=~/x --dir '/home/ivy tree'/y"
    )
    assert text.replace("--log=~/x", "").count("~") == 0
    assert parse_config({"out": "~/c", "budget": 1000, "run": {}}, CompareConfig).out == "/home/ivy tree/c"


@pytest.mark.parametrize("value", ["", " ", "a\x00b", "~nobody-of-that-name/x"])
def test_what_can_be_no_path_is_refused_by_name(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^prompts\.path: .* is not accepted") as caught:
        parse_config({"prompts": {"path": value}}, _WithPrompts)
    assert "\n" not in str(caught.value)


def test_what_a_section_s_fields_say_together_is_one_sentence_without_the_section() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"reward": {}}, _WithReward)
    said = "reward: give at least one of train, folder, http, judge, functions, sources."
    assert str(caught.value) == said
    with pytest.raises(ConfigError) as caught:
        parse_config({}, RewardConfig)
    assert str(caught.value) == said.removeprefix("reward: ")


@pytest.mark.parametrize("selection", [{"targets": 0.25}, {"utility": "ray"}], ids=str)
def test_what_goes_by_the_scale_takes_objectives_on_it(selection: dict[str, Any], tmp_path: Path) -> None:
    def objectives(**parts: float) -> dict[str, Any]:
        return {"objectives": {"helpfulness": None, "brevity": parts}}

    for parts, ends in (({"verbosity": -1.0}, "-100 to 0"), ({"a": 1.0, "b": 0.5}, "0 to 150")):
        with pytest.raises(ConfigError, match=rf"space.objectives: `brevity` goes from {ends}, and .* add up to 1"):
            run_config(tmp_path, space=objectives(**parts), selection=selection)
        run_config(tmp_path, space=objectives(**parts))
    run_config(tmp_path, space=objectives(a=0.1, b=0.2, c=0.7), selection=selection)


class _WithReward(BaseModel):
    reward: RewardConfig


class _WithPrompts(BaseModel):
    prompts: PromptsConfig


@pytest.mark.parametrize(
    "server", ["gpu1:8000", "http://", "http://gpu1:99999", "http://[::1", "http://gpu1/\n", " http://gpu1/v1"]
)
def test_what_is_no_address_is_refused_before_it_is_asked(server: str) -> None:
    with pytest.raises(ConfigError, match=r"servers: .* is no address; write for example http://localhost:8000/v1"):
        parse_config({"servers": [server], "folder": "x"}, HttpRewardConfig)


def test_a_grid_without_its_centre_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^directions: 4 is not accepted; take an odd number.*centre"):
        parse_config({"prompts": {"path": "x"}, "directions": 4}, EvaluateConfig)


def test_a_path_that_begins_otherwise_is_kept_letter_for_letter() -> None:
    for text in ("./a//b/", "owner/name", "a~b", "x/~"):
        assert parse_config({"prompts": {"path": text}}, _WithPrompts).prompts.path == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{a: 010}", r"`a`: 010 in line 1 is a number to base 8 or 60"),
        ("{a: [{b: 1:30}]}", r"`a\.0\.b`: 1:30"),
    ],
)
def test_numbers_to_another_base_are_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_yaml(text, "here")
    assert parse_yaml("{a: '010', b: 0, c: 0.10, d: -5, e: 10:x}", "here")["a"] == "010"


def test_half_a_character_is_refused_where_it_stands() -> None:
    """Nothing could write it down again: no run folder would ever open."""
    with pytest.raises(ConfigError, match=r"here: `a\.b` in line 2 holds half a character, 'x\\ud800'; write the"):
        parse_yaml('a:\n  b: "x\\ud800"', "here")
    assert parse_yaml('a: "\\U0001F600"', "here") == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    ("field", "value"), [("iterations", "yes"), ("rollout.temperature", "true"), ("space.objectives.a", "{a: on}")]
)
def test_true_is_no_number(field: str, value: str, tmp_path: Path) -> None:
    given = yaml_of(tmp_path)
    with pytest.raises(ConfigError, match=rf"^{field.removesuffix('.a')}.*write a number, not True"):
        load_config(given, {field: value})


@pytest.mark.parametrize(
    ("ratings", "said"),
    [
        ("{format: helpsteer, scales: {helpfulness: [0, 4]}}", "scales: format helpsteer has its own"),
        ("{format: ultrafeedback, columns: {prompt: q}}", "columns: format ultrafeedback has its own"),
        ("{scales: {a: [0, 4]}, columns: {prompt: response}}", "columns.prompt: 'response' is read as response too"),
        ("{scales: {a: [0, 4]}, columns: {prompt: ''}}", "columns.prompt: give the name"),
    ],
)
def test_what_would_be_left_unread_is_refused(ratings: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(yaml_of(tmp_path), {"ratings": f"[{{path: r.jsonl, {ratings[1:]}]"})
    swapped = "[{path: r.jsonl, scales: {a: [0, 4]}, columns: {prompt: response, response: prompt}}]"
    assert load_config(yaml_of(tmp_path), {"ratings": swapped})


def test_a_space_reads_as_its_section_says(tmp_path: Path) -> None:
    config = load_config(yaml_of(tmp_path), {"space.zero_padded": "true", "space.placement": "after_question"})
    assert config.direction_space().to_dict().items() >= {"zero_padded": True, "placement": "after_question"}.items()


def yaml_of(folder: Path) -> Path:
    file = folder / "my.yaml"
    file.write_text(
        "{out: o, policy: p, space: {objectives: {a: null, b: null}}, prompts: {path: p.jsonl},"
        " reward: {functions: {a: 'm:a', b: 'm:b'}}, evaluate: {prompts: {path: h.jsonl}}}"
    )
    return file


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dppo", "learner: 'dppo' is not known; did you mean `dpo`?"),
        ("x", "learner: 'x' is not known; known: sft, dpo."),
    ],
)
def test_look_up_refuses_an_unknown_name_with_the_nearest_one(name: str, said: str) -> None:
    assert look_up({"sft": 1, "dpo": 2}, "dpo", "learner") == 2
    with pytest.raises(ConfigError, match=re.escape(said)):
        look_up({"sft": 1, "dpo": 2}, name, "learner")
