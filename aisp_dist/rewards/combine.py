"""Several rewards to one number per candidate. Pure; knows neither models nor functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from aisp_dist.config import Reward
from aisp_dist.records import Score

# Mean and standard deviation by reward name, as a prompt's first iteration had them. None: nothing seen yet.
Frozen = Mapping[str, tuple[float, float]] | None


def combine(
    settings: Mapping[str, Reward],
    mode: Literal["weighted_sum", "standardized"],
    scores: Mapping[str, Sequence[Score]],
    frozen: Frozen = None,
) -> tuple[list[Score], Frozen]:
    """One Score per candidate: the weighted sum over the rewards with `use: select` that apply to it; and the
    statistics to pass in the next time.

    standardized takes (r - mean) / deviation for r. A reward's statistics are those of the first scores with any value
    (deviation 0 counts as 1) and never change after: so numbers of different iterations compare. Score the base
    answer after the first iteration, with its statistics.
    value None, always with a reason: a selecting reward is quarantined, none applies, or the sum is not finite.
    """
    selecting = [name for name, reward in settings.items() if reward.use == "select"]
    statistics = dict(frozen or {})
    if mode == "standardized":
        for name in selecting:
            values = [score.value for score in scores[name] if score.value is not None]
            if name not in statistics and values:
                statistics[name] = _moments(values)
    rows = zip(*(scores[name] for name in selecting), strict=True)
    combined = [_total(settings, dict(zip(selecting, row, strict=True)), statistics) for row in rows]
    return combined, statistics or None


def _moments(values: Sequence[float]) -> tuple[float, float]:
    if min(values) == max(values):  # their rounded deviation need not be 0
        return values[0], 1.0
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return mean, deviation or 1.0


def _total(
    settings: Mapping[str, Reward], scores: Mapping[str, Score], statistics: Mapping[str, tuple[float, float]]
) -> Score:
    quarantined = [f"{name}: {score.reason}" for name, score in scores.items() if score.reason is not None]
    if quarantined:
        return Score(None, "; ".join(quarantined))
    terms = []
    for name, score in scores.items():
        if score.value is not None:
            mean, deviation = statistics.get(name, (0.0, 1.0))
            terms.append(settings[name].weight * ((score.value - mean) / deviation))
    if not terms:
        return Score(None, f"no reward applies ({', '.join(scores)} gave None); return a number from one of them")
    total = sum(terms)
    if not math.isfinite(total):
        return Score(None, f"the combined reward is {total}")
    return Score(total)
