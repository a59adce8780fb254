"""The control of a round, rebuilt from its trace, and what it costs a trajectory, in whitened coordinates (noise.py).
Owns the update over past iterations. Of the model it knows only the hidden size. Equation numbers: Kanai et al., arXiv
2510.26219.

Shapes: T steps (max_new_tokens), D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aisp_dist.engine import noise
from aisp_dist.records import Round, Sampling, Weights


@dataclass(frozen=True, eq=False)
class Control:
    """The control m [T, D] after a trace of iterations. squares: |m_t|^2 by step."""

    sampling: Sampling
    trace: tuple[Weights, ...]
    filter: noise.Filter
    m_TD: torch.Tensor
    squares: tuple[float, ...]

    @property
    def u_sq(self) -> float:
        """sum_t |m_t|^2."""
        return math.fsum(self.squares)


def rebuild(round: Round, num_steps: int, dim: int, device: torch.device, known: Control | None = None) -> Control:
    """The control of a round: m^1 = 0, then the update (14) for each entry of the trace, in order. Continues from
    `known` if the trace extends that one's; the bits are the same either way."""
    if known is None or known.sampling != round.sampling or known.trace != round.trace[: len(known.trace)]:
        time_filter = noise.time_filter(round.sampling, num_steps, device)
        known = Control(round.sampling, (), time_filter, torch.zeros(num_steps, dim, device=device), (0.0,) * num_steps)
    if known.trace == round.trace:
        return known
    m_TD = known.m_TD
    for iteration in range(len(known.trace), len(round.trace)):
        m_TD = _update(m_TD, known.filter, round, iteration)
    return Control(round.sampling, round.trace, known.filter, m_TD, tuple(_dots(m_TD, m_TD)))


def cost(control: Control, round: Round, sample: int, dots: list[float]) -> tuple[float, float]:
    """(sum_t m_t . e_t, sum_t |m_t|^2) of a trajectory. dots: m_t . e_t of its own steps.

    The sums run over all T steps for `full`, for which the noise after the end is drawn here, and over the trajectory's
    own steps for `marginal`."""
    length, steps = len(dots), len(control.squares)
    if round.sampling.after_eos == "marginal":
        return math.fsum(dots), math.fsum(control.squares[:length])
    rest = (
        _noise(round, control.filter, round.iteration, sample, control.m_TD.shape[1], length)
        if length < steps
        else None
    )
    after = [] if rest is None else _dots(control.m_TD[length:], rest)
    return math.fsum(dots + after), control.u_sq


def costs(control: Control, round: Round, lengths: Sequence[int]) -> list[tuple[float, float]]:
    """`cost` of each trajectory of a round, given its length in tokens, from its noise alone."""
    found = []
    for sample, length in zip(range(round.start, round.stop), lengths, strict=True):
        dots = [0.0] * length
        if not round.sampling.mean:
            e_TD = _noise(round, control.filter, round.iteration, sample, control.m_TD.shape[1], stop=length)
            dots = _dots(control.m_TD[:length], e_TD)
        found.append(cost(control, round, sample, dots))
    return found


def moves(control: Control, round: Round, sample: int | None) -> torch.Tensor:
    """v [T, D], v_t = (L (m + e))_t, by which a sample of the round moved its pre-logits, (3). For sample None, without
    noise: u_t = (L m)_t."""
    x_TD, made = control.m_TD, control.filter
    if sample is not None:
        x_TD = x_TD + _noise(round, made, round.iteration, sample, x_TD.shape[1])
    if not made.feed.any():
        return x_TD  # the noise of a step acts at that step only: L = 1
    state_1D, v_TD = torch.zeros_like(x_TD[:1]), torch.empty_like(x_TD)
    for t in range(len(x_TD)):
        at = torch.tensor([t + 1], device=x_TD.device)
        v_TD[t : t + 1], state_1D = made.step(x_TD[t : t + 1], state_1D, at)
    return v_TD


def _update(m_TD: torch.Tensor, time_filter: noise.Filter, round: Round, iteration: int) -> torch.Tensor:
    """m^{k+1} from m^k and the weights of iteration k.

    `full`: m + sum_i w_i e_i, since the weights sum to one. `marginal`: after a sample's end, its v is replaced by its
    mean alpha m. Samples are added in ascending order, each product rounded before its sum, so that the bits are fixed.
    A weight of zero contributes nothing, and an iteration without any other weight leaves m as it was."""
    sampling, entry = round.sampling, round.trace[iteration]
    if not any(entry.weights):
        return m_TD
    steps = torch.arange(1, len(m_TD) + 1, device=m_TD.device)
    folded = m_TD if sampling.after_eos == "full" else torch.zeros_like(m_TD)
    for sample, (weight, length) in enumerate(zip(entry.weights, entry.lengths, strict=True)):
        if weight:
            term = _noise(round, time_filter, iteration, sample, m_TD.shape[1])
            if sampling.after_eos == "marginal":
                term = torch.where(steps[:, None] <= length, m_TD + term, sampling.alpha * m_TD)
            folded = folded + weight * term
    return folded


def _noise(
    round: Round,
    time_filter: noise.Filter,
    iteration: int,
    sample: int,
    dim: int,
    after: int = 0,
    stop: int | None = None,
) -> torch.Tensor:
    """e [T - after, D] of one trajectory from step `after` + 1 on, zero where the kind has no white coordinate. stop:
    the last step; T where it is None."""
    gain, device = time_filter.gain[after:stop], time_filter.gain.device
    steps = torch.arange(after + 1, after + 1 + len(gain), device=device)
    key = torch.tensor(noise.prompt_key(round.seed, round.prompt_id), device=device)
    word = torch.tensor(noise.sample_word(iteration, sample), device=device)
    e_TD = math.sqrt(round.sampling.sigma2) * noise.white(key, steps, word, dim)
    return torch.where(gain[:, None] > 0, e_TD, 0.0)


def _dots(a_TD: torch.Tensor, b_TD: torch.Tensor) -> list[float]:
    """a_t . b_t by step, in fp64. Callers add them up by fsum, which is exact and so the same on any device."""
    dots: list[float] = (a_TD.double() * b_TD.double()).sum(-1).tolist()
    return dots
