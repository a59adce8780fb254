"""Which rounds an engine can decode: those that fit the model, its memory and the guides that the engine has."""

from __future__ import annotations

from typing import Protocol

from aisp_dist.engine import noise
from aisp_dist.engine.attention import TILE
from aisp_dist.engine.guide import Guide
from aisp_dist.engine.kv import KVCache
from aisp_dist.records import Ascent, Round, TokenReward


class Model(Protocol):
    """What is asked of a model. context_length: longest sequence in tokens, None if unbounded; token_bytes: keys and
    values of one token."""

    @property
    def context_length(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def token_bytes(self) -> int: ...


def check(
    round: Round,
    lm: Model,
    max_new_tokens: int,
    end_ids: frozenset[int],
    own: Guide | None = None,
    kv: KVCache | None = None,
) -> None:
    """Raises ValueError for a round that cannot be decoded. own: the engine's guides; kv: its cache."""
    length, context = len(round.prompt_tokens), lm.context_length
    if not length:
        raise ValueError("the prompt has no tokens; it needs at least one to decode from")
    if context is not None and length + max_new_tokens > context + 1:
        raise ValueError(
            f"{length} prompt tokens + {max_new_tokens} new tokens exceed the model's {context} positions; "
            "lower generator.max_new_tokens or prompts.max_tokens"
        )
    low, high, vocab = min(round.prompt_tokens), max(round.prompt_tokens), lm.vocab_size
    if low < 0 or high >= vocab:
        raise ValueError(f"prompt tokens {low} to {high} exceed the model's vocabulary of {vocab}; use its tokenizer")
    guide, own = round.sampling.guide, own or Guide()
    if (isinstance(guide, Ascent) and not own.value) or (isinstance(guide, TokenReward) and not own.reward):
        raise ValueError(f"the round asks for {guide}, but the engine was made without a guide for it")
    if not 0 <= round.start < round.stop:
        raise ValueError(f"samples {round.start} to {round.stop}: start must be below stop")
    if round.sampling.sigma2 or round.sampling.decode:
        noise.sample_word(round.iteration, round.stop - 1)
    longest = max(map(len, round.starts), default=0)
    need = length + longest + -longest % TILE
    if kv and (need := need + kv.arenas_for(kv.blocks(longest))) > kv.capacity:
        raise ValueError(
            f"a prompt of {length} tokens and an answer that begins with {longest} need room for {need} tokens of "
            f"keys and values ({need * lm.token_bytes / 1e9:.2f} GB); there is room for {kv.capacity} "
            f"({kv.capacity * lm.token_bytes / 1e9:.2f} GB); lower prompts.max_tokens or generator.batch_rows"
        )
    if round.starts:
        if round.sampling.sigma2:
            raise ValueError(f"starts with noise of variance {round.sampling.sigma2}; a round has one or the other")
        if len(round.starts) != round.stop - round.start:
            raise ValueError(f"{len(round.starts)} starts for {round.stop - round.start} samples; give one each")
        if longest >= max_new_tokens:
            raise ValueError(f"a start has {longest} tokens; the limit is {max_new_tokens - 1}")
        if odd := {t for start in round.starts for t in start if not 0 <= t < vocab or t in end_ids}:
            raise ValueError(f"a start holds {min(odd)}, an end token or outside the vocabulary of {vocab}")
    if any(len(w.weights) != len(w.lengths) for w in round.trace):
        raise ValueError("an iteration of the trace must have as many lengths as weights")
