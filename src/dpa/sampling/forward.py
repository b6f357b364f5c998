"""One forward pass of a causal language model over a cache, and which models can be decoded at all.
Run its tests: pytest tests/test_decoding.py
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from dpa.core.errors import ModelFileError
from dpa.models.policy import context_length


def check_decodable(model: PreTrainedModel) -> None:
    """Refuse models whose memory is not plain attention (recurrent, hybrid): their rows cannot leave a batch.

    Raises ModelFileError.
    """
    layers = DynamicCache(config=model.config).layers
    if model._is_stateful or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise ModelFileError(
            f"model: {type(model).__name__} keeps a state that is not plain attention, which the transformers sampler "
            "cannot batch; take an attention-only model."
        )


class Forward:
    """The logits of the last position, whatever the model's version of transformers calls the arguments."""

    def __init__(self, model: PreTrainedModel) -> None:
        takes = inspect.signature(model.forward).parameters
        self.model = model
        self.positioned = "position_ids" in takes
        """Whether the model is told the positions; else it counts what it has seen, and must be given the mask."""
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # newer transformers renamed it
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        keep, kinds = takes.get("logits_to_keep"), {parameter.kind for parameter in takes.values()}
        self.takes_rows = (
            self.positioned
            and keep is not None
            and "Tensor" in str(keep.annotation)
            and inspect.Parameter.VAR_KEYWORD in kinds  # through which attention is told where sequences begin
        )
        """Whether it can be asked by `over_row`, where its attention reads packed rows."""
        self._last_position = context_length(model) - 1

    def __call__(
        self, cache: Cache, ids_BT: torch.Tensor, seen_BS: torch.Tensor | None, positions_BT: torch.Tensor
    ) -> torch.Tensor:
        """logits_BV in the model's precision. `seen_BS` (bool) says which of the S positions are none of padding's;
        None where all are."""
        fields: dict[str, Any] = {self._cache_name: cache, **self._last_only}
        if self.positioned:
            # Padding stands before the first; a row that has ended stays for some steps, perhaps beyond the last.
            fields["position_ids"] = positions_BT.clamp(0, self._last_position)
        elif seen_BS is None:
            raise ValueError("a model that takes no positions needs the mask")
        seen = None if seen_BS is None else seen_BS.long()
        return self.model(input_ids=ids_BT, attention_mask=seen, use_cache=True, **fields).logits[:, -1]

    def over_row(self, cache: Cache, inputs: Mapping[str, Any], ends_P: torch.Tensor) -> torch.Tensor:
        """logits_PV at the places `ends_P` of a packed row, whose `inputs` are those of models/attention.py."""
        fields = {**inputs, self._cache_name: cache, "logits_to_keep": ends_P}
        fields["position_ids"] = fields["position_ids"].clamp(max=self._last_position)
        return self.model(**fields, use_cache=True).logits[0]


class Read(NamedTuple):
    """P prompts that were read, in rows padded on the left so that all end in the same column of a strided cache."""

    cache: Cache
    logits_PV: torch.Tensor
    length_P: torch.Tensor
    padded: bool
    """Whether a step over them needs a mask."""
