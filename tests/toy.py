"""A toy world for the loop: no model, the answer's text is its reward, a linear function of v. Its noise is built from
the dense covariance matrix, independently of the filters in aisp_dist/noise.py.

T steps, D dimensions, N samples."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import torch

from aisp_dist.engine.noise import prompt_key, sample_word, white
from aisp_dist.records import Prompt, Rollout, Round, Sampling, Score, Trajectory

PROMPT = Prompt(id="toy", source_index=0, content="toy")


def covariance(sampling: Sampling, steps: int) -> np.ndarray:
    """[T, T] correlation of the noise over time, from its definition."""
    t = np.arange(steps)
    match sampling.noise:
        case "independent":
            return np.eye(steps)
        case "ar1":
            return sampling.parameter ** np.abs(t[:, None] - t[None])
        case "mixture":
            return sampling.parameter + (1 - sampling.parameter) * np.eye(steps)
        case "shared":
            return np.ones((steps, steps))


def white_noise(seed: int, sampling: Sampling, iteration: int, samples: range, steps: int, dim: int) -> np.ndarray:
    """[N, T, D] e, of variance sigma2; shared noise has one white coordinate, at t = 1."""
    key = torch.tensor(prompt_key(seed, PROMPT.id))
    word = torch.tensor([sample_word(iteration, i) for i in samples])
    t = torch.arange(1, steps + 1)
    e = white(key.expand(len(samples), steps, 2), t.expand(len(samples), steps), word[:, None].expand(-1, steps), dim)
    e = e.double().numpy() * np.sqrt(sampling.sigma2)
    if sampling.noise == "shared":
        e[:, 1:] = 0
    return e


class World:
    """An align.Backend: reward = sum_t c_t . v_t, responses of length `lengths(e)`."""

    def __init__(self, c: np.ndarray, lengths=None, reward=None) -> None:
        self.c, self.lengths = c, lengths or (lambda e: np.full(len(e), c.shape[0]))
        self.reward = reward or (lambda v, t: (self.c * v).sum((1, 2)))
        self.m_of: list[np.ndarray] = []

    def whitened_mean(self, request: Round) -> np.ndarray:
        steps, dim = self.c.shape
        m = np.zeros((steps, dim))
        alpha = request.sampling.alpha
        for k, (done, lengths) in enumerate((w.weights, w.lengths) for w in request.trace):
            e = white_noise(request.seed, request.sampling, k, range(len(done)), steps, dim)
            w = np.array(done)[:, None, None]
            if not w.any():
                continue
            if request.sampling.after_eos == "full":
                m = m + (w * e).sum(0)
            else:
                alive = np.arange(1, steps + 1)[None, :, None] <= np.array(lengths)[:, None, None]
                m = (w * np.where(alive, m + e, alpha * m)).sum(0)
        return m

    async def rollout(self, request: Round) -> Rollout:
        steps, dim = self.c.shape
        sampling = request.sampling
        if request.iteration < 0:
            zero = np.zeros((1, steps, dim))
            return Rollout((Trajectory(0, (1,) * steps, repr(float(self.reward(zero, [steps])[0])), "length"),))
        e = white_noise(request.seed, sampling, request.iteration, range(request.start, request.stop), steps, dim)
        m = self.whitened_mean(request)
        self.m_of.append(m)
        lower = np.linalg.cholesky(covariance(sampling, steps) + 1e-12 * np.eye(steps))
        v = np.einsum("st,ntd->nsd", lower, m + e)
        lengths = self.lengths(e)
        alive = (
            np.arange(1, steps + 1)[None]
            <= (lengths if sampling.after_eos == "marginal" else np.full(len(e), steps))[:, None]
        )
        cost = ((m * e).sum(-1) * alive).sum(-1)
        square = ((m * m).sum(-1)[None] * alive).sum(-1)
        rewards = self.reward(v, lengths)
        return Rollout(
            tuple(
                Trajectory(i, (1,) * int(lengths[j]), repr(float(rewards[j])), "stop", float(cost[j]), float(square[j]))
                for j, i in enumerate(range(request.start, request.stop))
            ),
            u_sq=float((m * m).sum()),
        )

    async def score(self, name: str, prompt: Prompt, responses) -> list[Score]:
        return [Score(None, "not finite") if not np.isfinite(x := float(r)) else Score(x) for r in responses]

    async def nll(self, prompt_id, prompt_tokens, responses) -> list[float]:
        return [0.0 for _ in responses]

    async def calibrate(self, request):
        return replace(request.sampling, sigma2=request.rates.noise)

    def align(self, run):
        from aisp_dist.align import align

        return asyncio.run(align(run, PROMPT, (1,), self))
