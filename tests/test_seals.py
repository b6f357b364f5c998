"""A sealed folder: whatever happens to a file of it is noticed, and what comes later is not looked at.
Run: pytest tests/test_seals.py
"""

import logging
from pathlib import Path

import pytest
from damage import damage

from dpa.core.errors import RunFolderError
from dpa.storage.run_folder import StageFolder
from dpa.storage.seals import broken, check_in_run, seal
from dpa.storage.tables import known_digest


def model(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(200)))
    (folder / "sub" / "template").write_text("template")
    return folder


@pytest.mark.parametrize("name", ["weights", "sub/template"])
@pytest.mark.parametrize("way", ["deleted", "truncated", "{}", "a flipped bit"])
def test_any_change_of_a_sealed_file_is_named(tmp_path: Path, name: str, way: str) -> None:
    folder = model(tmp_path / "model")
    sealed = seal(folder)
    (folder / "README.md").write_text("a card that comes later")
    assert broken(folder, sealed) is None
    damage(folder / name, way)
    said = broken(folder, sealed)
    assert said is not None and str(folder / name) in said


def test_a_stage_whose_model_changed_is_open_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, stage = model(tmp_path / "iter_0" / "policy"), StageFolder(tmp_path / "iter_0" / "finetune")
    stage.finish(sealed=[folder])
    assert stage.done and stage.seals
    tmp_path.rename(tmp_path.with_name("moved"))
    stage = StageFolder(tmp_path.with_name("moved") / "iter_0" / "finetune")
    assert stage.done, "a seal holds wherever the run folder lies"
    (stage.path.parent / "policy" / "weights").write_bytes(bytes(200))
    with caplog.at_level(logging.WARNING):
        assert not stage.done
    assert "policy/weights is damaged" in caplog.text
    with caplog.at_level(logging.WARNING):
        stage.finish(sealed=[stage.path.parent / "policy"])
    assert "is not, bit for bit, what it was" in caplog.text
    assert stage.done


def test_there_must_be_something_to_seal(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nothing to seal"):
        seal(tmp_path)


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = known_digest(file)
    assert known_digest(file) == first
    (tmp_path / "new").write_bytes(b"two")
    (tmp_path / "new").rename(file)
    assert known_digest(file) != first


def test_a_model_in_a_run_folder_is_held_to_its_seal_by_whoever_uses_it(tmp_path: Path) -> None:
    folder, stage = model(tmp_path / "iter_0" / "policy"), StageFolder(tmp_path / "iter_0" / "finetune")
    check_in_run(folder)  # of a run that sealed nothing
    stage.finish(sealed=[folder])
    check_in_run(folder)
    (folder / "README.md").write_text("a card that comes later")
    check_in_run(folder)
    damage(folder / "weights", "a flipped bit")
    with pytest.raises(RunFolderError, match=r"policy/weights is damaged.*makes it again; .* from a copy"):
        check_in_run(folder)
    (stage.path / "done.json").write_text("[]")
    check_in_run(folder)
    check_in_run(tmp_path / "elsewhere")
