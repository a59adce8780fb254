"""method.limit: whether an answer is near enough to the base model's own. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aisp_dist.config import Limit
from aisp_dist.records import Candidate


@dataclass(frozen=True, slots=True)
class Bounds:
    """A limit in the numbers of one prompt. nll: most nats per token. diversity: least."""

    nll: float = math.inf
    diversity: float = 0.0


def bounds(limit: Limit, base_nll: float | None, first: Sequence[Candidate]) -> Bounds | None:
    """base_nll: of the base answer, which limit.nll needs. first: the answers of the first iteration. None while they
    leave a typical diversity open, as none has a reward."""
    most = math.inf if limit.nll is None or base_nll is None else base_nll + limit.nll
    if limit.diversity != "typical":
        return Bounds(most, limit.diversity or 0.0)
    found = [diversity(candidate.text) for candidate in first if candidate.reward is not None]
    if not found:
        return None
    return Bounds(most, min(math.fsum(found) / len(found), max(found)))  # rounding must not rule out equal answers


def within(bounds: Bounds, text: str, nll: float | None) -> bool:
    """nll: per token of the answer as it was drawn."""
    return (nll is None or nll <= bounds.nll) and (not bounds.diversity or diversity(text) >= bounds.diversity)


def diversity(text: str) -> float:
    """Product over n = 2, 3, 4 of unique n-grams / n-grams of the text's words (Kanai et al. 2025); 1 for a text too
    short to have any."""
    words = text.split()
    product = 1.0
    for n in (2, 3, 4):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        product *= len(set(grams)) / len(grams) if grams else 1.0
    return product
