"""Keys and values of prompts and rows, and the decode pass: one new token of every row attends to the prefix of its
prompt and to its own suffix. A prefix is stored once, and all its rows attend to it in one product. Suffixes lie side
by side in blocks of steps; a block is made when the first row reaches it. Knows nothing of what rows decode.

A row's bits do not depend on the other rows: queries attend to a prefix in tiles of TILE, all rows attend to a block in
one call of fixed shape, and a part that a row does not see changes none of its bits. This holds on one or two CPU
threads; on a GPU it is untested.

Shapes: B rows (slots), H query heads, K key-value heads, G = H / K query heads of each, L keys of a prefix, S steps of
a block, C head size, Q = B * G queries of a key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from aisp_dist.engine.attention import KV, TILE, Dense, Layer, Mask, Prefix, attend_part, fused, mask, merge, seen, sink

_BLOCK = 2 * TILE
_TILES = 5  # in one call of the fused operator: from 192 queries on it takes other tiles and gives other bits


class KVCache:
    """For `num_rows` rows (a multiple of TILE) of at most `num_steps` tokens, and prompts of `num_tokens` tokens in all
    (`capacity`, which is also the longest prompt that fits). It lies on the device of the prefixes it is given."""

    def __init__(self, num_rows: int, num_steps: int, num_tokens: int) -> None:
        self.num_rows, self.capacity, self.free = num_rows, num_tokens, num_tokens
        self.block_size = min(_BLOCK, num_steps + -num_steps % TILE)
        self.blocks: list[list[KV]] = []  # by block, by layer: [B, K, S, C]
        self.prefixes: list[Prefix | None] = [None] * num_rows  # by slot
        self._seating: Seating | None = None

    def room(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens can be kept now."""
        return tokens <= self.free

    def keep(self, dense: Dense, z_D: torch.Tensor) -> Prefix:
        """The prefix that a dense pass computed. Call it only if there is `room`."""
        self.free -= dense.length
        return Prefix(dense.kv, dense.length, z_D)

    def drop(self, prefix: Prefix) -> None:
        """Forgets a prefix that no row uses."""
        self.free += prefix.length

    def seat(self, slot: int, prefix: Prefix, given: Sequence[Sequence[KV]] = ()) -> None:
        """Starts a suffix of this prefix in a slot. given: keys and values [K, TILE, C] by layer of its first tokens,
        TILE by TILE; what lies behind the last given token is overwritten before it is seen."""
        self.prefixes[slot], self._seating = prefix, None
        for block in self.blocks:
            for store in (x for kv in block for x in kv):
                store[slot] = 0  # a masked key has weight 0, but 0 * NaN of an earlier row would not be 0
        self._reach(TILE * len(given) - 1, prefix)
        for number, tile in enumerate(given):
            at, place = divmod(number * TILE, self.block_size)
            for kv, new in zip(self.blocks[at], tile, strict=True):
                for store, values in zip(kv, new, strict=True):
                    store[slot, :, place : place + TILE] = values

    def leave(self, slot: int) -> None:
        """Empties a slot."""
        self.prefixes[slot], self._seating = None, None
        if not any(self.prefixes):
            self.blocks.clear()

    def attend(self, places: Sequence[int]) -> DecodePass:
        """The pass that writes one token of every slot at this place of its suffix (0 for empty slots) and attends.
        At least one slot must be taken."""
        prefix = next(prefix for prefix in self.prefixes if prefix)
        self._reach(max(places), prefix)
        if self._seating is None:
            groups: dict[int, tuple[Prefix, list[int]]] = {}
            for slot, own in enumerate(self.prefixes):
                if own:
                    groups.setdefault(id(own), (own, []))[1].append(slot)
            self._seating = Seating(self.num_rows, list(groups.values()), prefix.z_D.device)
        return DecodePass(self, self._seating, places)

    def _reach(self, place: int, prefix: Prefix) -> None:
        """Makes the blocks up to this place of a suffix, in the shapes of the prefix."""
        while len(self.blocks) * self.block_size <= place:
            shapes = [[(self.num_rows, len(x), self.block_size, x.shape[2]) for x in kv] for kv in prefix.kv]
            made = [
                [x.new_zeros(s) for x, s in zip(*both, strict=True)] for both in zip(prefix.kv, shapes, strict=True)
            ]
            self.blocks.append([(k, v) for k, v in made])


@dataclass(frozen=True, eq=False)
class Order:
    """Queries in the order in which they attend to prefixes. group: G; take: their places in [Q], those of a prefix
    padded to whole tiles; back [Q]: where each query's output is; calls: (prefix, first, stop) of an attention call."""

    group: int
    take: torch.Tensor
    back: torch.Tensor
    calls: list[tuple[Prefix, int, int]]


@dataclass(frozen=True, eq=False)
class Seating:
    """Prefixes, each with the slots that attend to it. Empty slots belong to none; their output is never read."""

    num_rows: int
    groups: list[tuple[Prefix, list[int]]]
    device: torch.device
    _orders: dict[tuple[int, int], Order] = field(default_factory=dict)

    def order(self, group: int, tiles: int) -> Order:
        """For G queries of a row and key-value head, at most so many tiles in a call."""
        if (group, tiles) not in self._orders:
            take: list[int] = []
            back = [0] * (self.num_rows * group)
            calls = []
            for prefix, slots in self.groups:
                first = len(take)
                for query in (slot * group + g for slot in slots for g in range(group)):
                    back[query] = len(take)
                    take.append(query)
                take += [take[first]] * (-len(take) % TILE)
                for start in range(first, len(take), tiles * TILE):
                    calls.append((prefix, start, min(start + tiles * TILE, len(take))))
            take_Q, back_Q = (torch.tensor(x, device=self.device) for x in (take, back))
            self._orders[group, tiles] = Order(group, take_Q, back_Q, calls)
        return self._orders[group, tiles]


class DecodePass:
    """Attention of one new token [B, H, 1, C] of every row."""

    def __init__(self, cache: KVCache, seating: Seating, places: Sequence[int]) -> None:
        self.seating, self.size = seating, cache.block_size
        self.at_B = torch.tensor(places, device=seating.device)
        self.blocks = cache.blocks[: max(places) // self.size + 1]
        self._writes: list[tuple[torch.Tensor, torch.Tensor]] = []  # by block: rows that write to it, and where
        for number in range(len(self.blocks)):
            rows = [slot for slot, place in enumerate(places) if place // self.size == number]
            rows_R = torch.tensor(rows, dtype=torch.long, device=seating.device)
            self._writes.append((rows_R, self.at_B[rows_R] % self.size))
        self._masks: dict[Any, Mask] = {}  # layers with the same window share them

    def __call__(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, heads, kv_heads, group = q.shape[0], q.shape[1], k.shape[1], q.shape[1] // k.shape[1]
        q_BKGC = q.view(rows, kv_heads, group, -1)
        for block, (rows_R, at_R) in zip(self.blocks, self._writes, strict=True):
            for store, new in zip(block[layer.index], (k, v), strict=True):
                store[rows_R, :, at_R] = new[rows_R, :, 0]
        out = sink(layer, merge(self._prefixes(layer, q_BKGC), self._suffixes(layer, q_BKGC)))
        return out.reshape(rows, heads, 1, -1)

    def _suffixes(self, layer: Layer, q_BKGC: torch.Tensor) -> KV:
        """Output [B, K, G, C] and log-sum-exp [B, K, G] over each row's own tokens."""
        group = q_BKGC.shape[2]
        q = pad(q_BKGC, (0, 0, 0, group % 2))  # with an odd number, threads' workspaces in the operator are unaligned
        own: KV | None = None
        for number, block in enumerate(self.blocks):
            bias, blind = self._suffix_mask(layer, number, q.dtype)
            bias = bias.expand(-1, -1, q.shape[2], -1)
            part = attend_part(layer, q, *block[layer.index], Mask(bias, blind if len(self.blocks) > 1 else None))
            own = part if own is None else merge(own, part)
        assert own is not None
        return own[0][:, :, :group], own[1][:, :, :group]

    def _prefixes(self, layer: Layer, q_BKGC: torch.Tensor) -> KV:
        """Output [B, K, G, C] and log-sum-exp [B, K, G] over the rows' prompts."""
        rows, kv_heads, group, size = q_BKGC.shape
        order = self.seating.order(group, _TILES if fused(layer, q_BKGC.device) else 1)
        q_KQC = q_BKGC.transpose(0, 1).reshape(kv_heads, rows * group, size)[:, order.take]
        parts = []
        for prefix, first, stop in order.calls:
            k, v = (x[None] for x in prefix.kv[layer.index])
            visible = None if layer.window is None else self._prefix_mask(layer, order, first, stop, k)
            parts.append(attend_part(layer, q_KQC[None, :, first:stop], k, v, visible))
        out, lse = (torch.cat(x, dim=2)[0][:, order.back] for x in zip(*parts, strict=True))
        return out.view(kv_heads, rows, group, -1).transpose(0, 1), lse.view(kv_heads, rows, group).transpose(0, 1)

    def _suffix_mask(self, layer: Layer, number: int, dtype: torch.dtype) -> Mask:
        """What each row sees of a block."""
        key = "suffix", layer.window, number
        if key not in self._masks:
            to = torch.arange(number * self.size, (number + 1) * self.size, device=self.at_B.device)
            self._masks[key] = mask(seen(self.at_B[:, None], to, layer.window)[:, None, None], dtype)
        return self._masks[key]

    def _prefix_mask(self, layer: Layer, order: Order, first: int, stop: int, k: torch.Tensor) -> Mask:
        """What the queries of a call see, through the layer's window, of the keys [1, K, L, C] that a prefix kept."""
        key = "prefix", layer.window, order.group, first, stop, k.shape[2]
        if key not in self._masks:
            at_Q = self.at_B[order.take[first:stop] // order.group]
            to = torch.arange(-k.shape[2], 0, device=self.at_B.device)  # positions from the end of the prompt
            self._masks[key] = mask(seen(at_Q[:, None], to, layer.window)[None, None], k.dtype)
        return self._masks[key]
