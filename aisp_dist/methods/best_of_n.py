"""Best-of-n: num_samples x num_iterations independent candidates, by nucleus sampling or by greedy decoding under fresh
Gaussian noise, (17) of arXiv 2510.26219. Candidate (k, i) has the key of AISP's sample (k, i), so the first iteration
of AISP is best-of-n under noise. ARGS and RE-Control run here with one candidate; they search inside the generator."""

from __future__ import annotations

from collections.abc import Sequence

from aisp_dist.config import Method
from aisp_dist.methods.round import Key, Proposal, State, finished, over
from aisp_dist.records import Candidate, Rollout, Sampling


def propose(settings: Method, sampling: Sampling, state: State, key: Key, seen: Sequence[Candidate]) -> Proposal | None:
    if over(settings, state, seen):
        return None
    return Proposal(len(state), settings.num_samples, sampling)


def update(
    settings: Method, state: State, key: Key, proposal: Proposal, rollout: Rollout, rewards: Sequence[float | None]
) -> State:
    return (*state, finished(proposal, rollout, rewards, weights=(), kl=0.0))
