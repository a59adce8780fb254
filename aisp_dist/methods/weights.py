"""Importance weights, (18) of arXiv 2510.26219, and the temperature that gives them an effective sample size. Pure
numbers."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from aisp_dist.config import Ess


def importance_weights(
    rewards: Sequence[float | None], penalties: Sequence[float], lambda_: float | Ess
) -> tuple[float, ...]:
    """w = softmax(r / lambda - penalty) over one iteration, (18), rounded to fp32 as the trace stores it.

    A missing reward has weight 0. Where all are missing every weight is 0, which keeps u.
    """
    scored = [i for i, r in enumerate(rewards) if r is not None]
    if not scored:
        return (0.0,) * len(rewards)
    r = [rewards[i] or 0.0 for i in scored]
    p = [penalties[i] for i in scored]
    temperature = lambda_ if isinstance(lambda_, float) else ess_temperature(r, p, lambda_.ess * len(rewards))
    weights = [0.0] * len(rewards)
    for i, w in zip(scored, softmax(r, p, temperature), strict=True):
        weights[i] = struct.unpack("f", struct.pack("f", w))[0]
    return tuple(weights)


def softmax(rewards: Sequence[float], penalties: Sequence[float], lambda_: float) -> list[float]:
    top = max(rewards)  # subtracted before the division, so that a tiny lambda cannot overflow
    logs = [(r - top) / lambda_ - p for r, p in zip(rewards, penalties, strict=True)]
    high = max(logs)
    exps = [math.exp(value - high) for value in logs]
    total = math.fsum(exps)
    return [e / total for e in exps]


def ess_temperature(rewards: Sequence[float], penalties: Sequence[float], target: float) -> float:
    """The lambda at which the effective sample size 1 / sum w^2 is `target`, by Brent's method on log lambda.

    It scales with the rewards, since the bracket is around their spread. Where the target is out of reach (fewer finite
    rewards than it asks for, or many equal ones at the top) the nearer end of the bracket is returned; 1 where all
    rewards are equal.
    """
    from scipy.optimize import brentq  # its import takes longer than `aisp validate` without it

    top = max(rewards)
    spread = top - min(rewards)
    if spread == 0:
        return 1.0

    def excess(log_lambda: float) -> float:
        """log(ESS / target), which grows with lambda. The weights need not sum to one here."""
        scale = math.exp(-log_lambda)
        logs = [(r - top) * scale - p for r, p in zip(rewards, penalties, strict=True)]
        high = max(logs)
        exps = [math.exp(value - high) for value in logs]
        return math.log(sum(exps) ** 2 / sum(e * e for e in exps) / target)

    low, high = math.log(spread) - 16, math.log(spread) + 16
    if excess(low) >= 0:
        return math.exp(low)
    if excess(high) <= 0:
        return math.exp(high)
    return math.exp(brentq(excess, low, high, xtol=1e-12))


def deviation(rewards: Sequence[float | None]) -> float:
    """Standard deviation of those that are not None, divided by their number; 0 where there are none."""
    known = [r for r in rewards if r is not None]
    mean = math.fsum(r / len(known) for r in known)
    return math.hypot(*(r - mean for r in known)) / math.sqrt(len(known) or 1)
