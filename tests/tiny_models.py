"""Tiny random models and a byte-level tokenizer, made in milliseconds: what tests load, sample and train.
Used by: pytest tests/test_policy.py tests/test_samplers.py tests/test_finetuning.py
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dpa.core.directions import DirectionSpace
from dpa.core.objective import Objective

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

SPACE = DirectionSpace(
    objectives=(Objective("helpfulness", {"helpfulness": 1.0}), Objective("verbosity", {"verbosity": 1.0})),
    template="Weigh {weighted_rating}",
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, lossless, plus the special tokens: 261 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[2:]),
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(architecture: str = "llama", context: int = 256, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of two layers and width 32, in eval mode. `changes` go to its configuration."""
    torch.manual_seed(seed)
    common = {"vocab_size": 261, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.3}
    if architecture == "gpt2":
        fields = {**common, "n_positions": context, "n_embd": 32, "n_layer": 2, "n_head": 4, **changes}
        return GPT2LMHeadModel(GPT2Config(**fields)).eval()
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "mixtral": (MixtralConfig, MixtralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[architecture]
    fields = {
        **common,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        **changes,
    }
    return model_class(config_class(**fields)).eval()


def save_tiny_model(
    folder: Path, architecture: str = "llama", chat_template: str | None = CHAT_TEMPLATE, context: int = 256
) -> Path:
    """A plain Hugging Face folder with a tiny model and its tokenizer."""
    tiny_model(architecture, context).save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder
