"""How many bytes decoding takes, and the KV cache that fits. With

    c  bytes of a token's keys and values in all layers (LM.token_bytes)
    B  rows, T steps (max_new_tokens), D hidden size, V vocabulary

a run needs, beside the model's weights: suffixes, B T c; what rows keep by step, 32 B T; logits and their copies, B V;
the controls of B / 4 prompts, 4 T D each; the prefill of one prompt. What is left holds prompts, c a token, each once.
"""

from __future__ import annotations

import psutil
import torch

from aisp_dist.config import ConfigError
from aisp_dist.engine.attention import CHUNK, TILE
from aisp_dist.engine.kv import KVCache
from aisp_dist.engine.lm import LM

_SPARE = 0.05  # of the free memory, left to the allocator's fragments and to other processes
_PREFILL = 4096  # tokens of a prompt whose prefill is set aside


def parts(lm: LM, num_rows: int, num_steps: int) -> dict[str, int]:
    """Bytes by part, at most, without weights and prompts."""
    itemsize, heads = lm.dtype.itemsize, max(at.kv_heads * at.group for at in lm.attention)
    longest = min(_PREFILL, lm.context_length or _PREFILL)
    scores = 12 * CHUNK * heads if lm.device.type != "cpu" else 0  # the fused operator keeps none
    return {
        "suffixes": num_rows * num_steps * lm.token_bytes,
        "rows": num_rows * (32 * num_steps + 8 * lm.hidden_size),
        # Twice, where the base model's own are wanted too; and fp64 copies of 32 rows that draw, sorted at worst.
        "logits": lm.vocab_size * (num_rows * (12 + 2 * itemsize) + 32 * 60),
        "controls": 8 * (num_rows // 4 + 1) * num_steps * lm.hidden_size,  # twice while the table grows
        "prefill": longest * (scores + 16 * lm.hidden_size * itemsize + lm.token_bytes),
    }


def kv_cache(lm: LM, num_rows: int, num_steps: int, prompt_tokens: int | None = None, share: float = 1.0) -> KVCache:
    """A cache for rows of so many steps, and for prompts of `prompt_tokens` tokens in all; None: as many as fit into
    this process's share of the device's memory.

    Raises ConfigError, with the arithmetic, if one full prompt does not fit.
    """
    if prompt_tokens is None:
        free, need = free_bytes(lm.device, share), parts(lm, num_rows, num_steps)
        prompt_tokens = int((1 - _SPARE) * free - sum(need.values())) // lm.token_bytes
        if prompt_tokens < min(_PREFILL, lm.context_length or _PREFILL):
            raise _too_much(lm, num_rows, num_steps, need, free)
    return KVCache(num_rows, num_steps, prompt_tokens)


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


def _too_much(lm: LM, num_rows: int, num_steps: int, need: dict[str, int], free: int) -> ConfigError:
    prompt = min(_PREFILL, lm.context_length or _PREFILL)
    fixed = sum(parts(lm, 0, num_steps).values())
    per_row = (sum(need.values()) - fixed) / num_rows
    rows = int(((1 - _SPARE) * free - fixed - prompt * lm.token_bytes) / per_row) // TILE * TILE
    fix = (
        f"generator.batch_rows to {rows}" if rows > 0 else "a smaller generator.max_new_tokens, or use a smaller model"
    )
    sums = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in need.items())
    return ConfigError(
        f"generator.batch_rows: {num_rows} rows of {num_steps} new tokens at {lm.token_bytes / 1e3:.1f} kB a token do "
        f"not fit beside a prompt of {prompt} tokens: GB needed: {sums}; free: {free / 1e9:.2f}; set {fix}"
    )
