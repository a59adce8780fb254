"""Where the samples of an iteration begin: as an earlier answer does, up to a token drawn evenly along it.

Population Monte Carlo (Cappé et al. 2004) over answers: which answer is continued is drawn by importance weights over
all that the search has seen, softmax(r / lambda) with lambda from an effective number of answers. What follows the cut
is drawn anew from the base model, so what is given up in fluency is what selection takes, and no more. As a chain on
one answer the same move is QAlign's (Faria and Smith 2025, arXiv 2504.03790). Draws are keyed, and stratified over the
samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from aisp_dist.config import Branch
from aisp_dist.methods.round import Key
from aisp_dist.methods.weights import ess_temperature, softmax
from aisp_dist.philox import BRANCH, philox4x32

Parent = tuple[int, int]  # place of the answer among all so far, -1 for none; number of its tokens that are given


def parents(
    settings: Branch,
    key: Key,
    iteration: int,
    num_samples: int,
    rewards: Sequence[float | None],
    lengths: Sequence[int],
) -> tuple[Parent, ...]:
    """The answer that each sample continues. rewards, lengths: of all answers so far, None where one may not be
    continued; with none at all every sample begins anew."""
    able = [j for j, r in enumerate(rewards) if r is not None]
    if not able:
        return ((-1, 0),) * num_samples
    r = [rewards[j] or 0.0 for j in able]
    level = [0.0] * len(r)
    target = min(settings.ess, max(1.0, len(r) / 2))  # of few answers as many would be all of them, good and bad alike
    reached = list(accumulate(softmax(r, level, ess_temperature(r, level, target))))
    drawn = []
    for sample in range(num_samples):
        which, where, *_ = philox4x32((0, sample, iteration, BRANCH), key)
        at = bisect_right(reached, (sample + which / 2**32) / num_samples * reached[-1])
        parent = able[min(at, len(able) - 1)]
        drawn.append((parent, where * lengths[parent] >> 32))
    return tuple(drawn)
