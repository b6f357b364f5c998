"""Training elsewhere: a run's selection handed over to other trainers, and what they trained taken in.
Run its tests: pytest tests/test_elsewhere.py

    with LoopRun(config) as loop:
        hand_over(loop, 1, Path("data"), DataSettings())
        ...                                                  # TRL, LLaMA-Factory, axolotl make the folder `trained`
        take_in(loop, 1, Path("trained"))                    # iteration 1: the next rollout samples from it
"""

import logging
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpa.core.errors import ConfigError, RunFolderError
from dpa.core.records import Ledger
from dpa.core.reference import Model, ModelReference
from dpa.models.files import resolve_model
from dpa.models.policy import copy_policy, make_answers_end
from dpa.pages.dataset_card import axolotl_training, dataset_card, llama_factory, llama_factory_training
from dpa.recipes.checks import check_iteration
from dpa.recipes.loop_run import LoopRun
from dpa.recipes.results import ADOPTED, write_policy_card
from dpa.sampling.prompting import Prompting
from dpa.stages.adopt import adopt
from dpa.stages.data import SPLITS, DataSettings, Written, write_data
from dpa.storage.memory import peak_memory
from dpa.storage.rows import has_hub_form
from dpa.storage.seals import check_in_run
from dpa.storage.tables import read_json, save_folder_atomically, write_bytes, write_json
from dpa.training.checkpoints import remove_checkpoints

RECORD = "dpa_data.json"
"""In the data set's folder: where it comes from, its space, and the SHA-256 of every file of rows."""

_WRITTEN = {RECORD, "README.md", "policy", "dataset_info.json", "llamafactory.yaml", "axolotl.yaml"}
_WRITTEN |= {f"{split}.{format}" for split in SPLITS for format in ("parquet", "jsonl")}
"""Names in the data set's folder that are dpa's to replace."""

_log = logging.getLogger(__name__)


def newest_selection(loop: LoopRun) -> int:
    """The last iteration whose selection is finished. Raises RunFolderError when there is none."""
    for t in range(loop.config.iterations, loop.first - 1, -1):
        if (loop.path / f"iter_{t}" / "select" / "done.json").is_file():
            return t
    raise RunFolderError(f"{loop.path}: no iteration has selected anything yet; run `dpa run` or `dpa select` first.")


def hand_over(loop: LoopRun, t: int, out: Path, settings: DataSettings, with_policy: bool = True) -> Written:
    """Write the selection of iteration t at `out`: rows, card, record, and the policy of t - 1 with a chat template
    that reads `preference` and ends its answers. Whole or not at all; another such folder is replaced, unless it holds
    what dpa did not write: what was trained in it would be lost.

    Raises ConfigError, RunFolderError, DataError, ModelFileError, StorageError.
    """
    check_iteration(loop.config, t)
    if out.exists() and not (out / RECORD).is_file():
        raise ConfigError(f"--out: {out} exists and is no data set that dpa wrote; choose a new folder.")
    if others := sorted(entry.name for entry in out.glob("*") if entry.name not in _WRITTEN):
        raise ConfigError(
            f"--out: {out} holds {', '.join(others)}, which dpa did not write and would delete; move it away, or "
            "choose a new folder."
        )
    if loop.learner(t).reads == "prompts":
        raise ConfigError(
            f"learner: {loop.config.learner} samples while it learns, so iteration {t} has selected nothing to write; "
            "export an iteration of learner sft or dpo."
        )
    policy, selection = loop.policy(t - 1), loop.stage(t, "select")
    check_in_run(resolve_model(policy).path)
    prompting = Prompting.of(resolve_model(policy), loop.space)
    if make_answers_end(prompting.tokenizer, prompting.end_ids) and not with_policy:
        raise ConfigError(
            f"--no-policy: the chat template of {policy} ends no answer, so a trainer would never teach it to stop; "
            "leave it out: the copy's template does."
        )
    section = loop.training(t)
    training = {"learning_rate": section.learning_rate, "epochs": section.epochs, "max_length": section.max_length}
    training |= {"beta": loop.config.dpo.beta}
    name = re.sub(r"\W+", "_", f"{loop.config.name}_t{t}")
    with save_folder_atomically(out) as folder:
        written = write_data(selection, folder, loop.space, prompting, settings)
        facts: dict[str, Any] = {
            "run": loop.config.name,
            "iteration": t,
            "policy": str(policy),
            "space": loop.space.to_dict(),
            **asdict(settings),
            **asdict(written),
        }
        write_json(folder / RECORD, facts)
        text = dataset_card(name, loop.space, facts, training, "policy" if with_policy else None)
        write_bytes(folder / "README.md", text.encode())
        if settings.form == "messages":
            rows_file, start = f"train.{settings.format}", "policy" if with_policy else _named_anywhere(policy)
            write_json(folder / "dataset_info.json", llama_factory(name, written.pairs, written.files))
            for file, config in (
                ("llamafactory.yaml", llama_factory_training(name, written.pairs, training, start)),
                ("axolotl.yaml", axolotl_training(rows_file, written.pairs, training, start)),
            ):
                write_bytes(folder / file, config.encode())
        if with_policy:
            copy_policy(policy, prompting.tokenizer, folder / "policy", loop.space, {"from": str(policy)})
    return written


def _named_anywhere(policy: Model) -> str:
    """A folder by its whole path, since other programs run in the data set's; a Hub id as it is."""
    name = ModelReference.of(policy).name
    return name if has_hub_form(name) else str(Path(name).expanduser().absolute())


def take_in(loop: LoopRun, t: int, trained: Path) -> list[str]:
    """Make a folder that was trained elsewhere the policy of iteration t: checked, saved, sealed, its card written.

    What its own learner would have made: the next rollout samples from it, `dpa evaluate` measures it. Returns what was
    found and mended, a sentence each. Raises ConfigError, ModelFileError, RunFolderError, StorageError.
    """
    check_iteration(loop.config, t)
    stage, begun = loop.stage(t, "finetune"), time.monotonic()
    if stage.done:
        raise RunFolderError(
            f"iteration {t} of {loop.path} has a policy already; make this one a policy by itself with --out, or, to "
            f"put it in its place, delete {stage.path} and what was made from it (iter_{t}/evaluate, later iterations)."
        )
    data = from_data(trained)
    notes = adopt(trained, loop.policy(t - 1), loop.space, loop.policy_folder(t), data)
    if data and (data["run"], data["iteration"]) != (loop.config.name, t):
        notes.append(
            f"it lies with the data of iteration {data['iteration']} of {data['run']}, and is iteration {t} of "
            f"{loop.config.name} now"
        )
    ledger = Ledger(wall_s=time.monotonic() - begun, peak_memory=peak_memory(), extra={ADOPTED: 1.0})
    stage.finish(ledger, sealed=[loop.policy_folder(t)])
    remove_checkpoints(stage.path)
    write_policy_card(loop, t)
    return notes


def from_data(trained: Path) -> dict[str, Any]:
    """Which data set a trained folder lies in (`dpa data` wrote it, and training made the folder there), if any."""
    file = trained.absolute().parent / RECORD
    if not file.is_file():
        return {}
    facts = read_json(file)
    known = {"run": str, "iteration": int, "files": dict}
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), kind) for name, kind in known.items()):
        return {}  # a file of that name that `dpa data` did not write
    return {name: facts[name] for name in known}
