"""The card of a data set written for other trainers: README.md with Hugging Face's header, and the files they ask for.
Run its tests: pytest tests/test_elsewhere.py
"""

from collections.abc import Mapping
from typing import Any

import yaml

from dpa.core.directions import DirectionSpace
from dpa.pages.rendering import render
from dpa.pages.writing import example_preference


def dataset_card(
    name: str,
    space: DirectionSpace,
    facts: Mapping[str, Any],
    training: Mapping[str, Any],
    policy: str | None,
) -> str:
    """The card's text. `facts`: the record beside it (dpa_data.json); `training`: `learning_rate`, `epochs` and
    `max_length` (tokens) of the run's own learner, `beta` where it learns from pairs; `policy`: the folder to start
    from, as seen from the card's (None: it was not written)."""
    files = {file.partition(".")[0]: file for file in facts["files"]}
    metadata = {
        "tags": ["dpa", "directional-preference-alignment", "trl" if facts["form"] == "trl" else "chat"],
        "task_categories": ["text-generation"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": files[split]} for split in ("train", "test") if split in files],
            }
        ],
    }
    return render(
        "dataset.md",
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=name,
        space=space,
        facts=facts,
        training=training,
        policy=policy,
        asked=example_preference(space),
    )


def llama_factory(name: str, pairs: bool, files: Mapping[str, Any]) -> dict[str, Any]:
    """dataset_info.json of LLaMA-Factory: each split as a data set of messages."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described: dict[str, Any] = {"formatting": "sharegpt", "columns": {"messages": "messages"}}
    if pairs:
        described |= {"ranking": True, "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}}
    described["tags"] = {**tags, "system_tag": "system"}
    return {
        name if file.startswith("train") else f"{name}_test": {"file_name": file, **described} for file in sorted(files)
    }


def llama_factory_training(name: str, pairs: bool, training: Mapping[str, Any], start: str = "policy") -> str:
    """A configuration of `llamafactory-cli train`, to be run in the data set's folder; `start`: what is trained."""
    config: dict[str, Any] = {
        "model_name_or_path": start,
        "stage": "dpo" if pairs else "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": ".",
        "dataset": name,
        "cutoff_len": training["max_length"],
        "learning_rate": training["learning_rate"],
        "num_train_epochs": training["epochs"],
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "output_dir": "trained",
        "save_only_model": True,
        "report_to": "none",
    }
    if pairs:
        config |= {"pref_loss": "sigmoid", "pref_beta": training["beta"]}
    about = "# llamafactory-cli train llamafactory.yaml   (no `template:`, so that it reads the tokenizer's own)\n"
    return about + yaml.safe_dump(config, sort_keys=False)


def axolotl_training(file: str, pairs: bool, training: Mapping[str, Any], start: str = "policy") -> str:
    """A configuration of `axolotl train`, to be run in the data set's folder; `start`: what is trained."""
    rows: dict[str, Any] = {"path": file, "ds_type": "parquet" if file.endswith(".parquet") else "json"}
    if pairs:
        rows |= {"type": "chat_template.default", "field_messages": "messages"}
        rows |= {"field_chosen": "chosen", "field_rejected": "rejected", "split": "train"}
    else:
        rows |= {"type": "chat_template", "field_messages": "messages"}
        rows |= {"roles_to_train": ["assistant"], "train_on_eos": "turn"}
    config = {
        "base_model": start,
        "chat_template": "tokenizer_default",
        "datasets": [rows],
        "sequence_len": training["max_length"],
        "learning_rate": training["learning_rate"],
        "num_epochs": training["epochs"],
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "cosine",
        "bf16": "auto",
        "output_dir": "trained",
    }
    if pairs:
        config |= {"rl": "dpo", "rl_beta": training["beta"]}
    return "# axolotl train axolotl.yaml\n" + yaml.safe_dump(config, sort_keys=False)
