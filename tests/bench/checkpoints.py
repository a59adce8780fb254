"""Checkpoints with random weights on disk, and a tokenizer in which every token is a word, so that a text and its token
ids stand for each other. Their responses have no end token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from aisp_dist.bench.workload import random_weights, shape

SPECIAL = ("<pad>", "<s>", "<user>", "<assistant>", "<unk>")
TEMPLATE = "{{ bos_token }}{% for m in messages %} <{{ m.role }}> {{ m.content }}{% endfor %}"


def save(folder: Path, model: str, positions: int, dtype: torch.dtype, classifier: bool = False) -> str:
    """Save a model of this shape with its tokenizer; returns the directory."""
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    config = shape(model, positions, **({"num_labels": 1} if classifier else {}))
    random_weights(kind, config, dtype, torch.device("cpu")).save_pretrained(folder)
    tokenizer(model).save_pretrained(folder)
    return str(folder)


def tokenizer(model: str) -> Any:
    vocab = shape(model, 1).vocab_size
    words = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocab))])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words["<s>"])])
    named = {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=TEMPLATE, **named)
