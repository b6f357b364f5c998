"""A model that pads with its end token (SmolLM2's <|im_end|> is both) still learns to end, and does end.
pytest tests/test_end_token.py
"""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tiny_models import SPACE, tiny_model, tiny_tokenizer

from dpa.core.errors import ModelFileError
from dpa.core.records import SampleRequest
from dpa.core.sections.training import FinetuneConfig, PreferenceConfig
from dpa.models.policy import check_policy, load_policy, make_steerable
from dpa.sampling.samplers import TransformersSampler
from dpa.training.dpo import DPO
from dpa.training.learner import RowEncoder
from dpa.training.packing import Row, Siblings, pass_inputs
from dpa.training.policy_training import train_policy
from dpa.training.sft import SFT, encode_examples

END = 1
MESSAGES = [{"role": "user", "content": "Why?"}]
ROWS = pa.table(
    {
        "candidate_id": ["a", "b", "c"],
        "prompt_id": ["p", "q", "r"],
        "messages": [json.dumps(MESSAGES)] * 3,
        "direction": [[0.8, -0.6]] * 3,
        "response": ["So.", "So it is, as ever.", "No"],
        "chosen_id": ["a", "b", "c"],
        "rejected_id": ["b", "c", "a"],
        "chosen": ["So.", "So it is, as ever.", "No"],
        "rejected": ["So it is, as ever.", "No", "So."],
    }
)


def padded_with_end():  # type: ignore[no-untyped-def]
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    make_steerable(tokenizer, SPACE)
    model = tiny_model(pad_token_id=END)
    return model, tokenizer


def labels_of(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["labels"].flatten().tolist()


def test_winners_keep_the_label_of_their_end() -> None:
    model, tokenizer = padded_with_end()
    examples, rejects = encode_examples(ROWS, RowEncoder(model, tokenizer, SPACE, 256))
    assert not rejects and all(example.labels[-1] == END for example in examples)
    batch = pass_inputs([Row.of([Siblings(examples[:2])]), Row.of([Siblings(examples[2:])])])
    assert labels_of(batch).count(END) == len(examples)


def test_pairs_keep_both_ends(tmp_path: Path) -> None:
    model, tokenizer = padded_with_end()
    learner = DPO(PreferenceConfig(pairs_per_step=3, pairs_per_device=3), SPACE, 0)
    pairs, _ = learner.encode(ROWS, RowEncoder(model, tokenizer, SPACE, 256))
    trainer = learner.trainer(model, tokenizer, pairs, tmp_path, tiny_model)
    batch = trainer.collate(next(iter(trainer.get_train_dataloader()))["rows"].rows)
    kept = batch["completion_mask"].bool() & (batch["input_ids"] == END)
    assert kept.any(dim=1).all() and len(kept) == 2 * len(pairs), "chosen and rejected each end, as part of the answer"
    assert batch["attention_mask"][kept].all()


def test_trained_on_short_answers_it_ends_and_sampling_stops(tmp_path: Path) -> None:
    model, tokenizer = padded_with_end()
    start = tmp_path / "start"
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    config = FinetuneConfig(packed_rows_per_step=1, max_length=64, epochs=15, learning_rate=1e-2, warmup=0)
    train_policy(SFT(config, SPACE, 0), start, ROWS.slice(0, 1), tmp_path / "policy", tmp_path / "work")
    model, tokenizer = load_policy(tmp_path / "policy")
    tokenizer.pad_token = tokenizer.eos_token
    sampler = TransformersSampler(model, tokenizer, SPACE, max_new_tokens=30, temperature=0.01)
    samples = sampler.sample([SampleRequest(MESSAGES, (0.8, -0.6), (1, 2)), SampleRequest(MESSAGES, None, (3,))])
    assert {(s.text, s.finish_reason) for s in samples[0]} == {("So.", "stop")}


def test_no_end_token_is_found_before_anything_is_done(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match="no EOS token; set eos_token"):
        check_policy(tmp_path)
