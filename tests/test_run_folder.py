"""Run folders: one owner, one configuration; stages of shards that count only with their records.
Run: pytest tests/test_run_folder.py
"""

import io
import logging
import mmap
import re
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import yaml
from fakes import run_config
from forks import within

from dpa.core.errors import RunFolderError
from dpa.core.records import Ledger
from dpa.storage.identity import content_digest
from dpa.storage.memory import free_memory_of_machine, peak_memory
from dpa.storage.progress import AtWork, ProgressBar
from dpa.storage.run_folder import RunFolder, StageFolder
from dpa.storage.stage_records import Reject, count_reasons, read_ledger


def table(*values: int) -> pa.Table:
    return pa.table({"x": pa.array(values, pa.int64())})


def test_a_run_folder_holds_its_configuration(tmp_path: Path) -> None:
    config = run_config(tmp_path / "deep" / "run")
    with RunFolder(config.out).open(config) as run:
        stage = run.stage(2, "rollout")
        assert stage.name == "iter_2/rollout"
        assert stage.path == tmp_path / "deep" / "run" / "iter_2" / "rollout"
        assert run.stage(None, "reward").name == "reward"
    kept = yaml.safe_load((Path(config.out) / "config.yaml").read_text())
    assert run_config(Path(config.out)) == type(config).model_validate(kept)


def test_more_iterations_may_be_asked_for_on_resume(tmp_path: Path) -> None:
    RunFolder(tmp_path).open(run_config(tmp_path, iterations=2)).close()
    RunFolder(tmp_path).open(run_config(tmp_path, iterations=5)).close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["iterations"] == 5


def test_a_stage_is_done_when_its_record_says_so(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path / "s")
    stage.write_shard(0, table(1, 2), Ledger(rows=2, wall_s=1.0, peak_memory=5))
    assert not stage.done
    with pytest.raises(RunFolderError, match="s: this stage is not finished"):
        list(stage.tables())
    stage.write_shard(1, table(3), Ledger(rows=1, wall_s=0.5, peak_memory=7, extra={"invalid": 1.0}))
    stage.finish(Ledger(training_tokens=9), shards=2)
    again = StageFolder(tmp_path / "s")
    assert again.done
    assert [part["x"].to_pylist() for part in again.tables()] == [[1, 2], [3]]
    assert again.ledger == Ledger(rows=3, wall_s=1.5, peak_memory=7, training_tokens=9, extra={"invalid": 1.0})


def test_finishing_without_all_shards_is_refused(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    stage.write_shard(1, table(1), Ledger())
    with pytest.raises(ValueError, match="before all 2 shards"):
        stage.finish(shards=2)
    assert not stage.done


def test_a_stage_without_shards_can_be_done(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    stage.write_rejects([Reject("a", "too long")])
    stage.finish(Ledger(training_tokens=3))
    assert stage.done
    assert list(stage.tables()) == []
    assert (tmp_path / "rejects.jsonl").read_text().count("too long") == 1


def test_rewriting_a_shard_opens_the_stage_again(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    stage.write_shard(0, table(1), Ledger())
    stage.finish(shards=1)
    stage.write_shard(0, table(2), Ledger())
    assert not stage.done


def test_a_shard_of_other_inputs_is_not_there(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    stage.write_shard(0, table(1), Ledger(), made_from="policy-a")
    assert stage.shard_digest(0, "policy-a") is not None
    assert stage.shard_digest(0, "policy-b") is None
    assert stage.shard(0) is not None, "it is not damaged, only of other inputs"


def test_rejects_of_all_shards_stand_in_one_file(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "iter_1/rollout")
    stage.write_shard(0, table(1), Ledger(), [Reject("p1", "empty")])
    stage.write_shard(1, table(2), Ledger(), [Reject("p2", "a \ud800 in it")])
    stage.finish(shards=2)
    lines = (tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"id": "p1", "stage": "iter_1/rollout", "reason": "empty"}'
    assert "p2" in lines[1]


def test_reasons_are_counted_commonest_first() -> None:
    rejects = [Reject("1", "a"), Reject("2", "b"), Reject("3", "b"), Reject("4", "c")]
    assert count_reasons(rejects, most=2) == "2 x b, 1 x a, and 1 other reason"
    assert count_reasons([]) == ""


def test_a_folders_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("y" if name == "c" else "x")).write_text("1")
    assert content_digest(tmp_path / "a") == content_digest(tmp_path / "b") != content_digest(tmp_path / "c")
    (tmp_path / "b" / "x").write_text("2")
    assert content_digest(tmp_path / "a") != content_digest(tmp_path / "b")
    with pytest.raises(RunFolderError, match="no such file"):
        content_digest(tmp_path / "missing")


def test_progress_prints_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with ProgressBar("rollout", 100, "prompts", "tokens", done=20, out=out) as bar:
        bar.advance(30, amount=600)
    (line,) = out.getvalue().splitlines()
    assert line.startswith("rollout: 50/100 prompts, ")
    assert "tokens/s" in line
    assert " s left" in line


def test_a_bar_shows_a_label_with_brackets_as_it_is() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with ProgressBar("policy[/v2]", 2, out=out) as bar:
        bar.advance()
    assert "policy[/v2]" in out.getvalue()


def test_progress_lines_come_now_and_then() -> None:
    out = io.StringIO()
    with ProgressBar("score", 2, "shards", out=out, line_every_s=0.0) as bar:
        bar.advance()
        bar.advance()
    assert [line.split(",")[0] for line in out.getvalue().splitlines()[:2]] == [
        "score: 1/2 shards",
        "score: 2/2 shards",
    ]


def test_a_long_step_says_that_it_goes_on() -> None:
    out, begun = io.StringIO(), time.monotonic()
    with ProgressBar("iter_1/rollout", 64, "prompts", "tokens", out=out, line_every_s=0.3):
        assert within(60, lambda: out.getvalue().count("\n") >= 2)
    lines = out.getvalue().splitlines()
    assert len(lines) <= (time.monotonic() - begun) / 0.3
    assert re.fullmatch(r"iter_1/rollout: 0/64 prompts, 0 tokens/s, \d+\.\d s", lines[0])


def test_work_that_counts_nothing_says_that_it_goes_on_unless_somebody_else_does() -> None:
    out, inner = io.StringIO(), io.StringIO()
    with AtWork("iter_1/finetune", out, line_every_s=1.0):
        # its next look comes a second later, when the bar has long said something
        assert within(60, lambda: "\n" in out.getvalue())
        assert out.getvalue().startswith("iter_1/finetune: at work for ")
        with ProgressBar("finetune", 100, "steps", out=inner, line_every_s=0.1) as bar:
            said = out.getvalue().count("\n")
            for _ in range(15):
                time.sleep(0.1)
                bar.advance()
        assert out.getvalue().count("\n") == said
    assert inner.getvalue().count("\n") >= 5


def test_nothing_done_prints_nothing() -> None:
    out = io.StringIO()
    with ProgressBar("score", 5, done=5, out=out):
        pass
    assert out.getvalue() == ""


def test_peak_memory_stays_when_memory_is_freed() -> None:
    ballast = mmap.mmap(-1, 80_000_000)  # closed, it goes back at once; an allocator may keep what it frees
    ballast.write(b"x" * 80_000_000)
    rss = psutil.Process().memory_info().rss
    ballast.close()
    freed = psutil.Process().memory_info().rss
    assert freed < rss - 60_000_000
    assert peak_memory() > freed + 60_000_000


def test_a_clean_folder_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        StageFolder(tmp_path).write_shard(0, table(1), Ledger())
        StageFolder(tmp_path)
    assert not caplog.records


def test_free_memory_obeys_the_limit_of_a_container(tmp_path: Path) -> None:
    """Both versions of cgroups, at their root and at the process's own path; file pages count as free."""
    own = tmp_path / "own"
    own.write_text("4:memory:/jobs/7\n0::/jobs/7\n")
    unlimited = free_memory_of_machine(tmp_path / "none", own)
    assert unlimited > 10_000
    second, first = tmp_path / "jobs/7", tmp_path / "memory/jobs/7"
    for folder in (second, first):
        folder.mkdir(parents=True)
    (second / "memory.max").write_text("max\n")
    (second / "memory.current").write_text("1000\n")
    (second / "memory.stat").write_text("anon 1\ninactive_file 200\nactive_file 100\n")
    assert free_memory_of_machine(tmp_path, own) > 10_000
    (second / "memory.max").write_text("5000\n")
    assert free_memory_of_machine(tmp_path, own) == 5000 - 1000 + 300
    (first / "memory.limit_in_bytes").write_text("2000\n")
    (first / "memory.usage_in_bytes").write_text("2500\n")
    (first / "memory.stat").write_text("inactive_file 9000\ntotal_inactive_file 60\ntotal_active_file 40\n")
    assert free_memory_of_machine(tmp_path, own) == 0


def test_a_ledger_with_the_column_that_is_gone_is_still_read() -> None:
    assert read_ledger({"tokens_generated": 3, "prompt_tokens": 0, "extra": {"x": 1.0}}) == Ledger(3, extra={"x": 1.0})
    with pytest.raises(TypeError):
        read_ledger({"prompts": 3})
