"""What every method works with: the state that it carries from round to round, and the round that it asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aisp_dist.config import Method
from aisp_dist.methods.gain import settled
from aisp_dist.philox import permutation
from aisp_dist.records import Candidate, Iteration, Rollout, Sampling, Weights

State = tuple[Iteration, ...]
Key = tuple[int, int]  # of the prompt, philox.prompt_key


@dataclass(frozen=True, slots=True)
class Proposal:
    """`num_samples` trajectories of one iteration, drawn around the control that the trace of weights builds. Where
    samples continue earlier answers, starts has the tokens that each begins with, and parents the place of the answer
    that they are from."""

    iteration: int
    num_samples: int
    sampling: Sampling
    trace: tuple[Weights, ...] = ()
    starts: tuple[tuple[int, ...], ...] = ()
    parents: tuple[int, ...] = ()


def finished(
    proposal: Proposal, rollout: Rollout, rewards: Sequence[float | None], weights: Sequence[float], kl: float
) -> Iteration:
    """The record of an iteration. Without weights every sample counts the same: ESS = n."""
    finite = [r for r in rewards if r is not None]
    square = sum(w * w for w in weights)
    return Iteration(
        weights=tuple(weights),
        lengths=tuple(len(t.token_ids) for t in rollout.trajectories),
        ess=1 / square if square else float(len(finite)),
        kl=kl,
        mean_reward=sum(finite) / len(finite) if finite else None,
        best_reward=max(finite, default=None),
        sigma2=proposal.sampling.sigma2,
        top_p=None if proposal.sampling.decode is None else proposal.sampling.decode.p,
        parents=proposal.parents,
        given=tuple(map(len, proposal.starts)),
    )


def told(shuffle: bool, key: Key, iteration: int, rewards: Sequence[float | None]) -> list[float | None]:
    """The rewards of an iteration as the search learns from them. shuffle: each eligible sample has the reward of
    another one, by a keyed permutation."""
    learnt = list(rewards)
    if shuffle:
        eligible = [j for j, reward in enumerate(rewards) if reward is not None]
        for j, other in zip(eligible, permutation(key, iteration, len(eligible)), strict=True):
            learnt[j] = rewards[eligible[other]]
    return learnt


def over(settings: Method, state: State, seen: Sequence[Candidate]) -> bool:
    """Whether a prompt's search has ended: after num_iterations or, with `spend`, by its stopping rule. The rule reads
    the true rewards of this prompt alone, so it is the same for every method. seen: all candidates so far."""
    spend = settings.spend
    if spend is None:
        return len(state) >= settings.num_iterations
    best, since, rise = -math.inf, 0, 0.0  # best so far; iterations since it last rose; what the last one added
    for done in state:
        new = -math.inf if done.best_reward is None else done.best_reward
        rise = max(0.0, new - best) if math.isfinite(best) else 0.0
        since = 0 if new > best + (spend.min_gain if math.isfinite(best) else 0) else since + 1
        best = max(best, new)
    if spend.target is not None and best >= spend.target:
        return True
    if spend.plateau is not None and since >= spend.plateau:
        return True
    if spend.expected_gain is not None:
        rewards = [c.eligible_reward for c in seen if c.eligible_reward is not None]
        if settled(spend.expected_gain, rewards, len(state), rise if settings.learns else 0.0):
            return True
    return len(state) >= (spend.max_iterations or settings.num_iterations)
