"""Population: every sample continues an earlier answer.

The first iteration draws whole answers from the base model. From the second on, each sample has a parent, drawn by
softmax(r / lambda) over all answers so far, with lambda set by an effective number of parents. The parent is cut at a
token drawn evenly along it, the sample begins with the tokens before the cut, and the base model draws the rest. Draws
are keyed, and stratified over the samples of an iteration. There is no noise on the pre-logits. With `fresh` a share of
the samples draws whole answers in every iteration, as best-of-n does.

This is a selection scheme over answers. It is not population Monte Carlo (Cappé et al. 2004), whose weights would carry
the density of the proposal beside exp(r / lambda); those weights degenerate here, since the probability of a prefix is
tiny. Its nearest kin are QAlign (Faria and Smith 2025, arXiv 2504.03790), the same move as a Metropolis chain of one
answer, where that density cancels; and stochastic backtracking (arXiv 2605.25143).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from aisp_dist.config import Population
from aisp_dist.methods.round import Key, Proposal, State, finished, over, told
from aisp_dist.methods.weights import deviation, ess_temperature, softmax
from aisp_dist.philox import PARENT, philox4x32
from aisp_dist.records import Candidate, Rollout, Sampling

Parent = tuple[int, int]  # place of the answer among all so far, -1 for none; how many of its tokens are kept


def propose(
    settings: Population, sampling: Sampling, state: State, key: Key, seen: Sequence[Candidate]
) -> Proposal | None:
    if over(settings, state, seen):
        return None
    k, n = len(state), settings.num_samples
    if not state:
        return Proposal(k, n, sampling)
    rewards: list[float | None] = []
    for j in range(k):
        eligible = [candidate.eligible_reward for candidate in seen[j * n : (j + 1) * n]]
        rewards += told(settings.shuffle_rewards, key, j, eligible)
    anew = fresh(settings.fresh, n, rewards)
    chosen = parents(settings.ess, key, k, n - anew, rewards, [len(candidate.token_ids) for candidate in seen])
    chosen += ((-1, 0),) * anew
    starts = tuple(seen[parent].token_ids[:length] if length else () for parent, length in chosen)
    return Proposal(k, n, sampling, starts=starts, parents=tuple(parent for parent, _ in chosen))


def update(
    settings: Population, state: State, key: Key, proposal: Proposal, rollout: Rollout, rewards: Sequence[float | None]
) -> State:
    return (*state, finished(proposal, rollout, rewards, weights=(), kl=0.0))


def fresh(share: float | Literal["ties"], num_samples: int, rewards: Sequence[float | None]) -> int:
    """How many samples of an iteration draw whole answers. ties: one of as many as the rewards have steps, counted down
    from the best one by half of their standard deviation; answers within a step are no better than each other. So all
    do while all rewards are equal, half do where they are all or nothing, few do where they differ by many degrees."""
    if share == "ties":
        known = [r for r in rewards if r is not None]
        unit = deviation(known)
        steps = {int((max(known) - r) / unit * 2) for r in known} if unit else {0}
        share = 1 / len(steps)
    return math.ceil(share * num_samples)


def parents(
    ess: float,
    key: Key,
    iteration: int,
    num_samples: int,
    rewards: Sequence[float | None],
    lengths: Sequence[int],
) -> tuple[Parent, ...]:
    """The answer that each sample continues. ess: effective number of parents. rewards, lengths: of all answers so far;
    a reward of None marks an answer that may not be continued, and without any other every sample starts anew."""
    able = [j for j, r in enumerate(rewards) if r is not None]
    if not able:
        return ((-1, 0),) * num_samples
    r = [rewards[j] or 0.0 for j in able]
    level = [0.0] * len(r)
    target = min(ess, max(1.0, len(r) / 2))  # at most half of few answers, or the bad ones would be continued too
    reached = list(accumulate(softmax(r, level, ess_temperature(r, level, target))))
    drawn = []
    for sample in range(num_samples):
        which, where, *_ = philox4x32((0, sample, iteration, PARENT), key)
        at = bisect_right(reached, (sample + which / 2**32) / num_samples * reached[-1])
        parent = able[min(at, len(able) - 1)]
        drawn.append((parent, where * lengths[parent] >> 32))
    return tuple(drawn)
