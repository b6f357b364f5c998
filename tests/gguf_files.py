"""A tiny GGUF file, written by llama.cpp's own Python package."""

from pathlib import Path

import gguf
import numpy as np
import torch
from tiny_models import CHAT_TEMPLATE, SPECIAL, tiny_model, tiny_tokenizer


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix in llama.cpp's order of rotary halves (convert_hf_to_gguf.py)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path,
    kind: str = "F32",
    template: str = CHAT_TEMPLATE,
    pre: str = "smollm",
    extra: tuple[str, ...] = (),
    **more: object,
) -> torch.nn.Module:
    """A tiny random Llama as llama.cpp would store it; `more` are further keys. Returns the model."""
    model = tiny_model(
        tie_word_embeddings=False, hidden_size=64, num_key_value_heads=2, rms_norm_eps=1e-4, vocab_size=262
    )
    vocabulary = tiny_tokenizer().get_vocab()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    for add, value in (
        (writer.add_context_length, 256),
        (writer.add_block_count, 2),
        (writer.add_embedding_length, 64),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_rope_dimension_count, 16),
        (writer.add_rope_freq_base, 10_000.0),
        (writer.add_layer_norm_rms_eps, 1e-4),
        (writer.add_vocab_size, 262),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, pre),
        (writer.add_token_list, [*sorted(vocabulary, key=vocabulary.__getitem__), "ab"]),
        (writer.add_token_types, [3 if n < len(SPECIAL) else 1 for n in range(262)]),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 1),
        (writer.add_pad_token_id, 0),
        (writer.add_eot_token_id, 3),
        (writer.add_chat_template, template),
    ):
        add(value)
    for key, value in more.items():
        writer.add_string(key.replace("__", "."), str(value))
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
        "model.layers": "blk",
    }
    for name, tensor in model.state_dict().items():
        stored = name
        for theirs, ours in names.items():
            stored = stored.replace(theirs, ours)
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        array = (permuted(tensor, heads) if heads else tensor).numpy()
        if array.ndim == 2 and kind != "F32":
            quantised = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(stored, quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(stored, np.ascontiguousarray(array))
    for name in extra:
        writer.add_tensor(name, np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
