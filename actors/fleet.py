"""The processes behind a pool: started, asked for signs of life, replaced. Does not know what they are asked to do.

A process that cannot be replaced (its machine is gone, say) is started again and again while others work; the fleet is
broken when none is left. Plain asyncio; knows Ray only through the replicas it is given.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from aisp_dist.align import reason

log = logging.getLogger("aisp")

_BACKOFF = (1.0, 60.0)  # seconds before a process is started again: the first time, and at most
_SIGNS = ("progress", "busy")


class Fault(Exception):
    """The infrastructure failed more often than runtime.retries allows. The run ends; the same command resumes it."""


class Replica(Protocol):
    """A handle to one process."""

    name: str

    def call(self, method: str, *args: Any) -> Awaitable[Any]: ...

    def health(self) -> Awaitable[Mapping[str, float]]:
        """Answers while calls run: `progress`, a counter of work done; `busy`, whether there is any to do; and counts
        that grow, such as `busy_seconds`."""

    async def restart(self, why: str) -> None:
        """Replace the process and wait until it has started. Raises Fault where that fails, ConfigError where it always
        will."""


class Call(NamedTuple):
    """A call that is at a replica now. since: the loop's time, seconds."""

    home: str
    method: str
    since: float
    deadline: asyncio.Timeout


@dataclass(eq=False)
class Slot:
    """A replica and what the pool knows of it.

    held: places that are given away. used: something was asked of this process. homes: prompts that are warm here.
    epoch: restarts so far, so that a fault seen by several calls restarts the process once. sacrificed: the last
    restart was because of one call, so the others in flight are not to blame. barren: restarts since the last answer.
    alone: kept for one call. trouble: why it stays away. counts: of the process's health; before: counts of the
    processes that it replaced, summed.
    """

    replica: Replica
    calls: dict[int, Call] = field(default_factory=dict)
    held: int = 0
    used: bool = False
    homes: int = 0
    epoch: int = 0
    sacrificed: bool = False
    barren: int = 0
    alone: bool = False
    recovery: asyncio.Task[None] | None = None
    trouble: Exception | None = None
    counts: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)

    @property
    def up(self) -> bool:
        return self.recovery is None


class Fleet:
    """stall: seconds without a sign of life, or busy without progress, after which a process is replaced. patience:
    seconds for one to start. up, broken: called when a slot has a fresh process, and when no process is left. event:
    told of each restart and stall, with the replica's name."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        retries: int,
        stall: float,
        patience: float,
        up: Callable[[Slot], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        self.slots = [Slot(replica) for replica in replicas]
        self.retries, self.stall, self.patience = retries, stall, patience
        self.on_up, self.on_broken = up, broken
        self.event: Callable[[str, str], None] = lambda kind, replica: None
        self.broken: BaseException | None = None  # why nothing can serve any more
        self.restarts = 0

    async def ready(self, at_least: int) -> None:
        """Start every replica; returns when so many are up, while the others still start. Raises Fault or ConfigError
        where that cannot be."""
        for slot in self.slots:
            self._recover(slot, "")
        while sum(slot.up for slot in self.slots) < at_least:
            recoveries = [slot.recovery for slot in self.slots if slot.recovery]
            await asyncio.wait(recoveries, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            troubles = [slot.trouble for slot in self.slots if slot.trouble]
            if self.broken or len(self.slots) - len(troubles) < at_least:
                raise self.broken or troubles[-1]

    async def watch(self) -> None:
        """Ask every replica for its health, for ever. Replaces one that does not answer, or is busy without progress,
        for `stall` seconds."""
        await asyncio.gather(*(self._watch(slot) for slot in self.slots))

    async def refresh(self) -> None:
        """Ask the replicas that are up for their counts now; those that do not answer keep the last ones."""

        async def ask(slot: Slot) -> None:
            epoch = slot.epoch
            with suppress(Exception):
                counts = dict(await asyncio.wait_for(slot.replica.health(), 10.0))
                if slot.epoch == epoch:
                    slot.counts = {name: value for name, value in counts.items() if name not in _SIGNS}

        await asyncio.gather(*(ask(slot) for slot in self.slots if slot.up))

    def counts(self) -> dict[str, float]:
        """The replicas' counts, summed over all their processes."""
        total: dict[str, float] = {}
        for slot in self.slots:
            for counts in (slot.before, slot.counts):
                for name, value in counts.items():
                    total[name] = total.get(name, 0) + value
        return total

    def oldest(self) -> list[tuple[Slot, Call]]:
        """The calls that are at replicas, longest first."""
        calls = [(slot, call) for slot in self.slots for call in slot.calls.values()]
        return sorted(calls, key=lambda pair: pair[1].since)

    def restart(self, slot: Slot, epoch: int, why: str, sacrificed: bool = False) -> None:
        """Replace a slot's process, unless that has happened since `epoch`. Its calls end at once."""
        if slot.epoch != epoch:
            return
        slot.epoch, slot.sacrificed = slot.epoch + 1, sacrificed
        slot.barren += not sacrificed
        self.restarts += 1
        log.warning("%s: %s; replacing it, %d calls repeat", slot.replica.name, why.rstrip("."), len(slot.calls))
        self.event("restart", slot.replica.name)
        now = asyncio.get_running_loop().time()
        for call in slot.calls.values():  # a frozen machine would let them wait for ever
            if not call.deadline.expired():
                call.deadline.reschedule(now)
        for name, value in slot.counts.items():
            slot.before[name] = slot.before.get(name, 0) + value
        slot.counts = {}
        self._recover(slot, why)

    def _recover(self, slot: Slot, why: str) -> None:
        if slot.recovery is not None:
            slot.recovery.cancel()

        async def recover() -> None:
            began = asyncio.get_running_loop().time()
            for tries in itertools.count(1):
                try:
                    if stormy := slot.barren > 2 * self.retries + 2:
                        slot.barren = 0
                        raise Fault(f"{slot.replica.name} died again and again without an answer: {why}")
                    await slot.replica.restart(why)
                    break
                except Fault as error:
                    late = asyncio.get_running_loop().time() - began >= self.patience
                    if stormy or late or tries > self.retries:
                        if slot.trouble is None:
                            self.event("gave_up", slot.replica.name)
                        slot.trouble = error
                        if all(other.trouble for other in self.slots):
                            return self._break(error)
                    wait = _BACKOFF[1] if slot.trouble else min(_BACKOFF[0] * 2 ** (tries - 1), _BACKOFF[1])
                    log.warning("%s; trying again in %g s", error, wait)
                    await asyncio.sleep(wait)
                except Exception as error:  # a model that cannot be used, or a bug: another try would fail too
                    return self._break(error)
            slot.recovery = slot.trouble = None
            slot.used = False
            self.on_up(slot)

        slot.recovery = asyncio.ensure_future(recover())

    def _break(self, error: BaseException) -> None:
        self.broken = error
        self.on_broken(error)

    async def _watch(self, slot: Slot) -> None:
        loop = asyncio.get_running_loop()
        mark, since = (-1, -1.0), loop.time()
        while True:
            await asyncio.sleep(min(self.stall / 4, 5.0))
            epoch = slot.epoch
            if not slot.up:
                continue
            try:
                counts = dict(await asyncio.wait_for(slot.replica.health(), self.stall))
            except TimeoutError:
                why = f"no sign of life for {self.stall:g} s"
            except Exception as error:  # it died while nobody called it
                why = reason(cause(error))
            else:
                now = (epoch, counts["progress"])
                if not counts["busy"] or now != mark:
                    mark, since = now, loop.time()
                if slot.epoch == epoch:
                    slot.counts = {name: value for name, value in counts.items() if name not in _SIGNS}
                if loop.time() - since < self.stall:
                    continue
                why = f"busy, and no progress for {self.stall:g} s"
            if slot.epoch == epoch:
                self.event("stall", slot.replica.name)
                self.restart(slot, epoch, why)


def cause(error: BaseException) -> BaseException:
    """What the callee raised, where Ray wrapped it; else the error itself."""
    found: BaseException = getattr(error, "cause", None) or error
    return found
