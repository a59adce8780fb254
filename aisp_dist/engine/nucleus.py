"""Draws from the nucleus of a distribution, without sorting the vocabulary.

The nucleus is the smallest set of likeliest tokens whose probabilities add up to at least p; of equal tokens the one
with the lower id comes first (Holtzman et al. 2020, arXiv 1904.09751). A token is drawn by the inverse CDF of a keyed
uniform over the nucleus in that order.

Only the likeliest tokens are ranked, and more of them only for rows that need more. Weights of tokens are fp64,
relative to the likeliest. Their total over the vocabulary is first known in fp32, within a bound; where the bound
leaves a choice of tokens, it is computed in fp64. So a row's token depends on its own logits alone, and no order of a
sum can move it.

Shapes: R rows, V vocabulary, K ranked tokens, P values of p.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_RANKED = (64, 512, 4096)  # likeliest tokens that are ranked before the whole vocabulary is
_BLOCK = 16  # tokens, of which the likeliest stands for all in the search for the K likeliest
# Relative error of a total in fp32: three roundings of (logit - largest) / temperature, which is above -104 or weighs
# nothing, 16 of a sum over a block, and those of exp.
_ERROR = 3e-5


def log_normalizer(logits_RV: torch.Tensor) -> torch.Tensor:
    """log sum_v exp(logit_v), fp64 [R]."""
    return _total(logits_RV).log() + logits_RV.amax(-1)


def nll(logits_RV: torch.Tensor, token_R: torch.Tensor) -> torch.Tensor:
    """-log P(token) at temperature 1, fp64 [R]."""
    return log_normalizer(logits_RV) - logits_RV.gather(1, token_R[:, None])[:, 0]


def draw(
    logits_RV: torch.Tensor, p_R: torch.Tensor, temperature_R: torch.Tensor, uniform_R: torch.Tensor
) -> torch.Tensor:
    """Tokens [R]. logits_RV: fp32; p_R, temperature_R, uniform_R: fp64, the last in (0, 1)."""
    given = logits_RV, p_R, temperature_R, uniform_R
    if logits_RV.device.type != "cpu":  # which rows want more would be a value to wait for; a GPU sorts quickly
        total_R = _total(logits_RV, temperature_R)
        return _drawn(logits_RV.shape[1], total_R, total_R, *given)[0]
    first, *sizes = _sizes(logits_RV.shape[1])
    about_R = _rough_total(logits_RV, temperature_R)
    tokens_R, enough_R, agreed_R = _drawn(first, about_R * (1 - _ERROR), about_R * (1 + _ERROR), *given)
    left_R = (~(enough_R & agreed_R)).nonzero()[:, 0]  # rows without a token
    left = [x[left_R] for x in given]
    total_R = _total(left[0], left[2])
    for size in sizes or (first,):
        if not len(left_R):
            break
        found_R, enough_R, _ = _drawn(size, total_R, total_R, *left)
        tokens_R[left_R[enough_R]] = found_R[enough_R]
        left_R, total_R, *left = (x[~enough_R] for x in (left_R, total_R, *left))
    return tokens_R


def _drawn(
    size: int,
    low_R: torch.Tensor,
    high_R: torch.Tensor,
    logits_RV: torch.Tensor,
    p_R: torch.Tensor,
    temperature_R: torch.Tensor,
    uniform_R: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [R] by the `size` likeliest; whether those are enough for the row [R]; and whether any total of weights
    between low and high gives this token [R]."""
    values_RK, ids_RK, sure_R = _rank(logits_RV, size)
    reached_RK = ((values_RK.double() - values_RK[:, :1]) / temperature_R[:, None]).exp().cumsum(-1)
    share_R = torch.where(p_R < 1, p_R, uniform_R)  # of the total, reached by the nucleus or at once by the token
    last_R1, other_R1 = (
        torch.searchsorted(reached_RK, (share_R * total_R)[:, None]).clamp(max=size - 1) for total_R in (low_R, high_R)
    )
    inside_R1 = torch.searchsorted(reached_RK, uniform_R[:, None] * reached_RK.gather(1, last_R1)).clamp(max=size - 1)
    rank_R1 = torch.where(p_R[:, None] < 1, inside_R1, last_R1)
    return ids_RK.gather(1, rank_R1)[:, 0], last_R1[:, 0] < sure_R, (last_R1 == other_R1)[:, 0]


def _total(logits_RV: torch.Tensor, temperature_R: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of weights exp((logit - largest) / temperature), fp64 [R]; at temperature 1 where none is given."""
    below_RV = logits_RV.double().sub_(logits_RV.amax(-1, keepdim=True))
    if temperature_R is not None:
        below_RV /= temperature_R[:, None]
    return below_RV.exp_().sum(-1)


def _rough_total(logits_RV: torch.Tensor, temperature_R: torch.Tensor) -> torch.Tensor:
    """The same within _ERROR, from weights in fp32."""
    weights_RV = logits_RV - logits_RV.amax(-1, keepdim=True)
    weights_RV.div_(temperature_R[:, None].float()).exp_()
    blocks, rest = _blocks(weights_RV)
    return blocks.sum(1).sum(-1, dtype=torch.float64) + rest.sum(-1, dtype=torch.float64)


def masses(logits_RV: torch.Tensor, p_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """At temperature 1 the probability of the likeliest token [R] and of each nucleus [R, P], for p < 1; fp64."""
    normalizer_R = log_normalizer(logits_RV)
    first_R = normalizer_R.new_zeros(len(logits_RV))
    mass_RP = normalizer_R.new_zeros(len(logits_RV), len(p_P))
    left_R = torch.arange(len(logits_RV), device=logits_RV.device)
    for size in _sizes(logits_RV.shape[1]):
        values, _, sure = _rank(logits_RV[left_R], size)
        reached = (values.double() - normalizer_R[left_R, None]).exp().cumsum(-1)
        last = torch.searchsorted(reached, p_P.expand(len(left_R), -1).contiguous()).clamp(max=size - 1)
        first_R[left_R], mass_RP[left_R] = reached[:, 0], reached.gather(1, last)
        left_R = left_R[(last >= sure[:, None]).any(-1)]
        if not len(left_R):
            break
    return first_R, mass_RP


def _sizes(vocab_size: int) -> Iterator[int]:
    yield from (size for size in _RANKED if size < vocab_size)
    yield vocab_size


def _blocks(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The row as [R, _BLOCK, W], of which [:, :, w] is a block, and what is left behind it."""
    whole = logits_RV.shape[1] // _BLOCK * _BLOCK
    return logits_RV[:, :whole].view(len(logits_RV), _BLOCK, whole // _BLOCK), logits_RV[:, whole:]


def _rank(logits_RV: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `size` likeliest tokens in the order of a stable sort of the whole row: logits [R, K], ids [R, K], and how
    many of the first are in their final place [R]: a token as likely as the last may have been left out."""
    if size == logits_RV.shape[1]:
        values, ids = logits_RV.sort(dim=-1, descending=True, stable=True)
        return values, ids, torch.full_like(ids[:, 0], size)
    values, ids = _likely(logits_RV, size)
    values, place = values.topk(size, -1)
    ids = ids.gather(1, place)
    if (values[:, 1:] == values[:, :-1]).any():  # equal ones are in no order
        ids, place = ids.sort(-1)
        values, place = values.gather(1, place).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, place)
    return values, ids, (values > values[:, -1:]).sum(-1)


def _likely(logits_RV: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and ids of some tokens [R, N], among them all that are likelier than the last of the `size` likeliest:
    those of the `size` blocks with the likeliest tokens."""
    blocks, rest = _blocks(logits_RV)
    count = blocks.shape[2]
    if count <= size:
        return logits_RV, torch.arange(logits_RV.shape[1], device=logits_RV.device).expand(logits_RV.shape)
    block_RK = blocks.amax(1).topk(size, -1, sorted=False).indices
    inside = torch.arange(_BLOCK, device=logits_RV.device)[:, None] * count
    values = blocks.gather(2, block_RK[:, None].expand(-1, _BLOCK, -1)).flatten(1)
    ids = (inside + block_RK[:, None]).flatten(1)
    behind = torch.arange(_BLOCK * count, logits_RV.shape[1], device=logits_RV.device).expand(len(ids), -1)
    return torch.cat([values, rest], 1), torch.cat([ids, behind], 1)
