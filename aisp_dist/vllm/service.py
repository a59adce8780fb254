"""One vLLM engine and any number of callers: rounds in, trajectories out, as the local engine's Service answers them.
Owns how many requests vLLM holds at a time, their ends and texts; vLLM owns the batch, the cache and the devices."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from aisp_dist.engine.admissible import check
from aisp_dist.engine.served import Served
from aisp_dist.records import Calibration, Late, Rollout, Round, Sampling, TopP, Trajectory
from aisp_dist.together import together
from aisp_dist.vllm import requests

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams, TokensPrompt
    from vllm.v1.engine.async_llm import AsyncLLM

    from aisp_dist.vllm.worker import Answer

_AHEAD = 8  # one request waits inside vLLM for every so many rows, so that no row idles between steps
_LOOK = 0.5  # seconds between looks at an engine that nobody asks
_TRIES = 100
T = TypeVar("T")


class Disobeyed(RuntimeError):
    """vLLM did not decode what it was told to: the hook is not where vLLM chooses its tokens."""


class NotFinite(ValueError):
    """The model's logits are not finite."""


class Dead(RuntimeError):
    """vLLM's engine has died, so there is no answer."""


class Meter:
    """What the engine's steps add up to."""

    def __init__(self) -> None:
        self.steps = self.row_steps = 0

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            self.steps += 1
            self.row_steps += scheduler_stats.num_running_reqs


class Service:
    """Answers requests with one engine until `close`. Made on the event loop that uses it.

    limit: seconds that vLLM may take for one answer; a round with a slower one fails with Late. broken: called once
    with the error when the engine has died. An error of one request goes to its caller.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        served: Served,
        meter: Meter,
        limit: float = math.inf,
        broken: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.llm, self.served, self.meter, self.limit, self.broken = llm, served, meter, limit, broken
        self.busy_seconds = 0.0
        self._began = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._since = 0.0
        self._open = 0
        self._names = itertools.count()
        self._room = asyncio.Semaphore(served.rows + max(1, served.rows // _AHEAD))
        self._watching = asyncio.ensure_future(self._watch())
        self._fault: Dead | None = None  # why nothing is asked of the engine any more
        self._alone = asyncio.Lock()  # one call at a time has the engine for itself

    async def install(self) -> str:
        """Hook the model; answers the hook's name. Raises RuntimeError where this vLLM's inside is another."""
        found: str = await self._rpc("aisp_install")
        return found

    async def rollout(self, round: Round) -> Rollout:
        """Decode a round. Raises ValueError for one that the model cannot take or finish."""
        check(round, self.served, self.served.max_new_tokens, self.served.end_ids)
        return await self._finite(lambda: self._rollout(round))

    async def _rollout(self, round: Round) -> Rollout:
        names = [self._name() for _ in range(round.start, round.stop)]
        samples = range(round.start, round.stop)
        found = await together(*(self._decode(round, s, name) for s, name in zip(samples, names, strict=True)))
        controlled = requests.plain(round) if round.sampling.sigma2 and round.trace else None
        asked = names, controlled, round.start, [len(t.token_ids) for t in found], self.served.max_new_tokens
        sound, u_sq, costs = await self._rpc("aisp_finish", *asked)
        if not all(sound):
            raise NotFinite(
                f"prompt {round.prompt_id!r}, iteration {round.iteration}: the logits of sample "
                f"{samples[sound.index(False)]} are not finite; lower method.sigma2 or use a wider dtype"
            )
        if costs:
            found = [replace(t, control_cost=c, control_sq=sq) for t, (c, sq) in zip(found, costs, strict=True)]
        return Rollout(tuple(found), u_sq)

    async def nll(self, prompt_tokens: tuple[int, ...], responses: Sequence[tuple[int, ...]]) -> list[float]:
        """The base model's mean negative log-likelihood per token of each response, in nats."""
        if not prompt_tokens or not all(responses):
            raise ValueError("nll needs at least one prompt token and one response token")
        return await self._finite(lambda: self._nll(prompt_tokens, responses))

    async def _nll(self, prompt: Sequence[int], responses: Sequence[tuple[int, ...]]) -> list[float]:
        answers = await together(*(self._forced(prompt, response, self._name()) for response in responses))
        losses = [_loss(answer) for answer in answers]
        if not all(map(math.isfinite, losses)):
            raise NotFinite("the logits of a given answer are not finite; use a wider dtype")
        return losses

    async def calibrate(self, request: Calibration) -> Sampling:
        """See engine/calibrate.py. The base answer is decoded again, token by token, for its states."""
        return await self._finite(lambda: self._calibrate(request))

    async def _calibrate(self, request: Calibration) -> Sampling:
        name, answer = self._name(), request.base_tokens
        round = requests.plain(Round(request.seed, request.prompt_id, (), 0, 0, 1, request.sampling))
        rates = (request.rates.noise, request.rates.drawing)
        await self._forced(request.prompt_tokens, answer, name, kept=True)
        found = await self._rpc("aisp_calibrate", name, request.seed, request.prompt_id, len(answer), round, rates)
        if not found:
            raise NotFinite("the logits of the base answer are not finite; use a wider dtype")
        decode = TopP(*found["decode"]) if found["decode"] else None
        return replace(request.sampling, sigma2=found["sigma2"], decode=decode)

    async def prove(self) -> None:
        """Decode a few tokens and check that vLLM obeys: forced tokens come back, with the base model's probabilities,
        and noise moves what is decoded. Raises Disobeyed."""
        vocab, steps = self.served.vocab_size, min(4, self.served.max_new_tokens)
        prompt = tuple((7919 * i + 13) % vocab for i in range(8))
        forced = [tuple((101 * i + 7 * j + 3) % vocab for i in range(steps)) for j in range(2)]
        if not all(loss > 0 for loss in await self.nll(prompt, forced)):
            raise Disobeyed("the likelihood of forced tokens is 1: it is taken after the exchange of logits")
        rounds = [Round(0, "probe", prompt, 0, 0, 4, Sampling(sigma2=s)) for s in (0.0, 1e6)]
        still, moved = [{t.token_ids for t in (await self.rollout(r)).trajectories} for r in rounds]
        if len(still) != 1 or len(moved) == 1:
            raise Disobeyed("noise on the pre-logits does not change what is decoded, or its absence does")

    def figures(self) -> dict[str, float]:
        """What grows: seconds at work and alive, rows that held a request and all rows, over all steps."""
        now = time.monotonic()
        return {
            "busy_seconds": self.busy_seconds + (now - self._since if self._open else 0.0),
            "up_seconds": now - self._began,
            "row_steps": self.meter.row_steps,
            "row_slots": self.meter.steps * self.served.rows,
        }

    @property
    def work(self) -> int:
        return self.meter.steps

    @property
    def busy(self) -> bool:
        """Whether a request has no answer yet."""
        return bool(self._open) or self._alone.locked()

    def close(self) -> None:
        """End the engine and its processes. May be called from another thread."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._watching.cancel)
        self.llm.shutdown()

    async def empty(self) -> None:
        """Empty the cache of keys and values, while nothing is decoded. Raises Dead, Disobeyed."""
        self._alive()
        try:
            for _ in range(_TRIES):  # a request that has just ended may hold its blocks for a moment
                if done := await self.llm.reset_prefix_cache():
                    break
                await asyncio.sleep(_LOOK / 10)
        except Exception as error:
            raise self._died(f"vLLM did not empty its cache: {error}") from error
        if not done:
            raise Disobeyed("vLLM does not empty its cache of prefixes")
        await self._rpc("aisp_empty")

    async def _finite(self, call: Callable[[], Awaitable[T]]) -> T:
        """What a call answers. Where its logits are not finite it is made once more, with nothing beside it and an
        empty cache, and raises NotFinite only then: keys and values that are not finite stay in freed blocks, and on
        CPUs they spoil the next request there, which has no fault."""
        with suppress(NotFinite):
            async with self._asked():
                return await call()
        async with self._alone:
            while self._open:
                await asyncio.sleep(_LOOK / 50)
            await self.empty()
            try:
                return await call()
            except NotFinite:
                await self.empty()
                raise

    async def _decode(self, round: Round, sample: int, name: str) -> Trajectory:
        served, likely = self.served, round.sampling.likelihood
        given = tokens = round.starts[sample - round.start] if round.starts else ()
        ends, ended = sorted(served.end_ids), None
        # vLLM may see a stop string where the text has none, such as in halves of characters; then it is asked for the
        # rest without any, which always ends.
        for stop in (served.stop, ()):
            if ended is None:
                asked = requests.trajectory(round, sample, tokens, name, served.max_new_tokens, ends, stop)
                answer = await self._generate(*asked, name)
                tokens = (() if likely else tokens) + tuple(answer.token_ids)
                tokens = max(tokens, given, key=len)  # it may see a string in what is given and forced
                ended = served.ended(round.prompt_tokens, tokens, len(given))
        if ended is None:
            raise Disobeyed(f"vLLM ended a request after {len(tokens)} tokens, without an end token or stop string")
        tokens, finish, text = ended
        losses = _losses(answer)[: len(tokens)]
        return Trajectory(sample, tokens, text, finish, nll=math.fsum(losses) / len(losses) if likely else None)

    async def _forced(self, prompt: Sequence[int], response: Sequence[int], name: str, kept: bool = False) -> Any:
        answer = await self._generate(*requests.forced(prompt, response, name, kept), name)
        if tuple(answer.token_ids) != tuple(response):
            raise Disobeyed(f"vLLM decoded {answer.token_ids[:8]}... where {list(response[:8])}... was forced")
        return answer

    async def _generate(self, prompt: TokensPrompt, params: SamplingParams, name: str) -> CompletionOutput:
        async with self._room:
            self._alive()
            try:
                async with asyncio.timeout(None if math.isinf(self.limit) else self.limit):
                    async for output in self.llm.generate(prompt, params, name, lora_request=self.served.adapter):
                        answer: CompletionOutput = output.outputs[0]
            except TimeoutError:
                raise Late(f"an answer was not finished after {self.limit:g} s of decoding") from None
            except Exception as error:
                if self.llm.errored:
                    raise self._died(f"vLLM's engine has died: {error}") from error
                raise
        if answer.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a request by {answer.finish_reason!r}")
        return answer

    async def _rpc(self, method: str, *args: Any) -> Any:
        """What the workers with logits answer. Raises RuntimeError with the error of a worker's method; Dead where the
        call itself fails, since answers of other ranks may then lie where the next call would find them."""
        self._alive()
        try:
            answers: list[Answer] = await self.llm.collective_rpc(method, args=args)
        except Exception as error:
            raise self._died(f"vLLM's workers did not answer {method}: {error}") from error
        for sound, value in answers:
            if not sound:
                raise RuntimeError(f"a worker of vLLM: {value}")
        told = [value for _, value in answers if value is not None]
        if not told:
            raise Disobeyed(f"no worker of vLLM has logits to answer {method}")
        return told[-1]

    def _alive(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _died(self, why: str) -> Dead:
        """From now on nothing is asked of the engine."""
        if self._fault is None:
            self._fault = Dead(why)
            self.broken(self._fault)
        return self._fault

    def _name(self) -> str:
        return f"aisp-{next(self._names)}"

    @asynccontextmanager
    async def _asked(self) -> AsyncIterator[None]:
        while self._alone.locked():
            async with self._alone:
                pass
        if not self._open:
            self._since = time.monotonic()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self.busy_seconds += time.monotonic() - self._since

    async def _watch(self) -> None:
        while not self.llm.errored:
            await asyncio.sleep(_LOOK)
        self._died(f"vLLM's engine has died: {self.llm.dead_error}")


def _losses(answer: CompletionOutput) -> list[float]:
    """-log P of each token, in nats."""
    steps = zip(answer.token_ids, answer.logprobs or (), strict=False)
    return [-float(step[token].logprob) for token, step in steps]


def _loss(answer: CompletionOutput) -> float:
    losses = _losses(answer)
    return math.fsum(losses) / len(losses)
