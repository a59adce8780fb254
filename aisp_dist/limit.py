"""method.limit: whether an answer is near enough to the base model's own. Pure."""

from __future__ import annotations

from aisp_dist.config import Limit
from aisp_dist.metrics import diversity


def within(limit: Limit | None, text: str, nll: float | None, base_nll: float | None) -> bool:
    """nll, base_nll: per token, of the answer as it was drawn and of the base answer; both are known for limit.nll."""
    if limit is None:
        return True
    if limit.nll is not None and nll is not None and base_nll is not None and nll > base_nll + limit.nll:
        return False
    return limit.diversity is None or diversity(text) >= limit.diversity
