"""The search methods, one file each, behind one protocol of two pure functions.

    propose(settings, sampling, state, key, seen) -> Proposal | None     what to draw next; None when the search is over
    update(settings, state, key, proposal, rollout, rewards) -> State    what the answers teach

`settings` is the method's section of the configuration, `sampling` how it draws for this prompt, `seen` all candidates
so far; `rewards` has None for candidates that are not eligible. A state is the tuple of finished iterations and nothing
else: it holds what the next round needs (the trace of weights) and what a reader wants to know (ESS, KL, rewards). A
method knows neither where trajectories come from nor which of them is best; align.py does.

A method is a section in aisp_dist/config/methods.py, which names its file, and that file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from aisp_dist import config
from aisp_dist.methods.round import Key, Proposal, State
from aisp_dist.records import Candidate, Rollout, Sampling

__all__ = ["Key", "Method", "Proposal", "State", "bind"]


@dataclass(frozen=True, slots=True)
class Method:
    propose: Callable[[State, Key, Sequence[Candidate]], Proposal | None]
    update: Callable[[State, Key, Proposal, Rollout, Sequence[float | None]], State]


def bind(settings: config.Method, sampling: Sampling) -> Method:
    """The method of a configuration, with its settings filled in."""
    module = import_module(f"{__name__}.{settings.algorithm}")
    return Method(partial(module.propose, settings, sampling), partial(module.update, settings))
