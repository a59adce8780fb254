"""Keys and values of prompts, starts and rows, and the decode pass: one new token of every row attends to the prefix of
its prompt and to its own suffix. A prefix is stored once, and all its rows attend to it in one product. A suffix lies
in blocks of steps, which a row takes as it reaches them; blocks of any rows share arenas. Knows nothing of what rows
decode.

A row's bits do not depend on the other rows: queries attend to a prefix in tiles of TILE and to an arena in one call of
fixed shape, a row's blocks are merged in an order that its own length decides, and a part that a row does not see
changes none of its bits. This holds on one or two CPU threads; on a GPU it is untested.

Shapes: B rows (slots), H query heads, K key-value heads, G = H / K query heads of each, L keys of a prefix, A blocks of
an arena (TILE), S steps of a block, P blocks of all arenas, J blocks of a row, C head size, Q = B * G queries of a
key-value head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from aisp_dist.engine.attention import KV, TILE, Dense, Layer, Mask, Prefix, attend_part, fused, mask, merge, seen, sink

_BLOCK = 2 * TILE
_TILES = 5  # in one call of the fused operator: from 192 queries on it takes other tiles and gives other bits


def block_size(num_steps: int) -> int:
    """Steps of a block, for rows of at most `num_steps`."""
    return min(_BLOCK, num_steps + -num_steps % TILE)


def suffixes(num_rows: int, num_steps: int) -> int:
    """Tokens of the arenas that a cache needs at least: one row of all its steps, and a first block for every row."""
    size = block_size(num_steps)
    return size * (blocks := max(-(-num_steps // size), num_rows)) + size * (-blocks % TILE)


@dataclass(eq=False)
class Arena:
    """Blocks that are made together. kv: [A, K, S, C] by layer; owners: slot and number of each block in the slot's
    suffix, None for a free block."""

    kv: list[KV]
    owners: list[tuple[int, int] | None]


class KVCache:
    """For `num_rows` rows (a multiple of TILE) of at most `num_steps` tokens; `capacity`: tokens of prompts, starts and
    arenas in all, of which `free` are left. It lies on the device of the prefixes it is given."""

    def __init__(self, num_rows: int, num_steps: int, num_tokens: int) -> None:
        self.num_rows, self.capacity, self.free = num_rows, num_tokens, num_tokens
        self.block_size = block_size(num_steps)
        self.arenas: list[Arena] = []
        self.tables: list[list[tuple[Arena, int]]] = [[] for _ in range(num_rows)]  # a slot's blocks, in order
        self.prefixes: list[Prefix | None] = [None] * num_rows  # by slot
        self._seating: Seating | None = None
        self._layout: Layout | None = None

    @property
    def arena_size(self) -> int:
        """Tokens of an arena."""
        return TILE * self.block_size

    @property
    def holes(self) -> int:
        """Free blocks of the arenas."""
        return TILE * len(self.arenas) - sum(map(len, self.tables))

    def blocks(self, tokens: int) -> int:
        """Blocks of a suffix of so many tokens, at least one."""
        return max(1, -(-tokens // self.block_size))

    def arenas_for(self, blocks: int) -> int:
        """Tokens of the arenas of so many blocks."""
        return self.arena_size * -(-max(0, blocks) // TILE)

    def room(self, tokens: int, blocks: int = 0) -> bool:
        """Whether a prompt or start of so many tokens and so many blocks can be kept now."""
        if tokens + self.arenas_for(blocks - self.holes) > self.free:
            self._tidy()
        return tokens + self.arenas_for(blocks - self.holes) <= self.free

    def keep(self, dense: Dense, z_D: torch.Tensor) -> Prefix:
        """The prefix that a dense pass computed. Call it only if there is `room`."""
        self.free -= dense.length
        return Prefix(dense.kv, dense.length, z_D)

    def drop(self, prefix: Prefix) -> None:
        """Forgets a prefix that no row uses."""
        self.free += prefix.length

    def seat(self, slot: int, prefix: Prefix, given: Sequence[Sequence[KV]] = ()) -> None:
        """Starts a suffix of this prefix in a slot. given: keys and values [K, TILE, C] by layer of its first tokens,
        TILE by TILE; what lies behind the last given token is overwritten before it is seen. Call it only if there is
        `room` for the blocks."""
        self.prefixes[slot], self._seating = prefix, None
        if not self.reach(slot, max(0, TILE * len(given) - 1)):
            raise RuntimeError(f"no block is free for the {TILE * len(given)} first tokens of a row")
        for number, tile in enumerate(given):
            at, place = divmod(number * TILE, self.block_size)
            arena, index = self.tables[slot][at]
            for kv, new in zip(arena.kv, tile, strict=True):
                for store, values in zip(kv, new, strict=True):
                    store[index, :, place : place + TILE] = values

    def reach(self, slot: int, place: int) -> bool:
        """Whether the slot has the block of this place of its suffix. Takes missing ones, if there is room."""
        table, prefix = self.tables[slot], self.prefixes[slot]
        assert prefix is not None
        while len(table) * self.block_size <= place:
            if not self.holes:
                if not self.room(0, 1):
                    return False
                self.free -= self.arena_size
                size = self.block_size
                made = [[x.new_empty(TILE, len(x), size, x.shape[2]) for x in kv] for kv in prefix.kv]
                self.arenas.append(Arena([(k, v) for k, v in made], [None] * TILE))
            arena, index = self._hole()
            for store in (x for kv in arena.kv for x in kv):
                store[index] = 0  # a masked key has weight 0, but 0 * NaN of an earlier row would not be 0
            arena.owners[index] = slot, len(table)
            table.append((arena, index))
            self._layout = None
        return True

    def leave(self, slot: int) -> None:
        """Empties a slot."""
        self.prefixes[slot], self._seating, self._layout = None, None, None
        for arena, index in self.tables[slot]:
            arena.owners[index] = None
        self.tables[slot] = []
        if not any(self.prefixes):
            self._tidy()

    def attend(self, places: Sequence[int]) -> DecodePass:
        """The pass that writes one token of every slot at this place of its suffix, which the slot has reached, and
        attends; -1 for a slot without a token, whose output is not to be read. At least one slot must be taken."""
        prefix = next(prefix for prefix in self.prefixes if prefix)
        self._tidy()
        if self._seating is None:
            groups: dict[int, tuple[Prefix, list[int]]] = {}
            for slot, own in enumerate(self.prefixes):
                if own:
                    groups.setdefault(id(own), (own, []))[1].append(slot)
            self._seating = Seating(self.num_rows, list(groups.values()), prefix.z_D.device)
        if self._layout is None:
            self._layout = Layout.of(self.arenas, self.tables, prefix.z_D.device)
        return DecodePass(self, self._seating, self._layout, places)

    def _hole(self) -> tuple[Arena, int]:
        arena = next(arena for arena in self.arenas if None in arena.owners)
        return arena, arena.owners.index(None)

    def _tidy(self) -> None:
        """Gives back arenas that free blocks of others can replace, after moving what is left in them: so fewer blocks
        than an arena has are free at any step."""
        while self.holes >= TILE:
            emptiest = max(self.arenas, key=lambda arena: arena.owners.count(None))
            self.arenas.remove(emptiest)
            self.free += self.arena_size
            self._layout = None
            for index, owner in enumerate(emptiest.owners):
                if owner is not None:
                    arena, hole = self._hole()
                    for kv, old in zip(arena.kv, emptiest.kv, strict=True):
                        for store, values in zip(kv, old, strict=True):
                            store[hole] = values[index]
                    arena.owners[hole] = owner
                    self.tables[owner[0]][owner[1]] = arena, hole


@dataclass(frozen=True, eq=False)
class Layout:
    """Where blocks lie. owner, number [P]: the slot of a block (0 for a free one) and its place among the slot's
    blocks; parts [J, B]: the blocks of each slot, P where it has fewer. J is a power of two."""

    owner_P: torch.Tensor
    number_P: torch.Tensor
    parts_JB: torch.Tensor

    @staticmethod
    def of(arenas: Sequence[Arena], tables: Sequence[Sequence[tuple[Arena, int]]], device: torch.device) -> Layout:
        owners = [owner or (0, 0) for arena in arenas for owner in arena.owners]
        first = {id(arena): TILE * number for number, arena in enumerate(arenas)}
        most = 1 << (max(map(len, tables)) - 1).bit_length()
        parts = [[first[id(arena)] + index for arena, index in table] for table in tables]
        filled = [own + [len(owners)] * (most - len(own)) for own in parts]
        owner_P, number_P = torch.tensor(owners, device=device).T
        return Layout(owner_P, number_P, torch.tensor(filled, device=device).T)


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
    """Attention of one new token [B, H, 1, C] of every row, or of the first rows, if no slot behind them is taken."""

    def __init__(self, cache: KVCache, seating: Seating, layout: Layout, places: Sequence[int]) -> None:
        self.seating, self.layout, self.size = seating, layout, cache.block_size
        self.arenas = list(cache.arenas)
        self.at_B = torch.tensor(places, device=seating.device)
        writes: dict[int, tuple[Arena, list[tuple[int, int, int]]]] = {}  # by arena: row, block, step in the block
        for slot, place in enumerate(places):
            if place >= 0:
                arena, index = cache.tables[slot][place // self.size]
                writes.setdefault(id(arena), (arena, []))[1].append((slot, index, place % self.size))
        self._writes = [(arena, torch.tensor(rows, device=seating.device).T) for arena, rows in writes.values()]
        self._masks: dict[Any, Mask] = {}  # layers with the same window share them

    def __call__(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, heads, kv_heads, group = q.shape[0], q.shape[1], k.shape[1], q.shape[1] // k.shape[1]
        q_BKGC = q.view(rows, kv_heads, group, -1)
        for arena, (rows_R, index_R, at_R) in self._writes:
            for store, new in zip(arena.kv[layer.index], (k, v), strict=True):
                store[index_R, :, at_R] = new[rows_R, :, 0]
        out = sink(layer, merge(self._prefixes(layer, q_BKGC), self._suffixes(layer, q_BKGC)))
        return out.reshape(rows, heads, 1, -1)

    def _suffixes(self, layer: Layer, q_BKGC: torch.Tensor) -> KV:
        """Output [B, K, G, C] and log-sum-exp [B, K, G] over each row's own tokens."""
        group = q_BKGC.shape[2]
        q_PKGC = pad(q_BKGC, (0, 0, 0, group % 2))[self.layout.owner_P]  # an odd number unaligns threads' workspaces
        bias, blind = self._suffix_mask(layer, q_PKGC.dtype)
        bias = bias.expand(-1, -1, q_PKGC.shape[2], -1)
        outs, lses = [], []
        for number, arena in enumerate(self.arenas):
            own = slice(TILE * number, TILE * (number + 1))
            visible = Mask(bias[own], None if blind is None else blind[own])
            out, lse = attend_part(layer, q_PKGC[own], *arena.kv[layer.index], visible)
            outs.append(out[:, :, :group])
            lses.append(lse[:, :, :group])
        none, unseen = outs[0].new_zeros(1, *outs[0].shape[1:]), lses[0].new_full((1, *lses[0].shape[1:]), -math.inf)
        parts_JB = self.layout.parts_JB[:, : len(q_BKGC)]
        found = torch.cat([*outs, none])[parts_JB], torch.cat([*lses, unseen])[parts_JB]
        while len(found[0]) > 1:
            found = merge((found[0][0::2], found[1][0::2]), (found[0][1::2], found[1][1::2]))
        return found[0][0], found[1][0]

    def _prefixes(self, layer: Layer, q_BKGC: torch.Tensor) -> KV:
        """Output [B, K, G, C] and log-sum-exp [B, K, G] over the rows' prompts."""
        rows, kv_heads, group, size = q_BKGC.shape
        order = self.seating.order(group, _TILES if fused(layer, q_BKGC.new_empty(TILE, size)) else 1)
        q_KQC = q_BKGC.transpose(0, 1).reshape(kv_heads, rows * group, size)[:, order.take]
        parts = []
        for prefix, first, stop in order.calls:
            k, v = (x[None] for x in prefix.kv[layer.index])
            visible = None if layer.window is None else self._prefix_mask(layer, order, first, stop, k)
            parts.append(attend_part(layer, q_KQC[None, :, first:stop], k, v, visible))
        back = order.back[: rows * group]
        out, lse = (torch.cat(x, dim=2)[0][:, back] for x in zip(*parts, strict=True))
        return out.view(kv_heads, rows, group, -1).transpose(0, 1), lse.view(kv_heads, rows, group).transpose(0, 1)

    def _suffix_mask(self, layer: Layer, dtype: torch.dtype) -> Mask:
        """What the queries of all blocks see of them, [P, 1, 1, S]. Without a window every block has a key to see."""
        key = "suffix", layer.window
        if key not in self._masks:
            at_P = self.at_B[self.layout.owner_P].clamp(min=0)
            to_PS = self.layout.number_P[:, None] * self.size + torch.arange(self.size, device=at_P.device)
            visible = mask(seen(at_P[:, None], to_PS, layer.window)[:, None, None], dtype)
            self._masks[key] = visible if layer.window is not None else visible._replace(blind=None)
        return self._masks[key]

    def _prefix_mask(self, layer: Layer, order: Order, first: int, stop: int, k: torch.Tensor) -> Mask:
        """What the queries of a call see, through the layer's window, of the keys [1, K, L, C] that a prefix kept."""
        key = "prefix", layer.window, order.group, first, stop, k.shape[2]
        if key not in self._masks:
            at_Q = self.at_B[order.take[first:stop] // order.group]
            to = torch.arange(-k.shape[2], 0, device=self.at_B.device)  # positions from the end of the prompt
            self._masks[key] = mask(seen(at_Q[:, None], to, layer.window)[None, None], k.dtype)
        return self._masks[key]
