"""One shard's prompts: which are searched now, and how their rows get into the store.

    inputs -> store.plan -> window -> align_input -> store.add -> (flush) -> parts
                              |            | rollout, nll, calibrate: generator pool
                              |            | score:                   one pool for each reward
                              +--- full: waits until a prompt in flight is finished

Keeps no state that a restart could miss: finished prompts are in the store, all others are computed again, bit for bit.
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
from typing import TYPE_CHECKING, Any

from actors.backend import RayBackend
from actors.counts import Counts, gauges
from actors.pool import Pool
from actors.table import Table, check_failed
from aisp_dist.align import PROBES, align_input, first_prompts, probe, tokens_of, window
from aisp_dist.analysis import guard
from aisp_dist.config import ConfigError, Run
from aisp_dist.data import prompts, render
from aisp_dist.output.lease import LeaseLost, read_owners
from aisp_dist.output.writer import Store
from aisp_dist.records import Done, Input, Prompt, Result
from aisp_dist.vllm.choice import Check, weakest

if TYPE_CHECKING:
    from actors.metrics import Exporter

log = logging.getLogger("aisp")

_REPORT = 5.0  # seconds between looks at the counts
Started = tuple[Mapping[str, Pool], int | None]  # pools by role, context length of the base model in tokens


class Stopped(Exception):
    """The run was asked to end early; what was finished is written."""


class Coordinator:
    """start: starts generators and scorers. export: makes the exporter of an output's counts (metrics.Exporter), from
    its run id and shard."""

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
        self.backend = RayBackend({})
        self.exporter: Exporter | None = None
        self.total: int | None = None  # of inputs, once somebody has counted them
        self.flushing: float | None = None  # the loop's time when a flush began
        self.sums: Counter[str] = Counter()  # of this output, by the names of Counts
        self.tally = guard.Tally()  # of this output, since this command began
        self.before = Counts()  # what the replicas had counted before this output

    def __repr__(self) -> str:
        return self.name

    async def load(self) -> str:
        """Start generators and scorers. Answers a line for the log with the first prompt as the model will read it,
        special tokens included, since a wrong template shows there. Raises ConfigError for a model or function that
        cannot be used or fails on each of the first prompts."""
        from aisp_dist.engine import pretrained  # brings torch, which the driver need not load

        self.tokenizer, (pools, self.context_length) = await asyncio.gather(
            asyncio.to_thread(pretrained.tokenizer, self.run.generator), self.start()
        )
        self.backend = RayBackend(pools)
        # In a thread: a shuffled source is read to its end first.
        first = await asyncio.to_thread(lambda: first_prompts(prompts.read(self.run.prompts)))
        await probe(self.run, first, self.backend.score_once)
        self.watches = [asyncio.ensure_future(pool.fleet.watch()) for pool in pools.values()]
        return await asyncio.to_thread(self._told, first)

    async def invariance(self) -> Check | None:
        """What the generators that are up have found of vLLM's batches."""
        slots = [slot for slot in self.backend.pools["generator"].fleet.slots if slot.up]
        found = await asyncio.gather(*(slot.replica.call("invariance") for slot in slots), return_exceptions=True)
        return weakest([one for one in found if not isinstance(one, BaseException)])  # another is being replaced

    def _told(self, first: Sequence[Prompt]) -> str:
        """The first prompt as the model will read it."""
        if not first:
            return f"there is no prompt among the first {100 * PROBES} lines of the input"
        try:
            tokens = tokens_of(self.run, first[0], self.tokenizer, self.context_length)
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
        """End relabel early; returns when what was finished is written. Raises the OSError that prevents it."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
            if not self.task.cancelled() and isinstance(error := self.task.exception(), OSError):
                raise error

    async def progress(self, total: int | None = None) -> Counts:
        """The counts so far. total: how many inputs there are, if the caller knows."""
        self.total = total if total is not None else self.total
        return self._counts()

    def _counts(self) -> Counts:
        counts = self.store.counts() if self.store else None
        now = Counts(
            done=counts.done if counts else 0,
            failed=counts.failed if counts else 0,
            committed=counts.committed if counts else 0,
            queued=self.backend.queued(),
            alive=self.backend.alive(),
        )
        own = Counts(**dict[str, Any]({**self.sums, **self.backend.sums}))
        return own + now + (self.backend.totals() - self.before)

    async def _refresh(self) -> None:
        await asyncio.gather(*(pool.fleet.refresh() for pool in self.backend.pools.values()))

    async def _begin(self, table: Table) -> Store:
        """Check that the output is ours to write, and count from zero."""
        if table.lease and not await asyncio.to_thread(table.lease.held):
            if owners := await asyncio.to_thread(read_owners, table.output):
                raise LeaseLost(f"{table.output} is owned by {owners[0]} now; this run stops without writing to it")
            raise ConfigError(
                f"output: {table.output} is not the same place for the coordinator, on {socket.gethostname()}, as for "
                "the command that started it; give a directory that all machines share, or a URI"
            )
        await self._refresh()
        self.before = self.backend.totals()
        self.sums, self.backend.sums = Counter(), Counter()
        self.tally = guard.Tally(tuple(n for n, reward in table.run.rewards.items() if reward.use == "report"))
        shard = f"{table.shard[0]}/{table.shard[1]}"
        self.exporter = self.export(table.fingerprint[:12], shard) if self.export else None
        self.backend.exporter = self.exporter
        self.reason = "in failed/"
        self.store = table.store()
        return self.store

    async def _relabel(self, table: Table) -> None:
        store, run, began = await self._begin(table), table.run, time.monotonic()
        places = window(run) * len(self.backend.pools["generator"].fleet.slots)
        room = asyncio.Semaphore(places)
        intake = store.plan(prompts.read(run.prompts), table.retry_failed)

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
                for _ in range(places):
                    await room.acquire()
                for task in beside:
                    task.cancel()
        finally:
            await asyncio.shield(self._flush_last())
        await self._refresh()
        await asyncio.to_thread(store.finish)
        if self.exporter:
            now = self._counts()
            self.exporter.gauges(gauges(now, now, time.monotonic() - began, self.total, 0))
        check_failed(store, run.runtime.max_failed, self.reason, whole=True)

    async def _search(self, run: Run, line: Input) -> Result:
        try:
            return await align_input(run, line, self.tokenizer, self.context_length, self.backend)
        finally:
            self.backend.forget(line.id)

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
                guard.check(table.run.guard, self.tally)
            return
        log.warning("source_index %d (id %s) failed: %s", result.prompt.source_index, result.prompt.id, result.reason)
        self.reason = result.reason
        check_failed(store, table.run.runtime.max_failed, self.reason)

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
        """Tell the exporter every few seconds; tell the log which prompts wait where when nothing moves."""
        loop, stall, pools = asyncio.get_running_loop(), run.runtime.timeouts.stall, self.backend.pools.values()
        last, at = self._counts(), loop.time()
        answers, moved = -1, loop.time()
        samples = run.method.num_samples * run.method.num_iterations + 1
        while True:
            await asyncio.sleep(_REPORT)
            now, time_now = self._counts(), loop.time()
            if self.exporter:
                self.exporter.gauges(gauges(now, now - last, time_now - at, self.total, samples))
            last, at = now, time_now
            if self.flushing is not None and time_now - self.flushing > stall:
                log.warning("writing to the output has taken %.0f s so far", time_now - self.flushing)
            if (total := sum(pool.answers for pool in pools)) != answers or not now.in_flight:
                answers, moved = total, time_now
            elif time_now - moved > stall:
                moved = time_now
                waits = sorted((pair for pool in pools for pair in pool.fleet.oldest()), key=lambda pair: pair[1].since)
                for slot, call in waits[:3]:
                    what = (call.home, call.method, slot.replica.name, time_now - call.since)
                    log.warning("nothing has moved for %g s: prompt %s waits for %s on %s for %.0f s", stall, *what)


def _take(intake: Iterator[Input], count: int) -> list[Input]:
    return list(itertools.islice(intake, count))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
