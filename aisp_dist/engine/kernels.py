"""The GPU kernels of a step's attention, over keys and values in pages. Owns their launches; pages.py owns the tables.
Needs Triton, which comes with torch where torch has CUDA.

A prompt's prefix is read by tiles of rows that share it, in parts of SPLIT keys; then every row goes through its own
suffix and merges the parts. Sizes and orders depend on one row and its prompt alone, so its bits do too.

Shapes: B rows, K key-value heads, G query heads of each, C head size of keys, V of values, P keys of a page, N tiles of
R rows, W pages of a line, S parts of a prefix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

SPLIT = 512  # keys of a prefix that one program reads


def queries(dtype: torch.dtype, size: int) -> int:
    """Queries of a tile: as many as a multiprocessor's registers and shared memory take."""
    return 16 if dtype == torch.float32 else 64 if size <= 128 else 32


class Tables(NamedTuple):
    """Where things are, all int32. pages [*, W]: by line, a row's suffix at the row's own, prompts after them;
    lengths [*]: tokens of a line's prompt; prompt [B]: the line of a row's prompt, -1 for an empty row;
    tile_line [N], tile_rows [N, R]: rows that share a prompt, -1 where there are none. num_splits: S of the longest."""

    pages: torch.Tensor
    lengths: torch.Tensor
    prompt: torch.Tensor
    tile_line: torch.Tensor
    tile_rows: torch.Tensor
    num_splits: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """W, N, S: what a captured step is captured for."""
        return self.pages.shape[1], len(self.tile_line), self.num_splits

    def copy(self, device: torch.device) -> Tables:
        there: Any = {name: x.to(device, copy=True) for name, x in self.tensors().items()}
        return self._replace(**there)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: x for name, x in self._asdict().items() if isinstance(x, torch.Tensor)}


@torch.library.custom_op("aisp::attend", mutates_args=("k_store", "v_store"))
def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    k_store: torch.Tensor,
    v_store: torch.Tensor,
    at: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    prompt: torch.Tensor,
    tile_line: torch.Tensor,
    tile_rows: torch.Tensor,
    num_splits: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Writes new keys [B, K, C] and values [B, K, V] of rows, at places at [B] of their suffixes, into pages of the
    stores [*, K, P, C] and [*, K, P, V]; then attention of q [B, K, G, C] over prefixes and suffixes, as [B, K, G, V].
    window and softcap are 0 for none; sinks [K * G]. The tables are those of Tables."""
    rows, heads, group, size = q.shape
    page_size, value_size = v_store.shape[2:]
    tiles, per_tile = tile_rows.shape
    out = torch.empty(rows, heads, group, value_size, dtype=q.dtype, device=q.device)
    part = torch.empty(rows, heads, group, num_splits, value_size, dtype=torch.float32, device=q.device)
    lse = torch.empty(rows, heads, group, num_splits, dtype=torch.float32, device=q.device)
    sizes = {"K": heads, "C": size, "CP": _power(size), "V": value_size, "VP": _power(value_size), "P": page_size}
    how = {"G": group, "S": num_splits, "SPLIT": SPLIT, "WINDOW": window, "SOFTCAP": softcap}
    how["num_warps"] = 8 if q.dtype == torch.float32 or size > 128 else 4
    where, width = (k_store, v_store, pages), pages.shape[1]
    _write[(rows, heads)](keys, values, *where, at, width, **sizes)
    tiled = max(16, _power(per_tile * group))
    tile = lengths, tile_line, tile_rows
    _prefix[(tiles, heads, num_splits)](
        q, *where, *tile, at, part, lse, scale, width, R=per_tile, Q=tiled, **sizes, **how
    )
    sink = q if sinks is None else sinks.float()
    row = lengths, prompt
    padded = max(16, _power(group))
    _suffix[(rows, heads)](
        q, *where, *row, at, part, lse, sink, out, scale, width, SINKS=sinks is not None, GP=padded, **sizes, **how
    )
    return out


@attend.register_fake
def _shape(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return q.new_empty(*q.shape[:3], values.shape[2])


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    keys,
    values,
    k_store,
    v_store,
    pages,
    at,
    width,
    K: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    P: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    place = tl.load(at + row)
    page = tl.load(pages + row * width + place // P).to(tl.int64)
    to = (page * K + head) * P + place % P
    c, v = tl.arange(0, CP), tl.arange(0, VP)
    tl.store(k_store + to * C + c, tl.load(keys + (row * K + head) * C + c, mask=c < C), mask=c < C)
    tl.store(v_store + to * V + v, tl.load(values + (row * K + head) * V + v, mask=v < V), mask=v < V)


@triton.jit  # type: ignore[untyped-decorator]
def _page(  # type: ignore[no-untyped-def]
    q,
    seen,
    k_store,
    v_store,
    page,
    head,
    top,
    total,
    acc,
    scale,
    K: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    P: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Online softmax of queries q [*, CP] over one page, of which they see seen [*, P]."""
    j, c, v = tl.arange(0, P), tl.arange(0, CP), tl.arange(0, VP)
    first = (page.to(tl.int64) * K + head) * P
    held = seen.to(tl.int32).max(0) > 0  # what nobody sees may hold anything, NaN too
    k = tl.load(k_store + (first + j)[None, :] * C + c[:, None], mask=held[None, :] & (c < C)[:, None], other=0.0)
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if SOFTCAP > 0:
        x = scores / SOFTCAP
        x2 = x * x  # near 0 the difference below would lose what fp32 can hold
        near = x * (1 - x2 * (1 / 3 - x2 * (2 / 15 - x2 * (17 / 315 - x2 * (62 / 2835)))))
        scores = SOFTCAP * tl.where(x2 < 0.04, near, 2 * tl.sigmoid(2 * x) - 1)
    scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp(scores - base[:, None])
    keep = tl.exp(top - base)
    values = tl.load(v_store + (first + j)[:, None] * V + v[None, :], mask=held[:, None] & (v < V)[None, :], other=0.0)
    acc = acc * keep[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return new, total * keep + tl.sum(weights, 1), acc


@triton.jit  # type: ignore[untyped-decorator]
def _prefix(  # type: ignore[no-untyped-def]
    queries,
    k_store,
    v_store,
    pages,
    lengths,
    tile_line,
    tile_rows,
    at,
    part,
    lse,
    scale,
    width,
    R: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = tl.load(tile_line + tile)
    if line >= 0:
        length = tl.load(lengths + line)
        start = split * SPLIT
        if start < length:
            i, c, v, j = tl.arange(0, Q), tl.arange(0, CP), tl.arange(0, VP), tl.arange(0, P)
            row = tl.load(tile_rows + tile * R + i // G, mask=i < R * G, other=-1)
            real = row >= 0
            place = tl.load(at + row, mask=real, other=0)
            query = (row * K + head) * G + i % G
            q = tl.load(queries + query[:, None] * C + c[None, :], mask=real[:, None] & (c < C)[None, :], other=0.0)
            stop = tl.minimum(start + SPLIT, length)
            if WINDOW > 0:
                oldest = length + tl.min(tl.where(real, place, 2147483647)) - WINDOW + 1
                start = tl.maximum(start, oldest // P * P)
            top = tl.full([Q], float("-inf"), tl.float32)
            total, acc = tl.zeros([Q], tl.float32), tl.zeros([Q, VP], tl.float32)
            for first in range(start, stop, P):
                page = tl.load(pages + line * width + first // P)
                seen = real[:, None] & (first + j < length)[None, :]
                if WINDOW > 0:
                    seen = seen & ((first + j)[None, :] > (length + place - WINDOW)[:, None])
                top, total, acc = _page(
                    q, seen, k_store, v_store, page, head, top, total, acc, scale, K, C, CP, V, VP, P, SOFTCAP
                )
            some = tl.where(total > 0, total, 1.0)
            to = query * S + split
            tl.store(lse + to, tl.where(total > 0, top + tl.log(some), float("-inf")), mask=real)
            tl.store(part + to[:, None] * V + v[None, :], acc / some[:, None], mask=real[:, None] & (v < V)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _suffix(  # type: ignore[no-untyped-def]
    queries,
    k_store,
    v_store,
    pages,
    lengths,
    prompt,
    at,
    part,
    lse,
    sinks,
    out,
    scale,
    width,
    SINKS: tl.constexpr,
    GP: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    i, c, v, j = tl.arange(0, GP), tl.arange(0, CP), tl.arange(0, VP), tl.arange(0, P)
    real = i < G
    query = (row * K + head) * G + i
    line = tl.load(prompt + row)
    acc = tl.zeros([GP, VP], tl.float32)
    total = tl.zeros([GP], tl.float32)
    if line >= 0:
        length, place = tl.load(lengths + line), tl.load(at + row)
        q = tl.load(queries + query[:, None] * C + c[None, :], mask=real[:, None] & (c < C)[None, :], other=0.0)
        top = tl.full([GP], float("-inf"), tl.float32)
        start = 0
        if WINDOW > 0:
            start = tl.maximum(0, place - WINDOW + 1) // P * P
        for first in range(start, place + 1, P):
            page = tl.load(pages + row * width + first // P)
            seen = real[:, None] & (first + j <= place)[None, :]
            if WINDOW > 0:
                seen = seen & (first + j > place - WINDOW)[None, :]
            top, total, acc = _page(
                q, seen, k_store, v_store, page, head, top, total, acc, scale, K, C, CP, V, VP, P, SOFTCAP
            )
        for split in range(0, tl.cdiv(length, SPLIT)):
            to = query * S + split
            other = tl.load(lse + to, mask=real, other=float("-inf"))
            values = tl.load(part + to[:, None] * V + v[None, :], mask=real[:, None] & (v < V)[None, :], other=0.0)
            new = tl.maximum(top, other)
            base = tl.where(new == float("-inf"), 0.0, new)
            keep, more = tl.exp(top - base), tl.exp(other - base)
            acc = acc * keep[:, None] + values * more[:, None]
            total = total * keep + more
            top = new
        if SINKS:
            sink = tl.load(sinks + head * G + i, mask=real, other=0.0)
            new = tl.maximum(top, sink)
            keep = tl.exp(top - new)
            acc, total = acc * keep[:, None], total * keep + tl.exp(sink - new)
    answer = acc / tl.where(total > 0, total, 1.0)[:, None]
    kept = real[:, None] & (v < V)[None, :]
    tl.store(out + query[:, None] * V + v[None, :], answer.to(out.dtype.element_ty), mask=kept)
