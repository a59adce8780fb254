"""Population with noise on the pre-logits beside its draws: an ablation, which no key of the configuration asks for.

The engine takes first tokens or noise in a round, not both. So here each sample that continues an answer is a round of
its own, whose prompt ends with the tokens that are given. That is slower, and costs the same tokens."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from aisp_dist.config import Population
from aisp_dist.data.detokenize import text_after
from aisp_dist.local import LocalBackend
from aisp_dist.records import Rates, Rollout, Round, Sampling, Trajectory


class Noisy(Population):
    """noise_rate: the share of the base answer's tokens that the noise changes in greedy decoding."""

    noise_rate: float

    def draws(self) -> tuple[Sampling, Rates]:
        sampling, rates = super().draws()
        return sampling, replace(rates, noise=self.noise_rate)


async def rollout(backend: LocalBackend, longest: int, round: Round) -> Rollout:
    """As the backend's, also for a round with starts and noise. longest: tokens of an answer, the given ones too."""
    if not (round.starts and round.sampling.sigma2):
        return await backend.rollout(round)

    async def one(sample: int, start: tuple[int, ...]) -> Trajectory:
        prompt = round.prompt_tokens + start
        alone = Round(round.seed, round.prompt_id, prompt, round.iteration, sample, sample + 1, round.sampling)
        (drawn,) = (await backend.rollout(alone)).trajectories
        tokens = start + drawn.token_ids
        whole = drawn.finish_reason == "stop" and len(tokens) <= longest
        said: dict[str, Any] = {"token_ids": tokens[:longest], "finish_reason": "stop" if whole else "length"}
        shown = tokens[:-1] if whole else tokens[:longest]
        text = text_after(backend.tokenizer, round.prompt_tokens, list(shown), cut=not whole)
        return replace(drawn, text=text, **said)

    samples = range(round.start, round.stop)
    return Rollout(tuple(await asyncio.gather(*map(one, samples, round.starts))))
