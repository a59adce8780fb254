"""What is decoded to measure decoding: a model, prompts of random tokens, the rounds that ask for them, their noise.
Shapes: as peers.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from aisp_dist import checkpoints, noise
from aisp_dist.bench import paired, shapes
from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine import model
from aisp_dist.engine.decode import Engine
from aisp_dist.engine.lm import LM
from aisp_dist.records import Rollout, Round, Sampling

SAMPLING = Sampling(sigma2=0.5)
ITERATION = 4  # whose trajectories are asked for: AISP's fifth


@dataclass(frozen=True)
class Workload:
    """`samples` trajectories for each of `prompts` prompts, in an engine of `batch_rows`."""

    model: str
    checkpoint: bool  # else the model is a shape
    prompt_tokens: int
    new_tokens: int
    samples: int
    prompts: int
    batch_rows: int
    dtype: str

    def load(self, device: torch.device) -> LM:
        """The engine's model, with nothing that ends a response. Raises ConfigError."""
        if self.checkpoint:
            lm = model.load(Generator.model_validate({"model": self.model, "dtype": self.dtype}), device)
        else:
            lm = model.adapt(self.causal(device), shapes.tokenizer(shapes.parse(self.model).vocab))
        tokens = self.prompt_tokens + self.new_tokens
        if lm.context_length is not None and tokens > lm.context_length:
            raise ConfigError(
                f"--prompt-tokens {self.prompt_tokens} and --new-tokens {self.new_tokens} exceed the "
                f"{lm.context_length} positions of {self.model!r}; lower them"
            )
        return replace(lm, eos_ids=frozenset())

    def causal(self, device: torch.device) -> Any:
        """transformers' own model, with the same weights."""
        dtype = getattr(torch, self.dtype)
        if not self.checkpoint:
            return shapes.causal(shapes.parse(self.model), self.prompt_tokens + self.new_tokens, dtype, device)
        where = checkpoints.locate("--model", self.model, "generator")
        return AutoModelForCausalLM.from_pretrained(where, dtype=dtype).to(device).eval().requires_grad_(False)

    def rounds(self, vocab: int, repetition: int, lengths: Sequence[int] = ()) -> list[Round]:
        """Random prompts, other ones in every repetition; of `prompt_tokens` each, or of these lengths."""
        draw = torch.Generator().manual_seed(repetition)
        prompts = [torch.randint(vocab, (n,), generator=draw) for n in lengths or [self.prompt_tokens] * self.prompts]
        return [
            Round(repetition, f"{p:06}", tuple(prompt.tolist()), ITERATION, 0, self.samples, SAMPLING)
            for p, prompt in enumerate(prompts)
        ]


@dataclass(frozen=True)
class Decoded:
    """What the engine answered; the share of its row-steps that became a kept token; the seconds of its first call,
    which prefills, and the steps that this took (on a GPU, several)."""

    answers: dict[Round, Rollout]
    utilisation: float
    first: float
    first_steps: int

    def tokens(self) -> list[list[int]]:
        """By prompt and sample, however they were submitted."""
        ordered = sorted(self.answers, key=lambda round: round.prompt_id)
        return [list(t.token_ids) for round in ordered for t in self.answers[round].trajectories]


def drive(engine: Engine, *groups: Sequence[Round]) -> Decoded:
    """Decodes groups of rounds, each when the one before it has left the engine."""
    answers: dict[Round, Rollout] = {}
    device, before, first, first_steps = engine.lm.device, engine.steps, 0.0, 0
    start = paired.now(device)
    for group in groups:
        for round in group:
            engine.submit(round)
        while engine.busy:
            answers.update(engine.step())
            if not first:
                first, first_steps = paired.now(device) - start, engine.steps - before
    kept = sum(len(t.token_ids) for rollout in answers.values() for t in rollout.trajectories)
    return Decoded(answers, kept / ((engine.steps - before) * len(engine.rows)), first, first_steps)


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
