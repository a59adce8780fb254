"""The loop of one prompt: draw, score, update, keep the best. It is given its rollout and its scoring as functions, so
the same lines run on a toy problem in a test, in one process, and under Ray. Nothing here knows models or machines."""

from __future__ import annotations

import asyncio
import hashlib
import math
from array import array
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from aisp_dist import methods
from aisp_dist.config import Run, Search
from aisp_dist.data import thinking
from aisp_dist.methods.limit import within
from aisp_dist.philox import prompt_key
from aisp_dist.records import (
    BASE_ITERATION,
    Candidate,
    Done,
    Failed,
    Prompt,
    Rates,
    Result,
    Rollout,
    Round,
    Sampling,
    Score,
    TokenReward,
    Trajectory,
)
from aisp_dist.rewards.combine import Frozen, combine

RolloutFn = Callable[[Round], Coroutine[None, None, Rollout]]
ScoreFn = Callable[[str, Prompt, Sequence[str]], Awaitable[list[Score]]]  # reward name, prompt, responses
# prompt id, its tokens, responses -> the base model's mean NLL per token of each response
NllFn = Callable[[str, tuple[int, ...], Sequence[tuple[int, ...]]], Awaitable[list[float]]]
# prompt id, sampling, what it leaves open, the prompt's key, its tokens, its base answer -> sampling
CalibrateFn = Callable[[str, Sampling, Rates, tuple[int, int], tuple[int, ...], tuple[int, ...]], Awaitable[Sampling]]


class RowError(Exception):
    """This prompt cannot be finished, and a fresh process would say the same; it becomes a failed row."""


async def align(
    run: Run,
    prompt: Prompt,
    prompt_tokens: tuple[int, ...],
    rollout: RolloutFn,
    score: ScoreFn,
    nll: NllFn,
    calibrate: CalibrateFn,
    thinks: bool = False,
) -> Result:
    """Search one prompt to the end. thinks: the rendered prompt has opened a block of thinking. RowError becomes a
    Failed; every other exception is a fault and passes through."""
    try:
        return await _search(run, prompt, prompt_tokens, rollout, score, nll, calibrate, thinks)
    except RowError as error:
        return Failed(prompt, str(error))


async def _together(*calls: Awaitable[Any]) -> list[Any]:
    """All answers. Where one fails the others end first: nothing is asked any more for a prompt that is over."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _search(
    run: Run,
    prompt: Prompt,
    prompt_tokens: tuple[int, ...],
    rollout: RolloutFn,
    score: ScoreFn,
    nll: NllFn,
    calibrate: CalibrateFn,
    thinks: bool,
) -> Done:
    key = prompt_key(run.seed, prompt.id)
    selecting = {name: reward for name, reward in run.rewards.items() if reward.use == "select"}
    held_out = [name for name in run.rewards if name not in selecting]
    sampling, limit = run.method.sampling(), run.method.limit
    rates = run.method.rates() if isinstance(run.method, Search) else Rates()
    base_nll: float | None = None

    async def scored(iteration: int, drawn: Sequence[Trajectory], frozen: Frozen) -> tuple[list[Candidate], Frozen]:
        texts = [_answer(run, t.text, thinks) for t in drawn]
        said = [text for text in texts if isinstance(text, str)]
        answers = (
            await _together(*(score(name, prompt, said) for name in selecting)) if said else [[] for _ in selecting]
        )
        given = {name: iter(scores) for name, scores in zip(selecting, answers, strict=True)}
        raw = {n: [next(scores) if isinstance(t, str) else t for t in texts] for n, scores in given.items()}
        combined, frozen = combine(selecting, run.combine, raw, frozen)
        return [
            Candidate(
                iteration=iteration,
                sample=t.sample,
                text=text if isinstance(text, str) else t.text,
                token_ids=t.token_ids,
                finish_reason=t.finish_reason,
                reward=total.value,
                rewards=tuple((name, raw[name][i].value) for name in selecting),
                reason=total.reason,
                nll=t.nll,
                within=isinstance(text, str) and within(limit, text, t.nll, base_nll),
            )
            for i, (t, text, total) in enumerate(zip(drawn, texts, combined, strict=True))
        ], frozen

    ask = partial(Round, run.seed, prompt.id, prompt_tokens)
    base_rollout = asyncio.ensure_future(rollout(ask(BASE_ITERATION, 0, 1, Sampling())))
    try:
        state: methods.State = ()
        frozen: Frozen = None
        candidates: list[Candidate] = []
        best: Candidate | None = None
        best_reward = -math.inf
        curve: list[float | None] = []
        near = limit is not None and limit.nll is not None
        if near or rates != Rates():
            own = (await base_rollout).trajectories[0].token_ids
            if rates != Rates():
                sampling = await calibrate(prompt.id, sampling, rates, key, prompt_tokens, own)
            if near:
                (base_nll,) = await nll(prompt.id, prompt_tokens, [own])
        method = methods.bind(run.method, sampling)
        while (proposal := method.propose(state, key, candidates)) is not None:
            k = proposal.iteration
            reader = prompt if isinstance(proposal.sampling.guide, TokenReward) else None
            drawn = await rollout(
                ask(k, 0, proposal.num_samples, proposal.sampling, proposal.trace, reader, proposal.starts)
            )
            new, frozen = await scored(k, drawn.trajectories, frozen)
            eligible = [candidate.eligible_reward for candidate in new]
            for candidate, reward in zip(new, eligible, strict=True):  # strictly greater: the earliest of equals wins
                if reward is not None and reward > best_reward:
                    best, best_reward = candidate, reward
            candidates += new
            curve.append(best.reward if best else None)
            state = method.update(state, key, proposal, drawn, eligible)
        base_drawn = await base_rollout
    finally:
        base_rollout.cancel()
        await asyncio.gather(base_rollout, return_exceptions=True)
    if best is None and any(c.reward is not None and not c.within for c in candidates):
        raise RowError(f"none of {len(candidates)} candidates is within method.limit; widen it")
    if best is None:
        raise RowError(f"no candidate has a finite reward; the first says: {candidates[0].reason}")
    (base,), _ = await scored(BASE_ITERATION, base_drawn.trajectories, frozen)
    answered = isinstance(_answer(run, base_drawn.trajectories[0].text, thinks), str)
    shown = [best.text, base.text][: 1 + answered]
    losses, *reports = await _together(
        nll(prompt.id, prompt_tokens, [best.token_ids, base.token_ids][: 1 + (base_nll is None)]),
        *(score(name, prompt, shown) for name in held_out),
    )
    judged = [(name, [*(s.value for s in scores), None]) for name, scores in zip(held_out, reports, strict=True)]
    best, base = (
        replace(c, rewards=(*c.rewards, *((name, values[i]) for name, values in judged)))
        for i, c in enumerate((best, base))
    )
    return Done(
        prompt=prompt,
        prompt_tokens=len(prompt_tokens),
        best=best,
        base=base,
        nll=losses[0],
        base_nll=losses[1] if base_nll is None else base_nll,
        samples_spent=len(candidates),
        quarantined=sum(c.reason is not None for c in candidates),
        curve=tuple(curve),
        candidates=tuple(candidates),
        trace=state,
        prompt_hash=hashlib.blake2b(array("q", prompt_tokens).tobytes(), digest_size=8).hexdigest(),
    )


def _answer(run: Run, text: str, thinks: bool) -> str | Score:
    """What rewards are to see of a response; why they see nothing where it has no answer."""
    if run.generator.thinking == "keep":
        return text
    try:
        return thinking.answer(text, run.generator.thinking_tags, thinks)
    except thinking.Unfinished as error:
        return Score(None, str(error))
