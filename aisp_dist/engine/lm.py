"""A causal language model as the engine uses it: a decoder, a head, and what they are made of. model.py makes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from aisp_dist.engine.attention import TILE, Dense, Pass, running


class Heads(NamedTuple):
    """The attention of a layer: key-value heads, query heads of each, sizes of a key and of a value."""

    kv_heads: int
    group: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class LM:
    """A causal language model in two parts, decoder and head. eos_ids end a response; turn_end is the one that only
    the chat template says, None if the checkpoint declares all. context_length is the longest sequence in tokens, None
    if unbounded. attention: by layer."""

    decoder: nn.Module
    head: nn.Module
    tokenizer: Any
    hidden_size: int
    vocab_size: int
    num_layers: int
    context_length: int | None
    eos_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    head_dtype: torch.dtype
    attention: tuple[Heads, ...] = ()
    turn_end: int | None = None

    def states(self, attend: Pass, tokens_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        """Last hidden states z [B, T, D], after the final norm."""
        with running(attend):
            out = self.decoder(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False)
        z: torch.Tensor = out.last_hidden_state
        return z

    def logits(self, z_ND: torch.Tensor) -> torch.Tensor:
        """fp32 [N, V]: the family's full map from hidden states to logits, softcaps and scales included."""
        out = self.head(inputs_embeds=z_ND.to(self.head_dtype)[:, None], use_cache=False)
        logits: torch.Tensor = out.logits[:, 0].float()
        return logits

    def dense(self, tokens: tuple[int, ...], keep: bool = False) -> tuple[torch.Tensor, Dense]:
        """z [T, D] of one whole sequence, computed alone, and the pass that holds its keys and values if kept."""
        attend = Dense(len(tokens), keep)
        padding = -len(tokens) % TILE  # causal: what follows a sequence cannot change it
        ids = torch.tensor([(*tokens, *[tokens[-1]] * padding)], device=self.device)
        positions = torch.arange(ids.shape[1], device=self.device).clamp(max=len(tokens) - 1)
        return self.states(attend, ids, positions[None])[0, : len(tokens)], attend

    @property
    def token_bytes(self) -> int:
        """What the keys and values of one token take, in all layers."""
        return self.dtype.itemsize * sum(at.kv_heads * (at.key_size + at.value_size) for at in self.attention)
