"""Models to measure with: random weights of a named shape, and a tokenizer whose every token is a word, so that a text
and its token ids stand for each other. Nothing here ends a response."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from aisp_dist.config import ConfigError

FAMILIES = {"llama": "llama", "gpt2": "gpt2", "qwen3": "qwen3", "gemma3": "gemma3_text", "mistral": "mistral"}
SPECIAL = ("<pad>", "<s>", "<user>", "<assistant>", "<unk>")
TEMPLATE = "{{ bos_token }}{% for m in messages %} <{{ m.role }}> {{ m.content }}{% endfor %}"


@dataclass(frozen=True)
class Shape:
    """A family's model by its sizes; four heads to a key-value head."""

    family: str
    hidden: int
    layers: int
    vocab: int
    head: int
    intermediate: int

    def config(self, positions: int, **more: Any) -> Any:
        heads = self.hidden // self.head
        sizes: dict[str, Any] = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "max_position_embeddings": positions,
        }
        if self.family != "gpt2":
            sizes |= {"num_key_value_heads": max(1, heads // 4), "head_dim": self.head}
            sizes["intermediate_size"] = self.intermediate
        if self.family == "gemma3":
            sizes |= {"query_pre_attn_scalar": self.head, "sliding_window": 512}  # as in Gemma 3 1B
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        # Tied or small weights would let the last token alone decide the next, and agreement would show nothing.
        weights = {"tie_word_embeddings": False, "initializer_range": self.hidden**-0.5}
        return AutoConfig.for_model(FAMILIES[self.family], **sizes, **ids, **weights, **more)


PRESETS = {"llama3-8b": Shape("llama", 4096, 32, 128256, 128, 14336)}


def parse(text: str) -> Shape:
    """A preset, or family:hidden/layers/vocab with k for 1024. Raises ConfigError."""
    if text in PRESETS:
        return PRESETS[text]
    found = re.fullmatch(rf"({'|'.join(FAMILIES)}):(\d+k?)/(\d+)/(\d+k?)", text)
    sizes = [int(part.removesuffix("k")) * (1024 if "k" in part else 1) for part in found.groups()[1:]] if found else []
    if found is None or not all(sizes) or sizes[0] % (16 if sizes[0] < 256 else 256) or sizes[2] < 64:
        raise ConfigError(
            f"--shape: {text!r} must be {', '.join(PRESETS)} or family:hidden/layers/vocab, as llama:512/8/16k: a "
            f"family of {', '.join(FAMILIES)}, hidden a multiple of 256 (of 16 below that), vocab from 64 up"
        )
    hidden, layers, vocab = sizes
    return Shape(found[1], hidden, layers, vocab, min(64, hidden // 4), -(-8 * hidden // 192) * 64)


def causal(shape: Shape, positions: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The same weights every time."""
    return _made(AutoModelForCausalLM, shape.config(positions), dtype, device)


def save(folder: Path, shape: Shape, positions: int, dtype: torch.dtype, classifier: bool = False) -> str:
    """A checkpoint with its tokenizer; returns its directory."""
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    config = shape.config(positions, **({"num_labels": 1} if classifier else {}))
    _made(kind, config, dtype, torch.device("cpu")).save_pretrained(folder)
    tokenizer(shape.vocab).save_pretrained(folder)
    return str(folder)


def _made(kind: Any, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return kind.from_config(config, dtype=dtype).eval().requires_grad_(False)


def tokenizer(vocab: int) -> Any:
    words = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocab))])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words["<s>"])])
    named = {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=TEMPLATE, **named)
