"""Importance weights of (18), and the temperature that gives them an effective sample size. Pure numbers."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from aisp_dist.config import Ess


def importance_weights(
    rewards: Sequence[float | None], penalties: Sequence[float], lambda_: float | Ess
) -> tuple[float, ...]:
    """w = softmax(r / lambda - penalty) over one iteration, (18), rounded to fp32 as the trace keeps them.

    A missing reward has weight 0; with none at all every weight is 0, which leaves u where it was.
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
    top = max(rewards)  # taken off before the division, so that a tiny lambda cannot overflow
    logs = [(r - top) / lambda_ - p for r, p in zip(rewards, penalties, strict=True)]
    high = max(logs)
    exps = [math.exp(value - high) for value in logs]
    total = math.fsum(exps)
    return [e / total for e in exps]


def ess_temperature(rewards: Sequence[float], penalties: Sequence[float], target: float) -> float:
    """The lambda at which 1 / sum w^2 = target, by secants and bisection on its logarithm.

    Free of the reward's unit: the search starts from the spread of the rewards. Where the target is out of reach (all
    rewards equal, or fewer finite ones than it asks for) the end of the bracket on its side is returned.
    """
    top = max(rewards)
    spread = top - min(rewards)
    if spread == 0:
        return 1.0

    def excess(log_lambda: float) -> float:
        """log(ESS / target), which grows with lambda; of weights that need not sum to one."""
        scale = math.exp(-log_lambda)
        logs = [(r - top) * scale - p for r, p in zip(rewards, penalties, strict=True)]
        high = max(logs)
        exps = [math.exp(value - high) for value in logs]
        return math.log(sum(exps) ** 2 / sum(e * e for e in exps) / target)

    low, high = math.log(spread) - 16, math.log(spread) + 16
    f_low, f_high = excess(low), excess(high)
    if f_low >= 0 or f_high <= 0:
        return math.exp(low if f_low >= 0 else high)
    for step in range(90):  # about 12 are enough; with bisections alone among them it would be 60
        middle = (low + high) / 2 if step % 3 == 0 else (low * f_high - high * f_low) / (f_high - f_low)
        f = excess(middle)
        if abs(f) < 1e-12 or not low < middle < high:
            break
        if f < 0:
            low, f_low = middle, f
        else:
            high, f_high = middle, f
    return math.exp(middle)
