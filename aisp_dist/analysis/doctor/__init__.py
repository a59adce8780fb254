"""`aisp doctor`: whether what this project promises holds on this hardware, with these models. Knows no Ray: one
process, and one model in memory at a time, where its actor would have it.

    examine.py: decoding.py: memory, schedule, repetition, threads -> tokens, states -> exact.py: transformers' model
                scoring.py: repetition, pairs, input -> scores -> transformers' model
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, Literal

import torch

from aisp_dist.config import Generator, ModelReward

Verdict = Literal["ok", "note", "FAILED"]
_SPREAD = 3.0  # ours may be so many times as far from transformers' plainest way as another of its own is
_FLOOR = 1e-5  # relative, where that is next to nothing


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. figure: what was measured; advice: what it means and what to do, empty if all is well."""

    name: str
    verdict: Verdict
    figure: str
    advice: str = ""

    def line(self) -> str:
        return f"{self.verdict:6} {self.name}: {self.figure}" + (f". {self.advice}" if self.advice else "")


def judge(name: str, good: bool, figure: str, advice: str, otherwise: Verdict = "FAILED") -> Check:
    return Check(name, "ok", figure) if good else Check(name, otherwise, figure, advice)


def allowed(spread: float, dtype: torch.dtype, scale: float = 1.0) -> float:
    """How far numbers of this scale may be from those of transformers' plainest way, where another of its own ways is
    as far as `spread`."""
    return max(_SPREAD * spread, scale * max(_FLOOR, torch.finfo(dtype).eps))


def free() -> None:
    """Gives back the memory of a model that is gone, before the next one."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU


def own_model(auto: Any, where: str, settings: Generator | ModelReward, place: torch.device, **options: Any) -> Any:
    """A model as transformers alone loads and runs it."""
    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    own = auto.from_pretrained(where, dtype=settings.dtype, use_safetensors=True, **source, **options).eval()
    return own if "device_map" in options else own.to(place)
