"""What the engine must reproduce, computed the slow way: transformers' own `generate` on the repeated prompt, with the
controlled noise added to what enters the output layer, and the noise made from its covariance matrix over time.

Shapes: N samples, T steps, D hidden size.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from aisp_dist.engine import noise
from aisp_dist.engine.decode import Engine
from aisp_dist.engine.step import STEP
from aisp_dist.records import Rollout, Round, Sampling, Weights


def covariance(sampling: Sampling, steps: int) -> torch.Tensor:
    """Sigma [T, T] of eps over time in units of sigma^2, by definition of the noise kinds."""
    t = torch.arange(steps, dtype=torch.float64)
    a = 1.0 if sampling.noise == "shared" else sampling.parameter
    match sampling.noise:
        case "independent":
            return torch.eye(steps, dtype=torch.float64)
        case "ar1":
            return sampling.parameter ** (t[:, None] - t).abs()
        case _:
            return a + (1 - a) * torch.eye(steps, dtype=torch.float64)


def factor(sampling: Sampling, steps: int) -> torch.Tensor:
    """The causal L [T, T] with L L' = Sigma."""
    if sampling.noise == "shared":
        return torch.ones(steps, steps, dtype=torch.float64) * (torch.arange(steps) == 0)
    return torch.linalg.cholesky(covariance(sampling, steps))


def white(round: Round, iteration: int, sample: int, steps: int, dim: int) -> torch.Tensor:
    """e [T, D] in fp64."""
    key = torch.tensor(noise.prompt_key(round.seed, round.prompt_id))
    word = torch.tensor(noise.sample_word(iteration, sample))
    drawn = noise.white(key, torch.arange(1, steps + 1), word, dim)
    return math.sqrt(round.sampling.sigma2) * drawn.double()


def control(round: Round, steps: int, dim: int) -> torch.Tensor:
    """u [T, D] of `after_eos: full`: u += sum_i w_i eps_i, (14)."""
    u = torch.zeros(steps, dim, dtype=torch.float64)
    for iteration, entry in enumerate(round.trace):
        for sample, weight in enumerate(entry.weights):
            u = u + weight * factor(round.sampling, steps) @ white(round, iteration, sample, steps, dim)
    return u


def generate(model: Any, round: Round, steps: int, **settings: Any) -> list[list[int]]:
    """Tokens of each sample by model.generate: greedy, with v_t added to the last position's hidden state, (5)."""
    samples, dim = range(round.start, round.stop), model.config.get_text_config().hidden_size
    v_NTD = torch.zeros(len(samples), steps, dim)
    if round.sampling.sigma2:
        u, left = control(round, steps, dim), factor(round.sampling, steps)
        v_NTD = torch.stack([u + left @ white(round, round.iteration, i, steps, dim) for i in samples]).float()
    taken = 0

    def add(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        nonlocal taken
        (hidden,) = args
        taken += 1
        return (torch.cat([hidden[:, :-1], hidden[:, -1:] + v_NTD[:, taken - 1, None]], dim=1),)

    hook = model.get_output_embeddings().register_forward_pre_hook(add)
    prompt = torch.tensor([round.prompt_tokens] * len(samples))
    ends = {"eos_token_id": None, "pad_token_id": 0, **settings}
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False, **ends)
    hook.remove()
    return made[:, prompt.shape[1] :].tolist()


def states(model: Any, tokens: list[int]) -> torch.Tensor:
    """z [T, D] of a whole sequence in one dense pass of transformers' own."""
    with torch.no_grad():
        return model.get_decoder()(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]


def trace(iterations: int, samples: int, length: int, seed: int = 0) -> tuple[Weights, ...]:
    """A trace of random weights, in fp32, and of random lengths up to `length`."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(
        Weights(
            tuple((2 * torch.randn(samples, generator=draw)).softmax(0).tolist()),
            tuple(torch.randint(1, length + 1, (samples,), generator=draw).tolist()),
        )
        for _ in range(iterations)
    )


class Watched(Engine):
    """An engine that keeps every row's hidden state z [D], by (prompt id, iteration, sample, step)."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.seen: dict[tuple[str, int, int, int], torch.Tensor] = {}
        self._whole, self.batch.first = self.batch.first, self._first  # type: ignore[method-assign]

    def _first(self, rows: int) -> Any:
        view = self._whole(rows)
        view.states = partial(self._states, view.states)
        return view

    def _states(self, computed: Any, attend: Any) -> torch.Tensor:
        z_BD = computed(attend)
        for slot, row in enumerate(self.rows):
            if row:
                round, step = row.job.round, int(self.batch.rows_BF[slot, STEP])
                self.seen[round.prompt_id, round.iteration, row.sample, step] = z_BD[slot].clone()
        return z_BD


def tokens(rollout: Rollout) -> list[list[int]]:
    return [list(trajectory.token_ids) for trajectory in rollout.trajectories]
