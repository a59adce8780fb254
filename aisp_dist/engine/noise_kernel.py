"""noise.white as one GPU kernel: the same bits as its tensor operations, in one launch. Needs Triton, which comes with
torch where torch has CUDA."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from aisp_dist.philox import NOISE

_BLOCK = 1024


def white(key: torch.Tensor, step: torch.Tensor, sample: torch.Tensor, dim: int, table: torch.Tensor) -> torch.Tensor:
    """As noise.white, with its table of quantiles on the same device."""
    steps, samples = (step + torch.zeros_like(sample)), (sample + torch.zeros_like(step))
    drawn: torch.Tensor = _draw(key.expand(*steps.shape, 2).contiguous(), steps, samples, dim, table)
    return drawn


@torch.library.custom_op("aisp::white", mutates_args=())
def _draw(
    keys: torch.Tensor, steps: torch.Tensor, samples: torch.Tensor, dim: int, table: torch.Tensor
) -> torch.Tensor:
    out = torch.empty(*steps.shape, dim, device=keys.device)
    if out.numel():
        grid = (steps.numel(), triton.cdiv(dim, _BLOCK))
        _white[grid](keys, steps, samples, table, out, dim, STREAM=NOISE, BLOCK=_BLOCK)
    return out


@_draw.register_fake
def _shape(keys: torch.Tensor, steps: torch.Tensor, samples: torch.Tensor, dim: int, table: Any) -> torch.Tensor:
    shape: torch.Tensor = table.new_empty(*steps.shape, dim)
    return shape


@triton.jit  # type: ignore[untyped-decorator]
def _white(keys, steps, samples, table, out, dim, STREAM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One vector a program in axis 0. Every coordinate computes its whole counter block and keeps its own 16 bits."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(keys + 2 * row) | (tl.load(keys + 2 * row + 1) << 32)
    step, sample = tl.load(steps + row).to(tl.uint32), tl.load(samples + row).to(tl.uint32)
    block = (at // 8).to(tl.uint32)
    none = tl.zeros_like(block)
    w0, w1, w2, w3 = tl.philox(seed, block, step + none, sample + none, none + STREAM)
    half = at % 8
    word = tl.where(half < 4, tl.where(half < 2, w0, w1), tl.where(half < 6, w2, w3))
    drawn = tl.where(half % 2 == 0, word & 0xFFFF, word >> 16)
    tl.store(out + row * dim + at, tl.load(table + drawn.to(tl.int32)), mask=at < dim)
