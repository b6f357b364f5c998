"""A learner as a user would add it: winners, one a pass, through transformers' own Trainer.
Used by: pytest tests/test_learners.py
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from dpa.storage.run_folder import Reject
from dpa.training.learner import Learner, RowEncoder
from dpa.training.packing import Example
from dpa.training.sft import encode_examples
from dpa.training.trainer_arguments import shared_arguments


class OneByOne(Learner[Example]):
    """Reads winners and the section `finetune`, as a learner does that says nothing else."""

    def encode(self, rows: pa.Table, encoder: RowEncoder) -> tuple[list[Example], list[Reject]]:
        """Prompt, response and end of each row."""
        return encode_examples(rows, encoder)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        work: Path,
        start: Callable[[], PreTrainedModel],
    ) -> Trainer:
        """A step for each example."""
        arguments = TrainingArguments(**shared_arguments(self, work), per_device_train_batch_size=1)
        rows = [{"input_ids": torch.tensor(each.ids), "labels": torch.tensor(each.labels)} for each in examples]
        return Trainer(model, arguments, train_dataset=rows)
