"""What is decoded to measure decoding: a model, prompts of random tokens, the rounds that ask for them, their noise.
Shapes: as peers.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from aisp_dist.bench import paired, shapes
from aisp_dist.engine import model, noise
from aisp_dist.engine.decode import Engine
from aisp_dist.engine.lm import LM
from aisp_dist.records import Rollout, Round, Sampling

SAMPLING = Sampling(sigma2=0.5)


@dataclass(frozen=True)
class Workload:
    """`samples` trajectories for each of `prompts` prompts, in an engine of `batch_rows`."""

    model: str  # a shape
    prompt_tokens: int
    new_tokens: int
    samples: int
    prompts: int
    batch_rows: int
    dtype: str

    def causal(self, device: torch.device) -> Any:
        """transformers' own model; the same weights every time."""
        size = self.prompt_tokens + self.new_tokens
        return shapes.causal(shapes.parse(self.model), size, getattr(torch, self.dtype), device)

    def load(self, device: torch.device) -> LM:
        """The engine's model."""
        return model.adapt(self.causal(device), shapes.tokenizer(shapes.parse(self.model).vocab))

    def rounds(self, vocab: int, repetition: int) -> list[Round]:
        """Random prompts, other ones in every repetition."""
        draw = torch.Generator().manual_seed(repetition)
        prompts = torch.randint(vocab, (self.prompts, self.prompt_tokens), generator=draw).tolist()
        return [
            Round(repetition, f"{p:06}", tuple(prompt), 0, 0, self.samples, SAMPLING)
            for p, prompt in enumerate(prompts)
        ]


@dataclass(frozen=True)
class Decoded:
    """Tokens by prompt and sample; the share of the engine's row-steps that became a kept token; the seconds of its
    first call, which prefills, and the steps that this took (on a GPU, several)."""

    tokens: list[list[int]]
    utilisation: float
    first: float
    first_steps: int


def drive(engine: Engine, rounds: Sequence[Round]) -> Decoded:
    answers: dict[Round, Rollout] = {}
    device, before, first, first_steps = engine.lm.device, engine.steps, 0.0, 0
    start = paired.now(device)
    for round in rounds:
        engine.submit(round)
    while engine.busy:
        answers.update(engine.step())
        if not first:
            first, first_steps = paired.now(device) - start, engine.steps - before
    tokens = [list(t.token_ids) for round in rounds for t in answers[round].trajectories]
    utilisation = sum(map(len, tokens)) / ((engine.steps - before) * len(engine.rows))
    return Decoded(tokens, utilisation, first, first_steps)


def warm(engine: Engine, rounds: Sequence[Round]) -> None:
    """Some steps of one sample each; the prompts stay prefilled and their controls known."""
    some = [replace(round, stop=1) for round in rounds]
    for round in some:
        engine.submit(round)
    for _ in range(min(3, engine.max_new_tokens)):
        engine.step()
    for round in some:
        engine.cancel(round)


def noise_of(rounds: Sequence[Round], steps: int, lm: LM) -> torch.Tensor:
    """v [B, T, D] of every trajectory: white noise, since there is no control yet."""
    t = torch.arange(1, steps + 1, device=lm.device)
    drawn = []
    for round in rounds:
        key = torch.tensor(noise.prompt_key(round.seed, round.prompt_id), device=lm.device)
        for sample in range(round.start, round.stop):
            word = torch.tensor(noise.sample_word(round.iteration, sample), device=lm.device)
            drawn.append(noise.white(key, t, word, lm.hidden_size))
    return math.sqrt(SAMPLING.sigma2) * torch.stack(drawn)
