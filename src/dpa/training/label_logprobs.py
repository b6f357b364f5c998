"""Log-probabilities of the tokens that have a label, and no logits of any other: TRL's chunked function, as a call.
Run its tests: pytest tests/test_label_logprobs.py

    inputs = {**pack_inputs(ids_N), "labels": labels}         # labels (1, T): a token's own id, IGNORED elsewhere
    logprobs_L = label_logprobs(model, inputs)                # log p(token | what stands before it)

The logits of SmolLM2 over 8,192 tokens are 1.6 GB in fp32, and training holds several copies of them. Here the last
hidden states are taken where a label follows, and the vocabulary goes by in tiles that the backward pass makes again.
"""

from typing import Any

import torch
from trl.kernels import ChunkedLogProbFunction

IGNORED = -100
"""Label of a token without loss."""

CPU_TILE, CUDA_TILE = 4096, 32_768
"""Words of the vocabulary in one tile of up to 4,096 tokens. TRL's own size on CUDA; a CPU holds six
copies of a tile."""


def has_plain_head(model: Any) -> bool:
    """Whether the logits of a causal language model are its hidden states times a matrix, perhaps capped or scaled."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    return (
        type(head) is torch.nn.Linear
        and not getattr(config, "output_router_logits", False)  # a mixture of experts has a loss of its own
        and all(getattr(config, name, None) is None for name in ("output_multiplier", "lm_head_multiplier"))
        and getattr(config, "logits_scaling", None) is None
    )


def label_logprobs(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """logprobs_L (fp32, with a gradient) of the labels of a row of T tokens, in their order (`label_places`).

    `inputs`: `labels` (1, T) and what else the model takes; `label_places`, where they are known already (to find them
    on a card is to wait for it). `model`: a transformers model, adapters within it and all, without the wrapper of PEFT
    or of a launched training; it has a plain head (`has_plain_head`). Enter autocast around the call.
    """
    labels_T = inputs["labels"][0]
    given = {name: value for name, value in inputs.items() if name not in ("labels", "label_places")}
    places_L = inputs["label_places"] if "label_places" in inputs else label_places(labels_T)
    hidden_TH = model.base_model(**given, use_cache=False).last_hidden_state[0]
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    logprobs_L, *_ = ChunkedLogProbFunction.apply(
        hidden_TH.index_select(0, places_L - 1),
        head.weight,
        head.bias,
        labels_T[places_L],
        1.0,
        CPU_TILE if hidden_TH.device.type == "cpu" else CUDA_TILE,
        getattr(config, "final_logit_softcapping", None),
        1.0 if scale is None else scale,
        (),
    )
    return logprobs_L


def label_places(labels_T: torch.Tensor) -> torch.Tensor:
    """Where in the row the labels stand, places_L; the first token is predicted from nothing and never counts."""
    return (labels_T[1:] != IGNORED).nonzero()[:, 0] + 1
