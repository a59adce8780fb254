"""Calls to replicas that may die, hang or be slow. Owns the difference between a fault and an answer:

- a fault of the infrastructure (a dead or stalled process) restarts the replica and repeats the call, elsewhere if it
  can; after `retries` repeats the run ends with Fault, and what is committed stays;
- an error that the callee raised itself is repeated once in a fresh process; if it comes again it is about this prompt,
  and becomes RowError. So does a reward's timeout (`timeout_is_content`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aisp_dist.align import RowError

log = logging.getLogger("aisp")


class Fault(Exception):
    """The infrastructure failed more often than runtime.retries allows. The run ends; the same command resumes it."""


class Replica(Protocol):
    """A handle to one process: `call` awaits a method's answer, `restart` replaces the process and awaits its start."""

    name: str

    def call(self, method: str, *args: Any) -> Awaitable[Any]: ...

    async def restart(self, reason: str) -> None: ...


@dataclass
class Slot:
    replica: Replica
    in_flight: int = 0
    epoch: int = 0  # restarts so far; a fault seen by several calls restarts the process once
    sacrificed: bool = False  # restarted for one call's own error: the others in flight are not to blame
    recovery: asyncio.Task[None] | None = None


class Pool:
    """Replicas of one kind. `limit`: calls a replica is given at a time; more wait here, outside the timeout."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        limit: int,
        timeout: float,
        retries: int,
        is_fault: Callable[[BaseException], bool],
        timeout_is_content: bool = False,
    ) -> None:
        self.slots = [Slot(replica) for replica in replicas]
        self.limit, self.timeout, self.retries = limit, timeout, retries
        self.is_fault, self.timeout_is_content = is_fault, timeout_is_content
        self.free = asyncio.Condition()
        self.home: dict[str, Slot] = {}  # where a prompt's prefix and control are warm; a preference, not a rule
        self.restarts = 0
        self.repeats = 0

    async def call(self, home: str, method: str, *args: Any) -> Any:
        """The method's answer from some replica, preferably the one that served `home` before.

        Raises RowError where a fresh process reproduces the error, Fault after too many infrastructure faults.
        """
        faults, errors = 0, 0
        avoid = fresh = None  # a slot not to go to again; the one slot that may judge an error, once restarted
        while True:
            slot = await self._take(home, avoid, fresh)
            epoch = slot.epoch
            try:
                return await asyncio.wait_for(slot.replica.call(method, *args), self.timeout)
            except Exception as error:
                timed_out = isinstance(error, TimeoutError)
                content = self.timeout_is_content if timed_out else not self.is_fault(error)
                reason = f"no answer within {self.timeout:g} s" if timed_out else _say(error)
                blameless = slot.epoch != epoch and slot.sacrificed
                faults, errors = faults + (not content and not blameless), errors + content
                if errors > 1:
                    if timed_out:  # the process still hangs on it
                        self._restart(slot, epoch, reason, sacrificed=True)
                    raise RowError(f"{method} on {slot.replica.name}, again in a fresh process: {reason}") from None
                if faults > self.retries:
                    raise Fault(
                        f"{method} on {slot.replica.name} failed {faults} times, more than runtime.retries = "
                        f"{self.retries}; the last: {reason}"
                    ) from None
                log.warning("%s: %s; restarting it and repeating %s of %s", slot.replica.name, reason, method, home)
                self.repeats += 1
                self._restart(slot, epoch, reason, sacrificed=content)
                avoid, fresh = (None, slot) if content else (slot, None)
            finally:
                await self._give(slot)

    def forget(self, home: str) -> None:
        self.home.pop(home, None)

    async def _take(self, home: str, avoid: Slot | None, only: Slot | None) -> Slot:
        async with self.free:
            while True:
                open_ = [s for s in self.slots if s.in_flight < self.limit and s.recovery is None]
                for s in self.slots:
                    if s.recovery and s.recovery.done():
                        s.recovery.result()  # raises: a replica that cannot be replaced ends the run
                if only is not None:
                    open_ = [s for s in open_ if s is only]
                if open_:
                    warm = self.home.get(home)
                    elsewhere = [s for s in open_ if s is not avoid] or open_
                    slot = warm if warm in elsewhere else min(elsewhere, key=lambda s: s.in_flight)
                    self.home[home] = slot
                    slot.in_flight += 1
                    return slot
                await self.free.wait()

    async def _give(self, slot: Slot) -> None:
        async with self.free:
            slot.in_flight -= 1
            self.free.notify_all()

    def _restart(self, slot: Slot, epoch: int, reason: str, sacrificed: bool) -> None:
        if slot.epoch != epoch:
            return
        slot.epoch, slot.sacrificed = slot.epoch + 1, sacrificed
        self.restarts += 1

        async def recover() -> None:
            try:
                await slot.replica.restart(reason)
                slot.recovery = None
            finally:
                async with self.free:
                    self.free.notify_all()

        slot.recovery = asyncio.ensure_future(recover())


def _say(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}".splitlines()[0][:500]
