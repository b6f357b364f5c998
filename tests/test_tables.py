"""Files are whole or not there, and what was damaged is noticed.
Run: pytest tests/test_tables.py
"""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa.core.errors import RunFolderError, StorageError
from dpa.storage.tables import (
    CHECKSUM,
    FileRecord,
    is_whole,
    read_json,
    read_table,
    save_folder_atomically,
    verify,
    write_bytes,
    write_json,
    write_table,
)

TABLE = pa.table({"id": ["a", "b", "c"], "score": [1.5, None, float("nan")], "direction": [[0.6, 0.8], [1.0, 0.0], []]})


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    record = write_table(file, TABLE)
    assert record.rows == 3
    assert record.bytes == file.stat().st_size
    again = read_table(file, record)
    assert again.schema.equals(TABLE.schema)
    assert str(again.to_pylist()) == str(TABLE.to_pylist())  # text, because NaN is not equal to itself
    assert names(tmp_path) == ["t.parquet"]


def test_equal_tables_are_equal_files(tmp_path: Path) -> None:
    assert write_table(tmp_path / "a", TABLE) == write_table(tmp_path / "b", TABLE)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FileRecord, bytes]:
    file = tmp_path_factory.mktemp("damage") / "t.parquet"
    record = write_table(file, TABLE)
    return file, record, file.read_bytes()


@settings(max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_any_flipped_bit_or_truncation_is_noticed(
    written: tuple[Path, FileRecord, bytes], place: float, bit: int, cut: bool
) -> None:
    file, record, data = written
    at = int(place * len(data))
    file.write_bytes(data[:at] if cut else data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
    for check in (read_table, verify):
        with pytest.raises(StorageError, match=r"t\.parquet is damaged"):
            check(file, record)


def test_a_flipped_bit_in_the_data_is_noticed_without_a_record_too(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    write_table(file, pa.table({"x": pa.array(range(1000), pa.int64())}))
    data = bytearray(file.read_bytes())
    data[len(data) // 4] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError, match=r"t\.parquet is damaged"):
        read_table(file)


def test_json_comes_back_and_damage_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    write_json(file, {"größe": [1, None, 2.5]})
    assert read_json(file) == {"größe": [1, None, 2.5]}
    file.write_text('{"gr')
    with pytest.raises(StorageError, match=r"r\.json is not readable JSON"):
        read_json(file)


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    write_json(file, 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, float("nan"))
    assert read_json(file) == 1


def test_a_missing_folder_and_a_long_name_are_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"missing/x: writing 1 bytes failed .*; create the folder"):
        write_bytes(tmp_path / "missing" / "x", b"x")
    with pytest.raises(RunFolderError, match="choose a shorter path"):
        write_bytes(tmp_path / ("x" * 300), b"x")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a model, größer" / "policy"
    with save_folder_atomically(target) as folder:
        assert folder.parent == target.parent  # a rename never crosses file systems
        (folder / "deep").mkdir()
        (folder / "deep" / "w.safetensors").write_bytes(b"1")
        assert not target.exists()
    assert (target / "deep" / "w.safetensors").read_bytes() == b"1"
    assert names(target.parent) == ["policy"]


def test_a_failed_folder_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    with save_folder_atomically(target) as folder:
        (folder / "w").write_text("old")
    with pytest.raises(KeyError), save_folder_atomically(target) as folder:
        (folder / "w").write_text("new")
        raise KeyError
    assert (target / "w").read_text() == "old"
    assert names(tmp_path) == ["policy"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    for content in ("old", "new"):
        with save_folder_atomically(target) as folder:
            (folder / content).write_text(content)
    assert names(target) == ["new"]
    assert names(tmp_path) == ["policy"]


def test_what_crashes_left_beside_a_folder_is_cleared_and_the_old_one_survives(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    (tmp_path / ".policy.old").mkdir()  # killed after the old folder was moved away, before the new one came
    (tmp_path / ".policy.old" / "w").write_text("old")
    (tmp_path / ".policy.tmp").mkdir()
    (tmp_path / ".policy.tmp" / "half").write_text("?")
    with pytest.raises(KeyError), save_folder_atomically(target):
        raise KeyError
    assert (target / "w").read_text() == "old"
    assert names(tmp_path) == ["policy"]


def test_a_folder_written_through_a_link_lies_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target = tmp_path / "out"
    target.symlink_to(tmp_path / "disk")
    for text in ("old", "new"):
        with save_folder_atomically(target) as folder:
            (folder / "file").write_text(text)
    assert target.is_symlink() and (tmp_path / "disk" / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "out", Path.rename
    with save_folder_atomically(target) as folder:
        (folder / "file").write_text("old")

    def fails(self: Path, to: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(StorageError), save_folder_atomically(target) as folder:
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "old"


@pytest.mark.parametrize("place", [".", "/", "a/.."])
def test_a_folder_that_cannot_be_renamed_is_one_sentence(place: str) -> None:
    with pytest.raises(RunFolderError, match="cannot be written as a whole"), save_folder_atomically(Path(place)):
        pass


@pytest.mark.parametrize("number", ["1e999", "NaN"])
def test_a_record_with_a_number_that_nobody_writes_is_damaged(number: str) -> None:
    assert not is_whole(json.loads(f'{{"wall_s": {number}, "{CHECKSUM}": "0"}}'))
