"""Draws from the nucleus of a distribution, without sorting the vocabulary.

The nucleus is the smallest set of likeliest tokens whose probabilities add up to at least p; of equal tokens the one
with the lower id comes first (Holtzman et al. 2020, arXiv 1904.09751). A token is drawn by the inverse CDF of a keyed
uniform over the nucleus in that order. Only the likeliest tokens are ranked, and more of them only for rows that need
more, so a row's bits depend on its own logits alone. Probabilities are fp64: the order of a sum cannot move a draw.

Shapes: R rows, V vocabulary, K ranked tokens, P values of p.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

_RANKED = (256, 4096)  # likeliest tokens that are ranked before the whole vocabulary is


class Ranked(NamedTuple):
    """The likeliest tokens of some rows. ids [R, K] from the likeliest on; reached [R, K]: sums of their probabilities;
    sure [R]: the first so many are in their final place (a token as likely as the last may have been left out)."""

    ids: torch.Tensor
    reached: torch.Tensor
    sure: torch.Tensor


def log_normalizer(logits_RV: torch.Tensor, temperature_R: torch.Tensor | None = None) -> torch.Tensor:
    """log sum_v exp(logit_v / temperature), fp64 [R]; at temperature 1 where none is given."""
    logits_RV = logits_RV.double()
    if temperature_R is not None:
        logits_RV /= temperature_R[:, None]  # of the copy
    return logits_RV.logsumexp(-1)


def nll(logits_RV: torch.Tensor, token_R: torch.Tensor) -> torch.Tensor:
    """-log P(token) at temperature 1, fp64 [R]."""
    return log_normalizer(logits_RV) - logits_RV.gather(1, token_R[:, None])[:, 0]


def draw(
    logits_RV: torch.Tensor,
    normalizer_R: torch.Tensor,
    p_R: torch.Tensor,
    temperature_R: torch.Tensor,
    uniform_R: torch.Tensor,
) -> torch.Tensor:
    """Tokens [R]. logits_RV: fp32; normalizer_R: log_normalizer at these temperatures; uniform_R: in (0, 1)."""
    given = logits_RV, normalizer_R, p_R, temperature_R, uniform_R
    if logits_RV.device.type != "cpu":  # which rows want more would be a value to wait for; a GPU sorts quickly
        return _drawn(logits_RV.shape[1], *given)[0]
    tokens_R = torch.zeros(len(logits_RV), dtype=torch.long)
    left_R = torch.arange(len(logits_RV))  # rows without a token
    for size in _sizes(logits_RV.shape[1]):
        found, settled = _drawn(size, *(x[left_R] for x in given))
        tokens_R[left_R[settled]] = found[settled]
        left_R = left_R[~settled]
        if not len(left_R):
            break
    return tokens_R


def _drawn(
    size: int,
    logits_RV: torch.Tensor,
    normalizer_R: torch.Tensor,
    p_R: torch.Tensor,
    temperature_R: torch.Tensor,
    uniform_R: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [R] by the `size` likeliest, and whether those are enough for the row [R]."""
    p_R1 = p_R[:, None]
    ids, reached, sure_R = _rank(logits_RV, normalizer_R, temperature_R, size)
    last_R1 = torch.searchsorted(reached, p_R1).clamp(max=size - 1)  # of the nucleus
    mass_R1 = torch.where(p_R1 < 1, reached.gather(1, last_R1), 1.0)
    rank_R1 = torch.searchsorted(reached, uniform_R[:, None] * mass_R1)
    settled_R = torch.where(p_R1 < 1, last_R1, rank_R1)[:, 0] < sure_R
    return ids.gather(1, rank_R1.clamp(max=size - 1))[:, 0], settled_R


def masses(logits_RV: torch.Tensor, p_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """At temperature 1 the probability of the likeliest token [R] and of each nucleus [R, P], for p < 1; fp64."""
    normalizer_R = log_normalizer(logits_RV)
    first_R = normalizer_R.new_zeros(len(logits_RV))
    mass_RP = normalizer_R.new_zeros(len(logits_RV), len(p_P))
    left_R = torch.arange(len(logits_RV), device=logits_RV.device)
    for size in _sizes(logits_RV.shape[1]):
        normalizer = normalizer_R[left_R]
        _, reached, sure = _rank(logits_RV[left_R], normalizer, torch.ones_like(normalizer), size)
        last = torch.searchsorted(reached, p_P.expand(len(left_R), -1).contiguous()).clamp(max=size - 1)
        first_R[left_R], mass_RP[left_R] = reached[:, 0], reached.gather(1, last)
        left_R = left_R[(last >= sure[:, None]).any(-1)]
        if not len(left_R):
            break
    return first_R, mass_RP


def _sizes(vocab_size: int) -> Iterator[int]:
    yield from (size for size in _RANKED if size < vocab_size)
    yield vocab_size


def _rank(logits_RV: torch.Tensor, normalizer_R: torch.Tensor, temperature_R: torch.Tensor, size: int) -> Ranked:
    """The `size` likeliest tokens in the order of a stable sort of the whole row."""
    if size == logits_RV.shape[1]:
        values, ids = logits_RV.sort(dim=-1, descending=True, stable=True)
        sure = torch.full_like(ids[:, 0], size)
    else:
        values, ids = logits_RV.topk(size, -1)  # equal ones in no order
        ids, place = ids.sort(-1)
        values, place = values.gather(1, place).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, place)
        sure = (values > values[:, -1:]).sum(-1)
    probability = (values.double() / temperature_R[:, None] - normalizer_R[:, None]).exp()
    return Ranked(ids, probability.cumsum(-1), sure)
