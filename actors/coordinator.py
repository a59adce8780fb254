"""One shard's prompts: which are in flight, their rounds, and their way into the store.

    inputs -> store.plan -> window -> render -> align -> store.add -> (flush thread) -> parts
                              |                  | rollout, nll: generator pool
                              |                  | score:        one pool for each reward
                              +--- full: waits until a prompt in flight is done

Holds nothing that a restart could miss: what is finished is in the store, what is not is computed again, bit for bit.
Plain asyncio; knows Ray only through the pools it is given.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.pool import Pool
from aisp_dist import prompts, render
from aisp_dist.align import align
from aisp_dist.config import Run
from aisp_dist.lease import Lease
from aisp_dist.place import Place
from aisp_dist.records import BadInput, Done, Failed, Input, Prompt, Result, Rollout, Round, Score
from aisp_dist.schema import ColumnType
from aisp_dist.store import Store

log = logging.getLogger("aisp")

SETTLED = 200  # prompts before the share of failed rows is judged
Started = tuple[Mapping[str, Pool], int | None]  # pools by role, context length of the base model in tokens


class TooManyFailed(Exception):
    """More than runtime.max_failed of the rows failed. What is finished is kept; the same command goes on from it."""


class Stopped(Exception):
    """The run was asked to end early; what was finished is written."""


@dataclass(frozen=True, slots=True)
class Table:
    """One output to fill. `run` has its paths resolved; `model` is the base model as the user named it."""

    run: Run
    output: Place
    columns: dict[str, ColumnType]
    fingerprint: str
    model: str
    lease: Lease | None = None  # without one it can be read, not filled
    retry_failed: bool = False
    shard: tuple[int, int] = (0, 1)

    def store(self) -> Store:
        keep = self.run.save.candidates
        return Store(
            self.output,
            self.run.save.rows_per_file,
            "raw" if self.run.prompts.format == "raw" else "chat",
            self.columns,
            self.fingerprint,
            self.fingerprint[:12],
            self.model,
            keep if isinstance(keep, str) else keep.top_bottom,
            self.run.save.trace,
            self.lease.held if self.lease else lambda: False,
            self.shard,
        )

    def whole(self) -> bool:
        """Whether every input has its committed row already. Reads, and writes nothing. Raises TooManyFailed where it
        has, and too many are failed ones: the same command ends as it did before."""
        store = self.store()
        waiting = next(store.plan(prompts.read(self.run.prompts), self.retry_failed), None)
        counts = store.counts()
        whole = waiting is None and counts.planned == counts.committed
        if whole:
            _judge(store, self.run.runtime.max_failed, "in failed/", whole=True)
        return whole


def window(run: Run) -> int:
    """Prompts in flight for each generator: twice what fills its rows, so that scoring overlaps decoding."""
    return max(2, -(-2 * run.generator.batch_rows // run.method.num_samples))


class Coordinator:
    def __init__(self, run: Run, start: Callable[[], Awaitable[Started]]) -> None:
        self.run, self.start = run, start
        self.task: asyncio.Task[None] | None = None
        self.store: Store | None = None
        self.pools: Mapping[str, Pool] = {}
        self.in_flight = 0
        self.samples = self.tokens = self.quarantined = self.gains = 0  # of the output that is being filled
        self.gain = 0.0

    def __repr__(self) -> str:
        return "coordinator"

    async def load(self) -> None:
        """Start generators and scorers. Raises ConfigError for a model or function that cannot be used."""
        from aisp_dist.engine import model  # brings torch, which the driver need not load

        self.tokenizer, (self.pools, self.context_length) = await asyncio.gather(
            asyncio.to_thread(model.tokenizer, self.run.generator), self.start()
        )

    async def first_prompt(self) -> str:
        """The first prompt as the model will read it, special tokens and all: a wrong template shows here."""
        line = next((p for p in prompts.read(self.run.prompts) if isinstance(p, Prompt)), None)
        if line is None:
            return "there is no prompt in the input"
        try:
            tokens = self._render(self.run, line)
        except render.Unrenderable as error:
            return f"the first prompt fails: {error}"
        return f"first prompt, {len(tokens)} tokens: {self.tokenizer.decode(tokens)!r}"

    async def relabel(self, table: Table) -> None:
        """Fill one output to the end. Raises Stopped, TooManyFailed, pool.Fault, LeaseLost, ConfigError."""
        self.task = asyncio.ensure_future(self._relabel(table))
        try:
            await self.task
        except asyncio.CancelledError:
            raise Stopped(f"stopped; what was finished is in {table.output}") from None
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def stop(self) -> None:
        """End relabel early; returns when what was finished is written."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])

    async def progress(self) -> dict[str, Any]:
        """Counts and sums so far, for lines, gauges and metrics.jsonl."""
        counts = self.store.counts() if self.store else None
        return {
            "done": counts.done if counts else 0,
            "failed": counts.failed if counts else 0,
            "committed": counts.committed if counts else 0,
            "in_flight": self.in_flight,
            "samples": self.samples,
            "tokens": self.tokens,
            "quarantined": self.quarantined,
            "reward_gain": self.gain / self.gains if self.gains else None,
            "repeats": sum(pool.repeats for pool in self.pools.values()),
            "restarts": sum(pool.restarts for pool in self.pools.values()),
        }

    async def _relabel(self, table: Table) -> None:
        store = self.store = table.store()
        self.samples = self.tokens = self.quarantined = self.gains = 0
        self.gain, self.reason = 0.0, "in failed/"
        run = table.run
        replicas = run.runtime.generators.replicas
        room = asyncio.Semaphore(window(run) * replicas)
        intake = store.plan(prompts.read(run.prompts), table.retry_failed)
        flusher: asyncio.Task[None] | None = None

        async def one(line: Input) -> None:
            self.in_flight += 1
            try:
                self._finish(table, await self._search(run, line))
            finally:
                self.in_flight -= 1
                room.release()

        try:
            async with asyncio.TaskGroup() as group:
                flusher = group.create_task(_flush_every(store, run.save.flush_seconds))
                while batch := await asyncio.to_thread(_take, intake, 64):
                    for line in batch:
                        await room.acquire()
                        group.create_task(one(line))
                for _ in range(window(run) * replicas):
                    await room.acquire()
                flusher.cancel()
        finally:
            await asyncio.shield(asyncio.to_thread(store.flush))
        await asyncio.to_thread(store.finish)
        _judge(store, run.runtime.max_failed, self.reason, whole=True)

    async def _search(self, run: Run, line: Input) -> Result:
        if isinstance(line, BadInput):
            return Failed(line, line.reason)
        try:
            tokens = self._render(run, line)
        except render.Unrenderable as error:
            return Failed(line, str(error))
        try:
            return await align(run, line, tokens, self._rollout, self._score, self._nll)
        finally:
            for pool in self.pools.values():
                pool.forget(line.id)

    def _render(self, run: Run, line: Prompt) -> tuple[int, ...]:
        limit = run.prompts.max_tokens
        if self.context_length is not None:
            limit = min(limit, self.context_length - run.generator.max_new_tokens)
        return render.render(line, run.prompts, self.tokenizer, limit)

    async def _rollout(self, round: Round) -> Rollout:
        rollout: Rollout = await self.pools["generator"].call(round.prompt_id, "rollout", round)
        self.samples += round.stop - round.start
        self.tokens += sum(len(t.token_ids) for t in rollout.trajectories)
        return rollout

    async def _score(self, reward: str, prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        scores: list[Score] = await self.pools[reward].call(prompt.id, "score", prompt, responses)
        return scores

    async def _nll(
        self, prompt_id: str, prompt_tokens: tuple[int, ...], responses: Sequence[tuple[int, ...]]
    ) -> list[float]:
        losses: list[float] = await self.pools["generator"].call(prompt_id, "nll", prompt_tokens, responses)
        return losses

    def _finish(self, table: Table, result: Result) -> None:
        store = self.store
        assert store is not None
        store.add(result)
        if isinstance(result, Done):
            self.quarantined += result.quarantined
            if result.best.reward is not None and result.base.reward is not None:
                self.gain, self.gains = self.gain + result.best.reward - result.base.reward, self.gains + 1
            return
        log.warning("source_index %d (id %s) failed: %s", result.prompt.source_index, result.prompt.id, result.reason)
        self.reason = result.reason
        _judge(store, table.run.runtime.max_failed, self.reason)


def _judge(store: Store, allowed: float, reason: str, whole: bool = False) -> None:
    """Raise TooManyFailed where the share of failed rows is settled and above what is allowed, or nothing worked."""
    counts = store.counts()
    total = counts.done + counts.failed
    if counts.failed > allowed * total and (total >= SETTLED or (whole and not counts.done)):
        raise TooManyFailed(
            f"{counts.failed} of {total} rows failed, {counts.failed / total:.1%}; runtime.max_failed allows "
            f"{allowed:.1%}, judged from {SETTLED} rows on or where none is done. The last reason: {reason}"
        )


def _take(intake: Iterator[Input], count: int) -> list[Input]:
    return list(itertools.islice(intake, count))


async def _flush_every(store: Store, seconds: float) -> None:
    while True:
        await asyncio.sleep(max(seconds, 0.05))
        try:
            await asyncio.to_thread(store.flush)
        except OSError as error:  # nothing is lost yet: the next flush tries again, and the last one must succeed
            log.warning("cannot write to the output (%s); trying again in %g s", error, seconds)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
