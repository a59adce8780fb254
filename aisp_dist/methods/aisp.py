"""Adaptive importance sampling on pre-logits: Algorithm 1 of arXiv 2510.26219. Numbers in parentheses are equations.

The mean trajectory u is never here: the engine rebuilds it from the trace of weights and the keyed noise. This file
makes the weights of an iteration from its rewards r_i, control costs and lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

from aisp_dist.config import Aisp, BatchedAisp
from aisp_dist.methods.round import Key, Proposal, State, finished, over, told
from aisp_dist.methods.weights import importance_weights
from aisp_dist.records import Candidate, Rollout, Sampling, Weights

Settings = Aisp | BatchedAisp


def propose(
    settings: Settings, sampling: Sampling, state: State, key: Key, seen: Sequence[Candidate]
) -> Proposal | None:
    if over(settings, state, seen):
        return None
    trace = tuple(Weights(done.weights, done.lengths) for done in state)
    return Proposal(len(state), settings.num_samples, sampling, trace)


def update(
    settings: Settings, state: State, key: Key, proposal: Proposal, rollout: Rollout, rewards: Sequence[float | None]
) -> State:
    sigma2 = proposal.sampling.sigma2
    penalties = [penalty(t.control_cost, t.control_sq, settings.alpha, sigma2) for t in rollout.trajectories]
    learnt = told(settings.shuffle_rewards, key, len(state), rewards)
    weights = importance_weights(learnt, penalties, settings.lambda_)
    return (*state, finished(proposal, rollout, rewards, weights, kl=rollout.u_sq / (2 * sigma2)))


def penalty(control_cost: float, control_sq: float, alpha: float, sigma2: float) -> float:
    """The second term of (18) for one trajectory, with u . eps in place of u . v. The quadratic term is the same for
    all samples of `full` noise and cancels; for `marginal` it ends with the sample and does not."""
    rest = 1 - alpha
    return (rest * control_cost + rest**2 / 2 * control_sq) / sigma2
