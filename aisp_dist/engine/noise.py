"""Keyed Gaussian noise. Every number is a pure function of (seed, prompt, iteration, sample, step, coordinate), so any
machine can draw any part of it again, in any order, with the same bits on every device. Owns the normal table and the
covariance over time.

Whitened coordinates. Each noise kind is a causal linear filter L of white noise e_t ~ N(0, sigma^2 I):  eps = L e. The
control is kept as m with u = L m, so v = u + eps = L (m + e) and the filter runs once, on the sum. Since L is lower
triangular, for the first T steps of any kind

    u' Sigma^-1 v = sum_{t<=T} m_t . (m_t + e_t) / sigma^2      KL(Q_u || P) = sum_t |m_t|^2 / (2 sigma^2)

so the penalty of (18), its Rao-Blackwell form and the update are the same code for every covariance. Equation numbers:
Kanai et al., arXiv 2510.26219.

Shapes: N rows, T steps (max_new_tokens), D hidden size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from aisp_dist.philox import NOISE, UNIFORM, philox4x32, prompt_key, sample_word

if TYPE_CHECKING:
    from aisp_dist.records import Sampling

__all__ = ["Filter", "normal_table", "prompt_key", "sample_word", "time_filter", "uniform", "white"]


@functools.cache
def normal_table(device: torch.device | str = "cpu") -> torch.Tensor:
    """Quantiles of the standard normal at 65,536 midpoints, fp32, scaled to unit variance. The largest is 4.33."""
    grid = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    table: torch.Tensor = torch.special.ndtri(grid)
    return (table / table.square().mean().sqrt()).float().to(device)


def white(key: torch.Tensor, step: torch.Tensor, sample: torch.Tensor, dim: int) -> torch.Tensor:
    """White noise of unit variance, fp32 [..., dim]. key [..., 2]: of the prompt; step [...]: from 1; sample [...]: the
    sample word; all int64."""
    blocks = torch.arange((dim + 7) // 8, device=key.device)
    words = philox4x32(
        [blocks, step[..., None], sample[..., None], torch.full_like(step[..., None], NOISE)],
        [key[..., :1], key[..., 1:]],
    )
    halves = torch.stack([h for w in words for h in (w & 0xFFFF, w >> 16)], dim=-1)
    drawn: torch.Tensor = normal_table(key.device)[halves.flatten(-2)[..., :dim]]
    return drawn


def uniform(key: torch.Tensor, step: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Uniforms in (0, 1) with 32 random bits, fp64 [...], for drawing tokens. Arguments as in `white`."""
    counter = [torch.zeros_like(step), step, sample, torch.full_like(step, UNIFORM)]
    u: torch.Tensor = (philox4x32(counter, [key[..., 0], key[..., 1]])[0].double() + 0.5) / 2**32
    return u


@dataclass(frozen=True)
class Filter:
    """L as a recursion over steps, from state 0:  v_t = feed_t * state + gain_t * x_t;  state = keep * state + v_t.

    feed, gain: [T] fp32. A step whose gain is 0 has no white coordinate (`shared` has one only, at t = 1).
    """

    feed: torch.Tensor
    gain: torch.Tensor
    keep: float

    def step(self, x_ND: torch.Tensor, state_ND: torch.Tensor, t_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of rows at steps t_N, from 1: the input m_t + e_t gives v_t and the next state."""
        v_ND = self.feed[t_N - 1, None] * state_ND + self.gain[t_N - 1, None] * x_ND
        return v_ND, (self.keep * state_ND + v_ND if self.keep else v_ND)


def time_filter(sampling: Sampling, num_steps: int, device: torch.device | str = "cpu") -> Filter:
    """The filter of a noise kind, with unit variance at every step.

    ar1: eps_t = rho eps_{t-1} + sqrt(1 - rho^2) eta_t. mixture: eps_t = sqrt(a) c + sqrt(1 - a) eta_t, written
    causally: the mean of eps_t given the past is c_t sum_{s<t} eps_s with c_t = a / (1 - a + a (t - 1)). shared: the
    mixture with a = 1, one vector for all t."""
    past = torch.arange(num_steps, dtype=torch.float64)  # t - 1
    keep = 0.0
    if sampling.noise == "independent":
        feed, gain = torch.zeros_like(past), torch.ones_like(past)
    elif sampling.noise == "ar1":
        feed = torch.full_like(past, sampling.parameter)
        gain = torch.where(past == 0, 1.0, math.sqrt(1 - sampling.parameter**2))
    else:
        a, keep = (1.0 if sampling.noise == "shared" else sampling.parameter), 1.0
        feed = torch.where(past == 0, 0.0, a / (1 - a + a * past.clamp(min=1 if a == 1 else 0)))
        gain = (1 - a * past * feed).clamp(min=0).sqrt()
        if a == 1:
            gain = (past == 0).double()
    return Filter(feed.float().to(device), gain.float().to(device), keep)
