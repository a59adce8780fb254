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
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.counts import Counts, gauges
from actors.pool import Pool
from aisp_dist.align import align
from aisp_dist.analysis import guard
from aisp_dist.config import BatchedAisp, ConfigError, Run
from aisp_dist.data import prompts, render, thinking
from aisp_dist.output.filesystem import Place
from aisp_dist.output.lease import Lease, LeaseLost, read_owners
from aisp_dist.output.schema import ColumnType
from aisp_dist.output.writer import Store
from aisp_dist.records import BadInput, Done, Failed, Input, Prompt, Result, Rollout, Round, Sampling, Score

if TYPE_CHECKING:
    from actors.metrics import Exporter

log = logging.getLogger("aisp")

_REPORT = 5.0  # seconds between looks at the figures
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
    shard: tuple[int, int] = (0, 1)  # this one of so many: the parts k with k % shard[1] == shard[0]

    def store(self) -> Store:
        return Store(
            self.output,
            self.run.save.rows_per_file,
            "raw" if self.run.prompts.format == "raw" else "chat",
            self.columns,
            self.fingerprint,
            self.fingerprint[:12],
            self.model,
            self.run.save.keep,
            self.run.save.trace,
            self.lease.held if self.lease else lambda: False,
            self.shard,
        )

    def whole(self) -> bool:
        """Whether every input has its committed row already. Reads, and writes nothing. Raises TooManyFailed where it
        has, and too many are failed ones: the same command ends as it did before."""
        store = self.store()
        waiting = next(store.plan(prompts.read(self.run.prompts), self.retry_failed), None)
        whole = waiting is None and store.settled()
        if whole:
            _judge(store, self.run.runtime.max_failed, "in failed/", whole=True)
        return whole


def window(run: Run) -> int:
    """Prompts in flight for each generator: twice what fills its rows, so that scoring overlaps decoding; of Batched
    AISP its batch."""
    if isinstance(run.method, BatchedAisp):
        return run.method.num_prompts
    return max(2, -(-2 * run.generator.batch_rows // run.method.num_samples))


class Coordinator:
    """export: makes what the figures of one output are told to (exporter.py), from its run id and shard."""

    def __init__(
        self,
        run: Run,
        start: Callable[[], Awaitable[Started]],
        export: Callable[[str, str], Exporter] | None = None,
        name: str = "coordinator",
    ) -> None:
        self.run, self.start, self.export, self.name = run, start, export, name
        self.task: asyncio.Task[None] | None = None
        self.store: Store | None = None
        self.exporter: Exporter | None = None
        self.pools: Mapping[str, Pool] = {}
        self.total: int | None = None  # of inputs, once somebody has counted them
        self.flushing: float | None = None  # since when, by the loop's time
        self.sums: Counter[str] = Counter()  # of this output, by the names of Counts
        self.tally = guard.Tally()  # of this output, since this command began
        self.before = Counts()  # what its replicas had counted before it

    def __repr__(self) -> str:
        return self.name

    async def load(self) -> str:
        """Start generators and scorers; answers the first prompt as the model will read it, special tokens and all: a
        wrong template shows there. Raises ConfigError for a model or function that cannot be used."""
        from aisp_dist.engine import model  # brings torch, which the driver need not load

        self.tokenizer, (self.pools, self.context_length) = await asyncio.gather(
            asyncio.to_thread(model.tokenizer, self.run.generator), self.start()
        )
        self.watches = [asyncio.ensure_future(pool.fleet.watch()) for pool in self.pools.values()]
        for pool in self.pools.values():
            pool.fleet.event = self._event
        return await asyncio.to_thread(self._first_prompt)

    def _first_prompt(self) -> str:
        line = next((p for p in prompts.read(self.run.prompts) if isinstance(p, Prompt)), None)
        if line is None:
            return "there is no prompt in the input"
        try:
            tokens = self._render(self.run, line)
        except render.Unrenderable as error:
            return f"the first prompt fails: {error}"
        return f"first prompt, {len(tokens)} tokens: {self.tokenizer.decode(tokens)!r}"

    async def relabel(self, table: Table) -> None:
        """Fill one output to the end. Raises Stopped, TooManyFailed, GuardStop, fleet.Fault, LeaseLost,
        ConfigError."""
        self.task = asyncio.ensure_future(self._relabel(table))
        try:
            await self.task
        except asyncio.CancelledError:
            raise Stopped(f"stopped; what was finished is in {table.output}") from None
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def stop(self) -> None:
        """End relabel early; returns when what was finished is written. Raises what kept it from being written."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
            if not self.task.cancelled() and isinstance(error := self.task.exception(), OSError):
                raise error

    async def progress(self, total: int | None = None) -> Counts:
        """The figures so far. total: how many inputs there are, if the caller knows."""
        self.total = total if total is not None else self.total
        return self._figures()

    def _figures(self) -> Counts:
        counts = self.store.counts() if self.store else None
        now = Counts(
            done=counts.done if counts else 0,
            failed=counts.failed if counts else 0,
            committed=counts.committed if counts else 0,
            queued={role: len(pool.waiting) for role, pool in self.pools.items()},
            alive={role: sum(slot.up for slot in pool.fleet.slots) for role, pool in self.pools.items()},
        )
        return Counts(**dict[str, Any](self.sums)) + now + (self._of_replicas() - self.before)

    def _of_replicas(self) -> Counts:
        """What the replicas have counted since they were started, for this output and earlier ones."""
        grown = {role: pool.fleet.figures() for role, pool in self.pools.items()}
        decoded = grown.get("generator", {})
        return Counts(
            repeats=sum(pool.repeats for pool in self.pools.values()),
            restarts=sum(pool.fleet.restarts for pool in self.pools.values()),
            busy={role: figures.get("busy_seconds", 0.0) for role, figures in grown.items()},
            up={role: figures.get("up_seconds", 0.0) for role, figures in grown.items()},
            row_steps=decoded.get("row_steps", 0.0),
            row_slots=decoded.get("row_slots", 0.0),
        )

    def _event(self, kind: str, replica: str) -> None:
        if self.exporter:
            self.exporter.event(kind, replica)

    async def _relabel(self, table: Table) -> None:
        if table.lease and not await asyncio.to_thread(table.lease.held):
            if owners := await asyncio.to_thread(read_owners, table.output):
                raise LeaseLost(f"{table.output} is owned by {owners[0]} now; this run stops without writing to it")
            raise ConfigError(
                f"output: {table.output} is not the same place for the coordinator, on {socket.gethostname()}, as for "
                "the command that started it; give a directory that all machines share, or a URI"
            )
        await asyncio.gather(*(pool.fleet.refresh() for pool in self.pools.values()))
        self.sums, self.before = Counter(), self._of_replicas()
        self.tally = guard.Tally(tuple(n for n, reward in table.run.rewards.items() if reward.use == "report"))
        store = self.store = table.store()
        self.exporter = (
            self.export(table.fingerprint[:12], f"{table.shard[0]}/{table.shard[1]}") if self.export else None
        )
        self.reason, began = "in failed/", time.monotonic()
        run = table.run
        replicas = len(self.pools["generator"].fleet.slots)
        room = asyncio.Semaphore(window(run) * replicas)
        intake = store.plan(prompts.read(run.prompts), table.retry_failed)
        beside: list[asyncio.Task[None]] = []

        async def one(line: Input) -> None:
            self.sums["in_flight"] += 1
            try:
                self._finish(table, await self._search(run, line))
            finally:
                self.sums["in_flight"] -= 1
                room.release()

        try:
            async with asyncio.TaskGroup() as group:
                beside = [
                    group.create_task(self._flush_every(run.save.flush_seconds)),
                    group.create_task(self._report(run)),
                ]
                while batch := await asyncio.to_thread(_take, intake, 64):
                    for line in batch:
                        await room.acquire()
                        group.create_task(one(line))
                for _ in range(window(run) * replicas):
                    await room.acquire()
                for task in beside:
                    task.cancel()
        finally:
            await asyncio.shield(self._flush_last())
        await asyncio.gather(*(pool.fleet.refresh() for pool in self.pools.values()))
        await asyncio.to_thread(store.finish)
        if self.exporter:
            now = self._figures()
            self.exporter.gauges(gauges(now, now, time.monotonic() - began, self.total, 0))
        _judge(store, run.runtime.max_failed, self.reason, whole=True)

    async def _search(self, run: Run, line: Input) -> Result:
        if isinstance(line, BadInput):
            return Failed(line, line.reason)
        try:
            tokens = self._render(run, line)
        except render.Unrenderable as error:
            return Failed(line, str(error))
        try:
            settings = run.generator
            strips = settings.thinking == "strip"
            thinks = strips and thinking.opens(self.tokenizer.decode(tokens), settings.thinking_tags)
            return await align(run, line, tokens, self._rollout, self._score, self._nll, self._calibrate, thinks)
        finally:
            for pool in self.pools.values():
                pool.forget(line.id)

    def _render(self, run: Run, line: Prompt) -> tuple[int, ...]:
        limit = run.prompts.max_tokens
        if self.context_length is not None:
            limit = min(limit, self.context_length - run.generator.max_new_tokens)
        return render.render(line, run.prompts, self.tokenizer, limit)

    async def _rollout(self, round: Round) -> Rollout:
        began = time.monotonic()
        rollout: Rollout = await self.pools["generator"].call(round.prompt_id, "rollout", round)
        samples, tokens = round.stop - round.start, sum(len(t.token_ids) for t in rollout.trajectories)
        for name, count in (("iterations", round.iteration >= 0), ("samples", samples), ("tokens", tokens)):
            self.sums[name] += count
        if self.exporter:
            self.exporter.round(time.monotonic() - began, samples, tokens)
        return rollout

    async def _score(self, reward: str, prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        began = time.monotonic()
        scores: list[Score] = await self.pools[reward].call(prompt.id, "score", prompt, responses)
        if self.exporter:
            self.exporter.scored(reward, time.monotonic() - began, len(responses))
        return scores

    async def _nll(
        self, prompt_id: str, prompt_tokens: tuple[int, ...], responses: Sequence[tuple[int, ...]]
    ) -> list[float]:
        losses: list[float] = await self.pools["generator"].call(prompt_id, "nll", prompt_tokens, responses)
        return losses

    async def _calibrate(self, prompt_id: str, *asked: Any) -> Sampling:
        sampling: Sampling = await self.pools["generator"].call(prompt_id, "calibrate", *asked)
        return sampling

    def _finish(self, table: Table, result: Result) -> None:
        store = self.store
        assert store is not None
        store.add(result)
        self.sums["fresh"] += 1
        if self.exporter:
            self.exporter.finished(result)
        if isinstance(result, Done):
            self.sums["quarantined"] += result.quarantined
            if result.best.reward is not None and result.base.reward is not None:
                self.sums["gain"] += result.best.reward - result.base.reward  # type: ignore[assignment]
                self.sums["gains"] += 1
            if table.run.guard.action == "stop":
                self.tally.add_done(result)
                guard.judge(table.run.guard, self.tally)
            return
        log.warning("source_index %d (id %s) failed: %s", result.prompt.source_index, result.prompt.id, result.reason)
        self.reason = result.reason
        _judge(store, table.run.runtime.max_failed, self.reason)

    async def _flush_every(self, seconds: float) -> None:
        store, loop = self.store, asyncio.get_running_loop()
        assert store is not None
        while True:
            await asyncio.sleep(max(seconds, 0.05))
            self.flushing = loop.time()
            try:
                await asyncio.to_thread(store.flush)
            except OSError as error:  # nothing is lost yet: the next flush tries again, and the last one must succeed
                log.warning("cannot write to the output (%s); trying again in %g s", error, seconds)
            finally:
                self.flushing = None

    async def _flush_last(self) -> None:
        """Raises OSError where the output cannot be written to again and again."""
        assert self.store is not None
        for wait in (1.0, 3.0, None):
            try:
                return await asyncio.to_thread(self.store.flush)
            except OSError as error:
                if wait is None:
                    raise
                log.warning("cannot write to the output (%s); trying again in %g s", error, wait)
                await asyncio.sleep(wait)

    async def _report(self, run: Run) -> None:
        """Tell the exporter every few seconds, and the log when nothing moves: which prompt sits where."""
        loop, stall = asyncio.get_running_loop(), run.runtime.timeouts.stall
        last, at = self._figures(), loop.time()
        answers, moved = -1, loop.time()
        samples = run.method.num_samples * run.method.num_iterations + 1
        while True:
            await asyncio.sleep(_REPORT)
            now, time_now = self._figures(), loop.time()
            if self.exporter:
                self.exporter.gauges(gauges(now, now - last, time_now - at, self.total, samples))
            last, at = now, time_now
            if self.flushing is not None and time_now - self.flushing > stall:
                log.warning("writing to the output has taken %.0f s so far", time_now - self.flushing)
            if (total := sum(pool.answers for pool in self.pools.values())) != answers or not now.in_flight:
                answers, moved = total, time_now
            elif time_now - moved > stall:
                moved = time_now
                for slot, call in sorted(
                    (pair for pool in self.pools.values() for pair in pool.fleet.oldest()),
                    key=lambda pair: pair[1].since,
                )[:3]:
                    what = (call.home, call.method, slot.replica.name, time_now - call.since)
                    log.warning("nothing has moved for %g s: prompt %s waits for %s on %s for %.0f s", stall, *what)


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


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
