"""The settings that the vLLM engines of these tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aisp_dist.config import Generator

STEPS = 12
SHAPE = {"hidden_size": 64, "head_dim": 32}  # the least head that vLLM attends with on a CPU


def settings(directory: Path, **more: Any) -> Generator:
    own = {"max_num_seqs": 24, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 26}
    common = {"model": str(directory), "dtype": "float32", "engine": "vllm", "max_new_tokens": STEPS}
    return Generator(**common | {"vllm": own} | more)
