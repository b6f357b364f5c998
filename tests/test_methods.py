"""A new method is one file (toy_method.py) and one line; the comparison trains, measures, judges and draws it.

pytest tests/test_methods.py
"""

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import toy_method
import yaml
from damage import damage
from toy_run import toy_config

from dpa.core.compare_config import load_comparison
from dpa.core.config_identity import resolved
from dpa.core.errors import ConfigError, EngineError, StorageError
from dpa.recipes.baselines.lab import Lab, Method, Trained, unstated
from dpa.recipes.baselines.methods import METHODS, compared
from dpa.recipes.compare import Comparison
from dpa.storage.run_folder import StageFolder


def toy_comparison(folder: Path, **fields: object) -> Path:
    """A comparison's file over toy_run.py's world, with rated rows; returns its path."""
    rows = [
        {"prompt": f"Who? {n}", "response": word, "helpfulness": len(word), "verbosity": n % 5}
        for n in range(6)
        for word in ("I", "you and I")
    ]
    (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scales = {"helpfulness": [0, 10], "verbosity": [0, 10]}
    run = resolved(toy_config(folder, folder, ratings=[{"path": str(folder / "rated.jsonl"), "scales": scales}]))
    run = {name: value for name, value in run.items() if name not in ("name", "out", "seed")}
    whole = {"out": str(folder / "out"), "seeds": [0], "budget": 3000, "resamples": 20, "run": run, **fields}
    file = folder / "compare.yaml"
    file.write_text(yaml.safe_dump(whole))
    return file


def train_above(lab: Lab) -> list[Trained]:
    """The toy's policy, under another name."""
    return [lab.as_point("above", lab.ground.policy_folder(0))]


@pytest.fixture
def registered() -> Iterator[None]:
    """The one line, and one of a method that stands on it."""
    METHODS["toy"] = toy_method.METHOD
    METHODS["above"] = Method(name="above", title="above", color=("#1", "#2"), stands_on="toy", train=train_above)
    yield
    del METHODS["toy"], METHODS["above"]


def test_a_method_that_is_a_file_and_a_line_is_trained_measured_and_reported(tmp_path: Path, registered: None) -> None:
    comparison = Comparison(load_comparison(toy_comparison(tmp_path, methods=["toy", "above", "pooled"])))
    above = comparison.jobs[-1]
    for job in (*comparison.shared, *comparison.jobs):
        assert job.ready and (above.ready or job is not above)
        pickle.loads(pickle.dumps(job)).run()  # as it comes to a process of its own
        assert above.ready == (job.place in ("toy", "above")), "it waits for what it stands on"
    page = comparison.report()
    results = json.loads(page.with_name("results.json").read_text())
    assert [policy["method"] for policy in results["policies"]] == ["pooled", "pooled", "toy", "above"]
    assert results["policies"][2]["point"] and len(results["policies"][2]["fronts"]["model"]["verbosity"]) == 1
    lead, _ = results["leads"]["verbosity"]
    assert (lead["method"], lead["title"], lead["bar"]) == ("toy", "a toy", 50.0)
    (cost,) = [row for row in results["costs"] if row["method"] == "toy"]
    assert cost["total"] == pytest.approx(3000, rel=0.1)
    assert above.record and above.record["cost"]["training_tokens"] == cost["training"], "charged for it, too"
    both = comparison.config.model_copy(update={"changes": {"toy": {"iterations": 2}}})
    assert replace(above, config=both).settings.iterations == 2, "what it stands on is changed, and so is it"
    assert replace(above, config=both).ground is not None
    other = comparison.config.model_copy(update={"changes": {"above": {"iterations": 2}}})
    assert replace(above, config=other).ground is None, "other settings train another policy"
    assert "a toy" in page.read_text() and "#123456" in page.read_text() and "#abcdef" in page.read_text()
    assert (tmp_path / "out" / "seed_0" / "toy" / "job.json").is_file()


def train_on_scores(lab: Lab) -> list[Trained]:
    """The toy's policy, by a method that reads what its seed shares."""
    assert len(lab.rated_scores()) == len(lab.rated)
    return toy_method.train(lab)


def test_what_turns_out_damaged_is_made_again_by_the_same_command(
    tmp_path: Path, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "toy", replace(toy_method.METHOD, train=train_on_scores))
    comparison = Comparison(load_comparison(toy_comparison(tmp_path, methods=["toy", "pooled"])))
    jobs = [*comparison.shared, *comparison.jobs]

    def report() -> bytes:
        for job in jobs:
            job.run()  # what is done is left alone
        return comparison.report().with_name("results.json").read_bytes()

    before, seed = report(), tmp_path / "out" / "seed_0"
    (shared,), toy = comparison.shared, next(job for job in jobs if job.place == "toy")
    (measured,) = (seed / "toy" / "measure").glob("*/score/shard-00000.parquet")
    again = r"run the same command again, and it is made again\.$"

    damage(measured, "a flipped bit")
    with pytest.raises(StorageError, match=rf"score/shard-00000\.parquet is damaged or missing; {again}"):
        comparison.report()
    assert not toy.done and report() == before

    (toy.folder / "job.json").unlink()
    damage(seed / "shared" / "iter_0" / "score" / "shard-00000.parquet", "a flipped bit")
    with pytest.raises(StorageError, match=again):
        toy.run()
    assert not shared.done
    with pytest.raises(EngineError, match="no job is done"):
        comparison.report()  # nothing is reported beside what is made again
    assert report() == before

    damage(seed / "shared" / "iter_0" / "evaluate" / "evaluation.json", "deleted")
    with pytest.raises(StorageError, match=rf"evaluation\.json is gone; {again}"):
        comparison.report()
    assert report() == before


def train_thrice(lab: Lab) -> list[Trained]:
    """One policy after another, each for a third of the budget."""
    rows, third = unstated(lab.rated), lab.budget / 3
    policy = lab.finetune(0, lab.config.policy, rows, third)
    policy = lab.finetune(1, policy, rows, lab.left - third)
    return [lab.as_point("thrice", lab.finetune(2, policy, rows, lab.left))]


def test_a_training_that_turns_out_damaged_is_given_again_what_it_was_given(
    tmp_path: Path, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "toy", replace(toy_method.METHOD, train=train_thrice))
    comparison = Comparison(load_comparison(toy_comparison(tmp_path, methods=["toy", "pooled"])))
    (shared,), toy = comparison.shared, next(job for job in comparison.jobs if job.place == "toy")
    shared.run()
    toy.run()
    before, weights = toy.record, toy.folder / "iter_1" / "policy" / "model.safetensors"
    trained = weights.read_bytes()
    for damaged in ("iter_0/rows/done.json", "iter_1/finetune/done.json", "iter_1/policy/model.safetensors"):
        assert damage(toy.folder / damaged, "a flipped bit")
        (toy.folder / "job.json").unlink()  # killed before the end
        toy.run()
        assert before and toy.record, damaged
        assert toy.record["cost"]["training_tokens"] == before["cost"]["training_tokens"], damaged
        assert toy.record["policies"] == before["policies"] and weights.read_bytes() == trained, damaged
        assert all(StageFolder(file.parent).done for file in toy.folder.glob("iter_*/*/done.json")), damaged


def test_only_names_that_are_registered_are_compared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="methods: 'toy' is not known"):
        compared(load_comparison(toy_comparison(tmp_path, methods=["toy"])))


def test_methods_are_named_apart_and_one_of_them_is_the_subject() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    assert len({method.color for method in METHODS.values()}) == len(METHODS)
    assert [name for name, method in METHODS.items() if method.kind == "subject"] == ["pooled"]
    assert all(method.saves_on in METHODS for method in METHODS.values() if method.saves_on)
    assert all(method.stands_on in METHODS for method in METHODS.values() if method.stands_on)
