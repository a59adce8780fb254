"""Timing of contenders in turns: a ratio compares runs that are neighbours in time, so a slow minute of the machine
affects all contenders alike."""

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

Prepare = Callable[
    [int], Callable[[], Any]
]  # repetition -> the work to time; its inputs are made before the clock starts


@dataclass(frozen=True)
class Timed:
    """One run: wall-clock seconds, CPU seconds of this process (which other load hardly changes), and the answer."""

    seconds: float
    cpu_seconds: float
    answer: Any


def alternate(contenders: Mapping[str, Prepare], repeat: int, device: torch.device) -> dict[str, list[Timed]]:
    """Run every contender once in each repetition; the order is reversed from one repetition to the next."""
    runs: dict[str, list[Timed]] = {name: [] for name in contenders}
    for repetition in range(repeat):
        for name in list(contenders)[:: -1 if repetition % 2 else 1]:
            work = contenders[name](repetition)
            start, cpu = now(device), time.process_time()
            answer = work()
            timed = Timed(now(device) - start, time.process_time() - cpu, answer)
            runs[name].append(timed)
            say(f"  {name:17}{timed.seconds:9.3f} s {timed.cpu_seconds:9.3f} CPU s")
    return runs


def now(device: torch.device) -> float:
    """Seconds on the clock, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(above: Sequence[Timed], below: Sequence[Timed]) -> dict[str, dict[str, float]]:
    """Ratios of seconds and of CPU seconds, repetition by repetition. CPU seconds mean nothing for work on a GPU."""
    pairs = list(zip(above, below, strict=True))
    clock, cpu = [a.seconds / b.seconds for a, b in pairs], [a.cpu_seconds / b.cpu_seconds for a, b in pairs]
    return {"ratio": spread(clock), "cpu_ratio": spread(cpu)}


def equal_share(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> float:
    """The share of positions with the same token in both; a token that only one of them has counts as different."""
    same = sum(x == y for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=False))
    return same / sum(max(len(left), len(right)) for left, right in zip(a, b, strict=True))


def place(device: str | None, threads: int) -> tuple[torch.device, dict[str, Any]]:
    """Set torch's threads; return the device and a description of the machine. Raises ConfigError for a bad device."""
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
