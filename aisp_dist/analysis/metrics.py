"""Measures of answers and of means over prompts. Pure; numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aisp_dist.methods.limit import diversity

__all__ = ["Interval", "diversity", "interval", "repetition", "spread"]

_RESAMPLES = 2000
_NORMAL = 1.959964  # the standard normal's 97.5 % quantile
_LARGE = 20_000  # above this many prompts the normal approximation replaces the bootstrap


class Interval(NamedTuple):
    """A mean over prompts and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Mean and 95 % bootstrap interval (percentiles of 2000 resamples of prompts). Pass the differences for a paired
    interval. Percentiles alone are too narrow for few values, so they are widened as Student's t is (after Hesterberg
    2015, arXiv 1411.5279): by 8 % for 24 values. Of one value the interval is that value, which says nothing. Raises
    ValueError where there are no values."""
    x = np.asarray(values, dtype=np.float64)
    if not x.size:
        raise ValueError("no values to average; an interval needs at least one")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, mean, mean)
    if x.size > _LARGE:
        half = _NORMAL * float(x.std(ddof=1)) / x.size**0.5
        return Interval(mean, mean - half, mean + half)
    drawn = np.random.default_rng(seed).integers(0, x.size, size=(_RESAMPLES, x.size), dtype=np.int32)
    low, high = np.quantile(x[drawn].mean(axis=1), [0.025, 0.975])
    from scipy.special import stdtrit  # its import takes longer than most commands without it

    wider = float(stdtrit(x.size - 1, 0.975)) / _NORMAL * (x.size / (x.size - 1)) ** 0.5
    return Interval(mean, mean + wider * (float(low) - mean), mean + wider * (float(high) - mean))


def spread(values: np.ndarray) -> Interval | None:
    """`interval` of the finite values; None where there is none, as for the NLL of rescored answers."""
    there = values[np.isfinite(values)]
    return interval(there) if there.size else None


def repetition(text: str) -> float:
    """Share of 4-grams of words that occurred before in the text: 1 - unique / all (rep-4 of Welleck et al. 2020, arXiv
    1908.04319); 0 where there are none."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0
