"""Adaptive importance sampling on pre-logits, Algorithm 1 of arXiv 2510.26219. Numbers in parentheses: its equations.

The mean trajectory u is never here: it is the fold of the trace of weights over regenerated noise (engine). Here are
the weights: what a round's rewards r_i, control costs and lengths make of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from aisp_dist.config import Aisp, BatchedAisp, Search
from aisp_dist.methods import branch
from aisp_dist.methods.round import Key, Proposal, State, finished, over
from aisp_dist.methods.weights import importance_weights
from aisp_dist.philox import permutation
from aisp_dist.records import Candidate, Rollout, Sampling, Weights


def propose(
    settings: Aisp | BatchedAisp, sampling: Sampling, state: State, key: Key, seen: Sequence[Candidate]
) -> Proposal | None:
    if over(settings, state):
        return None
    k, n = len(state), settings.num_samples
    trace = tuple(Weights(done.weights, done.lengths, done.given) for done in state) if sampling.sigma2 else ()
    if settings.branch is None or not state:
        return Proposal(k, n, sampling, trace)
    rewards: list[float | None] = []
    for j in range(k):
        rewards += _told(settings, key, j, [c.eligible_reward for c in seen[j * n : (j + 1) * n]])
    chosen = branch.parents(settings.branch, key, k, n, rewards, [len(c.token_ids) for c in seen])
    starts = tuple(seen[parent].token_ids[:length] if length else () for parent, length in chosen)
    return Proposal(k, n, sampling, trace, starts, tuple(parent for parent, _ in chosen))


def update(
    settings: Search, state: State, key: Key, proposal: Proposal, rollout: Rollout, rewards: Sequence[float | None]
) -> State:
    sigma2 = proposal.sampling.sigma2
    if not sigma2:
        return (*state, finished(proposal, rollout, rewards, weights=(), kl=0.0))
    told = _told(settings, key, len(state), rewards)
    penalties = [penalty(t.control_cost, t.control_sq, settings.alpha, sigma2) for t in rollout.trajectories]
    weights = importance_weights(told, penalties, settings.lambda_)
    return (*state, finished(proposal, rollout, rewards, weights, kl=rollout.u_sq / (2 * sigma2)))


def _told(settings: Search, key: Key, iteration: int, rewards: Sequence[float | None]) -> list[float | None]:
    """What the search is told of an iteration's rewards; the shuffled control, another sample's of those that count."""
    if not settings.shuffle_rewards:
        return list(rewards)
    counting = [j for j, reward in enumerate(rewards) if reward is not None]
    told = list(rewards)
    for j, other in zip(counting, permutation(key, iteration, len(counting)), strict=True):
        told[j] = rewards[counting[other]]
    return told


def penalty(control_cost: float, control_sq: float, alpha: float, sigma2: float) -> float:
    """The second term of (18) for one trajectory, with u . eps in place of u . v. For `full` noise the quadratic term
    is the same for all samples and cancels; for `marginal` it runs to the sample's own end and does not."""
    rest = 1 - alpha
    return (rest * control_cost + rest**2 / 2 * control_sq) / sigma2
