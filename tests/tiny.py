"""Tiny random causal language models of many families, and a tiny real tokenizer, made from configs in milliseconds.

tiny.causal("llama") -> model        tiny.tokenizer() -> fast tokenizer        tiny.save("llama", directory)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS, TURN = "<pad>", "<s>", "</s>", "<turn>"
PAD_ID, BOS_ID, EOS_ID, TURN_ID = range(4)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# Random weights this large make logits that differ clearly: an argmax is then no matter of rounding.
SCALE = 0.15

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": SCALE,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": SCALE}
_GEMMA = {**_SMALL, "num_hidden_layers": 4, "query_pre_attn_scalar": 16}
_TYPES = {"gemma3": "gemma3_text", "gemma3_multimodal": "gemma3"}  # the others are named as transformers does
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "mistral": {**_SMALL, "sliding_window": 8},
    "qwen3": _SMALL,
    "qwen2": {key: value for key, value in _SMALL.items() if key != "head_dim"},
    "gemma2": {**_GEMMA, "sliding_window": 8},
    "gemma3": {**_GEMMA, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3_multimodal": {
        "text_config": {**_GEMMA, "sliding_window": 8, "vocab_size": 260, "eos_token_id": EOS_ID},
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
    },
    "gpt2": _GPT,
    "phi3": {**_SMALL, "pad_token_id": PAD_ID},
    "mixtral": {**_SMALL, "num_local_experts": 4},
    "gpt_oss": {**_SMALL, "num_local_experts": 4, "sliding_window": 8},
    "olmo2": _SMALL,
    "cohere": {**_SMALL, "logit_scale": 0.5},
    "granite": {**_SMALL, "logits_scaling": 3.0, "attention_multiplier": 0.2},
    "gpt_neox": _SMALL,
    "opt": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": SCALE},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": SCALE},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": SCALE},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens after four special ones; BOS in front, a simple chat template."""
    vocab = {token: i for i, token in enumerate([PAD, BOS, EOS, TURN, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[TURN],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def causal(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model in fp32 with the vocabulary of `tokenizer()`; `overrides` change its config."""
    settings = {"vocab_size": 260, **FAMILIES[family], **overrides}
    config = AutoConfig.for_model(
        _TYPES.get(family, family),
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=False,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save(family: str, directory: str | Path, **overrides: Any) -> Path:
    """Writes a checkpoint that the Auto classes load, tokenizer included; returns its directory."""
    causal(family, **overrides).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return Path(directory)
