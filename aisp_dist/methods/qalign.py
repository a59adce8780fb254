"""QAlign (Faria and Smith 2025, arXiv 2504.03790): Metropolis chains over whole answers, with the target

    pi(y) = p(y) exp(r(y) / beta),    p: the base model's distribution as `sampling` draws from it.

Each chain's first answer is drawn from p. A move cuts the chain's answer y at a token i, drawn evenly from 0 to
|y| - 1, keeps y[:i] and draws the rest from p, which gives the proposal y'. |y| counts tokens, an end token included.
The chain goes to y' with probability

    min(1, exp((r(y') - r(y)) / beta) |y| / |y'|)

and stays at y otherwise. p cancels: p(y) q(y' | y) = S / |y|, where S, the sum of p(y) p(y' | y[:i]) over the common
prefixes y[:i] = y'[:i], is the same for the way back. In the long run a chain's answers are samples of pi. The answer
that is selected is the best of all that were drawn.

Differences from the published method: several chains, independent for a number beta; the answer with the highest reward
in place of a vote or minimum Bayes risk over one chain of thousands of moves; a nucleus or temperature, where p is that
of the sampling; no bound on the exponent. `beta: {sd: ...}` is this project's: in units of the deviation (divided by N,
not N - 1) of all rewards of the prompt so far. It is shared by the chains and changes as they move, so the target moves
with it, and the chains are no samples of a fixed distribution. Where all rewards are equal, lengths alone decide.

An answer without a reward, or beyond method.limit, is never accepted: it has pi(y) = 0. A chain starts at its first
answer that has one, and draws whole answers until then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from aisp_dist.config import Qalign
from aisp_dist.methods.round import Key, Proposal, State, finished, over, told
from aisp_dist.methods.weights import deviation
from aisp_dist.philox import PARENT, philox4x32
from aisp_dist.records import Candidate, Rollout, Sampling


def propose(settings: Qalign, sampling: Sampling, state: State, key: Key, seen: Sequence[Candidate]) -> Proposal | None:
    if over(settings, state, seen):
        return None
    k = len(state)
    if not state:
        return Proposal(k, settings.chains, sampling)
    at = positions(settings, state, key, seen)
    starts = []
    for chain, place in enumerate(at):
        tokens = seen[place].token_ids if place >= 0 else ()
        starts.append(tokens[: _words(key, k, chain)[1] * len(tokens) >> 32])
    return Proposal(k, settings.chains, sampling, starts=tuple(starts), parents=at)


def update(
    settings: Qalign, state: State, key: Key, proposal: Proposal, rollout: Rollout, rewards: Sequence[float | None]
) -> State:
    return (*state, finished(proposal, rollout, rewards, weights=(), kl=0.0))


def positions(settings: Qalign, state: State, key: Key, seen: Sequence[Candidate]) -> tuple[int, ...]:
    """The place among all answers where each chain is after the moves of `state`; -1 where it has not started."""
    n, last = settings.chains, len(state) - 1
    rewards: list[float | None] = []
    for k in range(len(state)):
        eligible = [candidate.eligible_reward for candidate in seen[k * n : (k + 1) * n]]
        rewards += told(settings.shuffle_rewards, key, k, eligible)
    beta = settings.beta if isinstance(settings.beta, float) else settings.beta.sd * deviation(rewards)
    at = []
    for chain, old in enumerate(state[-1].parents or (-1,) * n):
        new = last * n + chain
        before, after = rewards[old] if old >= 0 else None, rewards[new]
        accepted = after is not None
        if before is not None and after is not None:
            lengths = len(seen[old].token_ids), len(seen[new].token_ids)
            uniform = (_words(key, last, chain)[0] + 0.5) / 2**32
            accepted = math.log(uniform) < log_ratio(after - before, beta, *lengths)
        at.append(new if accepted else old)
    return tuple(at)


def log_ratio(gain: float, beta: float, length: int, new_length: int) -> float:
    """Log of the Metropolis ratio. gain: r(y') - r(y). beta: 0 only as that of rewards which are all equal."""
    tilt = gain / beta if beta else math.copysign(math.inf, gain) if gain else 0.0
    return tilt + math.log(length / new_length)


def _words(key: Key, iteration: int, chain: int) -> list[int]:
    """Random words of a move: the first accepts it, the second cuts for it."""
    return philox4x32((0, chain, iteration, PARENT), key)
