"""The settings that the vLLM engines of these tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import tiny
import torch
from safetensors.torch import save_file

from aisp_dist.config import Generator

STEPS = 12
SPOILT = tiny.EOS_ID  # a token that is never read, since it ends what it is decoded in
SHAPE = {"hidden_size": 64, "head_dim": 32}  # the least head that vLLM attends with on a CPU


def settings(directory: Path, **more: Any) -> Generator:
    own = {"max_num_seqs": 24, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 26}
    common = {"model": str(directory), "dtype": "float32", "engine": "vllm", "max_new_tokens": STEPS}
    return Generator(**common | {"vllm": own} | more)


def adapted(model: Any, directory: Path, rank: int = 4, scale: float = 2.0) -> Any:
    """The model with a random LoRA adapter merged into it, which is written to the directory as peft does."""
    layers, weights, draw = ("q_proj", "v_proj", "down_proj"), {}, torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if name.endswith(layers):
            a = 0.1 * torch.randn(rank, module.in_features, generator=draw)
            b = 0.1 * torch.randn(module.out_features, rank, generator=draw)
            weights |= {f"base_model.model.{name}.lora_{part}.weight": matrix for part, matrix in (("A", a), ("B", b))}
            module.weight.data += scale * b @ a
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "target_modules": layers, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(about))
    return model


def remaining(before: set[psutil.Process]) -> list[psutil.Process]:
    """Processes of vLLM that have begun since then and do not end."""
    new = set(psutil.Process().children(recursive=True)) - before
    return psutil.wait_procs([p for p in new if "EngineCore" in p.name() or "VLLM" in p.name()], timeout=60)[1]
