"""Keys and values on a CPU, and the pass in which one token of every row attends to its prompt's prefix and its own
suffix. A prompt's prefix is stored once, and all its rows meet it in one product. Suffixes stand side by side in blocks
of steps, made when a row first reaches them. Knows nothing of what rows decode.

The same bits whatever the schedule: a prefix is met in tiles of TILE queries, a block by all rows at once, and parts
that a row does not see change none of its bits. On one thread or two.

Shapes: B rows (slots), H query heads, K key-value heads, G = H / K, L keys of a prefix, S steps of a block, C head
size, Q = B * G queries of a key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from aisp_dist.engine.attention import KV, TILE, Dense, Layer, Mask, Prefix, attend_part, mask, merge, seen, sink

_BLOCK = 2 * TILE
_TILES = 5  # in one call: from 192 queries on, the kernel takes other tiles and gives other bits


class Blocks:
    """The store of an engine with `num_rows` rows (a multiple of TILE) of at most `num_steps` tokens, for prompts of
    `num_tokens` in all (capacity, the longest that fits)."""

    def __init__(self, num_rows: int, num_steps: int, num_tokens: int) -> None:
        self.num_rows, self.capacity, self.free = num_rows, num_tokens, num_tokens
        self.size = min(_BLOCK, num_steps + -num_steps % TILE)
        self.blocks: list[list[KV]] = []  # by block, by layer: [B, K, S, C]
        self.prefixes: list[Prefix | None] = [None] * num_rows
        self._seating: Seating | None = None

    def room(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens can be kept now."""
        return tokens <= self.free

    def keep(self, dense: Dense, z_D: torch.Tensor) -> Prefix:
        """The prefix that a dense pass left. `room` must have said yes."""
        self.free -= dense.length
        return Prefix(dense.kv, dense.length, z_D)

    def drop(self, prefix: Prefix) -> None:
        """Forgets a prefix that no row uses."""
        self.free += prefix.length

    def seat(self, slot: int, prefix: Prefix) -> None:
        """An empty suffix for a new trajectory."""
        self.prefixes[slot], self._seating = prefix, None
        for block in self.blocks:
            for store in (x for kv in block for x in kv):
                store[slot] = 0  # masked keys weigh 0, but 0 * NaN left by another row would not be 0

    def leave(self, slot: int) -> None:
        self.prefixes[slot], self._seating = None, None
        if not any(self.prefixes):
            self.blocks.clear()

    def reserve(self, lengths: Sequence[int]) -> bool:
        """Room for suffixes of these lengths, by slot. What all rows can need has been set aside (memory.py)."""
        like = next(prefix for prefix in self.prefixes if prefix).kv
        while len(self.blocks) * self.size < max(lengths):
            sized = [[x.new_zeros(self.num_rows, len(x), self.size, x.shape[2]) for x in kv] for kv in like]
            self.blocks.append([(k, v) for k, v in sized])
        return True

    def attend(self, at_B: torch.Tensor) -> Step:
        """The pass of rows whose tokens go to these places of their suffixes."""
        if self._seating is None:
            found: dict[int, tuple[Prefix, list[int]]] = {}
            for slot, prefix in enumerate(self.prefixes):
                if prefix:
                    found.setdefault(id(prefix), (prefix, []))[1].append(slot)
            self._seating = Seating(self.num_rows, list(found.values()))
        return Step(self, self._seating, at_B)


@dataclass(frozen=True, eq=False)
class Order:
    """Queries in the order in which they meet prefixes. take: their places in [Q], each prompt's padded to whole tiles;
    back [Q]: where each query's answer is; calls: (prefix, first, stop) of the kernel's calls."""

    take: torch.Tensor
    back: torch.Tensor
    calls: list[tuple[Prefix, int, int]]


@dataclass(frozen=True, eq=False)
class Seating:
    """Prefixes with the slots that attend to them. Slots of none do harmless padding work."""

    num_rows: int
    groups: list[tuple[Prefix, list[int]]]
    _orders: dict[tuple[int, int], Order] = field(default_factory=dict)

    def order(self, group: int, tiles: int) -> Order:
        """For G queries a row and key-value head, at most so many tiles in a call."""
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
            self._orders[group, tiles] = Order(torch.tensor(take), torch.tensor(back), calls)
        return self._orders[group, tiles]


class Step:
    """One token [B, H, 1, C] of every row."""

    def __init__(self, store: Blocks, seating: Seating, at_B: torch.Tensor) -> None:
        self.seating, self.at_B, self.size = seating, at_B, store.size
        self.blocks = store.blocks[: int(at_B.max()) // store.size + 1]
        self._shared: dict[Any, Any] = {}  # what the layers share

    def __call__(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, heads, kv_heads, group = q.shape[0], q.shape[1], k.shape[1], q.shape[1] // k.shape[1]
        q_BKGC = q.view(rows, kv_heads, group, -1)
        self._write(layer, k, v)
        out = sink(layer, merge(self._prefixes(layer, q_BKGC), self._suffixes(layer, q_BKGC)))
        return out.reshape(rows, heads, 1, -1)

    def _write(self, layer: Layer, k: torch.Tensor, v: torch.Tensor) -> None:
        for number, block in enumerate(self.blocks):
            if number not in self._shared:
                rows = (self.at_B // self.size == number).nonzero()[:, 0]
                self._shared[number] = rows, self.at_B[rows] % self.size
            rows, at = self._shared[number]
            for store, new in zip(block[layer.index], (k, v), strict=True):
                store[rows, :, at] = new[rows, :, 0]

    def _suffixes(self, layer: Layer, q_BKGC: torch.Tensor) -> KV:
        """Output [B, K, G, C] and log-sum-exp [B, K, G] over rows' own tokens."""
        group = q_BKGC.shape[2]
        q = pad(q_BKGC, (0, 0, 0, group % 2))  # an odd number would leave a thread's workspace unaligned
        own: KV | None = None
        for number, block in enumerate(self.blocks):
            key = "suffix", number, layer.window
            if key not in self._shared:
                to = torch.arange(number * self.size, (number + 1) * self.size)
                self._shared[key] = mask(seen(self.at_B[:, None], to, layer.window)[:, None, None], q.dtype)
            bias, blind = self._shared[key]
            bias = bias.expand(-1, -1, q.shape[2], -1)
            part = attend_part(layer, q, *block[layer.index], Mask(bias, blind if len(self.blocks) > 1 else None))
            own = part if own is None else merge(own, part)
        assert own is not None
        return own[0][:, :, :group], own[1][:, :, :group]

    def _prefixes(self, layer: Layer, q_BKGC: torch.Tensor) -> KV:
        """Output [B, K, G, C] and log-sum-exp [B, K, G] over the prompts of the rows."""
        rows, kv_heads, group, size = q_BKGC.shape
        order = self.seating.order(group, 1 if layer.softcap is not None else _TILES)
        q_KQC = q_BKGC.transpose(0, 1).reshape(kv_heads, rows * group, size)[:, order.take]
        parts = []
        for prefix, first, stop in order.calls:
            k, v = (x[None] for x in prefix.kv[layer.index])
            part = (
                None
                if layer.window is None
                else self._window(layer, q_KQC.dtype, order, first, stop, k.shape[2], group)
            )
            parts.append(attend_part(layer, q_KQC[None, :, first:stop], k, v, part))
        out, lse = (torch.cat(x, dim=2)[0][:, order.back] for x in zip(*parts, strict=True))
        return out.view(kv_heads, rows, group, -1).transpose(0, 1), lse.view(kv_heads, rows, group).transpose(0, 1)

    def _window(
        self, layer: Layer, dtype: torch.dtype, order: Order, first: int, stop: int, kept: int, group: int
    ) -> Mask:
        """What the queries of a call see of the `kept` last keys of a prefix."""
        key = "prefix", layer.window, first, stop, kept
        if key not in self._shared:
            at_Q = self.at_B[order.take[first:stop] // group]
            to = torch.arange(-kept, 0)  # positions counted from the end of the prompt
            self._shared[key] = mask(seen(at_Q[:, None], to, layer.window)[None, None], dtype)
        masked: Mask = self._shared[key]
        return masked
