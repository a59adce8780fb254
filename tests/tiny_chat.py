"""Tiny tokenizers and sequence classifiers for tests: one token a byte, so that lengths can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<pad>"]


def tokenizer(
    template: str | None = TEMPLATE,
    *,
    adds_bos: bool = True,
    adds_eos: bool = False,
    has_bos: bool = True,
    pad: str | None = "<pad>",
) -> PreTrainedTokenizerFast:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate([*SPECIAL, *alphabet])}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    single = f"{'<s> ' * (adds_bos and has_bos)}$A{' </s>' * adds_eos}"
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if has_bos else None, eos_token="</s>", pad_token=pad
    )
    made.chat_template = template
    return made


def classifier(
    folder: Path, tok: PreTrainedTokenizerFast, *, pad_token_id: int | None = None, labels: int = 1
) -> LlamaForSequenceClassification:
    """A random one whose scores differ visibly between texts, saved with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.5, pad_token_id=pad_token_id,
        bos_token_id=0, eos_token_id=1, num_labels=labels,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return model
