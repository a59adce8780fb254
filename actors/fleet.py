"""The processes behind a pool: started, asked for signs of life, replaced. Knows nothing of what they are asked to do.

A process that cannot be replaced (its machine is gone, say) is tried for again while others work; the fleet is broken
when none is left. Plain asyncio; knows Ray only through the replicas it is given.
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

_BACKOFF = (1.0, 60.0)  # seconds before another try to start a process: the first, and at most
_SIGNS = ("progress", "busy")


class Fault(Exception):
    """The infrastructure failed more often than runtime.retries allows. The run ends; the same command resumes it."""


class Replica(Protocol):
    """A handle to one process. `health` answers beside a running call: `progress`, a counter that stands still only
    while nothing is done, `busy`, whether there is anything to do, and figures that grow, such as `busy_seconds`."""

    name: str

    def call(self, method: str, *args: Any) -> Awaitable[Any]: ...

    def health(self) -> Awaitable[Mapping[str, float]]: ...

    async def restart(self, reason: str) -> None:
        """Replace the process and await its start. Raises Fault where that fails, ConfigError where it always will."""


class Call(NamedTuple):
    """What is at a replica now. since: the loop's time, seconds."""

    home: str
    method: str
    since: float
    deadline: asyncio.Timeout


@dataclass(eq=False)
class Slot:
    replica: Replica
    calls: dict[int, Call] = field(default_factory=dict)
    held: int = 0  # places in it that are given away
    used: bool = False  # something was asked of this process
    homes: int = 0  # prompts that are warm here
    epoch: int = 0  # restarts so far; a fault seen by several calls restarts the process once
    sacrificed: bool = False  # restarted for one call's own error: the others in flight are not to blame
    barren: int = 0  # restarts since the last answer
    alone: bool = False  # kept for one call
    recovery: asyncio.Task[None] | None = None
    trouble: Exception | None = None  # why it stays away
    figures: dict[str, float] = field(default_factory=dict)  # of the process's health
    before: dict[str, float] = field(default_factory=dict)  # figures of the processes that it replaced, summed

    @property
    def up(self) -> bool:
        return self.recovery is None


class Fleet:
    """stall: seconds without a sign of life or progress after which a process is replaced; patience: seconds for one to
    come up. up, broken: called when a slot has a fresh process, and when nothing is left. event: told of each restart
    and stall, with the replica's name."""

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
        """Start every replica; returns when so many are up, while the others are still awaited. Raises Fault or
        ConfigError where that cannot be."""
        for slot in self.slots:
            self._recover(slot, "")
        while sum(slot.up for slot in self.slots) < at_least:
            recoveries = [slot.recovery for slot in self.slots if slot.recovery]
            await asyncio.wait(recoveries, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            troubles = [slot.trouble for slot in self.slots if slot.trouble]
            if self.broken or len(self.slots) - len(troubles) < at_least:
                raise self.broken or troubles[-1]

    async def watch(self) -> None:
        """Ask every replica for its health for ever; replace those that do not answer, or do nothing, for `stall` s."""
        await asyncio.gather(*(self._watch(slot) for slot in self.slots))

    async def refresh(self) -> None:
        """Ask the replicas that are up for their figures now; those that do not answer keep the last ones."""

        async def ask(slot: Slot) -> None:
            epoch = slot.epoch
            with suppress(Exception):
                figures = dict(await asyncio.wait_for(slot.replica.health(), 10.0))
                if slot.epoch == epoch:
                    slot.figures = {name: value for name, value in figures.items() if name not in _SIGNS}

        await asyncio.gather(*(ask(slot) for slot in self.slots if slot.up))

    def figures(self) -> dict[str, float]:
        """The replicas' figures, summed over all their processes."""
        total: dict[str, float] = {}
        for slot in self.slots:
            for figures in (slot.before, slot.figures):
                for name, value in figures.items():
                    total[name] = total.get(name, 0) + value
        return total

    def oldest(self) -> list[tuple[Slot, Call]]:
        """The calls that are at replicas, longest first."""
        calls = [(slot, call) for slot in self.slots for call in slot.calls.values()]
        return sorted(calls, key=lambda pair: pair[1].since)

    def restart(self, slot: Slot, epoch: int, reason: str, sacrificed: bool = False) -> None:
        """Replace a slot's process, unless that has happened since `epoch`. Its calls end at once."""
        if slot.epoch != epoch:
            return
        slot.epoch, slot.sacrificed = slot.epoch + 1, sacrificed
        slot.barren += not sacrificed
        self.restarts += 1
        log.warning("%s: %s; replacing it, %d calls repeat", slot.replica.name, reason.rstrip("."), len(slot.calls))
        self.event("restart", slot.replica.name)
        now = asyncio.get_running_loop().time()
        for call in slot.calls.values():  # a frozen machine would let them wait for their whole timeout
            if not call.deadline.expired():
                call.deadline.reschedule(now)
        for name, value in slot.figures.items():
            slot.before[name] = slot.before.get(name, 0) + value
        slot.figures = {}
        self._recover(slot, reason)

    def _recover(self, slot: Slot, reason: str) -> None:
        if slot.recovery is not None:
            slot.recovery.cancel()

        async def recover() -> None:
            began = asyncio.get_running_loop().time()
            for tries in itertools.count(1):
                try:
                    if stormy := slot.barren > 2 * self.retries + 2:
                        slot.barren = 0
                        raise Fault(f"{slot.replica.name} died again and again without an answer: {reason}")
                    await slot.replica.restart(reason)
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
                except Exception as error:  # a model that cannot be used, or a mistake of ours: no try will mend it
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
                figures = dict(await asyncio.wait_for(slot.replica.health(), self.stall))
            except TimeoutError:
                reason = f"no sign of life for {self.stall:g} s"
            except Exception as error:  # it died while nobody called it
                reason = say(error)
            else:
                now = (epoch, figures["progress"])
                if not figures["busy"] or now != mark:
                    mark, since = now, loop.time()
                if slot.epoch == epoch:
                    slot.figures = {name: value for name, value in figures.items() if name not in _SIGNS}
                if loop.time() - since < self.stall:
                    continue
                reason = f"busy, and no progress for {self.stall:g} s"
            if slot.epoch == epoch:
                self.event("stall", slot.replica.name)
                self.restart(slot, epoch, reason)


def say(error: BaseException) -> str:
    """One line about an error, or about its cause where Ray wrapped it."""
    return reason(getattr(error, "cause", None) or error)
