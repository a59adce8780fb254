"""What the files of a checkpoint say of a model that another process serves: its tokenizer, lengths, and where answers
end, which is decided here by the same rules as in the local engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aisp_dist.config import ConfigError, Generator
from aisp_dist.data.detokenize import stopped, text_after
from aisp_dist.data.encode import surplus
from aisp_dist.engine import model, pretrained
from aisp_dist.engine.endings import end_ids, stops, warn_of_turn_end
from aisp_dist.records import Finish


@dataclass(frozen=True)
class Served:
    """The model. end_ids, stop: what ends a response; max_new_tokens: T; context_length: longest sequence in tokens;
    token_bytes: keys and values of one token; rows: decoded together at most; turn_end: the end token that only the
    template names; adapter: vLLM's LoRARequest, with which every request decodes; dim: hidden size."""

    tokenizer: Any
    end_ids: frozenset[int]
    stop: tuple[str, ...]
    max_new_tokens: int
    context_length: int
    vocab_size: int
    rows: int
    token_bytes: int = 0
    turn_end: int | None = None
    adapter: Any = None
    dim: int = 0

    def ended(
        self, prompt: Sequence[int], tokens: tuple[int, ...], given: int
    ) -> tuple[tuple[int, ...], Finish, str] | None:
        """A response's tokens, why it ended, and its text; None if it does not end here. It ends at the first token
        after the `given` ones with which it holds a stop string, which may begin in those."""
        end = tokens[-1] in self.end_ids
        whole = tokens[: len(tokens) - end]
        text = text_after(self.tokenizer, prompt, whole)
        if any(stop in text for stop in self.stop):
            for count in range(given + 1, len(whole) + 1):
                cut = stopped(self.tokenizer, prompt, whole[:count], self.stop)
                if cut is not None:
                    return tokens[:count], "stop", cut
        if end:
            return tokens, "stop", text
        if len(tokens) < self.max_new_tokens:
            return None
        return tokens, "length", text_after(self.tokenizer, prompt, whole, cut=True)


def read(settings: Generator, prompt_tokens: int, spare: int = 0) -> Served:
    """The model of a checkpoint. prompt_tokens: longest prompt. spare: positions of the model that are not to be used.
    Raises ConfigError."""
    from transformers import AutoConfig, GenerationConfig

    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    tokenizer = pretrained.tokenizer(settings)
    try:
        config = AutoConfig.from_pretrained(settings.model, **source).get_text_config(decoder=True)
        try:
            generation = GenerationConfig.from_pretrained(settings.model, revision=settings.revision)
        except OSError:
            generation = GenerationConfig.from_model_config(config)
        limit = model.context_length(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise pretrained.refusal(settings, error) from error
    if wrong := surplus(tokenizer, config.vocab_size):
        raise ConfigError(f"generator.model: {settings.model!r}: {wrong}")
    ends, turn_end = end_ids(config, generation, tokenizer)
    warn_of_turn_end(settings, tokenizer, turn_end)
    ends, strings = stops(tokenizer, ends, settings.stop)
    asked = settings.vllm.get("max_model_len") or prompt_tokens + settings.max_new_tokens
    context = min((limit or math.inf) - spare, asked)
    sizes = settings.max_new_tokens, int(context), config.vocab_size, settings.rows
    return Served(tokenizer, ends, strings, *sizes, turn_end=turn_end, dim=config.hidden_size)
