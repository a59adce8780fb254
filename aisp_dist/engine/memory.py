"""How many bytes decoding takes, and the KV cache that fits. With

    c  bytes of a token's keys and values in all layers (LM.token_bytes)
    B  rows, T steps (max_new_tokens), D hidden size, V vocabulary

a run needs, beside the model's weights: what rows keep by step, 16 B T; logits and their copies, B V; the controls of
B / 4 prompts, 4 T D each; the prefill of one prompt. What is left holds keys and values, c a token: prompts, each once,
the starts of answers that are continued, and what rows have decoded so far. At least one full prompt with one row of
all its steps must fit, and a first block of every row; rows that find no room for the next block wait (decode.py).
"""

from __future__ import annotations

import psutil
import torch

from aisp_dist.config import ConfigError
from aisp_dist.engine.attention import CHUNK, TILE
from aisp_dist.engine.kv import KVCache, suffixes
from aisp_dist.engine.lm import LM

_SPARE = 0.05  # of the free memory, left to the allocator's fragments and to other processes
_PREFILL = 4096  # tokens of a prompt whose prefill is set aside


def parts(lm: LM, num_rows: int, num_steps: int) -> dict[str, int]:
    """Bytes by part without weights and prompts: the least for suffixes, the most for the others."""
    itemsize, heads = lm.dtype.itemsize, max(at.kv_heads * at.group for at in lm.attention)
    longest = min(_PREFILL, lm.context_length or _PREFILL)
    scores = 12 * CHUNK * heads if lm.device.type != "cpu" else 0  # the fused operator keeps none
    return {
        "suffixes": suffixes(num_rows, num_steps) * lm.token_bytes,
        "rows": num_rows * (16 * num_steps + 8 * lm.hidden_size),
        # Twice, where the base model's own are wanted too; and fp64 copies of 32 rows that draw, sorted at worst.
        "logits": lm.vocab_size * (num_rows * (12 + 2 * itemsize) + 32 * 60),
        "controls": 8 * (num_rows // 4 + 1) * num_steps * lm.hidden_size,  # twice while the table grows
        "prefill": longest * (scores + 16 * lm.hidden_size * itemsize + lm.token_bytes),
    }


def kv_cache(lm: LM, num_rows: int, num_steps: int, kv_tokens: int | None = None, share: float = 1.0) -> KVCache:
    """A cache for rows of so many steps, and for `kv_tokens` tokens of prompts, starts and rows in all; None: as many
    as fit into this process's share of the device's memory.

    Raises ConfigError, with the arithmetic, if one full prompt does not fit beside the least that rows need.
    """
    if kv_tokens is None:
        free = free_bytes(lm.device, share)
        if not _fits(lm, num_rows, num_steps, free):
            raise _too_much(lm, num_rows, num_steps, free)
        need = parts(lm, num_rows, num_steps)
        kv_tokens = int((1 - _SPARE) * free - sum(need.values()) + need["suffixes"]) // lm.token_bytes
    return KVCache(num_rows, num_steps, kv_tokens)


def _fits(lm: LM, num_rows: int, num_steps: int, free: int) -> bool:
    need = sum(parts(lm, num_rows, num_steps).values())
    return (1 - _SPARE) * free - need >= min(_PREFILL, lm.context_length or _PREFILL) * lm.token_bytes


def free_bytes(device: torch.device, share: float = 1.0) -> int:
    """Memory that this process can still take: its share of all that the device has, less what it holds, and at most
    what is free. Processes that load side by side would else each count the same free memory as theirs."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
    else:
        machine = psutil.virtual_memory()
        free, total, held = machine.available, machine.total, psutil.Process().memory_info().rss
    return max(0, min(free, int(share * total) - held))


def _too_much(lm: LM, num_rows: int, num_steps: int, free: int) -> ConfigError:
    prompt = min(_PREFILL, lm.context_length or _PREFILL)
    fewer = range(num_rows - TILE, 0, -TILE)
    rows = next((rows for rows in fewer if _fits(lm, rows, num_steps, free)), 0)
    fix = f"generator.batch_rows to {rows}" if rows else "a smaller generator.max_new_tokens, or use a smaller model"
    sums = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts(lm, num_rows, num_steps).items())
    return ConfigError(
        f"generator.batch_rows: {num_rows} rows of {num_steps} new tokens at {lm.token_bytes / 1e3:.1f} kB a token do "
        f"not fit beside a prompt of {prompt} tokens: GB needed: {sums}; free: {free / 1e9:.2f}; set {fix}"
    )
