"""What every method speaks in: the state it carries from round to round and the round it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aisp_dist.records import Iteration, Rollout, Sampling, Weights

State = tuple[Iteration, ...]
Key = tuple[int, int]  # of the prompt, philox.prompt_key


@dataclass(frozen=True, slots=True)
class Proposal:
    """`num_samples` trajectories of one iteration, drawn around the control that the trace of weights builds."""

    iteration: int
    num_samples: int
    sampling: Sampling
    trace: tuple[Weights, ...] = ()


def finished(rollout: Rollout, rewards: Sequence[float | None], weights: Sequence[float], kl: float) -> Iteration:
    """The record of an iteration. Without weights (best-of-n) every sample counts the same: ESS = n."""
    finite = [r for r in rewards if r is not None]
    square = sum(w * w for w in weights)
    return Iteration(
        weights=tuple(weights),
        lengths=tuple(len(t.token_ids) for t in rollout.trajectories),
        ess=1 / square if square else float(len(finite)),
        kl=kl,
        mean_reward=sum(finite) / len(finite) if finite else None,
        best_reward=max(finite, default=None),
    )
