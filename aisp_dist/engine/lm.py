"""A causal language model as the engine uses it: decoder, head, tokenizer and sizes. model.py makes one.

Shapes: B rows, T tokens, N states, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from aisp_dist.engine.attention import TILE, Dense, Pass, running


class Heads(NamedTuple):
    """The attention of a layer. group: query heads of each key-value head; key_size, value_size: of one head."""

    kv_heads: int
    group: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class LM:
    """A causal language model in two parts: decoder, tokens to states, and head, the whole model without its decoder,
    so that softcaps and scales of the logits stay the family's. eos_ids: tokens that end a response; turn_end: the one
    of them that only the chat template knows, None if the checkpoint declares all; context_length: longest sequence in
    tokens, None if unbounded; head_dtype: of the output layer; attention: by layer."""

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
        """Last hidden states z [B, T, D], after the final norm, of tokens that attend by this pass."""
        with running(attend):
            out = self.decoder(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False)
        z: torch.Tensor = out.last_hidden_state
        return z

    def logits(self, z_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] in fp32 of hidden states, the family's softcaps and scales included."""
        out = self.head(inputs_embeds=z_ND.to(self.head_dtype)[:, None], use_cache=False)
        logits: torch.Tensor = out.logits[:, 0].float()
        return logits

    def dense(self, tokens: tuple[int, ...], keep: bool = False) -> tuple[torch.Tensor, Dense]:
        """z [T, D] of one whole sequence, computed alone, and its pass, which with `keep` holds its keys and values."""
        attend = Dense(len(tokens), keep)
        padding = -len(tokens) % TILE  # attention is causal: padding behind a sequence cannot change it
        ids = torch.tensor([(*tokens, *[tokens[-1]] * padding)], device=self.device)
        positions = torch.arange(ids.shape[1], device=self.device).clamp(max=len(tokens) - 1)
        return self.states(attend, ids, positions[None])[0, : len(tokens)], attend

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return self.dtype.itemsize * sum(at.kv_heads * (at.key_size + at.value_size) for at in self.attention)
