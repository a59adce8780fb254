"""The search of one prompt: draw, score, update, keep the best. A Backend does what needs models, so the same lines run
on a toy problem in a test, in one process and on a Ray cluster.

    input line -> render -> [propose -> Backend.rollout -> Backend.score -> update] repeated -> Done | Failed
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from array import array
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

from aisp_dist import methods
from aisp_dist.config import ConfigError, FunctionReward, Run
from aisp_dist.data import render, thinking
from aisp_dist.methods.limit import within
from aisp_dist.philox import prompt_key
from aisp_dist.records import (
    BASE_ITERATION,
    BadInput,
    Calibration,
    Candidate,
    Done,
    Failed,
    Input,
    Original,
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
from aisp_dist.rewards import RewardError
from aisp_dist.rewards.combine import Frozen, combine
from aisp_dist.together import together

Tokens = tuple[int, ...]


PROBES = 3  # prompts that a function must fail on to be refused


class RowError(Exception):
    """This prompt cannot be finished, and another try would say the same. It becomes a failed row with this reason."""


class Backend(Protocol):
    """A base model and rewards, wherever they run. Every method answers the same for the same arguments, and may be
    called any number of times at once. All raise RowError for a request that fails again when it is repeated; every
    other exception is a fault of the machinery and ends the run."""

    async def rollout(self, round: Round) -> Rollout:
        """The trajectories that the round asks for."""

    async def score(self, reward: str, prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        """One score by the named reward for each response, in order."""

    async def nll(self, prompt_id: str, prompt_tokens: Tokens, responses: Sequence[Tokens]) -> list[float]:
        """The base model's mean negative log-likelihood per token of each response, in nats."""

    async def calibrate(self, request: Calibration) -> Sampling:
        """The request's sampling with its rates turned into numbers."""


def reason(error: BaseException) -> str:
    """What a failed row says of an error: the first line of its message, after the error's type where the message is
    not ours."""
    text = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0][:500]


def window(run: Run) -> int:
    """How many prompts one generator searches at a time: as the method says, else twice what fills the rows, so that
    scoring overlaps decoding."""
    return run.method.prompts_together or max(2, -(-2 * run.generator.rows // run.method.num_samples))


def tokens_of(run: Run, prompt: Prompt, tokenizer: render.Tokenizer, context_length: int | None) -> Tokens:
    """The prompt's token ids. context_length: of the base model, in tokens; None where it has no limit. Raises
    Unrenderable for this prompt, ConfigError for what is wrong with every prompt."""
    max_tokens, longest = run.prompts.max_tokens, run.generator.max_new_tokens
    if context_length is not None:
        if longest >= context_length:
            raise ConfigError(
                f"generator.max_new_tokens: {longest} leaves no token for a prompt in the model's context of "
                f"{context_length}; lower it"
            )
        max_tokens = min(max_tokens, context_length - longest)
    return render.render(prompt, run.prompts, tokenizer, max_tokens)


def first_prompts(lines: Iterable[Input]) -> list[Prompt]:
    """The first PROBES prompts, without the bad lines among them; fewer where there are many bad lines."""
    return list(islice((line for line in islice(lines, 100 * PROBES) if isinstance(line, Prompt)), PROBES))


async def probe(
    run: Run, first: Sequence[Prompt], score: Callable[[str, Prompt, Sequence[str]], Awaitable[Any]]
) -> None:
    """Raise ConfigError for a function reward that fails on each of the first prompts, whatever the answer: it would
    fail on every prompt. `score` is a backend's, or one that raises RowError at the first error."""
    for name, reward in run.rewards.items():
        errors = []
        for prompt in first if isinstance(reward, FunctionReward) else ():
            try:
                await score(name, prompt, ["Yes.", "No."])
                break
            except RowError as error:
                errors.append(str(error).removeprefix(f"{name}: "))
        else:
            if errors:
                raise ConfigError(f"rewards.{name}: it fails on each of the first {len(errors)} prompts: {errors[0]}")


async def align_input(
    run: Run, line: Input, tokenizer: render.Tokenizer, context_length: int | None, backend: Backend
) -> Result:
    """From an input line to its result. Faults of the backend pass through."""
    if isinstance(line, BadInput):
        return Failed(line, line.reason)
    try:
        tokens = tokens_of(run, line, tokenizer, context_length)
    except render.Unrenderable as error:
        return Failed(line, str(error))
    strips = run.generator.thinking == "strip"
    thinks = strips and thinking.opens(tokenizer.decode(tokens), run.generator.thinking_tags)
    return await align(run, line, tokens, backend, thinks)


async def align(run: Run, prompt: Prompt, prompt_tokens: Tokens, backend: Backend, thinks: bool = False) -> Result:
    """Search one rendered prompt to the end. thinks: the prompt ends inside a block of thinking that it has opened.
    A RowError becomes a Failed; every other exception is a fault and passes through."""
    try:
        return await _search(run, prompt, prompt_tokens, backend, thinks)
    except RowError as error:
        return Failed(prompt, str(error))


async def _search(run: Run, prompt: Prompt, prompt_tokens: Tokens, backend: Backend, thinks: bool) -> Done:
    key = prompt_key(run.seed, prompt.id)
    selecting = {name: reward for name, reward in run.rewards.items() if reward.use == "select"}
    held_out = [name for name in run.rewards if name not in selecting]
    (sampling, rates), limit = run.method.draws(), run.method.limit
    base_nll: float | None = None

    async def scored(
        iteration: int, drawn: Sequence[Trajectory], frozen: Frozen, thinks: bool = thinks
    ) -> tuple[list[Candidate], Frozen]:
        """The trajectories as candidates; `frozen` are the statistics of combine."""
        texts = [_answer(run, t.text, thinks) for t in drawn]
        said = [text for text in texts if isinstance(text, str)]
        answers: list[list[Score]] = [[] for _ in selecting]
        if said:
            answers = await together(*(backend.score(name, prompt, said) for name in selecting))
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

    async def scored_original(frozen: Frozen) -> Original | None:
        """The answer that the prompt came with, by all rewards. It is in no other answer's batch, so that base and best
        have the bits that they have without it."""
        if prompt.original is None:
            return None
        (answer,), _ = await scored(BASE_ITERATION, [Trajectory(1, (), prompt.original, "stop")], frozen, thinks=False)
        shown = _answer(run, prompt.original, thinks=False)
        reports: list[list[Score]] = [[Score(None)] for _ in held_out]
        if isinstance(shown, str):
            reports = await together(*(backend.score(name, prompt, [shown]) for name in held_out))
        values = [(name, score.value) for name, (score,) in zip(held_out, reports, strict=True)]
        return Original(answer.reward, (*answer.rewards, *values))

    def round_of(iteration: int, samples: int, how: Sampling, **more: Any) -> Round:
        return Round(run.seed, prompt.id, prompt_tokens, iteration, 0, samples, how, **more)

    base_rollout = asyncio.ensure_future(backend.rollout(round_of(BASE_ITERATION, 1, Sampling())))
    try:
        state: methods.State = ()
        frozen: Frozen = None
        candidates: list[Candidate] = []
        best: Candidate | None = None
        best_reward = -math.inf
        curve: list[float | None] = []
        near = limit is not None and limit.nll is not None
        if near or rates != Rates():
            base_tokens = (await base_rollout).trajectories[0].token_ids
            if rates != Rates():
                request = Calibration(run.seed, prompt.id, prompt_tokens, base_tokens, sampling, rates)
                sampling = await backend.calibrate(request)
            if near:
                (base_nll,) = await backend.nll(prompt.id, prompt_tokens, [base_tokens])
        method = methods.bind(run.method, sampling)
        while (proposal := method.propose(state, key, candidates)) is not None:
            k = proposal.iteration
            reader = prompt if isinstance(proposal.sampling.guide, TokenReward) else None
            more = {"trace": proposal.trace, "prompt": reader, "starts": proposal.starts}
            drawn = await backend.rollout(round_of(k, proposal.num_samples, proposal.sampling, **more))
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
    losses, *reports = await together(
        backend.nll(prompt.id, prompt_tokens, [best.token_ids, base.token_ids][: 1 + (base_nll is None)]),
        *(backend.score(name, prompt, shown) for name in held_out),
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
        original=await scored_original(frozen),
    )


def _answer(run: Run, text: str, thinks: bool) -> str | Score:
    """What rewards see of a response. A Score with the reason where the response has no answer."""
    if run.generator.thinking == "keep":
        return text
    try:
        return thinking.answer(text, run.generator.thinking_tags, thinks)
    except thinking.Unfinished as error:
        return Score(None, str(error))
