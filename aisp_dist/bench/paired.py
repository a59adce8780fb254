"""Contenders timed in turns, repetition by repetition: a ratio compares neighbours on the clock, and a slow minute of
the machine falls on all of them."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from aisp_dist.config import ConfigError

Prepare = Callable[[int], Callable[[], Any]]  # repetition -> the work, with all that it needs made before the clock


@dataclass(frozen=True)
class Timed:
    """One run: seconds on the clock and of this process's CPU time (which other work on the machine hardly changes),
    what it answered, and the GPU memory it took beyond what was in use before it."""

    seconds: float
    cpu_seconds: float
    answer: Any
    peak_bytes: int


def alternate(contenders: Mapping[str, Prepare], repeat: int, device: torch.device) -> dict[str, list[Timed]]:
    """Every contender once a repetition, in an order that turns round from one to the next."""
    runs: dict[str, list[Timed]] = {name: [] for name in contenders}
    for repetition in range(repeat):
        for name in list(contenders)[:: -1 if repetition % 2 else 1]:
            timed = measure(contenders[name](repetition), device)
            runs[name].append(timed)
            say(f"  {name:17}{timed.seconds:9.3f} s {timed.cpu_seconds:9.3f} CPU s")
    return runs


def measure(work: Callable[[], Any], device: torch.device) -> Timed:
    before = allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start, cpu = now(device), time.process_time()
    answer = work()
    return Timed(now(device) - start, time.process_time() - cpu, answer, allocated(device, peak=True) - before)


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def allocated(device: torch.device, peak: bool = False) -> int:
    """Bytes of GPU memory; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(above: Sequence[Timed], below: Sequence[Timed]) -> dict[str, dict[str, float]]:
    """Of the seconds, repetition by repetition: on the clock, and of CPU time (which says nothing about a GPU)."""
    pairs = list(zip(above, below, strict=True))
    clock, cpu = [a.seconds / b.seconds for a, b in pairs], [a.cpu_seconds / b.cpu_seconds for a, b in pairs]
    return {"ratio": spread(clock), "cpu_ratio": spread(cpu)}


def equal_share(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> float:
    """The share of tokens that are the same at the same place; a token that only one of them has is not."""
    same = sum(x == y for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=False))
    return same / sum(max(len(left), len(right)) for left, right in zip(a, b, strict=True))


def place(device: str | None, threads: int) -> tuple[torch.device, dict[str, Any]]:
    """The device to measure on, with torch's threads set, and the machine in words. Raises ConfigError."""
    torch.set_num_threads(threads)
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device: {device!r} cannot be used here ({str(error).splitlines()[0]})") from None
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return chosen, {"device": f"{chosen} {name}", "threads": threads, **versions}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
