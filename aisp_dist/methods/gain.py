"""spend.expected_gain: what another round of a prompt would add to its best reward, estimated from its rewards so far.

The estimate is the smaller of two, each of which sees what the other is blind to:

    recurrence  E[max of N] - E[max of N - n] over all subsets of the N rewards that are there: without bias what a
                round of n added, in any order. A round more adds no more than that on average, since the expected
                maximum is concave in N. It assumes no distribution. It is small where the best reward came up again
                and again, as with rewards of few steps.
    normal      E[max(0, max of n new rewards - best)] for new rewards from a normal distribution with the mean and
                deviation of those that are there: small where the best is already far above the others.

Both are linear in the reward's unit and free of its zero. Of a method that learns from rewards, the next round is not
like those before it, and both are too small: its gain is at least what its last round added.

Why two: on simulated rewards (tests/bench/stopping.py) recurrence alone goes on after a lucky draw and spends more than
a fixed number of samples at equal reward, and the normal fit alone never notices a bound. A stopping rule by a cost for
each sample and a tail fit: Kalayci et al. 2025, arXiv 2510.01394.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from aisp_dist.methods.weights import deviation

_STEPS = 128  # of the integral, from the best to 8 deviations above


def settled(least: float, rewards: Sequence[float], rounds: int, last: float = 0.0) -> bool:
    """Whether the expected gain of another round is below `least` standard deviations of the rewards. rounds: in which
    they came. last: what the last round added, where the method learns.

    Equal rewards are never settled, however many there are: a deviation of 0 says nothing of what another answer may
    get, and where all answers fail, going on is all that helps. `target` ends a prompt that cannot get better."""
    unit = deviation(rewards)
    if rounds < 2 or not unit > 0:
        return False
    n = len(rewards) / rounds
    gain = min(recurrence(rewards, math.ceil(n)), normal(rewards, n))
    return max(gain, last) < least * unit


def recurrence(rewards: Sequence[float], n: int) -> float:
    """E[max of N] - E[max of N - n]. n: below N. The share of subsets of m = N - n whose largest member is the j-th
    largest of all is C(N - j, m - 1) / C(N, m)."""
    ordered = sorted(rewards, reverse=True)
    N, m = len(ordered), len(ordered) - n
    parts, share = [], m / N
    for j in range(1, n + 2):
        parts.append(share * (ordered[0] - ordered[j - 1]))
        share *= (n + 1 - j) / (N - j) if j < N else 0.0
    return math.fsum(parts)


def normal(rewards: Sequence[float], n: float) -> float:
    """The integral of P(max of n new ones > x) from the best on, by Simpson's rule."""
    unit = deviation(rewards)
    above = (max(rewards) - math.fsum(r / len(rewards) for r in rewards)) / unit
    width = 8 / _STEPS
    total = 0.0
    for i in range(_STEPS + 1):
        tail = math.erfc((above + i * width) / math.sqrt(2)) / 2
        exceeds = -math.expm1(n * math.log1p(-tail))
        total += exceeds * (1 if i in (0, _STEPS) else 4 if i % 2 else 2)
    return unit * total * width / 3
