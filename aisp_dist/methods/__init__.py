"""The search methods, one file each, under one protocol of two pure functions.

    propose(settings, sampling, state, key, seen) -> Proposal | None     what to draw next; None when the method is done
    update(settings, state, key, proposal, rollout, rewards) -> State    what the answers say

`settings` is the method's section of the configuration, `sampling` how it draws for this prompt, `seen` all candidates
so far; `rewards` are None of candidates that are not eligible. A state is the tuple of finished iterations and nothing
else: it holds what the next round needs (the trace of weights) and what a reader wants to know (ESS, KL, rewards). A
method knows neither where trajectories come from nor which of them is best; align.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from aisp_dist import config
from aisp_dist.methods import aisp, best_of_n
from aisp_dist.methods.round import Key, Proposal, State
from aisp_dist.records import Candidate, Rollout, Sampling

__all__ = ["Key", "Method", "Proposal", "State", "bind"]


@dataclass(frozen=True, slots=True)
class Method:
    propose: Callable[[State, Key, Sequence[Candidate]], Proposal | None]
    update: Callable[[State, Key, Proposal, Rollout, Sequence[float | None]], State]


def bind(settings: config.Method, sampling: Sampling) -> Method:
    """The method that a configuration names, with its settings filled in."""
    if isinstance(settings, config.Aisp | config.BatchedAisp):
        return Method(partial(aisp.propose, settings, sampling), partial(aisp.update, settings))
    return Method(partial(best_of_n.propose, settings, sampling), partial(best_of_n.update, settings))
