"""The tiny Llama of tiny.py as a GGUF file, with tokenizer and chat template, as llama.cpp's converter writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny

SIZES = {"intermediate_size": 64}  # blocks of Q8_0 and Q4_1 have 32 elements
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn": "attn",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "mlp.": "ffn_",
    "_proj": "",
    "attn.": "attn_",
}


def save(file: Path, kind: str = "F32", more: dict[str, np.ndarray] | None = None, **values: Any) -> Path:
    """kind: the type of the matrices, as gguf names it; F32 for the vectors. more: tensors beside those of the model.
    values: of the metadata, beside and in place of the model's own; None leaves a key out."""
    model, tokenizer = tiny.causal("llama", **SIZES), tiny.tokenizer()
    config, tokens = model.config, sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    metadata = {
        "general.type": "model",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i <= tiny.TURN_ID else 1 for i in range(len(tokens))],
        "tokenizer.ggml.scores": [0.0] * len(tokens),  # no merges
        "tokenizer.ggml.bos_token_id": tiny.BOS_ID,
        "tokenizer.ggml.eos_token_id": tiny.EOS_ID,
        "tokenizer.ggml.padding_token_id": tiny.PAD_ID,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": tokenizer.chat_template,
    } | values
    writer = gguf.GGUFWriter(str(file), metadata.pop("general.architecture", "llama"))
    for name, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(name, value)
    tensors = {_name(name): _layout(name, weight.numpy(), config) for name, weight in model.state_dict().items()}
    for name, weight in (tensors | (more or {})).items():
        stored = getattr(gguf.GGMLQuantizationType, kind if weight.ndim > 1 else "F32")
        writer.add_tensor(name, gguf.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _name(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _layout(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """llama.cpp's rotary embedding turns neighbouring pairs, so its converter interleaves the rows of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if (count := next((n for key, n in heads.items() if key in name), None)) is None:
        return weight
    return weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
