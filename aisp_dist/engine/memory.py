"""What decoding takes in bytes, and the store of keys and values that fits. With

    c  bytes of a token's keys and values in all layers (LM.token_bytes)
    B  rows, tau tokens of a response, V vocabulary, D hidden size, A prompts under control

the parts are: the model's weights; prompts, c a token, each once; suffixes, c a token of every row; logits and their
copies, B V; controls, 4 A tau D; the prefill of a prompt. On a CPU suffixes are set aside whole and made when reached;
on a GPU what is left beside the other parts is cut into pages that prompts and suffixes share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from aisp_dist.config import ConfigError
from aisp_dist.engine.attention import CHUNK
from aisp_dist.engine.blocks import Blocks
from aisp_dist.engine.lm import LM

_SPARE = 0.05  # of what is free, left to the allocator's cracks and to other processes
_PREFILL = 4096  # tokens of a prompt whose prefill is set aside

if TYPE_CHECKING:
    from aisp_dist.engine.pages import Pages


def parts(lm: LM, num_rows: int, num_steps: int, prompt_tokens: int, num_controls: int) -> dict[str, int]:
    """Bytes by part, at most. prompt_tokens: of all prompts held; num_controls: prompts under control."""
    itemsize, heads = lm.dtype.itemsize, max(at.kv_heads * at.group for at in lm.attention)
    longest = min(_PREFILL, lm.context_length or _PREFILL)
    weights = {id(p): p.nbytes for part in (lm.decoder, lm.head) for p in part.parameters()}
    scores = 12 * CHUNK * heads if lm.device.type == "cuda" else 0
    return {
        "weights": sum(weights.values()),
        "prompts": prompt_tokens * lm.token_bytes,
        "suffixes": num_rows * num_steps * lm.token_bytes,
        # Twice, where the base model's own are wanted too; and those of which tokens are drawn.
        "logits": lm.vocab_size * (num_rows * (12 + 2 * itemsize) + 32 * 60),
        "controls": 8 * (num_controls + 1) * num_steps * lm.hidden_size,  # twice while the table grows
        "prefill": longest * (scores + 16 * lm.hidden_size * itemsize + lm.token_bytes),
    }


def store(lm: LM, num_rows: int, num_steps: int, prompt_tokens: int | None = None) -> Blocks | Pages:
    """A store for rows of so many steps and, if told, for prompts of so many tokens in all; else for what is free.
    Raises ConfigError, with the arithmetic, where not even one full prompt and one full response fit."""
    need = parts(lm, num_rows, num_steps, 0, num_rows // 4)
    beside = sum(need[name] for name in ("logits", "controls", "prefill"))
    if lm.device.type == "cuda":
        from aisp_dist.engine.pages import PAGE, Pages

        pages = (prompt_tokens or 0) // PAGE + (num_steps // PAGE + 2) * num_rows
        if prompt_tokens is None:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(lm.device)[0]
            pages = int((1 - _SPARE) * free - beside) // (PAGE * lm.token_bytes)
            if (pages - num_rows) * PAGE < num_steps + _PREFILL:
                raise _too_much(lm, num_rows, num_steps, need, free, beside)
        return Pages(lm, num_rows, num_steps, pages)
    if prompt_tokens is None:
        free = psutil.virtual_memory().available
        prompt_tokens = int((1 - _SPARE) * free - beside - need["suffixes"]) // lm.token_bytes
        if prompt_tokens < min(_PREFILL, lm.context_length or _PREFILL):
            raise _too_much(lm, num_rows, num_steps, need, free, beside + need["suffixes"])
    return Blocks(num_rows, num_steps, prompt_tokens)


def _too_much(lm: LM, num_rows: int, num_steps: int, need: dict[str, int], free: int, taken: int) -> ConfigError:
    sums = ", ".join(f"{name} {need[name] / 1e9:.2f}" for name in ("suffixes", "logits", "controls", "prefill"))
    rows = int(num_rows * (1 - _SPARE) * free / (taken + _PREFILL * lm.token_bytes)) // 32 * 32
    fix = f"generator.batch_rows: {rows}" if rows else "a model or a generator.max_new_tokens that takes less"
    return ConfigError(
        f"generator.batch_rows: {num_rows} rows of {num_steps} new tokens at {lm.token_bytes / 1e3:.1f} kB a token do "
        f"not fit beside a prompt of {_PREFILL} tokens: GB needed: {sums}; free: {free / 1e9:.2f}; set {fix}"
    )
