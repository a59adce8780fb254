"""A LoRA adapter beside a model that vLLM serves: every request decodes with it. Its files are checked in
engine/intact.py; where the local engine decodes, it is merged (engine/adapter.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from aisp_dist.engine import intact, sizes

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can make room for


def arguments(adapter: str) -> dict[str, Any]:
    """vLLM's engine arguments. adapter: its directory. Its modules are named, so that vLLM leaves the head as it is:
    logits of other rows than those of its batch are asked for too."""
    about = json.loads(Path(adapter, intact.ADAPTER[0]).read_text(encoding="utf-8"))
    most = max([about.get("r") or 1, *(about.get("rank_pattern") or {}).values()])
    room = next((rank for rank in _RANKS if rank >= most), most)  # a larger one is refused by vLLM
    with safe_open(Path(adapter, intact.ADAPTER[1]), "numpy") as file:
        modules = {str(name).partition(".lora_")[0].rpartition(".")[2] for name in sorted(file.keys())}
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room, "lora_target_modules": sorted(modules)}


def misfit(adapter: str, model: Path) -> str | None:
    """A module that the adapter changes and that the checkpoint does not have in that shape, or None. vLLM would leave
    it out without a word."""
    shapes = {name: shape for name, _, shape, _ in sizes.tensors(model)}
    with safe_open(Path(adapter, intact.ADAPTER[1]), "numpy") as file:
        for name in sorted(file.keys()):
            module, _, part = str(name).removeprefix("base_model.model.").partition(".lora_")
            size = file.get_slice(name).get_shape()[-1 if part.startswith("A") else 0]
            if size not in shapes.get(f"{module}.weight", ()):
                return module
    return None
