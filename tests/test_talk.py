"""`dpa generate` and `dpa chat` say what is wrong with a direction or a prompt, and what to do about it.
pytest tests/test_talk.py
"""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from dpa.cli.commands import app
from dpa.cli.ecosystem import read_space, space_of_run
from dpa.cli.talk import answer, converse
from dpa.core.directions import DirectionSpace
from dpa.core.errors import ConfigError, DataError, DirectionError, RunFolderError
from dpa.core.objective import Objective
from dpa.core.reference import ModelReference
from dpa.core.sentences import target_template_of
from dpa.models.policy import check_policy, save_policy
from dpa.sampling.samplers import SamplerSpec
from dpa.serve.command import serve
from dpa.serve.settings import ServeSettings
from dpa.storage.run_folder import StageFolder

TERSE = DirectionSpace(
    (Objective("helpfulness", {"helpfulness": 1.0}), Objective("verbosity", {"verbosity": 1.0})),
    template="Weigh {weighted_rating}",
    presets={"terse": "-40deg", "wordy": "40deg"},
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk") / "policy"
    save_policy(tiny_model(), tiny_tokenizer(), folder, TERSE, {})
    return folder


def ask(model: Path, prompt: str = "Why?", direction: str | None = None, clamp: bool = False, **more) -> list[str]:
    return list(answer(ModelReference(str(model)), [prompt], direction, 1, 1.0, 3, 0, clamp, **more))


def test_several_prompts_load_the_policy_once(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    build = SamplerSpec.build
    monkeypatch.setattr(SamplerSpec, "build", lambda spec: loaded.append(spec) or build(spec))
    result = CliRunner().invoke(app, ["generate", str(policy), "Why?", "Who?", "Where?", "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert len(loaded) == 1


def test_a_misspelt_preset_is_told_the_nearest() -> None:
    with pytest.raises(DirectionError, match="did you mean `terse`"):
        TERSE.parse("tersee")
    with pytest.raises(DirectionError, match="known: helpfulness, verbosity, terse, wordy"):
        TERSE.parse("kind")
    with pytest.raises(DirectionError, match="did you mean `helpfulness`"):
        TERSE.parse("helpfulnes*0.8 - verbosity")
    with pytest.raises(DirectionError, match=r"known: helpfulness, verbosity\."):
        TERSE.parse("terse*0.8 + verbosity")  # a preset cannot be weighed


def test_a_direction_outside_the_cone_names_the_flag(policy: Path) -> None:
    with pytest.raises(DirectionError, match=r"from -45deg to 45deg .* or take `dpa generate --clamp`.*\.$"):
        ask(policy, direction="-60deg")
    assert ask(policy, direction="-60deg", clamp=True)


def test_a_model_that_nobody_trained_to_listen_is_said_to_be_one(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert ask(policy, direction="terse") and not capsys.readouterr().err
    plain = save_tiny_model(tmp_path / "plain")
    capsys.readouterr()
    assert ask(plain, direction="terse", named=str(policy))
    said = capsys.readouterr().err
    assert "dpa_config.json" in said and "answers alike" in said and len(said.splitlines()) == 1


def test_where_nothing_is_asked_the_center_is_and_none_only_where_it_is_said(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As `dpa serve` does it: a policy that is told nothing answers badly."""
    told: list[object] = []
    monkeypatch.setattr("dpa.cli.talk._ask", lambda *arguments: [str(told.append(arguments[4]))])
    ask(policy)
    ask(policy, direction="none")
    ask(save_tiny_model(tmp_path / "plain"), named=str(policy))  # nothing says that it was ever told a direction
    assert told == [TERSE.direction(TERSE.center), None, None]
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n/direction none\nWhy?\n/quit\n"))
    capsys.readouterr()
    converse(ModelReference(str(policy)), None, 1.0, 3, 0)
    assert told[3:] == [TERSE.direction(TERSE.center), None]
    said = capsys.readouterr().out
    assert "direction: helpfulness*100 + verbosity*0; /direction" in said and "direction: none" in said


def test_each_reason_for_no_answer_is_its_own(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"takes [0-9,]+ tokens, .* context holds 256; shorten"):
        ask(policy, "x" * 300)
    with pytest.raises(DataError, match=r"cannot be written as tokens .*Unicode"):
        ask(policy, "a \ud800 b")
    picky = Path(shutil.copytree(policy, tmp_path / "picky"))
    refusal = "{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    template = f"{{% for m in messages %}}{refusal}{{{{ m.content }}}}{{% endfor %}}"
    (picky / "chat_template.jinja").write_text(template)
    assert ask(picky, "yes")
    with pytest.raises(DataError, match=r"the chat template of .*picky refuses it \(not that\)"):
        ask(picky, "no")


def test_a_conversation_goes_on_after_a_prompt_that_does_not_fit(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    typed = io.StringIO("x" * 300 + "\nWhy?\n/quit\nnot read\n")
    monkeypatch.setattr("sys.stdin", typed)
    converse(ModelReference(str(policy)), "terse", 1.0, 3, 0)
    assert "shorten it" in capsys.readouterr().out and typed.read() == "not read\n"


def test_standard_input_that_is_no_utf8_is_refused(policy: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(policy), "-"], input=b"Caf\xe9?")
    assert isinstance(result.exception, DataError) and "not UTF-8 (byte 3)" in str(result.exception)


def test_typed_bytes_that_are_no_text_are_asked_as_such(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Caf\udce9?\n/quit\n"))  # as a terminal gives them on
    converse(ModelReference(str(policy)), "terse", 1.0, 3, 0)
    assert "TextEncodeInput" not in capsys.readouterr().out


def test_a_terminal_obeys_nothing_that_a_model_writes(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    written = "a\tb\n\x1b]0;x\x07\x9b2J\u202eé 👩\u200d🔬"
    monkeypatch.setattr("dpa.cli.talk._ask", lambda *arguments: [written])
    for screen in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda screen=screen: screen)
        monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n/quit\n"))
        converse(ModelReference(str(policy)), "terse", 1.0, 3, 0)
        shown = "a\tb\n\\x1b]0;x\\x07\\x9b2J\\u202eé 👩\u200d🔬" if screen else written
        assert capsys.readouterr().out.endswith(f"you> {shown}\nyou> ")


def test_a_reward_model_is_folded_in_the_space_of_its_run(policy: Path, tmp_path: Path) -> None:
    reward = tmp_path / "reward_model"
    reward.mkdir()
    (reward / "dpa_reward.json").write_text("{}")
    assert space_of_run(reward, ["helpfulness", "verbosity"]) is None
    with pytest.raises(ConfigError, match=r"is a reward model.*RUN/iter_1/policy"):
        read_space(str(reward))
    config = {
        "out": "x",
        "policy": "p",
        "space": {"objectives": {"helpfulness": None, "verbosity": None}, "presets": {"terse": "-40deg"}},
        "reward": {"functions": {"helpfulness": "m:f"}},
        "prompts": {"path": "p"},
        "evaluate": {"prompts": {"path": "p"}},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    found = space_of_run(reward, ["helpfulness", "verbosity"])
    assert found is not None and found.presets == {"terse": "-40deg"}
    assert space_of_run(reward, ["wit"]) is None
    assert read_space(str(tmp_path)) == found


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja"])
def test_a_policy_of_a_run_that_was_damaged_does_not_answer(policy: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(policy, tmp_path / "iter_1" / "policy"))
    StageFolder(tmp_path / "iter_1" / "finetune").finish(sealed=[folder])
    assert ask(folder)
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(RunFolderError, match=rf"{name} is damaged"):
        ask(folder)
    with pytest.raises(RunFolderError, match=rf"{name} is damaged"):
        serve(ServeSettings(model=str(folder)))
    with pytest.raises(RunFolderError, match=rf"{name} is damaged"):
        check_policy(folder)


def test_a_target_is_asked_where_the_policy_knows_them_and_refused_where_not(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(DirectionError, match="knows no targets"):
        ask(policy, direction="helpfulness; verbosity=40")
    knowing = replace(TERSE, target_template=target_template_of(TERSE.template))
    save_policy(tiny_model(), tiny_tokenizer(), tmp_path / "policy", knowing, {})
    assert ask(tmp_path / "policy", direction="helpfulness; verbosity=40")
    with pytest.raises(ConfigError, match="--robust: a target has no neighbours"):
        ask(tmp_path / "policy", direction="helpfulness; verbosity=40", best_of=2, robust=True, reward="any")
    with pytest.raises(ConfigError, match="--robust: no direction has no neighbours; give one by --direction"):
        ask(tmp_path / "policy", direction="none", best_of=2, robust=True, reward="any")
    assert ask(tmp_path / "policy", direction="terse")
