"""method.limit: whether an answer is near enough to the base model's own. Pure."""

from __future__ import annotations

from aisp_dist.config import Limit


def within(limit: Limit | None, text: str, nll: float | None, base_nll: float | None) -> bool:
    """nll, base_nll: NLL per token of the answer as it was drawn, and of the base answer; limit.nll needs both."""
    if limit is None:
        return True
    if limit.nll is not None and nll is not None and base_nll is not None and nll > base_nll + limit.nll:
        return False
    return limit.diversity is None or diversity(text) >= limit.diversity


def diversity(text: str) -> float:
    """Product over n = 2, 3, 4 of unique n-grams / n-grams of the text's words (Kanai et al. 2025); 1 for a text too
    short to have any."""
    words = text.split()
    product = 1.0
    for n in (2, 3, 4):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        product *= len(set(grams)) / len(grams) if grams else 1.0
    return product
