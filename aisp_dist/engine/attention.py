"""Attention over a shared prefix, behind transformers' AttentionInterface: a function of ours that a running pass
parametrises, so that no family needs code of its own. Owns masking, windows, softcaps, sinks and the merge of prefix
and suffix by log-sum-exp. Knows nothing of prompts' ids, noise or tokens.

The same bits whatever the schedule: kernels are called with shapes that depend on one prompt alone (Dense, and the
prefix of Shared in tiles of TILE queries) or never change (the suffix of Shared: all rows, full capacity), and on one
thread or two.

Shapes: B rows (slots), R rows of one prompt, H query heads, K key-value heads, G = H / K, L keys of a prefix, S suffix
capacity, T queries, C head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface

NAME = "aisp_shared_prefix"
# Ragged shapes take other kernels, and unaligned ones other paths through them, with other bits: queries that meet a
# prefix, tokens of a dense pass, rows and the capacity of a suffix all come in multiples of this.
TILE = 32
_CHUNK = 512  # queries of a dense pass at a time, to bound its masks and scores

KV = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """How one layer attends: its index, scale of the scores, sliding window (keys, its own included), softcap of the
    scores, and sink logits [H]."""

    index: int
    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


Pass = Callable[[Layer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_running: ContextVar[Pass | None] = ContextVar("aisp attention pass", default=None)


@contextmanager
def running(attend: Pass) -> Iterator[None]:
    """Inside, every adapted model attends by this pass."""
    token = _running.set(attend)
    try:
        yield
    finally:
        _running.reset(token)


def _interface(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    attend = _running.get()
    if attend is None:
        raise RuntimeError("this model belongs to the decode engine and builds no masks of its own: load another copy")
    layer = Layer(module.layer_idx, scaling or query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
    return attend(layer, query, key, value).transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register(NAME, _interface)


def attend_part(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> KV:
    """Softmax attention over a part of the keys: fp32 output [X, Y, T, C] and log-sum-exp [X, Y, T]. A query that sees
    no key of this part gets 0 and -inf. q [X, Y, T, C]; k, v [X, Y, *, C]; mask [X or 1, 1, T, *], True = seen."""
    if q.device.type == "cpu" and layer.softcap is None:
        bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=layer.scaling
        )
        if mask is None:
            return out.float(), lse
        blind = ~mask.any(-1)
        return out.float().masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -math.inf)
    scores = (q @ k.transpose(-1, -2)).float() * layer.scaling
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = (weights.to(v.dtype) @ v).float() / total.clamp(min=torch.finfo(torch.float32).tiny)
    return out, (top + total.log())[..., 0]


def _seen(at: torch.Tensor, to: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether a query at position `at` sees the key at position `to`."""
    return (to <= at) if window is None else (to <= at) & (to > at - window)


def merge(first: KV, second: KV) -> KV:
    """Attention over the union of two disjoint parts, the second of them seen by every query."""
    (out1, lse1), (out2, lse2) = first, second
    return torch.lerp(out2, out1, torch.sigmoid(lse1 - lse2)[..., None]), torch.logaddexp(lse1, lse2)


def _sink(layer: Layer, part: KV) -> torch.Tensor:
    """The output once the layer's sinks (keys with value 0) have taken their share; heads [K, G] are dims 1, 2."""
    out, lse = part
    if layer.sinks is None:
        return out
    sinks = layer.sinks.float().view(1, *out.shape[1:3], *[1] * (out.ndim - 4))
    return out * torch.sigmoid(lse - sinks)[..., None]


@dataclass
class Dense:
    """Causal attention of one whole sequence [1, H, T, C]. With `keep`, leaves in `kv` what a suffix of its first
    `length` tokens (the others are padding) can still see."""

    length: int
    keep: bool = False
    kv: list[KV] = field(default_factory=list)

    def __call__(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads, kv_heads, length = q.shape[1], k.shape[1], q.shape[2]
        if self.keep:  # at least one key: no kernel takes none
            first = 0 if layer.window is None else max(0, self.length - max(layer.window, 2) + 1)
            self.kv.append((k[0, :, first : self.length].clone(), v[0, :, first : self.length].clone()))
        q_KGTC = q.view(kv_heads, heads // kv_heads, length, -1)
        k_KGTC, v_KGTC = (x[0, :, None].expand(-1, heads // kv_heads, -1, -1) for x in (k, v))
        chunks = []
        for start in range(0, length, _CHUNK):
            stop = min(start + _CHUNK, length)
            low = 0 if layer.window is None else max(0, start - layer.window + 1)
            at, to = torch.arange(start, stop, device=q.device)[:, None], torch.arange(low, stop, device=q.device)
            keys, values = k_KGTC[:, :, low:stop], v_KGTC[:, :, low:stop]
            mask = _seen(at, to, layer.window)[None, None]
            out, lse = attend_part(layer, q_KGTC[:, :, start:stop], keys, values, mask)
            chunks.append(_sink(layer, (out[None], lse[None]))[0])
        return torch.cat(chunks, dim=2).reshape(1, heads, length, -1)


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prefilled prompt: its keys and values [K, L, C] by layer (a sliding layer keeps what a suffix can still see),
    its length in tokens, and z_0 [D], the last hidden state at its last position."""

    kv: list[KV]
    length: int
    z_D: torch.Tensor


def empty_suffix(like: list[KV], rows: int, capacity: int) -> list[KV]:
    """Keys and values [B, K, S, C] by layer for rows whose prefixes look `like` these; S >= capacity."""
    capacity += -capacity % TILE
    sized = [[x.new_zeros(rows, len(x), capacity, x.shape[2]) for x in kv] for kv in like]
    return [(k, v) for k, v in sized]


@dataclass
class Shared:
    """One token [B, H, 1, C] of every row, attending to its prompt's prefix and its own suffix, which it extends.

    suffix: keys and values [B, K, S, C] by layer. at_B: index of the row's token in its suffix.
    groups: rows of each prompt, as (slots [R], prefix); rows in no group do harmless padding work.
    """

    suffix: list[KV]
    at_B: torch.Tensor
    groups: list[tuple[torch.Tensor, Prefix]]
    _masks: dict[Any, Any] = field(default_factory=dict)

    def __call__(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
        q_BKGC = q.view(rows, kv_heads, heads // kv_heads, -1)
        slots = torch.arange(rows, device=q.device)
        for store, new in zip(self.suffix[layer.index], (k, v), strict=True):
            store[slots, :, self.at_B] = new[:, :, 0]
        group = q_BKGC.shape[2]
        even_BKGC = pad(q_BKGC, (0, 0, 0, group % 2))  # an odd number would leave a thread's workspace unaligned
        own = attend_part(layer, even_BKGC, *self.suffix[layer.index], self._suffix_mask(layer, even_BKGC.shape[2]))
        own = own[0][:, :, :group], own[1][:, :, :group]
        prompts = torch.zeros_like(own[0]), torch.full_like(own[1], -math.inf)
        for number, (rows_R, prefix) in enumerate(self.groups):
            part = self._prefix_part(layer, q_BKGC[rows_R], number, prefix)
            prompts[0][rows_R], prompts[1][rows_R] = part
        return _sink(layer, merge(prompts, own)).reshape(rows, heads, 1, -1)

    def _suffix_mask(self, layer: Layer, queries: int) -> torch.Tensor:
        """[B, 1, G, S]"""
        if layer.window not in self._masks:
            to = torch.arange(self.suffix[0][0].shape[2], device=self.at_B.device)
            self._masks[layer.window] = _seen(self.at_B[:, None], to, layer.window)[:, None, None]
        mask: torch.Tensor = self._masks[layer.window]
        return mask.expand(-1, -1, queries, -1)

    def _prefix_part(self, layer: Layer, q_RKGC: torch.Tensor, number: int, prefix: Prefix) -> KV:
        """Output [R, K, G, C] and log-sum-exp [R, K, G] over the prefix, in tiles of TILE queries."""
        rows, kv_heads, group, size = q_RKGC.shape
        queries = rows * group
        k, v = (x[None] for x in prefix.kv[layer.index])
        q_KQC = q_RKGC.transpose(0, 1).reshape(kv_heads, queries, size)
        tiles = torch.split(pad(q_KQC, (0, 0, 0, -queries % TILE)), TILE, dim=1)
        masks = self._prefix_masks(layer, number, k.shape[2], group, len(tiles))
        parts = [attend_part(layer, q[None].contiguous(), k, v, m) for q, m in zip(tiles, masks, strict=True)]
        out, lse = (torch.cat(x, dim=2)[0, :, :queries] for x in zip(*parts, strict=True))
        return out.view(kv_heads, rows, group, -1).transpose(0, 1), lse.view(kv_heads, rows, group).transpose(0, 1)

    def _prefix_masks(self, layer: Layer, number: int, kept: int, group: int, tiles: int) -> list[torch.Tensor | None]:
        """One mask [1, 1, TILE, L] a tile; None for a layer without a window."""
        if layer.window is None:
            return [None] * tiles
        if (layer.window, number) not in self._masks:
            at_Q = self.at_B[self.groups[number][0]].repeat_interleave(group)
            to = torch.arange(-kept, 0, device=at_Q.device)  # positions counted from the end of the prompt
            mask_QL = _seen(pad(at_Q, (0, -len(at_Q) % TILE))[:, None], to, layer.window)
            self._masks[layer.window, number] = [m[None, None] for m in torch.split(mask_QL, TILE)]
        masks: list[torch.Tensor | None] = self._masks[layer.window, number]
        return masks
