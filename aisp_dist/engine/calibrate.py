"""The sampling that has a wanted effect on a prompt: the share of the tokens of its base answer that would come out
differently. Such a rate means the same for every model, whatever the scale of its pre-logits and its confidence.

Shapes: T tokens of the base answer, D hidden size, V vocabulary, N = T times a number of noise draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from aisp_dist.engine import noise, nucleus
from aisp_dist.engine.lm import LM
from aisp_dist.records import Rates, Sampling, TopP

Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states [N, D] to logits [N, V] in fp32
_POSITIONS = 256  # noise vectors, by which a rate is known to about .02; also positions of a head product
_ITERATION = (1 << 16) - 1  # its noise is drawn by no search, since a configuration has fewer iterations
_VARIANCES = [2.0 ** (half / 2) for half in range(-120, 121)]
_NUCLEI = [round(0.5 + step / 40, 3) for step in range(19)]  # .5 to .95; a larger one holds tokens that no model means


@torch.inference_mode()
def calibrate(
    lm: LM,
    sampling: Sampling,
    rates: Rates,
    key: tuple[int, int],
    prompt_tokens: Sequence[int],
    answer: Sequence[int],
) -> Sampling:
    """The sampling whose sigma^2 and top_p have the wanted rates, from one pass over the base answer. Each is the least
    of a fixed set of values that reaches its rate, or the largest value if none does. key: of the prompt's noise."""
    z_TD, _ = lm.dense((*prompt_tokens, *answer[:-1]))
    return of_states(lm.logits, sampling, rates, key, z_TD[len(prompt_tokens) - 1 :].float())


def of_states(head: Head, sampling: Sampling, rates: Rates, key: tuple[int, int], z_TD: torch.Tensor) -> Sampling:
    """As `calibrate`, from the base answer's hidden states in fp32."""
    if rates.noise is not None:
        sampling = replace(sampling, sigma2=_least(_VARIANCES, _flips(head, key, z_TD), rates.noise))
    if rates.drawing is not None:
        sampling = replace(sampling, decode=TopP(_least(_NUCLEI, _draws(head, z_TD), rates.drawing), 1.0))
    return sampling


def _least(values: Sequence[float], share: Callable[[float], float], rate: float) -> float:
    """The least value whose share reaches the rate, the last one if none does. The share grows with the value."""
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(values[middle]) >= rate else (middle + 1, high)
    return values[low]


def _flips(head: Head, key: tuple[int, int], z_TD: torch.Tensor) -> Callable[[float], float]:
    """As a function of sigma^2, the share of steps at which argmax W (z_t + e), e ~ N(0, sigma^2 I), is not
    argmax W z_t. The noise is keyed: one draw a step for answers of 256 tokens and more, several for shorter ones."""
    draws = math.ceil(_POSITIONS / len(z_TD))
    z_ND = z_TD.repeat(draws, 1)
    place = torch.arange(len(z_ND), device=z_TD.device)
    word = noise.sample_word(_ITERATION, 0) + place // len(z_TD)
    e_ND = noise.white(torch.tensor(key, device=z_TD.device), place % len(z_TD) + 1, word, z_TD.shape[1])

    def argmax(x_ND: torch.Tensor) -> torch.Tensor:
        return torch.cat([head(part).argmax(-1) for part in torch.split(x_ND, _POSITIONS)])

    plain_N = argmax(z_TD).repeat(draws)
    return lambda sigma2: float((argmax(z_ND + math.sqrt(sigma2) * e_ND) != plain_N).double().mean())


def _draws(head: Head, z_TD: torch.Tensor) -> Callable[[float], float]:
    """As a function of p, the mean probability that a draw from the nucleus at temperature 1 is not the likeliest
    token."""
    p_P = torch.tensor(_NUCLEI, dtype=torch.float64, device=z_TD.device)
    found = [nucleus.masses(head(part), p_P) for part in torch.split(z_TD, _POSITIONS)]
    first_T, mass_TP = (torch.cat(parts) for parts in zip(*found, strict=True))
    shares: list[float] = (1 - first_T[:, None] / mass_TP).mean(0).tolist()
    return dict(zip(_NUCLEI, shares, strict=True)).__getitem__
