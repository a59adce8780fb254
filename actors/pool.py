"""Calls to replicas that may die, hang or be slow. Owns the difference between a fault and an answer:

- a fault of the infrastructure (a dead, frozen or stalled process) replaces the process and repeats the call wherever
  there is room. A call that saw more than `retries` faults is tried alone: if processes die of it again and again, and
  answer others, it becomes RowError; else the run ends with Fault, and what is committed stays;
- an error that the callee raised itself is repeated once, alone in a fresh process; if it comes again it is about this
  prompt, and becomes RowError. So does a reward's timeout (`timeout_is_content`).

Plain asyncio; knows Ray only through the replicas it is given.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from actors.fleet import Call, Fault, Fleet, Replica, Slot, say
from aisp_dist.align import RowError

log = logging.getLogger("aisp")


class _Failed(Exception):
    """A try that gave no answer; its process has been replaced. content: the callee itself raised, or may have hung, on
    this call. counts: False where the process was replaced for another call's error."""

    def __init__(self, reason: str, content: bool = False, counts: bool = True) -> None:
        super().__init__(reason)
        self.content, self.counts = content, counts


class _Away(Exception):
    """The one slot that will do did not come back in time."""


class _Waiter(NamedTuple):
    turn: asyncio.Future[Slot]
    home: str
    only: Slot | None


class Pool:
    """Replicas of one kind.

    limit: calls a replica is given at a time; more wait here, outside the timeout. timeout: seconds for an answer;
    stall, patience: see Fleet.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        limit: int,
        timeout: float,
        retries: int,
        is_fault: Callable[[BaseException], bool],
        timeout_is_content: bool = False,
        stall: float = 60.0,
        patience: float = 1800.0,
    ) -> None:
        self.fleet = Fleet(
            replicas, retries=retries, stall=stall, patience=patience, up=self._hand_out, broken=self._give_up
        )
        self.limit, self.timeout, self.retries = limit, timeout, retries
        self.is_fault, self.timeout_is_content = is_fault, timeout_is_content
        self.waiting: deque[_Waiter] = deque()
        self.home: dict[str, Slot] = {}  # where a prompt's prefix and control are warm; a preference, not a rule
        self.isolation = asyncio.Lock()  # one call at a time has a replica for itself
        self.answers = 0
        self.canary: tuple[Any, ...] | None = None  # the last call that was answered
        self.repeats = 0
        self._numbers = itertools.count()

    async def call(self, home: str, method: str, *args: Any) -> Any:
        """The method's answer from some replica, preferably the one that served `home` before.

        Raises RowError where a fresh process reproduces the error, Fault after too many infrastructure faults.
        """
        faults = 0
        while faults <= self.retries:
            try:
                async with self._slot(home) as slot:
                    return await self._try(slot, home, method, *args)
            except _Failed as error:
                failed = error
            self._repeats(slot, home, method, failed)
            if failed.content:
                try:
                    async with self._alone(home, slot) as slot:
                        return await self._try(slot, home, method, *args)
                except _Failed as error:
                    if error.content:
                        what = f"{method} on {slot.replica.name}, again in a fresh process"
                        raise RowError(f"{what}: {error}") from None
                    failed = error
                self._repeats(slot, home, method, failed)
            faults += failed.counts
        return await self._last_tries(slot, home, method, *args)

    async def _last_tries(self, slot: Slot, home: str, method: str, *args: Any) -> Any:
        """Each alone in a fresh process. It is the call that kills it where another process then answers what was
        answered before; if not, it is the infrastructure."""
        for _ in range(self.retries + 1):
            try:
                async with self._alone(home, slot) as slot:
                    return await self._try(slot, home, method, *args)
            except _Failed as error:
                reason = str(error)
            what = f"{method} of {home} on {slot.replica.name} failed more than runtime.retries = {self.retries} times"
            try:
                if self.canary is None:
                    raise _Failed("nothing was ever answered")
                async with self._alone(home, slot) as slot:
                    await self._try(slot, *self.canary)
            except _Failed:
                raise Fault(f"{what}, and nothing else succeeds there; the last: {reason}") from None
        raise RowError(f"{what}, alone in a fresh process that answers other calls: {reason}")

    def forget(self, home: str) -> None:
        if (slot := self.home.pop(home, None)) is not None:
            slot.homes -= 1

    async def _try(self, slot: Slot, home: str, method: str, *args: Any) -> Any:
        """One call in a slot that this task holds. Raises _Failed, the slot's process then being replaced."""
        epoch, number, slot.used = slot.epoch, next(self._numbers), True
        try:
            async with asyncio.timeout(self.timeout) as deadline:
                slot.calls[number] = Call(home, method, asyncio.get_running_loop().time(), deadline)
                answer = await slot.replica.call(method, *args)
        except Exception as error:
            del slot.calls[number]
            if slot.epoch != epoch:  # whatever it says, the process was taken from under it
                raise _Failed("its process was replaced", counts=not slot.sacrificed) from None
            late = deadline.expired()
            content = self.timeout_is_content if late else not self.is_fault(error)
            reason = f"no answer within {self.timeout:g} s" if late else say(error)
            self.fleet.restart(slot, epoch, reason, sacrificed=content)
            raise _Failed(reason, content) from None
        finally:
            slot.calls.pop(number, None)
        self.answers += 1
        self.canary = (home, method, *args)
        slot.barren = 0
        return answer

    def _repeats(self, slot: Slot, home: str, method: str, failed: _Failed) -> None:
        log.info("%s of %s is repeated: %s on %s", method, home, failed, slot.replica.name)
        self.repeats += 1
        self.fleet.event("retry", slot.replica.name)

    @asynccontextmanager
    async def _slot(self, home: str) -> AsyncIterator[Slot]:
        """A replica with room, first come first served."""
        slot = await self._take(home)
        try:
            yield slot
        finally:
            self._release(slot)

    @asynccontextmanager
    async def _alone(self, home: str, slot: Slot) -> AsyncIterator[Slot]:
        """That replica, fresh and with nobody else in it; or another, where that one does not come back."""
        async with self.isolation:
            try:
                while True:
                    slot.alone = True
                    if slot.up and slot.used:
                        self.fleet.restart(slot, slot.epoch, "a fresh process is wanted", sacrificed=True)
                    try:
                        await self._take(home, slot)
                        break
                    except _Away:
                        others = [s for s in self.fleet.slots if s.up and s is not slot]
                        if not others:
                            what = f"{slot.replica.name} did not come back within {self.fleet.patience:g} s"
                            raise Fault(what) from None
                        slot.alone, slot = False, others[0]
                try:
                    yield slot
                finally:
                    slot.alone = False
                    self._release(slot)
            finally:
                slot.alone = False
                self._hand_out(slot)

    async def _take(self, home: str, only: Slot | None = None) -> Slot:
        """Hold a place in a slot. Raises _Away where `only` that one will do and it stays away."""
        while True:
            if self.fleet.broken:
                raise self.fleet.broken
            slot = only or self._choose(home)
            if slot is not None and self._open(slot, only):
                return self._give(slot, home)
            waiter = _Waiter(asyncio.get_running_loop().create_future(), home, only)
            self.waiting.append(waiter)
            try:
                await asyncio.wait({waiter.turn}, timeout=self.fleet.patience if only else None)
            except asyncio.CancelledError:
                if waiter.turn.done() and not waiter.turn.exception():
                    self._release(waiter.turn.result())
                raise
            finally:
                if waiter in self.waiting:
                    self.waiting.remove(waiter)
            if not waiter.turn.done():
                raise _Away
            slot = waiter.turn.result()
            if slot.up:
                return slot
            self._release(slot)  # it went away in the moment between

    def _choose(self, home: str) -> Slot | None:
        """Where the prompt is warm, else where the fewest are at home."""
        warm = self.home.get(home)
        if warm is not None and self._open(warm, None):
            return warm
        return min((s for s in self.fleet.slots if self._open(s, None)), key=lambda s: (s.homes, s.held), default=None)

    def _open(self, slot: Slot, only: Slot | None) -> bool:
        if not slot.up:
            return False
        if slot.alone:
            return only is slot and not slot.held
        return slot.held < self.limit

    def _give(self, slot: Slot, home: str) -> Slot:
        if self.home.get(home) is not slot:
            self.forget(home)
            self.home[home] = slot
            slot.homes += 1
        slot.held += 1
        return slot

    def _release(self, slot: Slot) -> None:
        slot.held -= 1
        self._hand_out(slot)

    def _hand_out(self, slot: Slot) -> None:
        """Room has come up: to those who wait, in their order."""
        for waiter in list(self.waiting) if self.waiting and slot.up else ():
            if not self._open(slot, slot):
                return
            if waiter.only in (None, slot) and self._open(slot, waiter.only):
                self.waiting.remove(waiter)
                if not waiter.turn.done():
                    waiter.turn.set_result(self._give(slot, waiter.home))

    def _give_up(self, error: BaseException) -> None:
        while self.waiting:
            waiter = self.waiting.popleft()
            if not waiter.turn.done():
                waiter.turn.set_exception(error)
