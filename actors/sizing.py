"""From measured busy seconds to what a full run wants: how many replicas of each kind, GPU-hours, bytes. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

LARGEST = 64  # replicas that a ratio is spelled with
GOOD = 0.95  # the smallest ratio that keeps this share of the replicas busy is taken


@dataclass(frozen=True, slots=True)
class Suggestion:
    """generators, rewards: replicas in the smallest whole ratio that keeps them busy. utilisation: the share of the
    replicas' time that is then work. gpu_hours: of that many replicas, idle time included. bytes: of the rows."""

    generators: int
    rewards: dict[str, int]
    utilisation: float
    gpu_hours: float
    samples: int
    bytes: float

    def line(self) -> str:
        ratio = " : ".join(
            [f"{self.generators} generator", *(f"{count} {name}" for name, count in self.rewards.items())]
        )
        return (
            f"replicas {ratio} (busy {self.utilisation:.0%}); {self.samples:,} samples: {self.gpu_hours:,.3g} "
            f"replica-hours (GPU-hours where each has one), {_bytes(self.bytes)}"
        )


def suggest(
    generator_seconds_per_sample: float,
    reward_seconds_per_sample: Mapping[str, float],
    samples: int,
    bytes_per_row: float,
    rows: int,
) -> Suggestion:
    """The replicas' ratio that fits these busy seconds of one replica for each sample, and what `samples` samples and
    `rows` rows cost. A reward that takes no time gets its one replica. Raises ValueError for seconds that are not
    finite, or not above 0 for the generator."""
    seconds = [generator_seconds_per_sample, *reward_seconds_per_sample.values()]
    if not all(math.isfinite(s) and s >= 0 for s in seconds) or not generator_seconds_per_sample:
        raise ValueError(f"busy seconds a sample are {seconds}; they must be finite, the generator's (first) above 0")
    best, counts = 0.0, [1] * len(seconds)
    for pace in sorted({k / s for s in seconds if s for k in range(1, LARGEST)}):  # samples/s that some kind just keeps
        tried = [max(1, math.ceil(s * pace - 1e-9)) for s in seconds]
        if sum(tried) > LARGEST or best >= GOOD:
            break
        if (busy := pace * sum(seconds) / sum(tried)) > best + 1e-9:
            best, counts = busy, tried
    hours = samples * sum(seconds) / best / 3600
    generators, *others = counts
    rewards = dict(zip(reward_seconds_per_sample, others, strict=True))
    return Suggestion(generators, rewards, best, hours, samples, bytes_per_row * rows)


def _bytes(size: float) -> str:
    power = min(int(math.log(max(size, 1), 1000) + 1e-9), 5)
    return f"{size / 1000**power:.3g} {['bytes', 'kB', 'MB', 'GB', 'TB', 'PB'][power]}"
