"""The variance of noise by what it does: the share of a prompt's own answer that it would change. Free of the unit that
pre-logits have, which is another for every output layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from aisp_dist import noise
from aisp_dist.engine.lm import LM

_POSITIONS = (
    256  # noise vectors looked at, so the rate of one prompt is known to about .02; positions of a head product
)
_STEPS = 2  # variances tried for each factor of two
_LOW, _HIGH = -60 * _STEPS, 60 * _STEPS
_ITERATION = (1 << 16) - 1  # whose noise no search draws: a configuration has fewer


@torch.inference_mode()
def variance(
    lm: LM, key: tuple[int, int], prompt_tokens: Sequence[int], answer: Sequence[int], flip_rate: float
) -> float:
    """The least sigma^2, of powers of sqrt(2), at which argmax W (z_t + e), e ~ N(0, sigma^2 I), differs from
    argmax W z_t at a share `flip_rate` of the answer's steps. z on the answer itself; the noise is keyed, one draw a
    step for answers of 256 tokens and more, several for shorter ones."""
    z_TD, _ = lm.dense((*prompt_tokens, *answer[:-1]))
    z_TD = z_TD[len(prompt_tokens) - 1 :].float()
    draws = math.ceil(_POSITIONS / len(z_TD))
    z_ND = z_TD.repeat(draws, 1)
    place = torch.arange(len(z_ND), device=lm.device)
    word = noise.sample_word(_ITERATION, 0) + place // len(z_TD)
    e_ND = noise.white(torch.tensor(key, device=lm.device), place % len(z_TD) + 1, word, z_TD.shape[1])
    plain_N = _argmax(lm, z_TD).repeat(draws)

    def changes(at: int) -> bool:
        moved_N = _argmax(lm, z_ND + 2 ** (at / _STEPS / 2) * e_ND)
        return float((moved_N != plain_N).double().mean()) >= flip_rate

    low, high = _LOW, _HIGH  # changes(high) holds, or nothing does
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if changes(middle) else (middle + 1, high)
    return float(2 ** (low / _STEPS))


def _argmax(lm: LM, z_ND: torch.Tensor) -> torch.Tensor:
    return torch.cat([lm.logits(part).argmax(-1) for part in torch.split(z_ND, _POSITIONS)])
