"""What is decoded: a model with random weights, prompts of random tokens, rounds that ask for answers, their noise."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from aisp_dist.config import ConfigError
from aisp_dist.engine import model, noise
from aisp_dist.engine.lm import LM
from aisp_dist.records import Round, Sampling

FAMILIES = {"llama": "llama", "gpt2": "gpt2", "qwen3": "qwen3", "gemma3": "gemma3_text", "mistral": "mistral"}
SAMPLING = Sampling(sigma2=0.5)


@dataclass(frozen=True)
class Workload:
    """`samples` trajectories for each of `prompts` prompts, in an engine of `batch_rows` rows. model: a shape."""

    model: str
    prompt_tokens: int
    new_tokens: int
    samples: int
    prompts: int
    batch_rows: int
    dtype: str

    def causal(self, device: torch.device) -> Any:
        """transformers' own model."""
        config = shape(self.model, self.prompt_tokens + self.new_tokens)
        return random_weights(AutoModelForCausalLM, config, getattr(torch, self.dtype), device)

    def load(self, device: torch.device) -> LM:
        """The engine's model, with the same weights and a tokenizer that knows every id."""
        causal = self.causal(device)
        words = models.WordLevel({f"w{i}": i for i in range(causal.config.vocab_size)}, unk_token="w0")
        return model.adapt(causal, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)))

    def rounds(self, vocab: int, repetition: int) -> list[Round]:
        """The first round of random prompts, which differ from one repetition to the next."""
        draw = torch.Generator().manual_seed(repetition)
        prompts = torch.randint(vocab, (self.prompts, self.prompt_tokens), generator=draw).tolist()
        return [
            Round(repetition, f"{p:06}", tuple(prompt), 0, 0, self.samples, SAMPLING)
            for p, prompt in enumerate(prompts)
        ]


def shape(text: str, positions: int, **more: Any) -> Any:
    """transformers' configuration of family:hidden/layers/vocab, where k means 1024. It has no end token, so every
    response has its full length. Raises ConfigError."""
    found = re.fullmatch(rf"({'|'.join(FAMILIES)}):(\d+k?)/(\d+)/(\d+k?)", text)
    sizes = [int(part.removesuffix("k")) * (1024 if "k" in part else 1) for part in found.groups()[1:]] if found else []
    if found is None or not all(sizes) or sizes[0] % (16 if sizes[0] < 256 else 256) or sizes[2] < 64:
        raise ConfigError(
            f"--shape: {text!r} must be family:hidden/layers/vocab, as llama:512/8/16k: a family of "
            f"{', '.join(FAMILIES)}, hidden a multiple of 256 (of 16 below that), vocab from 64 up"
        )
    family, (hidden, layers, vocab) = found[1], sizes
    head = min(64, hidden // 4)
    more |= {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers}
    more |= {"num_attention_heads": hidden // head, "max_position_embeddings": positions}
    more |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    # With tied or small weights the last token alone would decide the next, and agreement would show nothing.
    more |= {"tie_word_embeddings": False, "initializer_range": hidden**-0.5}
    if family != "gpt2":  # the MLP has 8/3 of the hidden size, as Llama's
        more |= {"num_key_value_heads": max(1, hidden // head // 4), "head_dim": head}
        more |= {"intermediate_size": -(-8 * hidden // 192) * 64}
    if family == "gemma3":
        more |= {"query_pre_attn_scalar": head, "sliding_window": 512}  # as in Gemma 3 1B
    return AutoConfig.for_model(FAMILIES[family], **more)


def random_weights(kind: Any, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of an Auto class (`kind`); the same weights in every call."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return kind.from_config(config, dtype=dtype).eval().requires_grad_(False)


def noise_of(rounds: Sequence[Round], steps: int, lm: LM) -> torch.Tensor:
    """v [B, T, D] of every trajectory: white noise, since the mean is zero in a first round."""
    t = torch.arange(1, steps + 1, device=lm.device)
    drawn = []
    for round in rounds:
        key = torch.tensor(noise.prompt_key(round.seed, round.prompt_id), device=lm.device)
        for sample in range(round.start, round.stop):
            word = torch.tensor(noise.sample_word(round.iteration, sample), device=lm.device)
            drawn.append(noise.white(key, t, word, lm.hidden_size))
    return math.sqrt(SAMPLING.sigma2) * torch.stack(drawn)
