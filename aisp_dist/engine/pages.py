"""Keys and values on a GPU, in pages taken when they are needed: a prompt's prefix once, and each row's suffix as far
as it has come. Owns the pages and the tables by which kernels.py finds them. Knows nothing of what rows decode.

Shapes: B rows, K key-value heads, L tokens of a prompt, C head size, P tokens of a page, W pages of a line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from aisp_dist.engine import kernels
from aisp_dist.engine.attention import Dense, Layer, Pass, Prefix
from aisp_dist.engine.lm import LM

PAGE = 64


class Pages:
    """The store of an engine with `num_rows` rows of at most `num_steps` tokens, of `num_pages` pages. capacity: tokens
    of the longest prompt that fits.

    A line of the tables is a row's suffix or, after those, a prompt. Tables live on the host and are copied whole by
    `reserve`, so that steps in between find them at fixed places."""

    def __init__(self, lm: LM, num_rows: int, num_steps: int, num_pages: int) -> None:
        self.num_rows, self.device, self.dtype = num_rows, lm.device, lm.dtype
        self.capacity = (num_pages - 1 - max(num_rows, _pages(num_steps))) * PAGE
        self.store = [
            (
                torch.zeros(num_pages, at.kv_heads, PAGE, at.key_size, dtype=lm.dtype, device=lm.device),
                torch.zeros(num_pages, at.kv_heads, PAGE, at.value_size, dtype=lm.dtype, device=lm.device),
            )
            for at in lm.attention
        ]
        tile = kernels.queries(lm.dtype, max(max(at.key_size, at.value_size) for at in lm.attention))
        self.rows_per_tile = max(1, tile // max(at.group for at in lm.attention))
        self.free = list(range(num_pages - 1, 0, -1))  # page 0 takes what empty rows write
        self.free_lines = list(range(4 * num_rows - 1, num_rows - 1, -1))
        self.held: dict[int, list[int]] = {slot: [] for slot in range(num_rows)}  # pages by line
        self.seats: list[Prefix | None] = [None] * num_rows
        self._pages = torch.zeros(4 * num_rows, 16, dtype=torch.int32)
        self._lengths = torch.zeros(4 * num_rows, dtype=torch.int32)
        self._moved = self._paged = True
        self._placed: dict[tuple[int, int, int], kernels.Tables] = {}
        self.tables: kernels.Tables

    def room(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens can be kept now, with a page left for each row; for none, whether a row
        can be seated."""
        return bool(self.free_lines) and len(self.free) >= (_pages(tokens) + self.num_rows if tokens else 1)

    def keep(self, dense: Dense, z_D: torch.Tensor) -> Prefix:
        """The prefix that a dense pass left, copied to pages. `room` must have said yes."""
        line, count = self.free_lines.pop(), _pages(dense.length)
        self.held[line] = []
        self._take(line, count)
        self._lengths[line] = dense.length
        to = torch.tensor(self.held[line], device=self.device)
        for pair, kv in zip(self.store, dense.kv, strict=True):
            for pages, x in zip(pair, kv, strict=True):  # a sliding layer holds the last tokens only
                whole = pad(x, (0, 0, dense.length - x.shape[1], count * PAGE - dense.length))
                pages[to] = whole.view(len(x), count, PAGE, -1).transpose(0, 1)
        return Prefix([], dense.length, z_D, line)

    def drop(self, prefix: Prefix) -> None:
        """Forgets a prefix that no row uses."""
        self._give(prefix.line)
        del self.held[prefix.line]
        self.free_lines.append(prefix.line)

    def seat(self, slot: int, prefix: Prefix) -> None:
        """An empty suffix for a new trajectory, and its first page."""
        self.seats[slot], self._moved = prefix, True
        self._take(slot, 1)

    def leave(self, slot: int) -> None:
        self.seats[slot], self._moved = None, True
        self._give(slot)

    def reserve(self, lengths: Sequence[int]) -> bool:
        """Room for suffixes of these lengths, by slot; False where pages ran out."""
        for slot, length in enumerate(lengths):
            missing = _pages(length) - len(self.held[slot])
            if missing > len(self.free):
                return False
            self._take(slot, missing)
        self._upload()
        return True

    def attend(self, at_B: torch.Tensor) -> Pass:
        """The pass of rows whose tokens go to these places of their suffixes."""
        tables, at = self.tables, at_B.to(torch.int32)

        def step(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            rows, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
            out: torch.Tensor = kernels.attend(
                q.reshape(rows, kv_heads, heads // kv_heads, -1).to(self.dtype).contiguous(),
                k[:, :, 0].to(self.dtype).contiguous(),
                v[:, :, 0].to(self.dtype).contiguous(),
                *self.store[layer.index],
                at,
                **tables._asdict(),
                scale=layer.scaling,
                window=layer.window or 0,
                softcap=layer.softcap or 0.0,
                sinks=layer.sinks,
            )
            return out.view(rows, heads, 1, -1)

        return step

    def _take(self, line: int, count: int) -> None:
        if count > 0:
            held = self.held[line]
            while len(held) + count > self._pages.shape[1]:
                self._pages = pad(self._pages, (0, self._pages.shape[1]))
            taken = [self.free.pop() for _ in range(count)]
            self._pages[line, len(held) : len(held) + count] = torch.tensor(taken, dtype=torch.int32)
            held += taken
            self._paged = True

    def _give(self, line: int) -> None:
        self.free += self.held[line][::-1]
        self.held[line] = []
        self._pages[line] = 0
        self._paged = True

    def _upload(self) -> None:
        """The tables as they stand now, to where they are or, where one has outgrown its place, to a new one."""
        if not (self._moved or self._paged):
            return
        tiles: list[tuple[int, list[int]]] = []
        by_line: dict[int, list[int]] = defaultdict(list)
        for slot, seat in enumerate(self.seats):
            if seat:
                by_line[seat.line].append(slot)
        for line, slots in by_line.items():
            tiles += [(line, slots[i : i + self.rows_per_tile]) for i in range(0, len(slots), self.rows_per_tile)]
        tiles += [(-1, [-1])] * (_power(max(1, len(tiles))) - len(tiles))
        rows = [[*slots, *[-1] * (self.rows_per_tile - len(slots))] for _, slots in tiles]
        prompt = [seat.line if seat else -1 for seat in self.seats]
        longest = max((seat.length for seat in self.seats if seat), default=1)
        new = kernels.Tables(
            pages=self._pages,
            lengths=self._lengths,
            prompt=torch.tensor(prompt, dtype=torch.int32),
            tile_line=torch.tensor([line for line, _ in tiles], dtype=torch.int32),
            tile_rows=torch.tensor(rows, dtype=torch.int32),
            num_splits=_power(-(-longest // kernels.SPLIT)),
        )
        if new.shape not in self._placed:
            self._placed[new.shape] = new.copy(self.device)
        self.tables = self._placed[new.shape]
        for there, here in zip(self.tables.tensors().values(), new.tensors().values(), strict=True):
            there.copy_(here)
        self._moved = self._paged = False


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE)


def _power(count: int) -> int:
    """The next power of two, so that few shapes occur."""
    return 1 << (count - 1).bit_length()
